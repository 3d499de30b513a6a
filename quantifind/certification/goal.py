"""What a search is asked for: a limit of what is lost, or a budget; and the ladder to judge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantifind.certification.certificate import certified_steps
from quantifind.certification.measures import MEASURES
from quantifind.utils import plugins

if TYPE_CHECKING:  # for the stage that always runs: test_heavy_imports_are_rare
    import pandas as pd

Limit = float | Mapping[str, float]
# where a search is given neither a limit nor a budget; of accuracy, where there is one
DEFAULT_LIMIT = {"calibrated_ratio": 1.01, "accuracy_drop": 0.003}
# what a strategy took, by a candidate's origin: the answers of a search that are told apart
ANSWERS = {
    "as_is": "as it is: calibrated on training inputs; no training, no training label",
    "following": "following: its codes learned to follow the float network's outputs; no training "
    "label",
    "trained": "trained further: its codes learned from labels, too; the network was trained on",
}
# of losses: on given examples a network whose answers merely differ may have less by luck
RATIOS = ("criterion_ratio", "calibrated_ratio")
# each step of a ladder has at most this share of the bytes of the one above it
STEP = 0.97
# and the first at most so many times those of the chosen one
TOP = 1.6
# but for one, which is left if the others fail: the smallest that is so many widths of its bound
# from the limit, on validation data; at 95% confidence about four standard errors
SURE = 2.5


@dataclass(frozen=True)
class Goal:
    """The least ``cost`` with each measure at most its limit; or, where none is given, the least of
    ``measure`` with ``cost`` at most ``budget``.

    Each limit is tested at the same level and all must hold, which needs no correction
    (intersection–union test, Berger 1982).

    measure: one of `quantifind.certification.measures.MEASURES`, the first of the limits'.
    limits: by measure, the most that its one-sided bound may be; none for a budget.
    cost: ``mean_bits`` or a module of `quantifind.costs`.
    budget: the most that the cost may be.
    """

    measure: str
    limits: Mapping[str, float]
    cost: str
    budget: float | None

    @property
    def limit(self) -> float | None:
        """Of the first measure."""
        return self.limits.get(self.measure)

    @classmethod
    def of(cls, limit: Limit | None, budget: Limit | None) -> "Goal":
        """A goal from what `quantifind.search.find_strategy` takes.

        limit: the criterion ratio, or measures by their names; None for a budget, or for
            `DEFAULT_LIMIT`.
        budget: mean bits per parameter, or a cost by its name; None for a limit.
        Raises: ValueError for both, an unknown name, or a value out of range.
        """
        if limit is not None and budget is not None:
            raise ValueError(f"a search takes either a limit or a budget, not {limit=}, {budget=}")
        if budget is None:
            named = _named("limit", DEFAULT_LIMIT if limit is None else limit, "criterion_ratio")
            for measure, value in named.items():
                lowest = MEASURES[measure].lossless
                if not lowest <= value < math.inf:
                    raise ValueError(f"limit {measure} is {value:g}: {lowest:g} or more is needed")
            return cls(next(iter(named)), named, "model_bytes", None)
        named = _named("budget", budget, "mean_bits")
        if len(named) != 1:
            raise ValueError(f"budget is {budget!r}: one cost is needed")
        ((cost, value),) = named.items()
        if not 0 < value < math.inf:
            raise ValueError(f"budget {cost} is {value:g}: a number above 0 is needed")
        return cls("criterion_ratio", {}, cost, value)

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether a candidate does what was asked; one that can't be measured does not.

        row: its costs, and its `quantifind.certification.measures.degradation`.
        """
        if not math.isfinite(row[self.measure]):
            return False  # test_a_loss_that_is_nan_is_no_answer
        if self.budget is not None:
            return bool(row[self.cost] <= self.budget * (1 + 1e-9))
        return all(bool(row[f"{name}_bound"] <= limit) for name, limit in self.limits.items())

    def excess(self, row: Mapping[str, Any]) -> float:
        """How far the bounds are above their limits, of the measure that is furthest: as a multiple
        of what its limit allows to be lost. Above 0 where one does not keep its limit.

        row: as `keeps` takes it.
        """
        return self._excess({name: row[f"{name}_bound"] for name in self.limits})

    def excess_of_values(self, row: Mapping[str, Any]) -> float:
        """That of the values themselves, whatever their bounds are."""
        return self._excess({name: row[name] for name in self.limits})

    def _excess(self, lost: Mapping[str, float]) -> float:
        allowed = {n: max(v - MEASURES[n].lossless, 1e-9) for n, v in self.limits.items()}
        found = [(lost[n] - v) / allowed[n] for n, v in self.limits.items()]
        return max((math.inf if math.isnan(one) else one for one in found), default=0.0)

    def rank(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """What is to be least among the candidates that keep the goal.

        row: as `keeps` takes it.
        """
        bound, cost = row[f"{self.measure}_bound"], row[self.cost]
        return (bound, cost) if self.limit is None else (cost, bound)

    def margin(self, row: Mapping[str, Any]) -> float:
        """How far the degradation is below the limit, of the measure nearest to its own: as a
        multiple of the width of its bound, which at 95% confidence is 1.6 standard errors or more.

        What was not learned is held to lose at least what its answers diverge: a ratio below that
        is for the most part luck of the examples by which it was chosen, which others don't have
        (docs/statistics.md). For a budget, which has no limit, it is the bound with its sign
        turned.

        row: as `keeps` takes it.
        """
        if not self.limits:
            return -float(row[f"{self.measure}_bound"])
        return min(
            float((limit - _held(n, row)) / max(row[f"{n}_bound"] - row[n], 1e-12))
            for n, limit in self.limits.items()
        )


def _held(measure: str, row: Mapping[str, Any]) -> float:
    """The ratio measured, or, of a network as it is, 1 + its fidelity where that is more; any other
    measure as it was measured."""
    value, divergence = float(row[measure]), float(row.get("fidelity", math.nan))
    if measure not in RATIOS or row.get("answer") != "as_is" or math.isnan(divergence):
        return value
    return max(value, 1 + divergence)


def _named(kind: str, given: Limit, default: str) -> dict[str, float]:
    allowed = {"limit": list(MEASURES), "budget": ["mean_bits", *plugins.names("costs")]}[kind]
    named = given if isinstance(given, Mapping) else {default: given}
    if not named or not named.keys() <= set(allowed):
        raise ValueError(f"{kind} is {given!r}: a number or some of {', '.join(allowed)} is needed")
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{kind} {name} is {value!r}: a number is needed")
    return {name: float(value) for name, value in named.items()}


def answer_of(origin: str) -> str:
    """Which of the three `ANSWERS` a candidate of an origin is."""
    kind = origin.split()[0]
    return kind if kind in ANSWERS else "as_is"


def steps_that_keep(
    steps: "pd.DataFrame", limits: Mapping[str, float], bound: str = "bound"
) -> int:
    """How many steps of a ladder, from most bytes to fewest, pass: those before the first that has
    a bound above its limit (`quantifind.certification.certificate.certified_steps`).

    steps: a row for each, with the columns of `quantifind.certification.measures.degradation`.
    limits: by measure; all must hold.
    bound: which of the bounds, ``bound`` or, at the level of a look, ``look_bound``.
    """
    above = [steps[f"{measure}_{bound}"].to_numpy() - limit for measure, limit in limits.items()]
    return certified_steps(np.max(above, axis=0).tolist(), 0.0)


def ladder(
    rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], goal: Goal
) -> list[Mapping[str, Any]]:
    """The candidates to judge, from most bytes to fewest, the chosen one among them.

    The margin of each step is larger than that of every one below it. One with a smaller margin
    than another with fewer bytes would only be one more test to fail.

    rows: all candidates, as `Goal.keeps` takes them.
    chosen: one of the rows.
    goal: whose margin counts.
    """
    steps: list[Mapping[str, Any]] = []
    # a costlier step only adds one more chance to fail: test_a_ladder_starts_near_the_chosen
    size = chosen["model_bytes"]
    near = [row for row in rows if row["model_bytes"] <= TOP * size]
    above = [row for row in rows if row["model_bytes"] > TOP * size]
    sure = [row for row in above if goal.margin(row) >= SURE]
    fallback = min(sure, key=lambda row: row["model_bytes"], default=None)
    fallback = fallback or max(above, key=goal.margin, default=None)
    rows = near if fallback is None else [*near, fallback]
    for row in sorted(rows, key=lambda row: (row["model_bytes"], row[f"{goal.measure}_bound"])):
        if row is chosen or not steps or goal.margin(row) > goal.margin(steps[-1]):
            steps.append(row)
    spaced: list[Mapping[str, Any]] = []
    for row in steps[::-1]:
        if spaced and row["model_bytes"] > STEP * spaced[-1]["model_bytes"]:
            if row is not chosen:
                continue
            spaced.pop()
        spaced.append(row)
    return spaced
