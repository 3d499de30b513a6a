"""Whether coded weights lose less where errors of outputs are weighed by what they do.

    python -m benchmarks.effects [--network NAME]

Each network is trained as the pipeline trains it. All its weights have the same step, in their own
standard deviations, and are rounded one after another, by GPTQ that weighs what codes cost; what
has one axis has 8 bits. Errors of outputs count alike, or by what they do together to the answers
(`Choice.effects`). Judged on validation data: the divergence of the answers over the float
network's loss (fidelity). Writes benchmarks/results/effects.csv and the table of docs/method.md.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from benchmarks import grids
from quantifind.metrics import outcome
from quantifind.mixed_precision.measurements import CALIBRATION
from quantifind.mixed_precision.search_space import PER_TENSOR, STEPS, default_search_space
from quantifind.network.calibrated import Calibration
from quantifind.network.calibration import calibration_batches
from quantifind.quantize import mean_bits, quantize_model, quantize_within
from quantifind.strategy import Strategy
from quantifind.utils.loaders import Loaders, sample
from quantifind.workflow.evaluation_workflow import compare

RESULTS = grids.ROOT / "benchmarks/results/effects.csv"
MARKERS = grids.markers("python -m benchmarks.effects")
# of STEPS
SAME = (5, 7, 9)
COUNTED = {"alike": False, "by what they do": True}


def rows_of(
    network: str, made: tuple[nn.Module, nn.Module], splits: Loaders
) -> Iterator[dict[str, Any]]:
    """Bits, fidelity and seconds of each step, errors of outputs counted in both ways."""
    net, criterion = made
    train, val, _ = splits
    examples = calibration_batches(sample(train, CALIBRATION, seed=0), net, criterion=criterion)
    original = outcome(net, val, criterion)
    space = default_search_space(net, Calibration(net, examples).facts, storage="coded")
    torch.set_num_threads(1)
    for step in SAME:
        for counted, effects in COUNTED.items():
            tensors = {}
            for name, choices in space.tensors.items():
                able = [choice for choice in choices if choice.effects]
                assert len(able) in (0, len(STEPS)), name
                one = replace(able[step], effects=effects) if able else replace(PER_TENSOR, bits=8)
                tensors[name] = one
            started = time.monotonic()
            network_of = Calibration(net, examples, criterion=criterion)
            quantized = quantize_within(network_of, Strategy(tensors))
            seconds = time.monotonic() - started
            measured = compare(outcome(quantize_model(net, quantized), val, criterion), original)
            yield {
                "network": network,
                "step": STEPS[step],
                "errors": counted,
                "mean_bits": mean_bits(net, quantized),
                "fidelity": measured["fidelity"],
                "low": measured["fidelity_low"],
                "high": measured["fidelity_high"],
                "seconds": seconds,
            }


def markdown(results: pd.DataFrame) -> str:
    """A line for each step, a column for each way to count."""
    heads = " | ".join(f"errors count {counted}" for counted in COUNTED)
    lines = [f"| mean bits, fidelity, 95% interval, seconds | {heads} |", "|---|---|---|"]
    for (network, step), rows in results.groupby(["network", "step"], sort=False):
        cells = {row["errors"]: cell(row) for row in rows.to_dict("records")}
        found = " | ".join(cells[counted] for counted in COUNTED)
        lines.append(f"| {network}, {step:.2g} sd | {found} |")
    return "\n".join(lines) + "\n"


def cell(row: Mapping[Any, Any]) -> str:
    """What one way to count comes to."""
    ends = f"[{row['low']:.2g}, {row['high']:.2g}]"
    return f"{row['mean_bits']:.3f}, {row['fidelity']:.2g} {ends}, {row['seconds']:.1f} s"


def main() -> None:
    results = grids.measured(rows_of, grids.chosen_networks(__doc__), RESULTS)
    grids.write_table(MARKERS, markdown(results))


if __name__ == "__main__":
    main()
