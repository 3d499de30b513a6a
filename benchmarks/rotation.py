"""Whether weights whose inputs are rotated take fewer bits: entropy coded, rotated beside not.

    python -m benchmarks.rotation [--network NAME] [--limits 1.01 1.05]

Each network is trained as the pipeline trains it. First all weights have the same step, in their
own standard deviations, the first of a convolutional network and the last of both a finer one
(`FINER`), biases 8 bits: bits and CR on test data, of all weights as they are, all rotated, and all
but the first, whose inputs are pixels. Then searches of the default coded space, and of one that
has each of its coded choices rotated besides, with the same effort, certified on test data.
Writes benchmarks/results/rotation.csv and the table of docs/method.md.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import nn

from benchmarks import grids
from benchmarks.search import judged
from quantifind.metrics import outcome
from quantifind.mixed_precision.search_space import (
    PER_TENSOR,
    STEPS,
    SearchSpace,
    coded,
    default_search_space,
)
from quantifind.network.modules import named_tensors
from quantifind.network.trace import trace
from quantifind.quantize import mean_bits, quantize, quantize_model
from quantifind.search import find_strategy
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.utils.batches import batches_of
from quantifind.workflow.evaluation_workflow import compare

RESULTS = grids.ROOT / "benchmarks/results/rotation.csv"
MARKERS = grids.markers("python -m benchmarks.rotation")
NETWORKS = ("dense_mnist", "conv_mnist")
MEASURES = ("criterion_ratio", "calibrated_ratio")
SEED = 0
# by network, how many halvings of the square of the step its weights have besides
FINER = {"dense_mnist": (0, 0, 2), "conv_mnist": (4, 0, 0, 2)}
# of STEPS: 1, 1.4, 2 and 2.8 standard deviations
SAME = (6, 7, 8, 9)
BATCHES = 32


def same_step(net: nn.Module, step: int, finer: Sequence[int], rotated: Sequence[bool]) -> Strategy:
    """Weights coded with one of `STEPS`, and the others of 8 bits."""
    tensors: dict[str, Choice | None] = {}
    left = iter(zip(finer, rotated, strict=True))
    for name, tensor in named_tensors(net).items():
        tensors[name] = replace(PER_TENSOR, bits=8)
        if tensor.dim() > 1:
            less, turned = next(left)
            choice = coded(tensor)[max(step - less, 0)]
            tensors[name] = replace(choice, rotation=SEED if turned else None)
    return Strategy(tensors)


def step_rows(network: str, made: tuple[nn.Module, nn.Module]) -> Iterator[dict[str, Any]]:
    """Bits and CR on test data at each step."""
    net, criterion = made
    train, _, test = grids.loaders(network)
    calibration, original = list(islice(train, BATCHES)), outcome(net, test, criterion)
    finer = FINER[network]
    variants = {
        "no": [False] * len(finer),
        "all": [True] * len(finer),
        "all but the first": [False] + [True] * (len(finer) - 1),
    }
    for step in SAME:
        for rotated, which in variants.items():
            found = quantize(net, same_step(net, step, finer, which), calibration)
            measured = compare(outcome(quantize_model(net, found), test, criterion), original)
            yield {
                "network": network,
                "what": f"{STEPS[step]:#.2g} sd",
                "rotated": rotated,
                "mean_bits": mean_bits(net, found),
                "value": measured["criterion_ratio"],
                "low": measured["criterion_ratio_low"],
                "high": measured["criterion_ratio_high"],
            }


def both(net: nn.Module, example: Any) -> SearchSpace:
    """The default coded space, with what GPTQ rounds there rotated besides."""
    space = default_search_space(net, trace(net, [example]), storage="coded")
    return SearchSpace(
        {
            name: [*choices, *(replace(c, rotation=SEED) for c in choices if c.rounding == "gptq")]
            for name, choices in space.tensors.items()
        }
    )


def search_rows(
    network: str, made: tuple[nn.Module, nn.Module], limits: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """What is certified of searches with and without rotated choices."""
    net, criterion = made
    train, val, test = grids.loaders(network)
    example = next(iter(batches_of(train, net)))
    for measure in MEASURES:
        for limit in limits:
            for rotated in (False, True):
                how: Any = {"search_space": both(net, example)} if rotated else {"storage": "coded"}
                row = {"network": network, "what": f"{measure} ≤ {limit:g}"}
                row["rotated"] = "where it wins" if rotated else "no"
                try:
                    found = find_strategy(net, train, val, criterion, limit={measure: limit}, **how)
                except ValueError as error:  # that nothing keeps the limit is a result, too
                    print(f"{row}: {error}", flush=True)
                    yield row
                    continue
                row |= {"passes": found.passes} | judged(net, found, test, measure, None)
                tensors = found.quantized.tensors.values()
                row["turned"] = sum(tensor.rotation is not None for tensor in tensors)
                yield row


def markdown(results: pd.DataFrame) -> str:
    """A line for each step and limit, a column for what is rotated."""
    columns = list(dict.fromkeys(results["rotated"]))
    lines = [f"| mean bits, the ratio on test, 95% interval: rotated | {' | '.join(columns)} |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for (network, what), rows in results.groupby(["network", "what"], sort=False):
        cells = {
            row["rotated"]: "none"
            if pd.isna(row["mean_bits"])
            else f"{row['mean_bits']:.3f}, "
            f"{row['value']:#.4g} [{row['low']:#.4g}, {row['high']:#.4g}]"
            for row in rows.to_dict("records")
        }
        lines.append(f"| {network}, {what} | {' | '.join(cells.get(c, '–') for c in columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, help="by default both")
    parser.add_argument("--limits", type=float, nargs="*", default=[1.01, 1.05], help="of searches")
    given = parser.parse_args()
    torch.manual_seed(0)
    for network in [given.network] if given.network else NETWORKS:
        made, rows = grids.trained(network), []
        for found in (step_rows(network, made), search_rows(network, made, given.limits)):
            for row in found:
                rows.append(row)
                print(pd.DataFrame([row]).to_string(index=False, header=len(rows) == 1), flush=True)
        results = grids.write_rows(RESULTS, pd.DataFrame(rows))
    grids.write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
