"""Mixed-precision search: the cheapest strategy within a loss limit, or the smallest loss within a
budget."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from quantifind.certification.goal import Goal, Limit
from quantifind.metrics import Outcome, is_classification
from quantifind.mixed_precision.allocation import Allocation, Assignment, neighbours, total_cost
from quantifind.mixed_precision.candidates import Candidates, choices_key, note
from quantifind.mixed_precision.found import Found, chosen
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.refinement import (
    add_safer_allocations,
    adjust_scales,
    gptq_sequentially,
    learn_allocations,
)
from quantifind.mixed_precision.search_space import (
    WIDER,
    WIDTHS,
    SearchSpace,
    default_search_space,
)
from quantifind.mixed_precision.sensitivity import (
    PRECISION,
    measure_sensitivity,
    predict_sensitivity,
)
from quantifind.runtime.workers import Workers
from quantifind.utils.batches import Forward
from quantifind.utils.console import progress
from quantifind.utils.loaders import length_of

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
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    criterion: Any = None,
    *,
    forward: Forward | None = None,
    limit: Limit | None = None,
    budget: Limit | None = None,
    learn: float = 0,
    widths: Iterable[int] | None = None,
    activation_bits: Iterable[int] = (),
    search_space: SearchSpace | Mapping[str, Any] | None = None,
    confidence: float = 0.95,
    precision: float = PRECISION,
    proxies: bool = False,
    folder: Path | str | None = None,
    seed: int = 0,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> Found:
    """The strategy with the fewest bytes that keeps a limit, or the smallest loss within a budget.

    Training data calibrate and train; validation data select. Each tensor is quantized alone with
    every option and its loss increase measured; an integer program picks a combination as if
    increases added up; whole candidates are then measured and refined.

    model: a trained network, whose outputs are logits; what runs is a copy.
    train_loader: batches of training data; with ``learn``, gone through again and again.
    val_loader: batches of validation data.
    criterion: the loss, (outputs, targets) → a number, such as `torch.nn.CrossEntropyLoss()`, or
        one number an example. None for data without labels: then a limit is of relative_error.
    forward: (model, batch) → (outputs, targets), what the criterion gets; by default
        `quantifind.utils.forwards.DefaultForward`.
    limit: the criterion ratio, 1 or more, or ``{"criterion_ratio": 1.01}``,
        ``{"accuracy_drop": 0.005}`` or ``{"relative_error": 0.05}``. The candidate's one-sided
        bound on validation data is at most that.
    budget: instead, mean bits per parameter, or one of ``mean_bits`` and the modules of
        `quantifind.costs`, such as ``{"model_bytes": 100_000}``.
    learn: epochs of training of each of the few best allocations; 0 for none.
    widths: bits of the default search space, 1 to 32; by default 1 to 16, and up to 32 where none
        of those keeps the limit.
    activation_bits: bits that activations may have besides float, for a budget of what they save.
    search_space: instead of both, the choices of each tensor and activation, a `SearchSpace` or
        its fields.
    confidence: of the bounds, above 0.5 and below 1.
    precision: stop measuring a tensor once the standard error of its loss increase is this fraction
        of the increase; 0: use every example.
    proxies: whether the sensitivity table also has what is predicted without measuring.
    folder: keeps all that is measured. A call that was killed goes on, and another limit for the
        same network and data does not measure again what is there.
    seed: of the order of the examples, of which training data calibrate, and of learning.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Returns: the chosen strategy, its codes, and the tables.
    Raises: ValueError for an argument out of range; for data and criteria that
        `quantifind.mixed_precision.measurements.Measurements` can't take; and, naming the nearest,
        for a limit or budget that no candidate keeps.
    """
    goal = _goal(limit, budget, criterion)
    activation_bits = list(activation_bits)
    _check(goal, learn, confidence, activation_bits)
    if learn and isinstance(train_loader, Iterator):
        length_of(train_loader)  # says that it can't be gone through again
    search_space = _given_space(search_space)
    with Workers(engine, scheduler=scheduler) as workers:
        how: Any = {"forward": forward, "folder": folder, "seed": seed, "workers": workers}
        measurements = Measurements.start(model, train_loader, val_loader, criterion, **how)
        _check_measure(goal, measurements.original)
        for space in _spaces(measurements, widths, activation_bits, search_space):
            sensitivity = measure_sensitivity(measurements, space, precision=precision)
            allocation = Allocation.of(measurements, space, sensitivity, goal)
            candidates = Candidates(measurements, allocation, confidence)
            sweep_budgets(candidates)
            if candidates.best() is not None:
                break
        table = sensitivity.table
        if proxies:
            table = predict_sensitivity(measurements, sensitivity)
        try_neighbours(candidates)
        gptq_sequentially(candidates)
        add_safer_allocations(candidates)
        if learn:
            learn_allocations(candidates, learn)
        best, rows = chosen(candidates)
        return Found(
            best["strategy"], best["quantized"], rows, table, goal, confidence, criterion, forward
        )


def _goal(limit: Limit | None, budget: Limit | None, criterion: Any) -> Goal:
    goal = Goal.of(limit, budget)
    if criterion is not None:
        return goal
    if goal.limit is None:
        return replace(goal, measure="relative_error")
    if goal.measure != "relative_error":
        raise ValueError(
            f"limit {goal.measure} needs a criterion; without one, limit "
            "{'relative_error': 0.05} holds the outputs to the float network's"
        )
    return goal


def _check_measure(goal: Goal, original: Outcome) -> None:
    """Raise ValueError for a measure that the data have not."""
    if goal.measure == "accuracy_drop" and not is_classification(original):
        raise ValueError(
            "limit accuracy_drop needs targets that are class labels, one for each example; "
            "limit {'relative_error': 0.05} needs none"
        )
    if goal.measure == "criterion_ratio" and not original.criterion > 0:
        raise ValueError(
            f"the float network's loss on validation data is {original.criterion}: a ratio to it "
            "needs one above 0; limit {'relative_error': 0.05} needs none"
        )


def _check(goal: Goal, learn: float, confidence: float, activation_bits: Sequence[int]) -> None:
    if not 0 <= learn < math.inf:
        raise ValueError(f"learn is {learn!r}: epochs, 0 or more, are needed")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}: above 0.5 and below 1 is needed")
    if activation_bits and goal.cost in ("model_bytes", "mean_bits"):
        raise ValueError(
            f"activation_bits is {activation_bits}: activations on levels save no {goal.cost}; "
            "give a budget of bit_operations or energy_picojoules"
        )


def _given_space(given: SearchSpace | Mapping[str, Any] | None) -> SearchSpace | None:
    if given is None or isinstance(given, SearchSpace):
        return given
    if not {"tensors"} <= given.keys() <= {"tensors", "activations"}:
        named = ", ".join(given) or "nothing"
        raise ValueError(f"search_space has {named}: tensors, and perhaps activations")
    return SearchSpace(**given)


def _spaces(
    measurements: Measurements,
    widths: Iterable[int] | None,
    activation_bits: Sequence[int],
    given: SearchSpace | None,
) -> Iterator[SearchSpace]:
    """The search space that is given; or the default one, and a wider one where it is too small."""
    if given is not None:
        yield given
        return
    for tried in (WIDTHS, WIDER) if widths is None else (list(widths) or WIDTHS,):
        yield default_search_space(measurements.model, measurements.facts, tried, activation_bits)


def sweep_budgets(candidates: Candidates) -> None:
    """Uniform strategies, and allocations under falling budgets; once more with the scales of the
    best adjusted."""
    goal, allocation = candidates.goal, candidates.allocation
    uniform = [
        candidates.trial("uniform", strategy, allocation.alone(strategy.tensors, {}))
        for strategy in allocation.uniform_strategies()
    ]
    candidates.measure(
        [t for t in uniform if goal.budget is None or allocation.cost(t.quantized) <= goal.budget]
    )
    highest, lowest = (
        allocation.fixed + sum(group[end].cost for group in allocation.groups) for end in (0, -1)
    )
    if goal.budget is not None:
        highest = min(goal.budget, highest)
        lowest = max(lowest, 0.8 * highest)
    _walk_down(
        candidates, [highest * (lowest / highest) ** (i / (SWEEP - 1)) for i in range(SWEEP)]
    )
    best = candidates.best_assignment()
    if best is not None:
        row = candidates.best("allocated")
        assert row is not None
        _, candidates.factors = adjust_scales(candidates, row)
        _walk_down(candidates, [allocation.total(best) * share for share in FINER])


def _walk_down(candidates: Candidates, budgets: Sequence[float]) -> None:
    """Measure allocations, a few at a time, until several in a row don't keep the goal."""
    solved = (candidates.allocation.solve(budget) for budget in budgets)
    trials, failed = (candidates.allocated(a) for a in dict.fromkeys(solved) if a is not None), 0
    with progress("allocating", total=len(budgets)) as step:
        while failed < FAILURES and (wave := list(islice(trials, WAVE))):
            for row in candidates.measure(wave):
                step(note(row))
                failed = 0 if candidates.goal.keeps(row) else failed + 1
                if failed == FAILURES:
                    break


def try_neighbours(candidates: Candidates) -> None:
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
                    if candidates.is_best(row):
                        improved = assignment
            current = improved


def _worthwhile(candidates: Candidates, current: Assignment) -> Iterator[Assignment]:
    """The neighbours that save enough, or stay within the budget, the likeliest first."""
    goal, allocation, tries = candidates.goal, candidates.allocation, Counter[int]()
    cost = total_cost(allocation.groups, current)
    for assignment in neighbours(allocation.groups, current):
        moved = total_cost(allocation.groups, assignment)
        if goal.budget is not None:
            worth = moved + allocation.fixed <= goal.budget
        else:
            worth = moved < cost * (1 - SAVING)
        down = next(i for i, was in enumerate(current) if assignment[i] > was)
        known = choices_key(allocation.strategy(assignment)) in candidates.assignments
        if worth and not known and tries[down] < TRIES:
            tries[down] += 1
            yield assignment
