"""The fewest bits of a network, and where: what keeps a limit, or spends a budget best."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from torch.utils.data import DataLoader

from quantifind.certification.goal import Goal, Limit, ladder
from quantifind.metrics import is_classification
from quantifind.mixed_precision.allocation import Assignment, moves, total_cost
from quantifind.mixed_precision.candidates import Candidates, Row, Trial, choices_key, note
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.refinement import (
    adjust_scales,
    compensate_in_order,
    learn_allocations,
    steady,
)
from quantifind.mixed_precision.sensitivity import PRECISION, WIDER, WIDTHS, Menus, default_menus
from quantifind.runtime.workers import Workers
from quantifind.strategy import Strategy
from quantifind.utils.console import progress

# candidates at most, of a sweep over budgets, and of local moves
SWEEP, MOVES = 20, 24
# candidates measured at a time, by as many workers as there are
WAVE = 4
# shares of the best cost so far, at which a finer sweep allocates
FINER = tuple(0.94**i for i in range(SWEEP))
# a walk down falling budgets ends when so many in a row fail
FAILURES = 3
# moves that take the same tensor down, before the next tensor has its turn
TRIES = 3
# of its cost, what a move saves at least: else there would be one for each small tensor
SAVING = 0.003


def find_strategy(
    model: nn.Module,
    train_loader: DataLoader,
    val_loader: Iterable[Any],
    criterion: Any,
    *,
    limit: Limit | None = None,
    budget: Limit | None = None,
    learn: float = 0,
    widths: Iterable[int] | None = None,
    activation_bits: Iterable[int] = (),
    menus: Menus | None = None,
    confidence: float = 0.95,
    precision: float = PRECISION,
    folder: Path | str | None = None,
    seed: int = 0,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> tuple[Strategy, pd.DataFrame]:
    """The strategy with the fewest bytes that keeps a limit, or the smallest drop within a budget.

    Train data calibrate and teach, validation data choose. Single tensors are measured at every
    choice of the menus; an integer programme allocates as if their rises added up; whole networks
    are then measured, improved by local moves, compensated in order, their scales adjusted and, if
    asked for, their codes learned.

    limit: the criterion ratio, 1 or more, or ``{"criterion_ratio": 1.01}``,
    ``{"accuracy_drop": 0.005}`` or ``{"relative_error": 0.05}``: the candidate's one-sided bound on
    validation data is at most that. budget: instead, mean bits per parameter, or one of
    ``mean_bits`` and the modules of `quantifind.costs`, such as ``{"model_bytes": 100_000}``.
    learn: epochs of learned rounding of each of the few best allocations; 0 for none.
    widths: bits of the default menus, 1 to 32; by default 1 to 16, and up to 32 where none of those
    keeps the limit. activation_bits: bits that activations may have besides float, for a budget of
    what they save. menus: instead of both, ``{"tensors": {name: choices}, "activations": …}``.
    precision: of the rise of the loss by a single tensor, its standard error over itself, at which
    no more examples are measured; 0 for all of them.
    folder: keeps all that is measured: a call that was killed goes on, and another limit for the
    same network and data does not measure again what is there.
    Returns: the strategy, with its codes in ``fitted``; and a row per candidate, but for scales
    that were adjusted further, from most bytes to fewest: ``strategy``, ``origin``, ``mean_bits``,
    each of `quantifind.costs`, ``predicted_ratio``, ``examples`` it was measured on, those of
    `quantifind.certification.certificate.degradation`, ``on_ladder`` and ``chosen``.
    Errors: ValueError for a limit or budget out of range, and, naming the nearest, for one that no
    candidate keeps; for data and criteria that `Measurements` can't take.
    """
    goal = Goal.of(limit, budget)
    if not 0 <= learn < math.inf:
        raise ValueError(f"learn is {learn!r}: epochs, 0 or more, are needed")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}: above 0.5 and below 1 is needed")
    activation_bits = list(activation_bits)
    if activation_bits and goal.cost in ("model_bytes", "mean_bits"):
        raise ValueError(
            f"activation_bits is {activation_bits}: activations on levels save no {goal.cost}; "
            "give a budget of bit_operations or energy_picojoules"
        )
    with Workers(engine, scheduler=scheduler) as workers:
        measurements = Measurements(
            model, train_loader, val_loader, criterion, folder=folder, seed=seed, workers=workers
        )
        if goal.measure == "accuracy_drop" and not is_classification(measurements.original):
            raise ValueError("limit accuracy_drop needs targets that are class labels")
        for tried in (WIDTHS, WIDER) if widths is None and menus is None else (widths or WIDTHS,):
            given = menus or default_menus(measurements, tried, activation_bits)
            candidates = Candidates(measurements, given, goal, confidence, precision)
            sweep(candidates)
            if candidates.best() is not None:
                break
        move(candidates)
        compensate_in_order(candidates)
        steady(candidates)
        if learn:
            learn_allocations(candidates, learn)
        return answer(candidates)


def sweep(candidates: Candidates) -> None:
    """Uniform strategies, and allocations under falling budgets; once more with the scales of the
    best adjusted."""
    goal = candidates.goal
    uniform = [
        candidates.trial("uniform", strategy, candidates.alone(strategy.tensors, {}))
        for strategy in candidates.uniform()
    ]
    candidates.measure(
        [t for t in uniform if goal.budget is None or candidates.cost(t.quantized) <= goal.budget]
    )
    highest, lowest = (
        candidates.fixed + sum(unit[end].cost for unit in candidates.units) for end in (0, -1)
    )
    if goal.budget is not None:
        highest = min(goal.budget, highest)
        lowest = max(lowest, 0.8 * highest)
    _walk_down(
        candidates, [highest * (lowest / highest) ** (i / (SWEEP - 1)) for i in range(SWEEP)]
    )
    best = candidates.best_assignment()
    if best is not None:
        cost = candidates.fixed + total_cost(candidates.units, best)
        row = candidates.best("allocated")
        assert row is not None
        _, candidates.factors = adjust_scales(candidates, row)
        _walk_down(candidates, [cost * share for share in FINER])


def _walk_down(candidates: Candidates, budgets: Sequence[float]) -> None:
    allocated = (candidates.allocate(budget) for budget in budgets)
    with progress("allocating", total=len(budgets)) as step:
        trials = (candidates.allocated(a) for a in dict.fromkeys(allocated) if a is not None)
        _measure_until(candidates, trials, FAILURES, step)


def _measure_until(
    candidates: Candidates, trials: Iterable[Trial], failures: int, step: Callable[..., None]
) -> None:
    """Measure trials, a few at a time, until so many in a row don't keep the goal."""
    trials, failed = iter(trials), 0
    while failed < failures and (wave := list(islice(trials, WAVE))):
        for row in candidates.measure(wave):
            step(note(row))
            failed = 0 if candidates.goal.keeps(row) else failed + 1
            if failed == failures:
                break


def move(candidates: Candidates) -> None:
    """From the best allocation, local moves for as long as one is better when it is measured."""
    left, current = MOVES, candidates.best_assignment()
    with progress("moving", total=MOVES) as step:
        while current is not None and left > 0:
            moved = _worthwhile(candidates, current)
            improved = None
            while left > 0 and improved is None:
                wave = list(islice(moved, min(WAVE, left)))
                if not wave:
                    break
                left -= len(wave)
                rows = candidates.measure([candidates.allocated(a) for a in wave])
                for assignment, row in zip(wave, rows, strict=True):
                    step(note(row))
                    if candidates.best() is row:
                        improved = assignment
            current = improved


def _worthwhile(candidates: Candidates, current: Assignment) -> Iterator[Assignment]:
    """The moves that save enough, or stay within the budget, the likeliest first."""
    goal, tries = candidates.goal, Counter[int]()
    cost = total_cost(candidates.units, current)
    for assignment in moves(candidates.units, current):
        moved = total_cost(candidates.units, assignment)
        if goal.budget is not None:
            worth = moved + candidates.fixed <= goal.budget
        else:
            worth = moved < cost * (1 - SAVING)
        down = next(i for i, was in enumerate(current) if assignment[i] > was)
        known = choices_key(candidates.strategy(assignment)) in candidates.assignments
        if worth and not known and tries[down] < TRIES:
            tries[down] += 1
            yield assignment


def answer(candidates: Candidates) -> tuple[Strategy, pd.DataFrame]:
    """The best candidate, and all of them."""
    best = candidates.best() or _nearest(candidates)
    rows = sorted(candidates.rows.values(), key=lambda row: -row["model_bytes"])
    on_ladder = {id(row) for row in ladder(candidates.whole(), best, candidates.goal)}
    table = pd.DataFrame(rows).drop(columns="key")
    costs = pd.DataFrame([candidates.costs(row["strategy"].fitted) for row in rows])
    table = table.join(costs[costs.columns.difference(table.columns)])
    table["on_ladder"] = [id(row) in on_ladder for row in rows]
    table["chosen"] = [row is best for row in rows]
    return best["strategy"], table


def _nearest(candidates: Candidates) -> Row:
    """The nearest of candidates that seem not to keep the limit, should it keep it after all.

    Errors: ValueError, naming it, where it doesn't."""
    measure, limit = candidates.goal.measure, candidates.goal.limit
    rows = candidates.whole() or [*candidates.rows.values()]
    if limit is None:
        raise ValueError(
            "no candidate within the budget can be measured: all losses are NaN or infinite"
        )
    row = candidates.completed(min(rows, key=lambda row: row[f"{measure}_bound"]))
    value, bound, examples = row[measure], row[f"{measure}_bound"], row["examples"]
    if candidates.goal.keeps(row):
        return row
    text = (
        f"no candidate keeps {measure} at most {limit:g} with {candidates.confidence:.0%} "
        f"confidence on {examples} validation examples; the nearest has {value:.6g} (at most "
        f"{bound:.6g}) at {row['mean_bits']:.4g} bits"
    )
    if value < limit and bound < math.inf:
        # a standard error falls with the root of the number of examples
        needed = math.ceil(examples * ((bound - value) / (limit - value)) ** 2)
        text += f"; with about {needed:,} examples it would be certain enough"
    raise ValueError(text)
