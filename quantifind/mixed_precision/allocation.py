"""Which choice each tensor gets, under a budget: an exact integer programme (the multiple-choice
knapsack, solved by HiGHS), as if loss increases added up."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from typing import Any

import numpy as np
from scipy import optimize, sparse
from torch import Tensor, nn

from quantifind.certification.goal import Goal
from quantifind.metrics import Outcome
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.menu import Menu
from quantifind.mixed_precision.search_space import choice_key
from quantifind.mixed_precision.sensitivity import Sensitivity
from quantifind.network.folding import Pairs, parameter_count
from quantifind.network.modules import named_tensors
from quantifind.network.trace import ProductFacts, activation_names
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import Quantized
from quantifind.utils import plugins

Assignment = tuple[int, ...]
# a solution so far below the largest loss increase is solved anew in its own unit
SHRINK = 0.01
# groups at most for which the integer programme is solved exactly
EXACT = 64
# of a cost, how often a price is halved, and the largest
PRICES, LARGEST = 60, 1e30
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
    values: the network's tensors by name.
    products: of a pass, for the costs.
    folded: pairs of names, of the norms that are folded in ``model``.
    original: the float network's outcome.
    menu: the choices, each alone.
    loss_increases: by `choice_key`, of those that were measured or are predicted.
    groups: one knapsack class per weight (with the activation it multiplies) or pair of
        activations: its Pareto-optimal options, costliest first.
    fixed: the cost of what the space doesn't name.
    """

    model: nn.Module
    goal: Goal
    values: dict[str, Tensor]
    folded: Pairs
    products: list[ProductFacts]
    original: Outcome
    menu: Menu
    loss_increases: dict[str, float]
    groups: list[list[Option]]
    fixed: float

    @classmethod
    def of(
        cls,
        measurements: Measurements,
        sensitivity: Sensitivity,
        goal: Goal,
    ) -> "Allocation":
        """Raises: ValueError for a budget that the smallest candidate exceeds."""
        model = measurements.model
        given: dict[str, Any] = {
            "model": model,
            "goal": goal,
            "values": named_tensors(model),
            "folded": measurements.folded,
            "products": measurements.products,
            "original": measurements.original,
            "menu": sensitivity.menu,
            "loss_increases": sensitivity.loss_increases,
        }
        bare = cls(**given, groups=[], fixed=0.0)
        names = list(bare._group_names())
        groups = [pareto(options) for options in bare._options(names)]
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
        own, met = self.menu.space.tensors, self.menu.space.activations
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
        space = self.menu.space
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
        self.menu.make(key for kind in keys for key in kind.values())
        return self._quantized(keys)

    def _stand_ins(self, tensors: Any, activations: Any) -> Quantized:
        """What costs the same, rounded or not."""
        menu = self.menu
        return self._quantized(
            [
                {n: k if menu.has_made(k) else menu.stand_in(k) for n, k in keys.items()}
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
        own, met = ({name: self.menu[key] for name, key in named.items()} for named in keys)
        return Quantized(own, met, self.folded)  # type: ignore[arg-type]

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
        own = self.menu.space.tensors
        weights = [name for name in own if self.values[name].dim() > 1]
        for choice in own[weights[0]] if weights else []:
            bits = choice.width
            if bits <= UNIFORM_BITS and all(choice in own[name] for name in weights):
                tensors: dict[str, Choice | None] = dict.fromkeys(self.values)
                for name, choices in own.items():
                    nearest = min(choices, key=lambda c: abs(c.width - bits))
                    tensors[name] = choice if name in weights else nearest
                # what is far from the goal is not rounded
                if all(self.menu.has_made(k) for k in self._keys(tensors, {})[0].values()):
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
    """For each group the number of its option, so that the sum of the loss increases is least; of
    more than `EXACT` groups, nearly so.

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
    if len(groups) > EXACT:
        return _priced(groups, budget)
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


def _priced(groups: Sequence[Sequence[Option]], budget: float) -> Assignment:
    """A good allocation of many groups: each group's best at a price of the cost that is halved
    into the budget; what is left over is spent on what gains most for it.

    Of many groups each is a small part of the whole, and so is what this loses
    (test_many_groups_are_allocated_nearly_as_well).
    """
    widest = max(map(len, groups))
    costs, increases = (
        np.array(
            [
                [getattr(o, n) for o in group] + [math.inf] * (widest - len(group))
                for group in groups
            ]
        )
        for n in ("cost", "loss_increase")
    )
    finite, rows = np.where(np.isfinite(costs), costs, 0.0), np.arange(len(groups))

    def best(price: float) -> np.ndarray:
        # of several as good, the cheapest, which the last is
        each = increases + price * finite
        return widest - 1 - each[:, ::-1].argmin(1)

    low, high = 0.0, 1.0
    while costs[rows, best(high)].sum() > budget and high < LARGEST:
        low, high = high, 4 * high
    for _ in range(PRICES):
        price = (low + high) / 2
        low, high = (low, price) if costs[rows, best(price)].sum() <= budget else (price, high)
    at = best(high)
    if costs[rows, at].sum() > budget:
        at = costs.argmin(1)
    while True:
        more = costs - costs[rows, at][:, None]
        gain = increases[rows, at][:, None] - increases
        fits = (more <= budget - costs[rows, at].sum()) & (gain > 0)
        if not fits.any():
            return tuple(map(int, at))
        worth = np.where(fits, gain, -math.inf) / np.where(fits, np.maximum(more, 1e-12), 1.0)
        group, option = np.unravel_index(worth.argmax(), worth.shape)
        at[group] = option


def total_cost(groups: Sequence[Sequence[Option]], assignment: Assignment) -> float:
    return sum(group[i].cost for group, i in zip(groups, assignment, strict=True))


def neighbours(
    groups: Sequence[Sequence[Option]], start: Assignment
) -> Iterator[tuple[Assignment, int, float]]:
    """The assignments one group one step down, or one a step down and another one up, away.

    Those whose predicted loss increase per saved cost is least come first.

    groups: their options from the costliest to the cheapest (`pareto`).
    Returns: of each also the group that goes down, and the cost that is saved.
    """
    at = list(zip(groups, start, strict=True))
    down = [i for i, (group, place) in enumerate(at) if place + 1 < len(group)]
    up = [i for i, (_, place) in enumerate(at) if place > 0]
    costs, increases = (
        {
            step: np.array([_difference(at[i], step, name) for i in which])
            for step, which in ((1, down), (-1, up))
        }
        for name in ("cost", "loss_increase")
    )
    # of each pair: what goes down first, then None or what goes up
    saved = -(costs[1][:, None] + np.append(costs[-1], 0.0)[None])
    more = increases[1][:, None] + np.append(increases[-1], 0.0)[None]
    worth = more / np.where(saved == 0, 1e-9, np.abs(saved))
    for place in np.lexsort((worth.ravel(), saved.ravel() <= 0)):
        first, second = divmod(int(place), len(up) + 1)
        other = None if second == len(up) else up[second]
        if other != down[first]:
            moved = list(start)
            moved[down[first]] += 1
            if other is not None:
                moved[other] -= 1
            yield tuple(moved), down[first], float(saved[first, second])


def _difference(at: tuple[Sequence[Option], int], step: int, name: str) -> float:
    group, place = at
    return float(getattr(group[place + step], name) - getattr(group[place], name))
