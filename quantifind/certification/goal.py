"""What a search is asked for: a limit of what is lost, or a budget; and the ladder to judge."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantifind.utils import plugins

Limit = float | Mapping[str, float]
# what a limit may be of: its words, its unit, and what it is where nothing is lost
MEASURES = {
    "criterion_ratio": ("criterion ratio", "(1 is lossless)", 1.0),
    "accuracy_drop": ("accuracy drop", "(share of examples)", 0.0),
    "relative_error": ("relative error of the outputs", "(share of their norm)", 0.0),
}
# each step of a ladder has at most this share of the bytes of the one above it
STEP = 0.97


@dataclass(frozen=True)
class Goal:
    """The least ``cost`` with ``measure`` at most ``limit``; or, where that is None, the least of
    ``measure`` with ``cost`` at most ``budget``.

    measure: one of `MEASURES`.
    limit: the most that the one-sided bound of the measure may be.
    cost: ``mean_bits`` or a module of `quantifind.costs`.
    budget: the most that the cost may be.
    """

    measure: str
    limit: float | None
    cost: str
    budget: float | None

    @classmethod
    def of(cls, limit: Limit | None, budget: Limit | None) -> "Goal":
        """A goal from what `quantifind.search.find_strategy` takes.

        limit: the criterion ratio, or a measure by its name; None for a budget.
        budget: mean bits per parameter, or a cost by its name; None for a limit.
        Raises: ValueError for both or neither, an unknown name, or a value out of range.
        """
        if (limit is None) == (budget is None):
            raise ValueError(f"a search takes either a limit or a budget, not {limit=}, {budget=}")
        if limit is not None:
            measure, value = _one("limit", limit, "criterion_ratio", list(MEASURES))
            lowest = 1 if measure == "criterion_ratio" else 0
            if not lowest <= value < math.inf:
                raise ValueError(f"limit {measure} is {value:g}: {lowest} or more is needed")
            return cls(measure, value, "model_bytes", None)
        assert budget is not None
        cost, value = _one("budget", budget, "mean_bits", ("mean_bits", *plugins.names("costs")))
        if not 0 < value < math.inf:
            raise ValueError(f"budget {cost} is {value:g}: a number above 0 is needed")
        return cls("criterion_ratio", None, cost, value)

    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether a candidate does what was asked; one that can't be measured does not.

        row: its costs, and its `quantifind.certification.certificate.degradation`.
        """
        if not math.isfinite(row[self.measure]):
            return False  # test_a_loss_that_is_nan_is_no_answer
        if self.limit is not None:
            return bool(row[f"{self.measure}_bound"] <= self.limit)
        assert self.budget is not None
        return bool(row[self.cost] <= self.budget * (1 + 1e-9))

    def rank(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """What is to be least among the candidates that keep the goal.

        row: as `keeps` takes it.
        """
        bound, cost = row[f"{self.measure}_bound"], row[self.cost]
        return (cost, bound) if self.limit is not None else (bound, cost)

    def margin(self, row: Mapping[str, Any]) -> float:
        """How many standard errors the degradation is below the limit.

        For a budget, which has no limit, it is the bound with its sign turned.

        row: as `keeps` takes it.
        """
        value, bound = row[self.measure], row[f"{self.measure}_bound"]
        if self.limit is None:
            return -float(bound)
        return float((self.limit - value) / max(bound - value, 1e-12))

    def limit_to_certify(self, limits: Sequence[float]) -> float:
        """The limit of the search; for a budget, the first of those given.

        limits: of the criterion ratio.
        """
        return limits[0] if self.limit is None else self.limit


def _one(kind: str, given: Limit, default: str, allowed: Sequence[str]) -> tuple[str, float]:
    named = given if isinstance(given, Mapping) else {default: given}
    if len(named) != 1 or not named.keys() <= set(allowed):
        raise ValueError(f"{kind} is {given!r}: a number or one of {', '.join(allowed)} is needed")
    ((name, value),) = named.items()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{kind} {name} is {value!r}: a number is needed")
    return name, float(value)


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
