"""Which choice each tensor gets, under a budget: an exact integer programme (the multiple-choice
knapsack, solved by HiGHS), as if loss increases added up."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from typing import Any

import numpy as np
from scipy import optimize, sparse
from torch import Tensor, nn

from quantifind.certification.goal import Goal
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.search_space import SearchSpace, choice_key
from quantifind.mixed_precision.sensitivity import Sensitivity
from quantifind.network.folding import Pairs, parameter_count
from quantifind.network.modules import named_tensors
from quantifind.network.trace import ProductFacts, activation_names, macs
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils import plugins

Assignment = tuple[int, ...]
# a solution so far below the largest loss increase is solved anew in its own unit
SHRINK = 0.01
# what the solver lets a constraint be broken by
TOLERANCE = 1e-6
# the widest of the uniform candidates
UNIFORM_BITS = 8


@dataclass(frozen=True)
class Option:
    """One way to quantize a group: a tensor with the activations that it meets.

    tensors, activations: the choices, None for what stays in float.
    cost: in the budget's unit.
    loss_increase: predicted.
    """

    tensors: dict[str, Choice | None]
    activations: dict[str, Choice | None]
    cost: float
    loss_increase: float


@dataclass(frozen=True)
class Allocation:
    """The problem that a search solves: options, their costs, and their predicted loss increases.

    goal: whose cost is counted.
    space: the choices.
    values: the network's tensors by name.
    products: of a pass, for the costs.
    folded: pairs of names, of the norms that are folded in ``model``.
    quantized, loss_increases: by `choice_key`, of each choice alone.
    groups: one knapsack class per weight (with the activation it multiplies) or pair of
        activations: its Pareto-optimal options, costliest first.
    fixed: the cost of what the space doesn't name.
    """

    model: nn.Module
    goal: Goal
    space: SearchSpace
    values: dict[str, Tensor]
    folded: Pairs
    products: list[ProductFacts]
    quantized: dict[str, QuantizedTensor | QParams]
    loss_increases: dict[str, float]
    groups: list[list[Option]]
    fixed: float

    @classmethod
    def of(
        cls,
        measurements: Measurements,
        space: SearchSpace,
        sensitivity: Sensitivity,
        goal: Goal,
    ) -> "Allocation":
        """Raises: ValueError for a budget that the smallest candidate exceeds."""
        model = measurements.model
        given: dict[str, Any] = {
            "model": model,
            "goal": goal,
            "space": space,
            "values": named_tensors(model),
            "folded": measurements.folded,
            "products": macs(model, measurements.calibration[0]),
            "quantized": sensitivity.quantized,
            "loss_increases": sensitivity.loss_increases,
        }
        bare = cls(**given, groups=[], fixed=0.0)
        names = list(bare._group_names())
        groups = [pareto(bare._options(*one)) for one in names]
        # both operands of a product: test_activations_that_are_not_named_stay_in_float
        named = {name for one in names for kind in one for name in kind}
        fixed = bare.cost(Quantized()) - bare.cost(Quantized(), named)
        cheapest = fixed + sum(group[-1].cost for group in groups)
        if goal.budget is not None and goal.budget < cheapest:
            raise ValueError(
                f"budget {goal.cost} is {goal.budget:g}: "
                f"the smallest candidate takes {cheapest:.4g}"
            )
        return cls(**given, groups=groups, fixed=fixed)

    def _group_names(self) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
        """Names of tensors and of activations that are chosen together, since one's cost depends on
        the other's width."""
        own, met = self.space.tensors, self.space.activations
        products = (p.activations for p in self.products if p.weight is None)
        pairs = {names for names in products if not met.keys().isdisjoint(names)}
        paired = {name for pair in pairs for name in pair}
        for name in self.values:
            inputs = [name] if name in met and name not in paired else []
            if name in own or inputs:
                yield [name] if name in own else [], inputs
        yield from (([], pair) for pair in sorted(pairs))

    def _options(self, tensors: Sequence[str], activations: Sequence[str]) -> list[Option]:
        tried: list[list[tuple[str, Choice | None]]] = []
        for name in tensors:
            tried.append([(name, choice) for choice in self.space.tensors[name]])
        for name in activations:
            tried.append([(name, None), *((name, c) for c in self.space.activations.get(name, ()))])
        options = []
        for chosen in combinations(*tried):
            own, met = dict(chosen[: len(tensors)]), dict(chosen[len(tensors) :])
            cost = self.cost(self.alone(own, met), {*tensors, *activations})
            options.append(Option(own, met, cost, self.loss_increase(own, met)))
        return options

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
        own, met = (
            {
                name: self.quantized[choice_key(kind, name, choice)]
                for name, choice in named.items()
                if choice is not None
            }
            for kind, named in (("tensors", tensors), ("activations", activations))
        )
        return Quantized(own, met, self.folded)  # type: ignore[arg-type]

    def cost(self, quantized: Quantized, names: set[str] | None = None) -> float:
        """In the goal's unit, of the tensors and activations named, or of all."""
        in_bits = self.goal.cost == "mean_bits"
        measure = plugins.load("costs", "model_bytes" if in_bits else self.goal.cost, "measure")
        costs = measure(self.model, quantized, self.products)
        total = float(sum(v for name, v in costs.items() if names is None or name in names))
        return 8 * total / parameter_count(self.model) if in_bits else total

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
        own = self.space.tensors
        weights = [name for name in own if self.values[name].dim() > 1]
        for choice in own[weights[0]] if weights else []:
            bits = choice.width
            if bits <= UNIFORM_BITS and all(choice in own[name] for name in weights):
                tensors: dict[str, Choice | None] = dict.fromkeys(self.values)
                for name, choices in own.items():
                    nearest = min(choices, key=lambda c: abs(c.width - bits))
                    tensors[name] = choice if name in weights else nearest
                yield Strategy(tensors, folded=self.folded)


def pareto(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both cost and loss increase, from the costliest down."""
    # one that gave NaN or infinity is taken where there is no other: test_what_is_no_number_is_left
    finite = [option for option in options if math.isfinite(option.loss_increase)] or options
    kept: list[Option] = []
    for option in sorted(finite, key=lambda o: (o.cost, o.loss_increase)):
        if not kept or option.loss_increase < kept[-1].loss_increase:
            kept.append(option)
    return kept[::-1]


def allocate(groups: Sequence[Sequence[Option]], budget: float) -> Assignment | None:
    """For each group the number of its option, so that the sum of the loss increases is least.

    budget: the most that the sum of the costs may be.
    Returns: None where even the cheapest cost more.

    >>> group = [Option({}, {}, 8.0, 0.0), Option({}, {}, 4.0, 0.1), Option({}, {}, 2.0, 1.0)]
    >>> allocate([group, group[1:]], 12.0)
    (0, 0)
    """
    costs = np.array([option.cost for group in groups for option in group])
    increases = np.array([option.loss_increase for group in groups for option in group])
    starts = np.cumsum([0, *map(len, groups)])
    least = [min((o.cost, o.loss_increase, i) for i, o in enumerate(group)) for group in groups]
    cheapest = tuple(index for *_, index in least)
    if total_cost(groups, cheapest) > budget:
        return None
    scale, slack = increases[np.isfinite(increases)].max(initial=0.0), 0.0
    while True:
        chosen = _solve(costs, increases, starts, budget, scale, slack)
        if chosen is None:
            return cheapest
        picked = starts[:-1] + chosen
        if costs[picked].sum() > budget * (1 + 1e-12):
            # the solver takes a millionth too much for nothing: test_the_budget_is_kept_…
            slack += TOLERANCE
            continue
        total = sum(increases[picked])
        # the best has no option that is worse than this whole; without those the rest fill the
        # range in which the solver is exact: test_loss_increases_of_any_size_are_told_apart
        if total >= SHRINK * scale:
            return tuple(chosen)
        scale = total


def _solve(
    costs: np.ndarray,
    increases: np.ndarray,
    starts: np.ndarray,
    budget: float,
    scale: float,
    slack: float,
) -> list[int] | None:
    """The programme with loss increases in units of ``scale``, those above it left out."""
    allowed, most = increases <= scale, max(budget, costs.max()) or 1.0
    one_each = sparse.block_diag([sparse.coo_array(np.ones((1, n))) for n in np.diff(starts)])
    # without presolve, in whose undoing HiGHS prints unasked; not by milp, which can not tell it
    # to be silent: test_the_solver_says_nothing
    solved = optimize.linprog(
        np.where(allowed, increases / (scale or 1.0), 0.0),
        A_ub=costs[None] / most,
        b_ub=[budget / most - slack],
        A_eq=one_each,
        b_eq=np.ones(len(starts) - 1),
        bounds=np.column_stack([np.zeros(len(costs)), allowed]),
        integrality=np.ones(len(costs)),
        options={"mip_rel_gap": 0, "presolve": False},
    )
    if solved.x is None:
        return None
    return [int(part.argmax()) for part in np.split(solved.x, starts[1:-1])]


def total_cost(groups: Sequence[Sequence[Option]], assignment: Assignment) -> float:
    return sum(group[i].cost for group, i in zip(groups, assignment, strict=True))


def neighbours(groups: Sequence[Sequence[Option]], start: Assignment) -> list[Assignment]:
    """The assignments one group one step down, or one a step down and another one up, away.

    Those whose predicted loss increase per saved cost is least come first.

    groups: their options from the costliest to the cheapest (`pareto`).
    """
    found: dict[Assignment, tuple[float, float]] = {}
    for down in range(len(groups)):
        for up in [None, *range(len(groups))]:
            moved = list(start)
            moved[down] += 1
            if up is not None:
                moved[up] -= 1
            if up == down or moved[down] == len(groups[down]) or (up is not None and moved[up] < 0):
                continue
            changed = [
                (groups[i][start[i]], groups[i][moved[i]]) for i in (down, up) if i is not None
            ]
            saved = sum(old.cost - new.cost for old, new in changed)
            more = sum(new.loss_increase - old.loss_increase for old, new in changed)
            found[tuple(moved)] = (saved, more)
    return sorted(found, key=lambda a: (found[a][0] <= 0, found[a][1] / (abs(found[a][0]) or 1e-9)))
