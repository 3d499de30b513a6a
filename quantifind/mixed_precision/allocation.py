"""Which choice each tensor gets, under a budget (`quantifind.mixed_precision.knapsack`)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from typing import Any

from torch import Tensor, nn

from quantifind.certification.goal import Goal
from quantifind.mixed_precision.knapsack import Assignment, Option, allocate, pareto, total_cost
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.rounded_options import RoundedOptions
from quantifind.mixed_precision.search_space import choice_key, nearest_in_bits
from quantifind.mixed_precision.sensitivity import Sensitivity
from quantifind.network.folding import Pairs, parameter_count
from quantifind.network.modules import named_tensors
from quantifind.network.trace import ProductFacts, activation_names
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins

# the widest of the uniform candidates
UNIFORM_BITS = 8


@dataclass(frozen=True)
class Allocation:
    """The problem that a search solves: options, their costs, and their predicted loss increases.

    goal: whose cost is counted.
    values: the network's tensors by name.
    products: of a pass, for the costs.
    folded: pairs of names, of the norms that are folded in ``model``.
    rounded_options: the choices, each alone.
    loss_increases: by `choice_key`, of those that were measured or are predicted.
    options: one knapsack class per weight (with the activation it multiplies) or pair of
        activations: all its options.
    groups: of each its Pareto-optimal options, costliest first.
    fixed: the cost of what the space doesn't name.
    near: the range of loss increases in which allocations that just keep the limit are expected.
    """

    model: nn.Module
    goal: Goal
    values: dict[str, Tensor]
    folded: Pairs
    products: list[ProductFacts]
    rounded_options: RoundedOptions
    loss_increases: dict[str, float]
    options: list[list[Option]]
    groups: list[list[Option]]
    fixed: float
    near: tuple[float, float] = (0.0, math.inf)

    @classmethod
    def of(
        cls,
        measurements: Measurements,
        sensitivity: Sensitivity,
        goal: Goal,
        near: tuple[float, float] = (0.0, math.inf),
    ) -> "Allocation":
        """Raises: ValueError for a budget that the smallest candidate exceeds."""
        model = measurements.model
        given: dict[str, Any] = {
            "model": model,
            "goal": goal,
            "values": named_tensors(model),
            "folded": measurements.folded,
            "products": measurements.products,
            "rounded_options": sensitivity.rounded_options,
            "loss_increases": sensitivity.loss_increases,
            "near": near,
        }
        bare = cls(**given, options=[], groups=[], fixed=0.0)
        names = list(bare._group_names())
        options = bare._options(names)
        groups = [pareto(some) for some in options]
        # both operands of a product: test_activations_that_are_not_named_stay_in_float
        named = {name for one in names for kind in one for name in kind}
        fixed = bare.cost(Quantized()) - bare.cost(Quantized(), named)
        cheapest = fixed + sum(group[-1].cost for group in groups)
        if goal.budget is not None and goal.budget < cheapest:
            raise ValueError(
                f"budget {goal.cost} is {goal.budget:g}: "
                f"the smallest candidate takes {cheapest:.4g}"
            )
        return cls(**given, options=options, groups=groups, fixed=fixed)

    def _group_names(self) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
        """Names of tensors and of activations that are chosen together, since one's cost depends on
        the other's width."""
        own, met = self.rounded_options.space.tensors, self.rounded_options.space.activations
        products = (p.activations for p in self.products if p.weight is None)
        pairs = {names for names in products if not met.keys().isdisjoint(names)}
        paired = {name for pair in pairs for name in pair}
        for name in self.values:
            inputs = [name] if name in met and name not in paired else []
            if name in own or inputs:
                yield [name] if name in own else [], inputs
        yield from (([], pair) for pair in sorted(pairs))

    def _options(self, names: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[list[Option]]:
        """Of each group, all its options."""
        tried = [list(self._combinations(*one)) for one in names]
        costs: list[list[float]] = [[] for _ in names]
        # an entry of a cost is of one group, so that one option of each is costed at a time
        for number in range(max(map(len, tried), default=0)):
            now = [options[min(number, len(options) - 1)] for options in tried]
            own, met = ({n: c for one in now for n, c in one[kind].items()} for kind in (0, 1))
            found = self._costs(self._stand_ins(own, met))
            for each, (tensors, activations), options in zip(costs, names, tried, strict=True):
                if number < len(options):
                    each.append(sum(found.get(n, 0.0) for n in {*tensors, *activations}))
        return [
            [
                Option(own, met, cost, self.loss_increase(own, met))
                for (own, met), cost in zip(options, each, strict=True)
            ]
            for options, each in zip(tried, costs, strict=True)
        ]

    def _combinations(
        self, tensors: Sequence[str], activations: Sequence[str]
    ) -> Iterator[tuple[dict[str, Choice | None], dict[str, Choice | None]]]:
        space = self.rounded_options.space
        tried: list[list[tuple[str, Choice | None]]] = []
        for name in tensors:
            tried.append([(name, choice) for choice in space.tensors[name]])
        for name in activations:
            tried.append([(name, None), *((name, c) for c in space.activations.get(name, ()))])
        for chosen in combinations(*tried):
            yield dict(chosen[: len(tensors)]), dict(chosen[len(tensors) :])

    def loss_increase(self, tensors: Any, activations: Any) -> float:
        """Predicted: the sum of what each choice measured alone; NaN where one was not measured."""
        return sum(
            self.loss_increases.get(choice_key(kind, name, choice), math.nan)
            for kind, named in (("tensors", tensors), ("activations", activations))
            for name, choice in named.items()
            if choice is not None
        )

    def alone(self, tensors: Any, activations: Any) -> Quantized:
        """Tensors and activations by their choices, each fitted with the rest in float."""
        keys = self._keys(tensors, activations)
        self.rounded_options.make(key for kind in keys for key in kind.values())
        return self._quantized(keys)

    def _stand_ins(self, tensors: Any, activations: Any) -> Quantized:
        """What costs the same, rounded or not."""
        rounded_options = self.rounded_options
        return self._quantized(
            [
                {
                    n: k if rounded_options.has_made(k) else rounded_options.stand_in(k)
                    for n, k in keys.items()
                }
                for keys in self._keys(tensors, activations)
            ]
        )

    def _keys(self, tensors: Any, activations: Any) -> list[dict[str, str]]:
        """By name of a tensor, and of an activation, the key of its choice."""
        return [
            {n: choice_key(kind, n, choice) for n, choice in named.items() if choice is not None}
            for kind, named in (("tensors", tensors), ("activations", activations))
        ]

    def _quantized(self, keys: Sequence[Mapping[str, str]]) -> Quantized:
        own, met = (
            {name: self.rounded_options[key] for name, key in named.items()} for named in keys
        )
        said = {
            n: self.rounded_options.notes[k]
            for n, k in keys[0].items()
            if k in self.rounded_options.notes
        }
        return Quantized(own, met, self.folded, said)  # type: ignore[arg-type]

    def cost(self, quantized: Quantized, names: set[str] | None = None) -> float:
        """In the goal's unit, of the tensors and activations named, or of all."""
        costs = self._costs(quantized)
        return float(sum(v for name, v in costs.items() if names is None or name in names))

    def _costs(self, quantized: Quantized) -> dict[str, float]:
        """By name, in the goal's unit."""
        in_bits = self.goal.cost == "mean_bits"
        measure = plugins.load("costs", "model_bytes" if in_bits else self.goal.cost, "measure")
        costs: dict[str, float] = measure(self.model, quantized, self.products)
        unit = 8 / parameter_count(self.model) if in_bits else 1.0
        return {name: unit * cost for name, cost in costs.items()}

    def costs(self, quantized: Quantized) -> dict[str, float]:
        """By each module of `quantifind.costs`."""
        totals = {}
        for name in plugins.names("costs"):
            measure = plugins.load("costs", name, "measure")
            totals[name] = float(sum(measure(self.model, quantized, self.products).values()))
        return totals

    def total(self, assignment: Assignment) -> float:
        """The cost of an assignment, with what is fixed."""
        return self.fixed + total_cost(self.groups, assignment)

    def predicted(self, assignment: Assignment) -> float:
        """The loss increase of an assignment."""
        pairs = zip(self.groups, assignment, strict=True)
        return sum(group[i].loss_increase for group, i in pairs)

    def keys_of(self, assignments: Iterable[Assignment]) -> list[str]:
        """By `choice_key`, the choices of tensors that some assignments take, each once."""
        found: dict[str, None] = {}
        for assignment in assignments:
            for group, index in zip(self.groups, assignment, strict=True):
                found |= dict.fromkeys(self._keys(group[index].tensors, {})[0].values())
        return list(found)

    def solve(
        self, budget: float, groups: Sequence[Sequence[Option]] | None = None
    ) -> Assignment | None:
        """The options with the least predicted loss increase within a budget; None where none are.

        budget: in the goal's unit.
        groups: instead of all options.
        """
        # a budget that is met exactly is met: test_a_budget_is_spent_to_the_last_byte
        return allocate(groups or self.groups, (budget - self.fixed) * (1 + 1e-9))

    def strategy(
        self, assignment: Assignment, groups: Sequence[Sequence[Option]] | None = None
    ) -> Strategy:
        """The choices of an assignment."""
        tensors: dict[str, Any] = dict.fromkeys(self.values)
        activations: dict[str, Any] = dict.fromkeys(activation_names(self.products))
        for group, index in zip(groups or self.groups, assignment, strict=True):
            tensors |= group[index].tensors
            activations |= group[index].activations
        return Strategy(tensors, activations if any(activations.values()) else {}, self.folded)

    def uniform_strategies(self) -> Iterator[Strategy]:
        """The same choice for every weight, where all have it, and others at as many bits or the
        nearest there are; all of few bits."""
        own = self.rounded_options.space.tensors
        weights = [name for name in own if self.values[name].dim() > 1]
        for choice in own[weights[0]] if weights else []:
            bits = choice.width
            if bits <= UNIFORM_BITS and all(choice in own[name] for name in weights):
                tensors: dict[str, Choice | None] = dict.fromkeys(self.values)
                for name, choices in own.items():
                    is_weight = name in weights
                    tensors[name] = choice if is_weight else nearest_in_bits(choices, bits)
                # what is far from the goal is not rounded
                if all(
                    self.rounded_options.has_made(k) for k in self._keys(tensors, {})[0].values()
                ):
                    yield Strategy(tensors, folded=self.folded)
