"""The answer of a search: the best of its candidates, or the nearest, where none keeps the goal."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from quantifind.certification.goal import Goal, ladder
from quantifind.certification.measures import MEASURES, examples_needed
from quantifind.mixed_precision.candidates import Candidates, Row
from quantifind.mixed_precision.passes import Passes
from quantifind.mixed_precision.random_allocations import random_allocations
from quantifind.mixed_precision.shown import in_html, in_lines
from quantifind.runtime.control import Control
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Forward
from quantifind.utils.console import console

# relative error of outputs above which it is said beside a criterion ratio
SUSPICIOUS = 0.1


@dataclass(frozen=True)
class Found:
    """The answer of a search.

    strategy: the chosen one.
    quantized: what it has come to for the network.
    candidates: a row per candidate, largest first. Columns: ``strategy``, ``quantized``,
        ``origin``, ``answer`` (`quantifind.certification.goal.ANSWERS`), ``scales_adjusted``,
        ``mean_bits``, each of `quantifind.costs`, ``predicted_fidelity`` (what single tensors'
        divergences add up to, over the float loss), the ``examples`` it was measured on, those of
        `quantifind.certification.measures.degradation`, ``on_ladder`` and ``chosen``.
    sensitivity: the table of `quantifind.mixed_precision.sensitivity.measure_sensitivity`.
    goal: what was asked for.
    confidence: of the bounds.
    passes: what the search has cost, by phase, and what was left out.
    criterion, forward: by which it was judged, as `find_strategy` was given them.
    temperature: what the float network's logits are divided by for the calibrated ratio, fitted to
        validation data; None where there are none.
    control: float weights that had the training of the codes that learned from labels; None where
        none did.
    random: rows as the candidates', of `quantifind.mixed_precision.random_allocations`.
    """

    strategy: Strategy
    quantized: Quantized
    candidates: pd.DataFrame
    sensitivity: pd.DataFrame
    goal: Goal
    confidence: float
    passes: Passes
    criterion: Any = None
    forward: Forward | None = None
    temperature: float | None = None
    control: Control | None = None
    random: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __iter__(self) -> Iterator[Any]:
        """What most ask for: ``quantized, candidates = find_strategy(…)``."""
        return iter((self.quantized, self.candidates))

    def __repr__(self) -> str:
        return in_lines(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return in_html(self)

    @property
    def chosen(self) -> pd.Series:
        """The row of the chosen candidate."""
        return self.candidates[self.candidates["chosen"]].iloc[0]

    @property
    def mean_bits(self) -> float:
        """Bits per parameter, everything counted."""
        return float(self.chosen["mean_bits"])

    @property
    def model_bytes(self) -> float:
        """All that the quantized network stores."""
        return float(self.chosen["model_bytes"])

    @property
    def loss(self) -> float:
        """What it loses on validation data, by the first measure of the goal."""
        return float(self.chosen[self.goal.measure])

    @property
    def ladder(self) -> pd.DataFrame:
        """The candidates to judge on test data, largest first."""
        return self.candidates[self.candidates["on_ladder"]]


def found_by(
    candidates: Candidates,
    sensitivity: pd.DataFrame,
    criterion: Any,
    forward: Forward | None,
    *,
    random: int = 0,
    seed: int = 0,
) -> Found:
    """The answer that candidates give; what it has cost is said.

    random, seed: how many allocations at random are measured beside it, and of the draws.
    Raises: ValueError naming the nearest, where none keeps the goal.
    """
    best, table = best_and_table(candidates)
    passes, gain = candidates.measurements.passes, candidates.measurements.original.gain
    drawn = table.iloc[:0]
    if random and not passes.out_of_time and "interrupted" not in passes.left_out:
        with passes.of("random", math.inf):
            found = random_allocations(candidates, best["mean_bits"], random, seed=seed)
        drawn = found if len(found) else drawn
    console.print(f"{passes}", markup=False, highlight=False)
    return Found(
        strategy=best["strategy"],
        quantized=best["quantized"],
        candidates=table,
        sensitivity=sensitivity,
        goal=candidates.goal,
        confidence=candidates.confidence,
        passes=passes,
        criterion=criterion,
        forward=forward,
        temperature=None if gain is None else 1 / gain,
        control=candidates.control,
        random=drawn,
    )


def best_and_table(candidates: Candidates) -> tuple[Row, pd.DataFrame]:
    """The best candidate, and a table of all of them.

    Raises: ValueError naming the nearest, where none keeps the goal.
    """
    best = candidates.best() or _nearest(candidates)
    error = best["relative_error"]
    measure = candidates.goal.measure
    if measure in ("criterion_ratio", "calibrated_ratio") and error > SUSPICIOUS:
        console.print(
            f"Its {MEASURES[measure].words} is {best[measure]:.4g}, but its outputs are "
            f"{error:.0%} off: for outputs near the float network's ask for "
            "limit={'relative_error': 0.05}",
            markup=False,
        )
    able = [row for row in candidates.rows.values() if math.isfinite(row[measure])]
    rows = sorted(able, key=lambda row: -row["model_bytes"])
    steps = ladder([row for row in rows if candidates.is_whole(row)], best, candidates.goal)
    on_ladder = {row["key"] for row in steps}
    table = pd.DataFrame(rows)
    costs = pd.DataFrame([candidates.allocation.costs(row["quantized"]) for row in rows])
    table = table.join(costs[costs.columns.difference(table.columns)])
    gain = candidates.measurements.original.gain
    if gain is not None:
        table["original_temperature"] = 1 / gain
    table["on_ladder"] = table["key"].isin(on_ladder)
    table["chosen"] = table["key"] == best["key"]
    return best, table.drop(columns="key")


def _nearest(candidates: Candidates) -> Row:
    """The nearest of candidates that seem not to keep the limit, should it keep it after all.

    Raises: ValueError, naming it, where it doesn't.
    """
    goal, measure = candidates.goal, candidates.goal.measure
    rows = [row for row in candidates.rows.values() if math.isfinite(row[measure])]
    if not goal.limits or not rows:
        raise ValueError("no candidate can be measured: all losses are NaN or infinite")
    # by the values, as bounds of few examples are far above: test_the_nearest_is_measured_whole
    candidates.completed(min(rows, key=goal.excess_of_values))
    row = min(candidates.whole(), key=lambda row: (goal.excess(row), row["model_bytes"]))
    if goal.keeps(row):
        return row
    # that which it keeps least
    measure = max(
        goal.limits, key=lambda one: replace(goal, limits={one: goal.limits[one]}).excess(row)
    )
    value, bound, examples = row[measure], row[f"{measure}_bound"], row["examples"]
    limit = goal.limits[measure]
    text = (
        f"no candidate keeps {measure} at most {limit:g} with {candidates.confidence:.0%} "
        f"confidence on {examples} validation examples; the nearest has {value:.6g} (at most "
        f"{bound:.6g}) at {row['mean_bits']:.4g} bits"
    )
    needed = examples_needed(candidates.columns(row), goal.limits, candidates.confidence)
    if needed is not None:
        text += f"; with about {needed:,} examples it would be certain enough"
    others = {name: v for name, v in goal.limits.items() if name != measure}
    if others and replace(goal, measure=next(iter(others)), limits=others).keeps(row):
        text += f"; or ask for limit={others}"
    if candidates.measurements.passes.left_out:
        text += (
            f"; for want of effort or time: {', '.join(candidates.measurements.passes.left_out)}"
        )
    raise ValueError(text)
