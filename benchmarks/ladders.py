"""What a ladder certifies, where what was not learned is held to lose at least its divergence.

    python -m benchmarks.ladders [--network NAME]

Each network is trained as the pipeline trains it, and searched as it is, coded, for each of
`LIMITS`. Then its validation examples, not test data, are drawn into two halves, `DRAWS` times: the
first chooses among the candidates of the search and fixes the ladder, on the second it is walked
with 95% confidence. Where nothing is certified, 32 bits are counted; draws in which no candidate
keeps the limit on the first half are left out of both. Writes
benchmarks/results/ladders.csv and the table of docs/statistics.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from benchmarks import grids
from quantifind.certification.goal import Goal, ladder
from quantifind.certification.measures import Columns, calibrated, degradation
from quantifind.search import find_strategy
from quantifind.utils.loaders import Loaders
from quantifind.workflow.evaluation_workflow import evaluate_strategies

RESULTS = grids.ROOT / "benchmarks/results/ladders.csv"
MARKERS = grids.markers("python -m benchmarks.ladders")
MEASURE, LIMITS, DRAWS, NONE = "criterion_ratio", (1.01, 1.05), 40, 32.0
HELD = ("what was measured", "at least its divergence")


def rows_of(
    network: str, made: tuple[nn.Module, nn.Module], splits: Loaders
) -> Iterator[dict[str, Any]]:
    """Certified bits of each limit, candidates held to lose one and the other."""
    net, criterion = made
    train, val, _ = splits
    for limit in LIMITS:
        asked = {MEASURE: limit}
        found = find_strategy(net, train, val, criterion, limit=asked, storage="coded").candidates
        steps = evaluate_strategies(
            net, found["strategy"], val, criterion, quantized=found["quantized"], columns=True
        )
        assert (found["answer"] == "as_is").all()
        sizes, bits = found["model_bytes"].tolist(), found["mean_bits"].tolist()
        walked = certified(steps["columns"].tolist(), sizes, bits, Goal.of(asked, None))
        for held, certain in walked.items():
            yield {
                "network": network,
                "limit": limit,
                "held": held,
                "mean_bits": np.exp(np.log(certain).mean()),
                "low": np.quantile(certain, 0.05),
                "high": np.quantile(certain, 0.95),
                "none": np.mean(np.equal(certain, NONE)),
            }


def certified(
    columns: Sequence[Columns], sizes: Sequence[float], bits: Sequence[float], goal: Goal
) -> Mapping[str, list[float]]:
    """The bits of each draw in which anything keeps the goal."""
    generator, everything = np.random.default_rng(0), len(columns[0]["loss"])
    walked: dict[str, list[float]] = {held: [] for held in HELD}
    for _ in range(DRAWS):
        first, second = np.array_split(generator.permutation(everything), 2)
        rows = []
        for size, count, own in zip(sizes, bits, columns, strict=True):
            one, other = ({n: c[half] for n, c in own.items()} for half in (first, second))
            chosen_by, one_gain = degradation(one), calibrated(one).get("gain")
            gain = None if one_gain is None else float(one_gain[0])
            passes = goal.keeps(degradation(other, gain=gain))
            rows.append(chosen_by | {"model_bytes": size, "mean_bits": count, "passes": passes})
        keeping = [row for row in rows if goal.keeps(row)]
        if not keeping:
            continue
        place = rows.index(min(keeping, key=goal.rank))
        for held, answer in zip(HELD, ("", "as_is"), strict=True):
            named = [row | {"answer": answer} for row in rows]
            walk = ladder(named, named[place], goal)
            passed = next((i for i, row in enumerate(walk) if not row["passes"]), len(walk))
            walked[held].append(walk[passed - 1]["mean_bits"] if passed else NONE)
    return walked


def markdown(results: pd.DataFrame) -> str:
    """A line for each network and limit, a column for each way to hold."""
    heads = " | ".join(f"held to lose {held}" for held in HELD)
    lines = [f"| certified bits, 5 to 95%, nothing certified | {heads} |", "|---|---|---|"]
    for (network, limit), rows in results.groupby(["network", "limit"], sort=False):
        cells = {row["held"]: cell(row) for row in rows.to_dict("records")}
        found = " | ".join(cells[held] for held in HELD)
        lines.append(f"| {network}, CR ≤ {limit:g} | {found} |")
    return "\n".join(lines) + "\n"


def cell(row: Mapping[Any, Any]) -> str:
    """What one way to hold comes to."""
    return f"{row['mean_bits']:.2f}, {row['low']:.2f} to {row['high']:.2f}, {row['none']:.0%}"


def main() -> None:
    results = grids.measured(rows_of, grids.chosen_networks(__doc__), RESULTS)
    grids.write_table(MARKERS, markdown(results))


if __name__ == "__main__":
    main()
