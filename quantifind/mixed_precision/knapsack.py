"""The multiple-choice knapsack: an option of each group within a budget, with the least loss
increase, as if increases added up (solved by HiGHS); and the moves from one solution to the next.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from quantifind.tensor.choice import Choice
from quantifind.utils.silence import silent

Assignment = tuple[int, ...]
# a solution so far below the largest loss increase is solved anew in its own unit
SHRINK = 0.01
# groups at most for which the integer programme is solved exactly
EXACT = 64
# of a cost, how often a price is halved, and the largest
PRICES, LARGEST = 60, 1e30
# what the solver lets a constraint be broken by
TOLERANCE = 1e-6


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


def pareto(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats in both cost and loss increase, from the costliest down."""
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
    with silent():  # HiGHS prints unasked: test_the_solver_says_nothing
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
    """Assignments near one: a group a step down; or one group a step down and another a step up.

    Those with the least predicted loss increase per saved cost come first.

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
