"""The fewest bits that are certified, of each network at three limits, and how good the search is.

    python benchmarks/search.py [--network NAME]

Each network is trained as the pipeline trains it. The search sees train and validation data; the
ladder it fixes is judged on test data once. Writes benchmarks/results/search.csv: by limit of the
criterion ratio, with and without learned rounding, the certified strategy, the certified uniform
depth, and the seconds of the search (the first of a network, 1.01 without learning, measures
everything; those after it go on from that). And search_quality.csv: within budgets, the criterion
ratio on validation data of what the search finds, of the best uniform strategy of its menus, and of
the best of 100 random allocations, no fewer than the search measures.
"""

import tempfile
import time
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import grids
from quantifind.certification.certificate import certified_depth, certified_steps
from quantifind.certification.goal import Goal
from quantifind.mixed_precision.candidates import Candidates
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.sensitivity import default_menus
from quantifind.search import find_strategy
from quantifind.workflow.evaluation_workflow import evaluate_bit_depths, evaluate_strategies

RESULTS = grids.ROOT / "benchmarks/results/search.csv"
QUALITY = grids.ROOT / "benchmarks/results/search_quality.csv"
MARKERS = grids.markers("python benchmarks/search.py")
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
            _, candidates = find_strategy(
                net, train, val, criterion, limit=limit, learn=learn, folder=folder
            )
            seconds = time.monotonic() - started
            ladder = candidates[candidates["on_ladder"]]
            judged = evaluate_strategies(net, ladder["strategy"], test, criterion)
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
    measurements = Measurements(net, train, val, criterion, folder=folder)
    menus = default_menus(measurements)
    rows = []
    for budget in BUDGETS:
        _, table = find_strategy(net, train, val, criterion, budget=budget, folder=folder)
        found = table[table["chosen"]].iloc[0]
        whole = table["examples"] == measurements.examples
        uniform = table[whole & (table["origin"] == "uniform")]["criterion_ratio"].min()
        candidates = Candidates(measurements, menus, Goal.of(None, budget), 0.95)
        generator = np.random.default_rng(0)
        for _ in range(DRAWN):
            candidates.measure(
                [candidates.allocated(random_allocation(candidates, budget, generator))]
            )
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
    candidates: Candidates, budget: float, generator: np.random.Generator
) -> tuple[int, ...]:
    """Options drawn at random, then one after another a step cheaper until the budget holds."""
    units = candidates.units
    chosen = [int(generator.integers(len(unit))) for unit in units]
    while (
        candidates.fixed + sum(unit[i].cost for unit, i in zip(units, chosen, strict=True)) > budget
    ):
        able = [i for i, unit in enumerate(units) if chosen[i] < len(unit) - 1]
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
            else f"**{row['mean_bits']:.3f}** bits, {row['criterion_ratio']:#.4g} "
            f"[{row['low']:#.4g}, {row['high']:#.4g}]"
            for row in rows.to_dict("records")
        ]
        depths = ["none" if pd.isna(d) else f"{d:.0f}" for d in rows["uniform_bits"]]
        epochs = f"{learn} epochs" if learn else "no"
        lines.append(f"| {network} | {epochs} | {' | '.join(cells)} | {', '.join(depths)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found, quality = [], []
    for network in grids.chosen_networks(__doc__):
        with tempfile.TemporaryDirectory() as folder:
            found += measure(network, folder)
            results = grids.write_rows(RESULTS, pd.DataFrame(found))
            quality += measure_quality(network, folder)
            grids.write_rows(QUALITY, pd.DataFrame(quality))
        grids.write_readme(MARKERS, markdown(results))
        print(markdown(results))


if __name__ == "__main__":
    main()
