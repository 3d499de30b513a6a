"""The candidates of a search: made of each tensor's choices, measured on the whole network."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product as combinations
from typing import Any

import numpy as np

from quantifind.certification.certificate import degradation, hopeless, outdone, ratio_interval
from quantifind.certification.goal import Goal
from quantifind.costs import model_bytes
from quantifind.mixed_precision.allocation import Assignment, Option, allocate, undominated
from quantifind.mixed_precision.measurements import Columns, Measurements
from quantifind.mixed_precision.sensitivity import (
    PRECISION,
    Menus,
    part_key,
    quantized_parts,
    sensitivities,
)
from quantifind.network.macs import multiply_adds
from quantifind.network.modules import named_tensors
from quantifind.quantize import mean_bits
from quantifind.strategy import Choice, Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.tensor.scales import scaled
from quantifind.utils import plugins

# shares of the validation examples after each of which a candidate is given up or goes on
RACE = (0.125, 0.25, 0.5, 1.0)
# the widest of the uniform candidates
UNIFORM_BITS = 8
# ends the origin of a candidate whose scales were adjusted on validation data
ADJUSTED = ", scales adjusted"
Row = dict[str, Any]
Chosen = Mapping[str, Choice | None]


@dataclass(frozen=True)
class Trial:
    """A candidate to measure. key: names it for ever."""

    key: str
    origin: str
    strategy: Strategy
    quantized: Quantized


class Candidates:
    """What a search may choose among, and the rows of those it has measured.

    units: of each tensor, with the site that meets it, and of each product of two activations, the
        options from the costliest to the cheapest, those left out that another one beats.
    fixed: the cost, in the goal's unit, of what no menu names.
    """

    def __init__(
        self,
        measurements: Measurements,
        menus: Menus,
        goal: Goal,
        confidence: float,
        precision: float = PRECISION,
    ) -> None:
        self.measurements, self.menus, self.goal = measurements, menus, goal
        self.model, self.confidence = measurements.model, confidence
        self.values = named_tensors(self.model)
        if not menus["tensors"]:
            raise ValueError("no tensor of the network has a choice: the menus need some")
        if empty := [name for menu in menus.values() for name in menu if not menu[name]]:
            raise ValueError(f"{empty[0]}: its menu has no choice")
        self.products = multiply_adds(self.model, measurements.calibration[0][0])
        self.parts = quantized_parts(measurements, menus)
        table = sensitivities(measurements, menus, self.parts, precision=precision)
        keys = map(part_key, table["kind"], table["name"], table["choice"])
        self.rises = dict(zip(keys, table["loss_increase"], strict=True))
        self.units = [undominated(self._options(*unit)) for unit in self._units()]
        self.fixed = self.cost(Quantized({})) - self.cost(
            Quantized({}), {*menus["tensors"], *menus["activations"]}
        )
        self.rows: dict[str, Row] = {}
        self.assignments: dict[str, Assignment] = {}
        self.best_losses: np.ndarray | None = None
        # what the scales of weights are multiplied with in allocations
        self.factors: dict[str, float] = {}
        cheapest = self.fixed + sum(unit[-1].cost for unit in self.units)
        if goal.budget is not None and goal.budget < cheapest:
            raise ValueError(
                f"budget {goal.cost} is {goal.budget:g}: "
                f"the smallest candidate takes {cheapest:.4g}"
            )

    def _units(self) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
        """Names of tensors and of sites that are chosen together, since one's cost depends on the
        other's width."""
        own, sites = self.menus["tensors"], self.menus["activations"]
        pairs = {p.sites for p in self.products if p.weight is None} if sites else set()
        paired = {site for pair in pairs for site in pair}
        for name in self.values:
            met = [name] if name in sites and name not in paired else []
            if name in own or met:
                yield [name] if name in own else [], met
        yield from (([], pair) for pair in sorted(pairs))

    def _options(self, tensors: Sequence[str], sites: Sequence[str]) -> list[Option]:
        menus: list[list[tuple[str, Choice | None]]] = []
        for name in tensors:
            menus.append([(name, choice) for choice in self.menus["tensors"][name]])
        for name in sites:
            levels = self.menus["activations"][name]
            menus.append([(name, None), *((name, choice) for choice in levels)])
        options = []
        for chosen in combinations(*menus):
            own, met = dict(chosen[: len(tensors)]), dict(chosen[len(tensors) :])
            cost = self.cost(self.alone(own, met), {*tensors, *sites})
            options.append(Option(own, met, cost, self.rise(own, met)))
        return options

    def rise(self, tensors: Chosen, activations: Chosen) -> float:
        """Predicted, of the loss: the sum of what each measured alone."""
        return sum(
            self.rises[part_key(kind, name, choice)]
            for kind, named in (("tensors", tensors), ("activations", activations))
            for name, choice in named.items()
            if choice is not None
        )

    def alone(self, tensors: Chosen, activations: Chosen) -> Quantized:
        """Tensors and activations by their choices, each fitted with the rest in float."""
        tensor_parts, activation_parts = (
            {
                name: self.parts[part_key(kind, name, choice)]
                for name, choice in named.items()
                if choice is not None
            }
            for kind, named in (("tensors", tensors), ("activations", activations))
        )
        return Quantized(tensor_parts, activation_parts)

    def cost(self, quantized: Quantized, names: set[str] | None = None) -> float:
        """In the goal's unit, of the tensors and sites named, or of all."""
        in_bits = self.goal.cost == "mean_bits"
        measure = plugins.load("costs", "model_bytes" if in_bits else self.goal.cost, "measure")
        costs = measure(self.model, quantized, self.products)
        total = float(sum(v for name, v in costs.items() if names is None or name in names))
        count = sum(tensor.numel() for tensor in self.values.values())
        return 8 * total / count if in_bits else total

    def costs(self, quantized: Quantized) -> dict[str, float]:
        """What a candidate costs by each module of `quantifind.costs`."""
        totals = {}
        for name in plugins.names("costs"):
            measure = plugins.load("costs", name, "measure")
            totals[name] = float(sum(measure(self.model, quantized, self.products).values()))
        return totals

    def allocate(
        self, budget: float, units: Sequence[Sequence[Option]] | None = None
    ) -> Assignment | None:
        """The options with the least predicted rise within a budget, in the goal's unit; None where
        none are."""
        # a budget that is met exactly is met: test_a_budget_is_spent_to_the_last_byte
        return allocate(units or self.units, (budget - self.fixed) * (1 + 1e-9))

    def strategy(
        self, assignment: Assignment, units: Sequence[Sequence[Option]] | None = None
    ) -> Strategy:
        """The choices of an assignment, without codes."""
        tensors: dict[str, Choice | None] = dict.fromkeys(self.values)
        activations: dict[str, Choice | None] = dict.fromkeys(self.menus["activations"])
        for unit, index in zip(units or self.units, assignment, strict=True):
            tensors |= unit[index].tensors
            activations |= unit[index].activations
        levels = activations if any(activations.values()) else {}
        return Strategy(tensors, levels)

    def uniform(self) -> Iterator[Strategy]:
        """The same choice for every weight, where all have it in their menu, and others at as many
        bits or the nearest there are; all of few bits."""
        own = self.menus["tensors"]
        weights = [name for name in own if self.values[name].dim() > 1]
        for choice in own[weights[0]] if weights else []:
            bits = choice.get("bits", 2)
            if bits <= UNIFORM_BITS and all(choice in own[name] for name in weights):
                tensors: dict[str, Choice | None] = dict.fromkeys(self.values)
                for name, menu in own.items():
                    nearest = min(menu, key=lambda c: abs(c.get("bits", 2) - bits))
                    tensors[name] = choice if name in weights else nearest
                yield Strategy(tensors)

    def trial(self, origin: str, strategy: Strategy, quantized: Quantized) -> Trial:
        """A candidate to measure, named by its origin and choices."""
        return Trial(f"{origin} {choices_key(strategy)}", origin, strategy, quantized)

    def allocated(self, assignment: Assignment) -> Trial:
        """An allocation to measure, each tensor fitted with the rest in float, scales adjusted."""
        strategy = self.strategy(assignment)
        self.assignments[choices_key(strategy)] = assignment
        quantized = self.alone(strategy.tensors, strategy.activations)
        if not self.factors:
            return self.trial("allocated", strategy, quantized)
        # as `quantifind.mixed_precision.refinement.adjust_scales` names them
        key = f"allocated {choices_key(strategy)} {json.dumps(self.factors)}"
        return Trial(key, f"allocated{ADJUSTED}", strategy, scaled(quantized, self.factors))

    def measure(self, trials: Sequence[Trial]) -> list[Row]:
        """Their rows, which are kept."""
        new = [trial for trial in trials if trial.key not in self.rows]
        for row in self.measured(new):
            self.keep(row)
        return [self.rows[trial.key] for trial in trials]

    def measured(self, trials: Sequence[Trial], rival: Row | None = None) -> list[Row]:
        """Their rows: of each from as many examples as it takes to give it up, else all.

        rival: a row of all examples; a trial that is likely to be worse is given up, too.
        """
        everything, going_on = self.measurements.examples, dict.fromkeys(range(len(trials)))
        other = None if rival is None else self._columns(rival)
        found: dict[int, tuple[int, dict[str, float]]] = {}
        for share in RACE:
            quantized = {trials[i].key: trials[i].quantized for i in going_on}
            measured = self.measurements.all_columns(quantized, math.ceil(share * everything))
            for i in list(going_on):
                columns = measured[trials[i].key]
                drop = degradation(columns, confidence=self.confidence)
                found[i] = len(columns["loss"]), drop
                outdone = other is not None and self._outdone(columns, other)
                if outdone or self._hopeless(columns):
                    del going_on[i]
        return [self._row(trial, *found[i]) for i, trial in enumerate(trials)]

    def _row(self, trial: Trial, examples: int, drop: dict[str, float]) -> Row:
        strategy, quantized = trial.strategy, trial.quantized
        original = self.measurements.original["loss"].mean().item()
        known = all(
            c is None or part_key("tensors", n, c) in self.rises
            for n, c in strategy.tensors.items()
        )
        rise = self.rise(strategy.tensors, strategy.activations) if known else math.nan
        return {
            "key": trial.key,
            "strategy": replace(strategy, fitted=quantized),
            "origin": trial.origin,
            "mean_bits": mean_bits(self.model, quantized),
            "model_bytes": sum(model_bytes.measure(self.model, quantized, []).values()),
            self.goal.cost: self.cost(quantized),
            "predicted_ratio": 1 + rise / original,
            "examples": examples,
            **drop,
        }

    def completed(self, row: Row) -> Row:
        """The row of one that was given up, of all examples, which is kept; any other as it is."""
        if self.is_whole(row):
            return row
        columns = self._columns(row)
        whole = {**row, "examples": len(columns["loss"])}
        self.rows[row["key"]] = whole | degradation(columns, confidence=self.confidence)
        return self.rows[row["key"]]

    def drop(self, row: Row) -> None:
        """Let a candidate with adjusted scales go for one with better ones."""
        if row["origin"].endswith(ADJUSTED):
            self.rows.pop(row["key"], None)

    def keep(self, row: Row) -> None:
        """Let a measured candidate be one of those to choose among."""
        self.rows[row["key"]] = row
        if self.goal.limit is None and self.best() is row:
            self.best_losses = self._columns(row)["loss"]

    def _columns(self, row: Row) -> Columns:
        return self.measurements.columns(row["key"], row["strategy"].fitted)

    def _hopeless(self, columns: Columns) -> bool:
        goal, everything, confidence = self.goal, self.measurements.examples, self.confidence
        if goal.limit is not None:
            return hopeless(columns, goal.measure, goal.limit, everything, confidence=confidence)
        losses = columns["loss"]
        if self.best_losses is None:
            return False
        return ratio_interval(losses, self.best_losses[: len(losses)])[0] > 1

    def _outdone(self, columns: Columns, rival: Columns) -> bool:
        of_ratio = self.goal.measure == "criterion_ratio"
        return of_ratio and outdone(columns, rival, confidence=self.confidence)

    def whole(self) -> list[Row]:
        """The rows of candidates measured on all examples."""
        return [r for r in self.rows.values() if self.is_whole(r)]

    def is_whole(self, row: Row) -> bool:
        return bool(row["examples"] == self.measurements.examples)

    def best(self, origin: str | None = None) -> Row | None:
        """The candidate that the goal likes best of those, of an origin, that keep it."""
        keeping = [
            row
            for row in self.whole()
            if self.goal.keeps(row) and (origin is None or row["origin"].startswith(origin))
        ]
        return min(keeping, key=self.goal.rank, default=None)

    def best_assignment(self) -> Assignment | None:
        row = self.best("allocated")
        return None if row is None else self.assignments[choices_key(row["strategy"])]


def choices_key(strategy: Strategy) -> str:
    """A strategy's choices as a string."""
    return json.dumps(strategy.choices, sort_keys=True)


def note(row: Row) -> str:
    """A candidate beside a progress bar."""
    return f"{row['mean_bits']:.3g} bits CR {row['criterion_ratio']:.4f}"
