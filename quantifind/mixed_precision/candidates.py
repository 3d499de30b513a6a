"""The candidates of a search: quantized networks, measured whole, of which the best is kept."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantifind.certification.certificate import ratio_interval
from quantifind.certification.digits import amount
from quantifind.certification.goal import answer_of
from quantifind.certification.measures import MEASURES, degradation
from quantifind.certification.race import hopeless
from quantifind.costs import model_bytes
from quantifind.mixed_precision.allocation import Allocation
from quantifind.mixed_precision.knapsack import Assignment
from quantifind.mixed_precision.measurements import Columns, Measurements
from quantifind.mixed_precision.sensitivity import Sensitivity
from quantifind.quantize import mean_bits
from quantifind.runtime.control import Control
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized

# shares of the validation examples after each of which a candidate is given up or goes on
RACE = (0.125, 0.25, 0.5, 1.0)
# a candidate is stopped for futility when, at this confidence, its bound on all examples would
# still exceed the limit
FUTILE = 0.95
Row = dict[str, Any]
# takes passes, and of the best so far mean bits and what it loses, by name
Told = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Trial:
    """A candidate to measure.

    key: stable.
    origin: "uniform", "allocated", "sequential", "following … epochs" or "trained … epochs",
        and which share of the codes is not 0 where that was asked for.
    scales_adjusted: whether its scales are fitted on training inputs to follow the float network.
    """

    key: str
    origin: str
    scales_adjusted: bool
    strategy: Strategy
    quantized: Quantized


class Candidates:
    """The rows of those that have been measured.

    allocation: the problem that they solve.
    confidence: of the bounds.
    rows: by key, those to choose among.
    assignments: by `choices_key`, of allocated candidates.
    control: of those that were trained further.
    told: gets how the search stands, after each.
    """

    def __init__(
        self,
        measurements: Measurements,
        allocation: Allocation,
        confidence: float,
        told: Told | None = None,
    ) -> None:
        self.measurements, self.allocation = measurements, allocation
        self.goal, self.confidence = allocation.goal, confidence
        self.rows: dict[str, Row] = {}
        self.assignments: dict[str, Assignment] = {}
        self.control: Control | None = None
        self.told = told
        self._best_losses: np.ndarray | None = None

    def reallocate(self, sensitivity: Sensitivity) -> None:
        """Take other loss increases for those that the allocation was made by."""
        old = self.allocation
        self.allocation = Allocation.of(self.measurements, sensitivity, self.goal, old.near)
        self.assignments = {}

    def trial(self, origin: str, strategy: Strategy, quantized: Quantized, how: str = "") -> Trial:
        """A candidate to measure, named by its origin, by how its codes were made where choices
        don't tell, and by its choices."""
        key = f"{origin}{how} {choices_key(strategy)}"
        return Trial(key, origin, False, strategy, quantized)

    def allocated(self, assignment: Assignment) -> Trial:
        """An allocation to measure, each tensor fitted with the rest in float."""
        strategy = self.allocation.strategy(assignment)
        self.assignments[choices_key(strategy)] = assignment
        quantized = self.allocation.alone(strategy.tensors, strategy.activations)
        return self.trial("allocated", strategy, quantized)

    def fitted(self, row: Row, quantized: Quantized, examples: int) -> Trial:
        """A candidate with scales that were fitted to so many examples, which other passes change:
        test_rows_are_those_of_their_codes_whatever_was_searched_for_before."""
        key = f"{row['key']} fitted to {examples}"
        return Trial(key, row["origin"], True, row["strategy"], quantized)

    def measure(self, trials: Sequence[Trial]) -> list[Row]:
        """Their rows, which are kept."""
        new = [trial for trial in trials if trial.key not in self.rows]
        for row in self.measured(new):
            self.keep(row)
        return [self.rows[trial.key] for trial in trials]

    def measured(self, trials: Sequence[Trial], race: Sequence[float] = RACE) -> list[Row]:
        """Their rows: of each from as many examples as it takes to give it up, else all.

        race: shares of the examples after each of which one may be given up.
        """
        everything, going_on = self.measurements.examples, dict.fromkeys(range(len(trials)))
        found: dict[int, Columns] = {}
        for share in race:
            quantized = {trials[i].key: trials[i].quantized for i in going_on}
            measured = self.measurements.all_columns(quantized, math.ceil(share * everything))
            for i in list(going_on):
                found[i] = measured[trials[i].key]
                if self._is_given_up(found[i]):
                    del going_on[i]
        return [self._row(trial, found[i]) for i, trial in enumerate(trials)]

    def _is_given_up(self, columns: Columns) -> bool:
        goal, confidence = self.goal, self.confidence
        if goal.limits:
            everything = self.measurements.examples
            return any(
                hopeless(columns, *limit, everything, confidence=confidence, level=FUTILE)
                for limit in goal.limits.items()
            )
        losses, best = columns["loss"], self._best_losses
        return best is not None and ratio_interval(losses, best[: len(losses)])[0] > 1

    def _row(self, trial: Trial, columns: Columns) -> Row:
        strategy, quantized, allocation = trial.strategy, trial.quantized, self.allocation
        increase = allocation.loss_increase(strategy.tensors, strategy.activations)
        costs = model_bytes.measure(allocation.model, quantized, [])
        loss = self.measurements.original.calibrated_criterion
        row = {
            **vars(trial),
            "answer": answer_of(trial.origin),
            "mean_bits": mean_bits(allocation.model, quantized),
            "model_bytes": sum(costs.values()),
            "predicted_fidelity": increase / (loss if loss > 0 else math.nan),
            "examples": len(columns["loss"]),
            **degradation(columns, confidence=self.confidence),
        }
        if self.goal.cost not in row:
            row[self.goal.cost] = allocation.cost(quantized)
        return row

    def completed(self, row: Row) -> Row:
        """The row of one that was given up, of all examples, which is kept; any other as it is."""
        if self.is_whole(row):
            return row
        columns = self.columns(row)
        whole = {**row, "examples": len(columns["loss"])}
        self.rows[row["key"]] = whole | degradation(columns, confidence=self.confidence)
        return self.rows[row["key"]]

    def keep(self, row: Row) -> None:
        """Let a measured candidate be one of those to choose among."""
        self.rows[row["key"]] = row
        if self.goal.limit is None and self.is_best(row):
            self._best_losses = self.columns(row)["loss"]
        best = None if self.told is None else self.best()
        if self.told is not None and best is not None:
            measure = self.goal.measure
            facts = {"mean_bits": best["mean_bits"], measure: best[measure]}
            self.told({"passes": self.measurements.passes.taken} | facts)

    def columns(self, row: Row) -> Columns:
        """Of all examples."""
        return self.measurements.columns(row["key"], row["quantized"])

    def whole(self) -> list[Row]:
        """The rows of candidates measured on all examples."""
        return [row for row in self.rows.values() if self.is_whole(row)]

    def is_whole(self, row: Row) -> bool:
        return bool(row["examples"] == self.measurements.examples)

    def note(self, row: Row) -> str:
        """A candidate in few words: its bits, and the measure that was asked for."""
        measure = self.goal.measure
        measure = measure if math.isfinite(row[measure]) else "relative_error"
        lost = f"{MEASURES[measure].words} {amount(measure, row[measure])}"
        return f"{row['mean_bits']:.3g} bits, {lost}"

    def best(self, origin: str | None = None) -> Row | None:
        """The best candidate that keeps the goal; with ``origin``, of those of that origin."""
        return self._best_of(row for row in self.whole() if origin in (None, row["origin"]))

    def _best_of(self, rows: Iterable[Row]) -> Row | None:
        return min(filter(self.goal.keeps, rows), key=self.goal.rank, default=None)

    def is_best(self, row: Row) -> bool:
        best = self.best()
        return best is not None and best["key"] == row["key"]

    def best_assignment(self) -> Assignment | None:
        """The assignment of the best allocated candidate that the present allocation still has."""
        rows = (row for row in self.whole() if row["origin"] == "allocated")
        row = self._best_of(r for r in rows if choices_key(r["strategy"]) in self.assignments)
        return None if row is None else self.assignments[choices_key(row["strategy"])]


def choices_key(strategy: Strategy) -> str:
    """A strategy's choices as a string."""
    return json.dumps(strategy.choices, sort_keys=True)
