"""Whether weights whose inputs are rotated take fewer bits, or lose less.

    python -m benchmarks.rotation [--network NAME] [--search]

Each network is trained as the pipeline trains it. All its weights are put on the same grid, biases
on 8 bits, and judged on test data: none rotated, and all. Grids at a fixed width have a scale per
channel; entropy coded ones one step, in the weight's own standard deviations, of which the first
weight of a convolutional network and the last of both have a finer one (`FINER`). With --search,
searches of the default spaces, and of those that have what GPTQ rounds rotated besides, with the
same effort, certified on test data.
Writes benchmarks/results/rotation.csv and the table of docs/method.md.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import nn

from benchmarks import grids
from benchmarks.search import interval, judged
from quantifind.metrics import outcome
from quantifind.mixed_precision.search_space import (
    GPTQ,
    PER_TENSOR,
    STEPS,
    SearchSpace,
    coded,
    default_search_space,
)
from quantifind.network.modules import named_tensors
from quantifind.network.trace import rotatable, trace
from quantifind.quantize import mean_bits, quantize, quantize_model
from quantifind.search import find_strategy
from quantifind.strategy import Strategy
from quantifind.tensor.choice import STORAGES, Choice
from quantifind.utils.batches import batches_of
from quantifind.workflow.evaluation_workflow import compare

RESULTS = grids.ROOT / "benchmarks/results/rotation.csv"
MARKERS = grids.markers("python -m benchmarks.rotation")
NETWORKS = ("dense_mnist", "conv_mnist")
LIMITS = (1.01, 1.05)
MEASURES = ("criterion_ratio", "calibrated_ratio")
SEED = 0
# by network, how many of STEPS finer the step of each weight is
FINER = {"dense_mnist": (0, 0, 2), "conv_mnist": (4, 0, 0, 2)}
# of STEPS, those of all others
SAME = (8, 9)
PACKED = {"binary": {"bits": 1}, "ternary": {"levels": 3}, "2 bits": {"bits": 2}}
BATCHES = 32


def strategies(net: nn.Module, finer: Sequence[int]) -> Iterator[tuple[str, Strategy]]:
    """A name, and the same for all weights."""
    shown = named_tensors(net)
    weights = [name for name, tensor in shown.items() if tensor.dim() > 1]
    others = {name: replace(PER_TENSOR, bits=8) for name in shown if name not in weights}
    for name, given in PACKED.items():
        choice = Choice.of({**GPTQ.plain(), **given})
        yield name, Strategy(dict.fromkeys(weights, choice) | others)
    for step in SAME:
        own = {
            name: coded(shown[name])[max(step - less, 0)]
            for name, less in zip(weights, finer, strict=True)
        }
        yield f"coded, step {STEPS[step]:.2g} sd", Strategy(own | others)


def same_rows(network: str, made: tuple[nn.Module, nn.Module]) -> Iterator[dict[str, Any]]:
    """Bits and CR on test data of each of `strategies`."""
    net, criterion = made
    train, _, test = grids.loaders(network)
    calibration, original = list(islice(train, BATCHES)), outcome(net, test, criterion)
    for name, strategy in strategies(net, FINER[network]):
        weights = [n for n, c in strategy.tensors.items() if c and c.rounding == "gptq"]
        for rotated, turned in (("none", []), ("all", weights)):
            own = {
                n: replace(choice, rotation=SEED) if choice and n in turned else choice
                for n, choice in strategy.tensors.items()
            }
            found = quantize(net, Strategy(own), calibration)
            measured = compare(outcome(quantize_model(net, found), test, criterion), original)
            yield {
                "network": network,
                "what": name,
                "rotated": rotated,
                "mean_bits": mean_bits(net, found),
                "value": measured["criterion_ratio"],
                "low": measured["criterion_ratio_low"],
                "high": measured["criterion_ratio_high"],
            }


def besides(net: nn.Module, example: Any, storage: str) -> SearchSpace:
    """The default search space, with what GPTQ rounds there rotated besides."""
    facts = trace(net, [example])
    space = default_search_space(net, facts, storage=storage)
    tensors = {}
    for name, choices in space.tensors.items():
        turned = [replace(c, rotation=SEED) for c in choices if c.rounding == "gptq"]
        able = rotatable(name, named_tensors(net)[name].shape, facts)
        tensors[name] = [*choices, *(turned if able else [])]
    return SearchSpace(tensors)


def search_rows(network: str, made: tuple[nn.Module, nn.Module]) -> Iterator[dict[str, Any]]:
    """What is certified of searches with and without rotated choices."""
    net, criterion = made
    train, val, test = grids.loaders(network)
    example = next(iter(batches_of(train, net)))
    for storage, measure, limit in itertools.product(STORAGES, MEASURES, LIMITS):
        for rotated in (False, True):
            space = besides(net, example, storage) if rotated else None
            how: Any = {"search_space": space, "storage": storage}
            row: dict[str, Any] = {
                "network": network,
                "what": f"{storage}, {measure.replace('_', ' ')} ≤ {limit:g}",
            }
            row["rotated"] = "where the search has it" if rotated else "none"
            try:
                found = find_strategy(net, train, val, criterion, limit={measure: limit}, **how)
            except ValueError as error:  # that nothing keeps the limit is a result, too
                print(f"{row}: {error}", flush=True)
                yield row
                continue
            tensors = found.quantized.tensors.values()
            turned = sum(tensor.rotation is not None for tensor in tensors)
            row |= {"passes": found.passes.taken, "turned": turned}
            yield row | judged(net, found, test, measure, None)


def markdown(results: pd.DataFrame) -> str:
    """A line for each step and limit, a column for what is rotated."""
    columns = list(dict.fromkeys(results["rotated"]))
    lines = [f"| mean bits, the ratio on test, 95% interval: rotated | {' | '.join(columns)} |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for (network, what), rows in results.groupby(["network", "what"], sort=False):
        cells = {
            row["rotated"]: "none"
            if pd.isna(row["mean_bits"])
            else f"{row['mean_bits']:.3f}, {interval(row)}"
            for row in rows.to_dict("records")
        }
        lines.append(f"| {network}, {what} | {' | '.join(cells.get(c, '–') for c in columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, help="by default both")
    parser.add_argument("--search", action="store_true", help="search, too, which takes long")
    given = parser.parse_args()
    torch.manual_seed(0)
    for network in [given.network] if given.network else NETWORKS:
        made, rows = grids.trained(network), []
        for found in (same_rows, search_rows)[: 1 + given.search]:
            for row in found(network, made):
                rows.append(row)
                print(pd.DataFrame([row]).to_string(index=False, header=len(rows) == 1), flush=True)
        results = grids.write_rows(RESULTS, pd.DataFrame(rows))
    grids.write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
