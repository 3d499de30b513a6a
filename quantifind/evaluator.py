"""Losses of a network's quantized versions on one split: one working copy whose tensors are swapped
in place, in the layout and batch size that this machine runs fastest."""

import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir
from torch import Tensor, nn

from quantifind.activations import QuantizedActivations
from quantifind.metrics import Criterion, evaluating, outcome, outcome_of
from quantifind.pooling import pool_first
from quantifind.products import own_tensors
from quantifind.quantized import QuantizedTensor
from quantifind.store import fingerprint
from quantifind.strategy import Quantized, plain_copy, put_values
from quantifind.tape import NotRepeatable, Tape
from quantifind.utils import console, device_of

# sizes of batches that are tried, the large ones on a GPU; with few examples, the first is taken
BATCHES = (64, 32, 128, 512, 2048)
LARGE = (8192, 32768)
# examples that are timed at least, and how often; what takes longer than the fastest so far by this
# factor is not timed again
TIMED, ROUNDS, SLOWER = 512, 4, 1.2
# bytes of activations that are kept at a time while one tensor after another is changed
MEMORY = 256 * 2**20
# between a pass that goes on from where a tensor changed and a whole one, of the largest output
TOLERANCE = 1e-5
REMEMBERED = Path(user_cache_dir("quantifind")) / "layouts.json"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
Batches = list[tuple[Tensor, Tensor]]
Outcome = dict[str, Tensor]


class Evaluator:
    """A network's outputs and losses on one split, with any of its tensors on few levels.

    loader: batches (inputs, targets), read once, in one order. Inputs all of one shape are put into
        batches of another size; others stay in the loader's own.
    The network that is given stays as it is. Float32 results are those of a plain loop within 1e-5;
    which layout and batch size are the fastest is timed once per machine, network and shape of an
    example, and remembered in the user's cache folder.
    Errors: ValueError for a loader without examples.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Any], criterion: Criterion) -> None:
        _keep_freed_memory()
        self.given: Batches = [(inputs, targets) for inputs, targets in loader]
        if not self.given:
            raise ValueError("the loader has no examples")
        self.criterion = criterion
        self.work = plain_copy(model).eval()
        pool_first(self.work)
        self.device = device_of(self.work)
        self.values = {name: tensor.clone() for name, tensor in _own(self.work).items()}
        self.changed: set[str] = set()
        # tensors of which a pass that goes on from them was compared with a whole one
        self.compared: set[str] = set()
        self.repeatable = True
        self.layout, self.batch = CONTIGUOUS, 0
        self.inputs = self.targets = torch.empty(0)
        if len({(inputs.shape[1:], targets.shape[1:]) for inputs, targets in self.given}) == 1:
            self.inputs, self.targets = (torch.cat(part) for part in zip(*self.given, strict=True))
            self.given = []
            self._lay_out(*_fastest(self.work, self.inputs))

    @property
    def examples(self) -> int:
        return len(self.inputs) or sum(len(inputs) for inputs, _ in self.given)

    def _lay_out(self, layout: str, batch: int) -> None:
        self.layout, self.batch = layout, batch
        _to_layout(self.work, layout)
        self.inputs = _on(self.device, _in_layout(self.inputs, layout))
        self.targets = _on(self.device, self.targets)

    def batches(self, first: int = 0, last: int | None = None) -> Batches:
        """Batches (inputs, targets) of a span of the examples, by default all; a span only of
        examples that are alike in shape."""
        if self.given:
            return self.given
        last = self.examples if last is None else last
        spans = [(i, min(i + self.batch, last)) for i in range(first, last, self.batch)]
        return [(self.inputs[i:j], self.targets[i:j]) for i, j in spans]

    def outcome(
        self,
        quantized: Quantized | None = None,
        first: int = 0,
        last: int | None = None,
        *,
        change_inputs: Callable[[Tensor], Tensor] | None = None,
    ) -> Outcome:
        """The `quantifind.metrics.outcome` of a span of the examples, with tensors and activations
        on levels, and what is not named in float.

        change_inputs: takes each batch's inputs, and returns what the network is given instead.
        """
        quantized = quantized or Quantized({})
        self._put(quantized.tensors)
        net: nn.Module = self.work
        if quantized.activations:
            net = QuantizedActivations(self.work, quantized.activations)

        def run() -> Outcome:
            batches = self.batches(first, last)
            if change_inputs is not None:
                batches = [(change_inputs(inputs), targets) for inputs, targets in batches]
            return outcome(net, batches, self.criterion)

        return self._guarded(run)

    def alone(
        self, parts: Sequence[tuple[str, QuantizedTensor]], first: int = 0, last: int | None = None
    ) -> list[Outcome]:
        """For each of (name, quantized tensor) the outcome with this one on its levels, the rest in
        float. What a pass computes before it meets the tensor is computed once for all of them."""
        if self.repeatable:
            try:
                return self._guarded(lambda: self._going_on(parts, first, last))
            except (NotRepeatable, RuntimeError) as error:
                self.repeatable = False
                console.print(f"Each pass is a whole one: {_reason(error)}", markup=False)
        return [self.outcome(Quantized({name: part}), first, last) for name, part in parts]

    def _going_on(
        self, parts: Sequence[tuple[str, QuantizedTensor]], first: int, last: int | None
    ) -> list[Outcome]:
        names = list(dict.fromkeys(name for name, _ in parts))
        self._put({})
        outputs: list[list[Tensor]] = [[] for _ in parts]
        batches = self.batches(first, last)
        with evaluating(self.work):
            probe = Tape(self.work, batches[0][0].to(self.device), names)
            if probe.memory_bytes > MEMORY and len(names) > 1:
                half = set(names[: len(names) // 2])
                found: dict[int, Outcome] = {}
                for here in (True, False):
                    chosen = [i for i, (name, _) in enumerate(parts) if (name in half) == here]
                    some = self._going_on([parts[i] for i in chosen], first, last)
                    found.update(zip(chosen, some, strict=True))
                return [found[i] for i in range(len(parts))]
            self._compare(probe, batches[0][0].to(self.device), parts)
            for tapes in self._chunks(batches, names):
                for (name, part), collected in zip(parts, outputs, strict=True):
                    value = self._value(name, part)
                    collected += [tape.outputs(name, value) for tape in tapes]
            targets = torch.cat([targets for _, targets in batches]).to(self.device)
            return [outcome_of(torch.cat(one), targets, self.criterion) for one in outputs]

    def _chunks(self, batches: Batches, names: Sequence[str]) -> Iterator[list[Tape]]:
        tapes: list[Tape] = []
        for inputs, _ in batches:
            tapes.append(Tape(self.work, inputs.to(self.device), names))
            if sum(tape.memory_bytes for tape in tapes) + tapes[-1].memory_bytes > MEMORY:
                yield tapes
                tapes = []
        if tapes:
            yield tapes

    def _compare(
        self, tape: Tape, inputs: Tensor, parts: Sequence[tuple[str, QuantizedTensor]]
    ) -> None:
        for name, part in dict(reversed(parts)).items():
            if name in self.compared:
                continue
            found = tape.outputs(name, self._value(name, part))
            self._put({name: part})
            whole = self.work(inputs)
            self._put({})
            error = (found - whole).abs().max().item()
            if not error <= TOLERANCE * whole.abs().max().item():
                raise NotRepeatable(f"going on from {name} gives other outputs, by up to {error:g}")
            self.compared.add(name)

    def _value(self, name: str, part: QuantizedTensor) -> Tensor:
        return torch.empty_like(self.values[name]).copy_(part.dequantize())

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, QuantizedTensor]) -> None:
        """The working copy's tensors on their levels; those not named have their float values."""
        own = _own(self.work)
        for name in self.changed - tensors.keys():
            own[name].copy_(self.values[name])
        # first, so that a put that fails is undone: test_what_fails_leaves_nothing_behind
        self.changed = tensors.keys() & own.keys()
        put_values(self.work, tensors)

    def _guarded(self, run: Callable[[], Any]) -> Any:
        """What ``run`` returns; in half the batch size where memory runs out, and in the default
        layout where the remembered one fails."""
        while True:
            try:
                return run()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if self.given or not _is_out_of_memory(error) or self.batch == 1:
                    failed = error
                    break
                self.batch //= 2
                console.print(f"Out of memory: going on with batches of {self.batch}", markup=False)
        default = CONTIGUOUS, BATCHES[0]
        if self.given or (self.layout, self.batch) == default or isinstance(failed, NotRepeatable):
            raise failed
        was = f"{self.layout}, batches of {self.batch}"
        self._lay_out(*default)
        result = run()
        console.print(
            f"{was} failed ({_reason(failed)}): going on with {default[0]}, batches of "
            f"{default[1]}",
            markup=False,
        )
        return result


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in own_tensors(model).items()}


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a plain RuntimeError on the CPU
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "not enough memory" in str(error) or "out of memory" in str(error)
    )


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """On the device, where a quarter of its free memory holds it; else it goes batch by batch."""
    if device.type != "cuda" or tensor.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return tensor
    return tensor.to(device)


@torch.inference_mode(False)
@torch.no_grad()
def _to_layout(model: nn.Module, layout: str) -> None:
    for tensor in own_tensors(model).values():
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=FORMATS[layout])


def _in_layout(inputs: Tensor, layout: str) -> Tensor:
    if layout == CONTIGUOUS or inputs.dim() != 4:
        return inputs.contiguous()
    _, channels, height, width = inputs.shape
    if channels > 1:
        return inputs.contiguous(memory_format=torch.channels_last)
    # with one channel both layouts are the same memory, but a convolution goes by the strides:
    # test_one_channel_is_laid_out_too
    strides = (height * width, 1, width, 1)
    return inputs.contiguous().as_strided(inputs.shape, strides)


def _fastest(model: nn.Module, inputs: Tensor) -> tuple[str, int]:
    """Layout and batch size: timed, or remembered; the default for few examples."""
    if len(inputs) < TIMED:
        return CONTIGUOUS, BATCHES[0]
    device = device_of(model)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.node()
    shapes = {name: list(tensor.shape) for name, tensor in own_tensors(model).items()}
    size = min(len(inputs), max(_sizes(device)))
    facts = [str(model), shapes, list(inputs.shape[1:]), str(inputs.dtype), str(device), on, size]
    key = fingerprint(*facts, torch.get_num_threads(), torch.__version__)[:24]
    remembered = _remembered()
    if key not in remembered:
        remembered = _remembered() | {key: _timed(model, inputs)}
        with suppress(OSError):  # test_a_folder_that_cannot_be_written_is_no_error
            REMEMBERED.parent.mkdir(parents=True, exist_ok=True)
            partial = REMEMBERED.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(remembered, indent=1))
            os.replace(partial, REMEMBERED)
    layout, batch = remembered[key]
    return layout, batch


def _remembered() -> dict[str, list[Any]]:
    try:
        found = json.loads(REMEMBERED.read_text())
        return {
            key: [layout, batch]
            for key, (layout, batch) in found.items()
            if layout in FORMATS and batch in BATCHES + LARGE
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # is timed anew: test_a_damaged_memory_of_layouts_is_none


def _sizes(device: torch.device) -> tuple[int, ...]:
    return BATCHES + LARGE if device.type == "cuda" else BATCHES


def _timed(model: nn.Module, inputs: Tensor) -> list[Any]:
    """The fastest layout and batch size, all of them timed in turn, so that what else the machine
    does meets each alike."""
    convolves = any(tensor.dim() == 4 for tensor in own_tensors(model).values())
    layouts = list(FORMATS) if convolves and inputs.dim() == 4 else [CONTIGUOUS]
    sizes = [size for size in _sizes(device_of(model)) if size <= len(inputs)]
    going_on = [(layout, size) for size in sizes for layout in layouts]
    taken = dict.fromkeys(going_on, float("inf"))
    with evaluating(model):
        for _ in range(ROUNDS):
            for tried in going_on:
                taken[tried] = min(taken[tried], _seconds(model, inputs, *tried))
            fastest = min(taken.values())
            going_on = [tried for tried in going_on if taken[tried] <= SLOWER * fastest]
    best = min(taken, key=lambda tried: taken[tried])
    return list(best)


def _seconds(model: nn.Module, inputs: Tensor, layout: str, batch: int) -> float:
    """Of an example; infinite where the pass fails."""
    device = device_of(model)
    _to_layout(model, layout)
    try:
        some = _in_layout(inputs[: max(batch, TIMED)], layout).to(device)
        model(some[:batch])  # warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for part in some.split(batch):
            model(part)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / len(some)
    except (RuntimeError, MemoryError):
        return float("inf")  # is not taken: test_what_fails_while_timed_is_not_taken


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next pass; it would give it back to the system, and take
    it anew page by page, which takes longer than what is computed on it."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, 2**30)
