"""What each device for speed gains: the same work with it and without it, in one process.

The two take turns, and each has the least seconds of several rounds. The gain is how much longer
the work takes without: 0.05 is 5%. What gains less than that on every network is not kept. Networks
have random weights, which changes no time. Part of `python benchmarks/speed.py --parts rooms`,
which writes benchmarks/results/rooms.csv.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import grids
from quantifind.models import conv_mnist_model, dense_mnist_model, language_transformer_model
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize
from quantifind.runtime import evaluator, layouts, replay
from quantifind.runtime.evaluator import Evaluator
from quantifind.strategy import uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.devices import device, keep_freed_memory

RESULTS = grids.ROOT / "benchmarks/results/rooms.csv"
WORTH = 0.05
ROUNDS, REPLAY_ROUNDS = 25, 3
EXAMPLES = {"conv_mnist": 512, "dense_mnist": 4_096, "language_transformer": 512}
REPLAY_EXAMPLES = 128
WIDTHS = range(2, 9)
VOCABULARY, CLASSES, LENGTH = 60, 18, 20
CRITERION = nn.CrossEntropyLoss()
# the rule beside timing: batches that large, in channels_last where a network convolves images
ON_CPU, ON_GPU = 256, 4096


def network(name: str, examples: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    if name == "language_transformer":
        net = language_transformer_model.create_model_context(
            vocabulary=VOCABULARY, classes=CLASSES
        )[0]
        return net, [
            (torch.randint(1, VOCABULARY, (examples, LENGTH)), torch.randint(CLASSES, (examples,)))
        ]
    create = (conv_mnist_model if name == "conv_mnist" else dense_mnist_model).create_model_context
    return create()[0], [(torch.rand(examples, 1, 28, 28), torch.randint(10, (examples,)))]


def rule(model: nn.Module, inputs: Tensor) -> tuple[str, int]:
    convolves = inputs.dim() == 4 and any(p.dim() == 4 for p in model.parameters())
    batch = ON_GPU if device().type == "cuda" else ON_CPU
    return layouts.CHANNELS_LAST if convolves else layouts.CONTIGUOUS, batch


@contextmanager
def swapped(owner: Any, **values: Any) -> Iterator[None]:
    with patch.multiple(owner, **values):
        yield


def least(rounds: int, **ways: Callable[[], Any]) -> dict[str, float]:
    """The least seconds of each of the ways, which take turns: on a CPU those of the processor, so
    that other work of the machine does not count."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way, call in ways.items():
            started = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:  # the first warms up
                taken[way].append(clock() - started)
    return {way: min(seconds) for way, seconds in taken.items()}


def row(what: str, name: str, taken: dict[str, float]) -> dict[str, Any]:
    return {
        "what": what,
        "network": name,
        "with_seconds": taken["having"],
        "without_seconds": taken["lacking"],
        "gain": taken["lacking"] / taken["having"] - 1,
    }


def passes(name: str) -> list[dict[str, Any]]:
    """Whole passes of two strategies in turn, so that weights change as they do in a search."""
    net, data = network(name, EXAMPLES[name])
    strategies = [quantize(net, uniform_strategy(net, bits)) for bits in (4, 8)]

    def work(measured: Evaluator, **values: Any) -> Callable[[], None]:
        turns = cycle(strategies)

        def call() -> None:
            with swapped(evaluator, **values) if values else nullcontext():
                measured.outcome(next(turns))

        return call

    def made(**values: Any) -> Evaluator:
        with swapped(evaluator, **{"fastest": rule, **values}):
            return Evaluator(net, data, CRITERION)

    def nothing(_: nn.Module) -> Any:
        return nullcontext()

    plain = work(made())
    rows = [
        row(
            "oneDNN weights prepacked",
            name,
            least(ROUNDS, having=plain, lacking=work(made(), laying_out_once=nothing)),
        )
    ]
    with TemporaryDirectory() as folder, swapped(layouts, REMEMBERED=Path(folder) / "layouts"):
        timed = made(fastest=layouts.fastest)
    print(f"{name}: timed {timed.layout} {timed.batch}; rule {rule(net, data[0][0])}", flush=True)
    rows.append(
        row("layout and batch timed", name, least(ROUNDS, having=work(timed), lacking=plain))
    )
    if name == "conv_mnist":
        for what, function in (
            ("max pooling by slices", "pool_by_slices"),
            ("ReLU after pooling", "pool_first"),
        ):
            lacking = work(made(**{function: nothing}))
            rows.append(row(what, name, least(ROUNDS, having=plain, lacking=lacking)))
    return rows


def replays(name: str) -> list[dict[str, Any]]:
    """Every third tensor alone at seven widths."""
    net, data = network(name, REPLAY_EXAMPLES)
    choices = [quantize(net, uniform_strategy(net, bits)).tensors for bits in WIDTHS]
    tensors = {name: [choice[name] for choice in choices] for name in list(named_tensors(net))[::3]}
    with swapped(evaluator, fastest=rule):
        split, fused, whole = (Evaluator(net, data, CRITERION) for _ in range(3))

    def alone(measured: Evaluator) -> None:
        for tensor, parts in tensors.items():
            measured.alone(tensor, parts)

    def unsplit() -> None:
        with swapped(replay, _split=lambda *_: None):
            alone(fused)

    def whole_passes() -> None:
        for tensor, parts in tensors.items():
            for part in parts:
                whole.outcome(Quantized({tensor: part}))

    taken = least(REPLAY_ROUNDS, split=lambda: alone(split), fused=unsplit, whole=whole_passes)
    rows = [row("replay", name, {"having": taken["split"], "lacking": taken["whole"]})]
    if name == "language_transformer":
        found = {"having": taken["split"], "lacking": taken["fused"]}
        rows.append(row("fused layers split in replay", name, found))
    return rows


def rooms() -> list[dict[str, Any]]:
    """Writes its own table, in which rows of what has gone since stay as they were measured."""
    keep_freed_memory()
    torch.set_num_threads(1)
    table = pd.DataFrame([found for n in EXAMPLES for found in (*passes(n), *replays(n))])
    if RESULTS.exists():
        before = pd.read_csv(RESULTS)
        table = pd.concat([before[~before["what"].isin(table["what"])], table])
    table["kept"] = table.groupby("what")["gain"].transform("max") >= WORTH
    table = table.sort_values(["what", "network"])
    table.to_csv(RESULTS, index=False, float_format="%.4g")
    print(table.to_string(index=False), flush=True)
    return []
