"""The fewest bits that are certified, of each network at three limits, and how good the search is.

    python -m benchmarks.search [--network NAME]

Each network is trained as the pipeline trains it. The search sees train and validation data; the
ladder it fixes is judged on test data once. Writes benchmarks/results/search.csv: by limit of the
criterion ratio, with and without learned rounding, the certified strategy, the certified uniform
depth, and the seconds of the search (the first of a network, 1.01 without learning, measures
everything; those after it go on from that). And search_quality.csv: within budgets, the criterion
ratio on validation data of what the search finds, of the best uniform strategy of its search space,
and of the best of 100 random allocations, no fewer than the search measures. Both tables stand in
docs/results.md.
"""

import tempfile
import time
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import grids
from quantifind.certification.certificate import certified_depth, certified_steps
from quantifind.certification.goal import Goal
from quantifind.mixed_precision.allocation import Allocation
from quantifind.mixed_precision.candidates import Candidates
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.search_space import default_search_space
from quantifind.mixed_precision.sensitivity import measure_sensitivity
from quantifind.search import find_strategy
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths, evaluate_strategies

RESULTS = grids.ROOT / "benchmarks/results/search.csv"
QUALITY = grids.ROOT / "benchmarks/results/search_quality.csv"
MARKERS = grids.markers("python -m benchmarks.search")
QUALITY_MARKERS = grids.markers("python -m benchmarks.search, quality")
LIMITS = (1.01, 1.05, 1.10)
# of learned rounding, chosen on validation data, fewer where an epoch takes long
EPOCHS = {"dense_mnist": 12, "conv_mnist": 2, "language_transformer": 2, "simple_dense": 2}
# random allocations, no fewer than what a search measures at most
DRAWN = 100
BUDGETS = (1.5, 2.0, 3.0, 4.0)


def measure(network: str, folder: str) -> list[dict[str, Any]]:
    """A row per limit, without and with learning."""
    net, criterion = grids.trained(network)
    train, val, test = grids.loaders(network)
    uniform = evaluate_bit_depths(net, test, criterion)
    rows = []
    for learn in (0, EPOCHS[network]):
        for limit in LIMITS:
            started = time.monotonic()
            found = find_strategy(
                net, train, val, criterion, limit=limit, learn=learn, folder=folder
            )
            seconds = time.monotonic() - started
            ladder = found.ladder
            judged = evaluate_strategies(
                net, ladder["strategy"], test, criterion, quantized=ladder["quantized"]
            )
            steps = certified_steps(judged["criterion_ratio_bound"].tolist(), limit)
            best = judged.iloc[steps - 1] if steps else None
            rows.append(
                {
                    "network": network,
                    "limit": limit,
                    "learn": learn,
                    "mean_bits": np.nan if best is None else best["mean_bits"],
                    "criterion_ratio": np.nan if best is None else best["criterion_ratio"],
                    "low": np.nan if best is None else best["criterion_ratio_low"],
                    "high": np.nan if best is None else best["criterion_ratio_high"],
                    "uniform_bits": certified_depth(uniform, limit),
                    "seconds": seconds,
                }
            )
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return rows


def measure_quality(network: str, folder: str) -> list[dict[str, Any]]:
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
        allocation = Allocation.of(measurements, sensitivity, Goal.of(None, budget))
        candidates = Candidates(measurements, allocation, 0.95)
        generator = np.random.default_rng(0)
        for _ in range(DRAWN):
            drawn = random_allocation(allocation, budget, generator)
            candidates.measure([candidates.allocated(drawn)])
        ratios = [row["criterion_ratio"] for row in candidates.whole()]
        rows.append(
            {
                "network": network,
                "budget": budget,
                "found_bits": found["mean_bits"],
                "found_ratio": found["criterion_ratio"],
                "uniform_ratio": uniform,
                "random_ratio": min(ratios),
            }
        )
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    return rows


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
    """The table of certified strategies, a line per network and a column per limit."""
    limits = sorted(set(results["limit"]))
    lines = [
        "| certified on test: mean bits, CR, 95% interval | learned "
        + " ".join(f"| CR ≤ {limit:g}" for limit in limits)
        + " | uniform depth at these |",
        "|---" * (3 + len(limits)) + "|",
    ]
    for (network, learn), rows in results.groupby(["network", "learn"], sort=False):
        cells = [
            "none"
            if pd.isna(row["mean_bits"])
            else f"**{row['mean_bits']:.3f}** bits, {grids.ratio(row)}"
            for row in rows.to_dict("records")
        ]
        depths = ["none" if pd.isna(d) else f"{d:.0f}" for d in rows["uniform_bits"]]
        epochs = f"{learn} epochs" if learn else "no"
        lines.append(f"| {network} | {epochs} | {' | '.join(cells)} | {', '.join(depths)} |")
    return "\n".join(lines) + "\n"


def quality_markdown(results: pd.DataFrame) -> str:
    """The table of strategies within budgets, a line per network and budget."""
    lines = [
        "| CR on validation within a budget | mean bits | best uniform | best of 100 random "
        "| search | its mean bits |",
        "|---|---|---|---|---|---|",
    ]
    for row in results.to_dict("records"):
        ratios = [row[f"{kind}_ratio"] for kind in ("uniform", "random", "found")]
        cells = ["–" if pd.isna(ratio) else f"{ratio:.4g}" for ratio in ratios]
        numbers = f"{row['budget']:g} | {' | '.join(cells)} | {row['found_bits']:.3f}"
        lines.append(f"| {row['network']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found, quality = [], []
    for network in grids.chosen_networks(__doc__):
        with tempfile.TemporaryDirectory() as folder:
            found += measure(network, folder)
            results = grids.write_rows(RESULTS, pd.DataFrame(found))
            quality += measure_quality(network, folder)
            qualities = grids.write_rows(QUALITY, pd.DataFrame(quality))
        grids.write_table(MARKERS, markdown(results))
        grids.write_table(QUALITY_MARKERS, quality_markdown(qualities))
        print(markdown(results))


if __name__ == "__main__":
    main()
