"""Which choice each tensor gets, under a budget: an exact integer programme (the multiple-choice
knapsack, solved by HiGHS), as if what tensors cost the loss added up."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

from quantifind.strategy import Choice

Assignment = tuple[int, ...]
# a solution so far below the largest rise is solved anew in its own unit
SHRINK = 0.01
# what the solver lets a constraint be broken by
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Option:
    """One way to put a unit, a tensor with the activations it meets, on few levels.

    tensors, activations: the choices, None for what stays in float. cost: in the budget's unit.
    rise: predicted, of the loss.
    """

    tensors: dict[str, Choice | None]
    activations: dict[str, Choice | None]
    cost: float
    loss_increase: float


def undominated(options: Sequence[Option]) -> list[Option]:
    """Those than which no other is both as cheap and as good, from the dearest to the cheapest."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss_increase)):
        if not kept or option.loss_increase < kept[-1].loss_increase:
            kept.append(option)
    return kept[::-1]


def allocate(units: Sequence[Sequence[Option]], budget: float) -> Assignment | None:
    """For each unit the number of its option, so that the sum of the rises is least and that of the
    costs at most ``budget``; None where even the cheapest cost more.

    >>> unit = [Option({}, {}, 8.0, 0.0), Option({}, {}, 4.0, 0.1), Option({}, {}, 2.0, 1.0)]
    >>> allocate([unit, unit[1:]], 12.0)
    (0, 0)
    """
    costs = np.array([option.cost for unit in units for option in unit])
    loss_increases = np.array([option.loss_increase for unit in units for option in unit])
    sizes = [len(unit) for unit in units]
    cheapest = tuple(
        min(range(len(unit)), key=lambda i: (unit[i].cost, unit[i].loss_increase)) for unit in units
    )
    if total_cost(units, cheapest) > budget:
        return None
    one_each = sparse.block_diag([sparse.coo_array(np.ones((1, size))) for size in sizes])
    starts = np.cumsum([0, *sizes])
    scale, most, slack = loss_increases.max(), max(budget, costs.max()) or 1.0, 0.0
    while True:
        allowed = loss_increases <= scale
        with _quiet():
            solved = optimize.milp(
                np.where(allowed, loss_increases / (scale or 1.0), 0.0),
                integrality=np.ones(len(costs)),
                bounds=optimize.Bounds(0, allowed),
                constraints=[
                    optimize.LinearConstraint(one_each, 1, 1),
                    optimize.LinearConstraint(costs[None] / most, -np.inf, budget / most - slack),
                ],
                options={"mip_rel_gap": 0},
            )
        if solved.x is None:
            return cheapest
        chosen = [
            int(solved.x[start : start + size].argmax())
            for start, size in zip(starts, sizes, strict=False)
        ]
        if costs[starts[:-1] + chosen].sum() > budget * (1 + 1e-12):
            # the solver takes a millionth too much for nothing: test_the_budget_is_kept_…
            slack += TOLERANCE
            continue
        total = sum(
            loss_increases[start + index] for start, index in zip(starts, chosen, strict=False)
        )
        # the best has no option that is worse than this whole; without those the rest fill the
        # range in which the solver is exact: test_rises_of_any_size_are_told_apart
        if total >= SHRINK * scale:
            return tuple(chosen)
        scale = total


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what HiGHS writes to standard output though it is told not to
    (test_the_solver_says_nothing)."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def total_cost(units: Sequence[Sequence[Option]], assignment: Assignment) -> float:
    return sum(unit[i].cost for unit, i in zip(units, assignment, strict=True))


def moves(units: Sequence[Sequence[Option]], start: Assignment) -> list[Assignment]:
    """The assignments one unit one step down, or one a step down and another one up, away; those
    whose predicted rise per saved cost is least come first.

    units: their options from the dearest to the cheapest (`undominated`).
    """
    found: dict[Assignment, tuple[float, float]] = {}
    for down in range(len(units)):
        for up in [None, *range(len(units))]:
            moved = list(start)
            moved[down] += 1
            if up is not None:
                moved[up] -= 1
            if up == down or moved[down] == len(units[down]) or (up is not None and moved[up] < 0):
                continue
            changed = [
                (units[i][start[i]], units[i][moved[i]]) for i in (down, up) if i is not None
            ]
            saved = sum(old.cost - new.cost for old, new in changed)
            found[tuple(moved)] = (
                saved,
                sum(new.loss_increase - old.loss_increase for old, new in changed),
            )
    return sorted(found, key=lambda a: (found[a][0] <= 0, found[a][1] / (abs(found[a][0]) or 1e-9)))
