"""How good the search is: beside uniform and random strategies within the same bits.

    python -m benchmarks.search_quality [--network NAME]

Within budgets of mean bits, the criterion ratio on validation data of what the search finds, of the
best uniform strategy of its search space, and of random allocations: the best of 100, no fewer than
a search measures, then refined as the search refines its own (moves, GPTQ layer by layer, fitted
scales); wherever that solves for an allocation, one is drawn. Writes
benchmarks/results/search_quality.csv and the table of docs/results.md.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import grids
from quantifind.certification.goal import Goal
from quantifind.mixed_precision.allocation import Allocation
from quantifind.mixed_precision.candidates import Candidates
from quantifind.mixed_precision.knapsack import Assignment, Option
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.search_space import default_search_space
from quantifind.mixed_precision.sensitivity import measure_sensitivity
from quantifind.search import find_strategy, refine

RESULTS = grids.ROOT / "benchmarks/results/search_quality.csv"
MARKERS = grids.markers("python -m benchmarks.search_quality")
# random allocations, no fewer than what a search measures at most
DRAWN = 100
BUDGETS = (1.5, 2.0, 3.0, 4.0)


class Drawn(Allocation):
    """A search's problem, whose solutions are drawn at random."""

    def solve(
        self, budget: float, groups: Sequence[Sequence[Option]] | None = None
    ) -> Assignment | None:
        assert groups is None
        if budget < self.fixed + sum(group[-1].cost for group in self.groups):
            return None
        return random_allocation(self, budget, np.random.default_rng(int(1_000 * budget)))


def measure(network: str, folder: str) -> list[dict[str, Any]]:
    """A row per budget of mean bits: the search beside uniform and random strategies."""
    net, criterion = grids.trained(network)
    train, val, _ = grids.loaders(network)
    measurements = Measurements.start(net, train, val, criterion, folder=folder)
    space = default_search_space(net, measurements.facts)
    sensitivity = measure_sensitivity(measurements, space)
    rows = []
    for budget in BUDGETS:
        table = find_strategy(net, train, val, criterion, budget=budget, folder=folder).candidates
        found = table[table["chosen"]].iloc[0]
        whole = table["examples"] == measurements.examples
        uniform = table[whole & (table["origin"] == "uniform")]["criterion_ratio"].min()
        allocation = Drawn(**vars(Allocation.of(measurements, sensitivity, Goal.of(None, budget))))
        candidates = Candidates(measurements, allocation, 0.95)
        generator = np.random.default_rng(0)
        for _ in range(DRAWN):
            drawn = random_allocation(allocation, budget, generator)
            candidates.measure([candidates.allocated(drawn)])
        random = least(candidates)
        refine(candidates, 0, labels=False)
        rows.append(
            {
                "network": network,
                "budget": budget,
                "found_bits": found["mean_bits"],
                "found_ratio": found["criterion_ratio"],
                "uniform_ratio": uniform,
                "random_ratio": random,
                "refined_ratio": least(candidates),
            }
        )
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return rows


def least(candidates: Candidates) -> float:
    """The least criterion ratio of those within the budget."""
    return min(r["criterion_ratio"] for r in candidates.whole() if candidates.goal.keeps(r))


def random_allocation(
    allocation: Allocation, budget: float, generator: np.random.Generator
) -> tuple[int, ...]:
    """Options drawn at random, then one after another a step cheaper until the budget holds."""
    groups = allocation.groups
    chosen = [int(generator.integers(len(group))) for group in groups]
    while allocation.total(tuple(chosen)) > budget:
        able = [i for i, group in enumerate(groups) if chosen[i] < len(group) - 1]
        chosen[generator.choice(able)] += 1
    return tuple(chosen)


def markdown(results: pd.DataFrame) -> str:
    """The table of strategies within budgets, a line per network and budget."""
    lines = [
        "| CR on validation within a budget | mean bits | best uniform | best of 100 random "
        "| refined | search | its mean bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results.to_dict("records"):
        ratios = [row[f"{kind}_ratio"] for kind in ("uniform", "random", "refined", "found")]
        cells = ["–" if pd.isna(ratio) else f"{ratio:.4g}" for ratio in ratios]
        numbers = f"{row['budget']:g} | {' | '.join(cells)} | {row['found_bits']:.3f}"
        lines.append(f"| {row['network']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    for network in grids.chosen_networks(__doc__):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(network, folder)
        results = grids.write_rows(RESULTS, pd.DataFrame(rows))
        grids.write_table(MARKERS, markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
