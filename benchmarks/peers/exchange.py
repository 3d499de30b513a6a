"""What a peer is given, what it gives back, and the one way in which that is counted.

A peer's script runs in the peer's own environment, as
`python -m benchmarks.peers.PEER QUESTION ANSWER`. It reads the folder QUESTION (see `read`) and
writes into the folder ANSWER the dequantized weights of each candidate and, in answer.json, their
counts, the seconds of the search, and notes on what failed.
"""

import copy
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantifind.utils import plugins

Batches = list[tuple[Tensor, Tensor]]
BATCH = 128


@dataclass(frozen=True)
class Question:
    """A network in eval mode on the CPU; batches of training examples to calibrate with, and the
    validation examples to choose by. Test examples are not in it."""

    network: nn.Module
    calibration: Batches
    validation: Batches

    def layers(self) -> dict[str, nn.Module]:
        """A copy of each module that has a weight, by its name, in the order of the pass."""
        modules = copy.deepcopy(self.network).named_modules()
        return {name: module for name, module in modules if hasattr(module, "weight")}


@dataclass(frozen=True)
class OnGrid:
    """A weight as its peer dequantizes it.

    values: in the shape of the weight. bits: of a code; of 3 levels they are log2 of 3.
    blocks: the same values in parts, (blocks, elements) each, whose rows share a scale and a zero
    point. scales, zero_points: how many of them, and the bits of each, as the peer stores them.
    """

    values: Tensor
    bits: float
    blocks: Sequence[Tensor]
    scales: tuple[int, int]
    zero_points: tuple[int, int] = (0, 0)

    @property
    def levels(self) -> int:
        """The most distinct values in a row."""
        steps = [block.sort(dim=1).values.diff(dim=1) for block in self.blocks]
        return 1 + max(int((step != 0).sum(1).max()) for step in steps)

    @property
    def counts(self) -> dict[str, tuple[int, float]]:
        """Numbers of codes, scales and zero points, and the bits of each."""
        assert sum(block.numel() for block in self.blocks) == self.values.numel()
        codes = (self.values.numel(), self.bits)
        return {"codes": codes, "scales": self.scales, "zero points": self.zero_points}

    @property
    def total_bits(self) -> float:
        return sum(count * bits for count, bits in self.counts.values())


@dataclass(frozen=True)
class Decoded:
    """A parameter as it is decoded from a peer's bitstream, whose bytes its candidate states."""

    values: Tensor

    @property
    def counts(self) -> dict[str, tuple[int, float]]:
        return {}


@dataclass(frozen=True)
class Candidate:
    """A network found: its parameters that are on a grid, or in a bitstream of ``stream_bytes``,
    by name. All others stay in float32."""

    name: str
    weights: Mapping[str, OnGrid | Decoded]
    stream_bytes: int = 0

    @property
    def counts(self) -> dict[str, dict[str, tuple[int, float]]]:
        """By name, and of the bitstream as a whole."""
        assert self.stream_bytes or not any(isinstance(w, Decoded) for w in self.weights.values())
        whole = {"bitstream": {"bytes": (self.stream_bytes, 8.0)}} if self.stream_bytes else {}
        return {name: weight.counts for name, weight in self.weights.items()} | whole


@dataclass(frozen=True)
class Failure:
    """A setting that gave no network, and why."""

    name: str
    reason: str


Search = Callable[[Question], Iterator[Candidate | Failure]]


def rows(values: Tensor, group: int | None = None) -> list[Tensor]:
    """A weight in blocks, a scale per output channel, or per ``group`` elements within it."""
    channels = values.detach().flatten(1)
    return list(channels.split(group or channels.shape[1], dim=1))


def stored(parameters: Tensor) -> tuple[int, int]:
    """How many scales or zero points a tensor holds, and the bits of each."""
    return parameters.numel(), 8 * parameters.element_size()


def mean_loss(network: nn.Module, batches: Batches) -> float:
    """The mean cross entropy per example."""
    with torch.inference_mode():
        losses = [
            nn.functional.cross_entropy(network(images), labels, reduction="sum").item()
            for images, labels in batches
        ]
    return sum(losses) / sum(len(labels) for _, labels in batches)


def write(
    folder: Path,
    network: nn.Module,
    *,
    created_by: Mapping[str, object],
    calibration: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
) -> None:
    """Lay down a question. created_by: what `created` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "network.json").write_text(json.dumps(created_by), encoding="utf-8")
    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    for name, (images, labels) in {"calibration": calibration, "validation": validation}.items():
        examples = {"images": images.contiguous(), "labels": labels.contiguous()}
        save_file(examples, folder / f"{name}.safetensors")


def read(folder: Path) -> Question:
    """What `write` laid down."""
    network = created(**json.loads((folder / "network.json").read_text(encoding="utf-8")))
    network.load_state_dict(load_file(folder / "weights.safetensors"))

    def batches(name: str) -> Batches:
        examples = load_file(folder / f"{name}.safetensors")
        parts = (examples[key].split(BATCH) for key in ("images", "labels"))
        return list(zip(*parts, strict=True))

    return Question(network.eval(), batches("calibration"), batches("validation"))


def created(network: str, options: Mapping[str, Any]) -> nn.Module:
    """A network before training, of the project's plug-ins or of torchvision."""
    if network in plugins.names("models"):
        made: nn.Module = plugins.load("models", network, "create_model_context")(**options)[0]
        return made
    return torchvision.models.get_model(network, **options)


def answer(search: Search) -> None:
    """Run a peer's search on the question of the command line and write what it found.

    Only the search is timed. A candidate with more levels than its bits can tell apart is left out,
    and said so; an error ends the search, and what came before it counts.
    """
    question, folder = read(Path(sys.argv[1])), Path(sys.argv[2])
    torch.manual_seed(0)
    found: list[Candidate | Failure] = []
    started = time.process_time()
    try:
        for one in search(question):
            found.append(one)
            print(f"{time.process_time() - started:.1f} s: {one.name}", flush=True)
    except Exception as error:
        traceback.print_exc()
        found.append(Failure("the search", f"{type(error).__name__}: {error}"))
    seconds = time.process_time() - started

    candidates, notes = {}, []
    for place, one in enumerate(found):
        if isinstance(one, Candidate) and (reason := off_grid(one)):
            one = Failure(one.name, reason)
        if isinstance(one, Failure):
            notes.append(f"{one.name}: {' '.join(one.reason.split())}")
            continue
        assert one.name not in candidates, f"{one.name} twice"
        file = f"{place}.safetensors"
        values = {name: w.values.detach().float() for name, w in one.weights.items()}
        save_file({name: v.contiguous() for name, v in values.items()}, folder / file)
        candidates[one.name] = {"file": file, "counts": one.counts}
    result = {"seconds": seconds, "notes": notes, "candidates": candidates}
    (folder / "answer.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def off_grid(candidate: Candidate) -> str | None:
    """Why a candidate's values can't be what its codes decode to, if so."""
    for name, weight in candidate.weights.items():
        if not weight.values.isfinite().all():
            return f"{name} is not finite"
        if isinstance(weight, Decoded):
            continue
        allowed = round(2**weight.bits)
        if (levels := weight.levels) > allowed:
            return f"{name} has {levels} levels for a scale, {allowed} fit its bits"
    return None


def mean_bits(counts: Mapping[str, Mapping[str, tuple[int, float]]], network: nn.Module) -> float:
    """Bits per parameter: codes, scales and zero points, the bytes of a bitstream, and 32 for each
    value left in float32."""
    parameters = {name: value.numel() for name, value in network.named_parameters()}
    stored = sum(count * bits for parts in counts.values() for count, bits in parts.values())
    left = sum(count for name, count in parameters.items() if name not in counts)
    total = (stored + 32 * left) / sum(parameters.values())
    assert math.isfinite(total)
    return total
