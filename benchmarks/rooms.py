"""What each device for speed gains: the same work with it and without it, in one process.

The two take turns, and each has the least seconds of several rounds. The gain is how much longer
the work takes without: 0.05 is 5%. What gains less than that on every network is not kept. Networks
have random weights, which changes no time. Part of `python -m benchmarks.speed --parts rooms`,
which writes benchmarks/results/rooms.csv and the table of docs/speed.md.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks import grids
from quantifind.models import conv_mnist_model, dense_mnist_model, language_transformer_model
from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize
from quantifind.runtime import evaluator, replay
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.layouts import CONTIGUOUS, CPU_BATCH
from quantifind.strategy import uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.devices import device

RESULTS = grids.ROOT / "benchmarks/results/rooms.csv"
MARKERS = grids.markers("python -m benchmarks.speed --parts rooms")
WORTH = 0.05
ROUNDS, REPLAY_ROUNDS = 25, 3
NETWORKS = ("conv_mnist", "dense_mnist", "language_transformer")
CONVOLUTIONAL = ("conv_mnist", "conv_colour")
PASS_EXAMPLES, REPLAY_EXAMPLES = 512, 128
WIDTHS = range(2, 9)
VOCABULARY, CLASSES, LENGTH = 60, 18, 20
CRITERION = nn.CrossEntropyLoss()


def network(name: str, examples: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    if name == "language_transformer":
        net = language_transformer_model.create_model_context(
            vocabulary=VOCABULARY, classes=CLASSES
        )[0]
        return net, [
            (torch.randint(1, VOCABULARY, (examples, LENGTH)), torch.randint(CLASSES, (examples,)))
        ]
    if name == "conv_colour":
        blocks = [
            (
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for before, after in ((3, 32), (32, 64), (64, 128))
        ]
        net = nn.Sequential(*chain(*blocks), nn.Flatten(), nn.Linear(128 * 16, 10)).to(device())
        return net, [(torch.rand(examples, 3, 32, 32), torch.randint(10, (examples,)))]
    create = (conv_mnist_model if name == "conv_mnist" else dense_mnist_model).create_model_context
    return create()[0], [(torch.rand(examples, 1, 28, 28), torch.randint(10, (examples,)))]


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
    """Whole passes of a convolutional network, the only kind that pools and has images."""
    net, data = network(name, PASS_EXAMPLES)
    quantized = quantize(net, uniform_strategy(net, 4))

    def work(**functions: Callable[..., Any]) -> Callable[[], Any]:
        with patch.multiple(evaluator, **functions) if functions else nullcontext():
            measured = Evaluator(net, data, CRITERION)
        return lambda: measured.outcome(quantized)

    having = work()
    rows = []
    for what, lacking in (
        ("ReLU after pooling", work(pool_first=lambda _: None)),
        ("layout by rule", work(layout_and_batch=lambda *_: (CONTIGUOUS, CPU_BATCH))),
    ):
        rows.append(row(what, name, least(ROUNDS, having=having, lacking=lacking)))
    return rows


def replays(name: str) -> list[dict[str, Any]]:
    """Every third tensor alone at seven widths."""
    net, data = network(name, REPLAY_EXAMPLES)
    choices = [quantize(net, uniform_strategy(net, bits)).tensors for bits in WIDTHS]
    tensors = {name: [choice[name] for choice in choices] for name in list(named_tensors(net))[::3]}
    split, fused, whole = (Evaluator(net, data, CRITERION) for _ in range(3))

    def alone(measured: Evaluator) -> None:
        for tensor, parts in tensors.items():
            measured.one_tensor(tensor, parts)

    def unsplit() -> None:
        with patch.object(replay, "_fused_layer", lambda *_: None):
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


def markdown(results: pd.DataFrame) -> str:
    """The table, a line for each device and network."""
    lines = [
        "| | network | seconds with it | without it | gain | kept |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.to_dict("records"):
        times = f"{row['with_seconds']:#.3g} | {row['without_seconds']:#.3g} | {row['gain']:.0%}"
        kept = "yes" if row["kept"] else "no"
        lines.append(f"| {row['what']} | {row['network']} | {times} | {kept} |")
    return "\n".join(lines) + "\n"


def rooms() -> list[dict[str, Any]]:
    """Writes its own table, in which what is gone (weights prepacked for oneDNN, layout and batch
    timed, max pooling by slices) keeps the rows that were measured last."""
    torch.set_num_threads(1)
    rows = [found for name in CONVOLUTIONAL for found in passes(name)]
    rows += [found for name in NETWORKS for found in replays(name)]
    table = pd.DataFrame(rows)
    if RESULTS.exists():
        before = pd.read_csv(RESULTS)
        table = pd.concat([before[~before["what"].isin(table["what"])], table])
    table["kept"] = table.groupby("what")["gain"].transform("max") >= WORTH
    table = table.sort_values(["what", "network"])
    table.to_csv(RESULTS, index=False, float_format="%.4g")
    grids.write_table(MARKERS, markdown(pd.read_csv(RESULTS)))
    print(table.to_string(index=False), flush=True)
    return []
