"""Which allocations a search measures: under falling budgets, then moves from the best."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from quantifind.mixed_precision.candidates import Candidates, choices_key
from quantifind.mixed_precision.knapsack import Assignment, neighbours, total_cost
from quantifind.mixed_precision.sensitivity import Sensitivity
from quantifind.utils.console import progress

# candidates at most, of a sweep over budgets, and of local moves
SWEEP, MOVES = 20, 24
# candidates measured at a time, by as many workers as there are
AT_A_TIME = 4
# shares of the best cost so far, at which a finer sweep allocates
FINER = tuple(0.94**i for i in range(SWEEP))
# times that the step between what keeps the goal and what does not is halved
HALVINGS = 3
# a walk down falling budgets ends when so many in a row fail
FAILURES = 3
# costlier ones that keep the goal, where no other does
FIRST = 1
# sweeps at most after one that found nothing
AGAIN = 4
# moves that take the same tensor down, before the next tensor has its turn
TRIES = 3
# of its cost, what a move saves at least: else there would be one for each small tensor
SAVING = 0.003


def explore(candidates: Candidates, sensitivity: Sensitivity, precision: float) -> Sensitivity:
    """Sweep budgets; where no allocation keeps the goal, measure what they take and was only
    predicted, and sweep again (test_bad_predictions_cost_no_answer).

    candidates: get the allocation by what was measured.
    precision: as `quantifind.mixed_precision.sensitivity.measure_options` takes it.
    Returns: the sensitivities with what was measured besides.
    """
    sweep_budgets(candidates)
    for _ in range(AGAIN):
        keys = candidates.allocation.keys_of(candidates.assignments.values())
        new = [key for key in keys if key not in sensitivity.measured]
        done = candidates.best_assignment() is not None or not new
        if done or candidates.measurements.passes.left <= 0:
            break
        sensitivity = sensitivity.with_measured(new, precision)
        candidates.reallocate(sensitivity)
        sweep_budgets(candidates)
    return sensitivity


def sweep_budgets(candidates: Candidates) -> None:
    """Uniform strategies, and allocations under falling budgets, then finer below the best."""
    goal, allocation = candidates.goal, candidates.allocation
    low, high = allocation.near
    uniform = [
        candidates.trial("uniform", strategy, allocation.alone(strategy.tensors, {}))
        for strategy in allocation.uniform_strategies()
        if low <= allocation.loss_increase(strategy.tensors, {}) <= high
    ]
    candidates.measure(
        [t for t in uniform if goal.budget is None or allocation.cost(t.quantized) <= goal.budget]
    )
    most, least = (
        allocation.fixed + sum(group[end].cost for group in allocation.groups) for end in (0, -1)
    )
    if goal.budget is not None:
        most = min(goal.budget, most)
        least = max(least, 0.8 * most)
    solved = [allocation.solve(most * (least / most) ** (i / (SWEEP - 1))) for i in range(SWEEP)]
    tried = [a for a in dict.fromkeys(solved) if a is not None]
    # of those that are surely good enough, the last
    sure = [i for i, a in enumerate(tried) if allocation.predicted(a) < low]
    _walk_down(candidates, tried[max(sure, default=0) :])
    if candidates.best_assignment() is None:
        _walk_down(candidates, tried[: max(sure, default=0)][::-1], FIRST)
    best = candidates.best_assignment()
    if best is not None:
        finer = [allocation.solve(allocation.total(best) * share) for share in FINER]
        _walk_down(candidates, [a for a in dict.fromkeys(finer) if a is not None])
        _halve(candidates)


def _halve(candidates: Candidates) -> None:
    """Between the best allocation and the next cheaper one that failed, for as long as that pays
    (seen: 8% of the bytes lay there)."""
    allocation, goal = candidates.allocation, candidates.goal
    if goal.budget is not None:
        return
    for _ in range(HALVINGS):
        best = candidates.best_assignment()
        if best is None or candidates.measurements.passes.left <= 0:
            return
        high = allocation.total(best)
        costs = [allocation.total(a) for a in candidates.assignments.values()]
        low = max((cost for cost in costs if cost < high), default=None)
        assignment = None if low is None else allocation.solve((low + high) / 2)
        if assignment is None or allocation.total(assignment) in costs:
            return
        candidates.measure([candidates.allocated(assignment)])


def _walk_down(
    candidates: Candidates, assignments: Sequence[Assignment], until: int | None = None
) -> None:
    """Measure allocations, a few at a time, until several in a row don't keep the goal, or until
    so many do."""
    trials, failed, kept = (candidates.allocated(a) for a in assignments), 0, 0
    passes = candidates.measurements.passes
    with progress("allocating", total=len(assignments)) as step:
        while some := list(islice(trials, AT_A_TIME)):
            for row in candidates.measure(some):
                step(candidates.note(row))
                keeps = candidates.goal.keeps(row)
                failed, kept = (0, kept + 1) if keeps else (failed + 1, kept)
            if (until is not None and kept >= until) or (until is None and failed >= FAILURES):
                return
            if passes.left <= 0:
                passes.stopped("fewer budgets")
                return


def try_neighbours(candidates: Candidates) -> None:
    """From the best allocation, local moves for as long as one is better when it is measured."""
    left, current = MOVES, candidates.best_assignment()
    with progress("moving", total=MOVES) as step:
        passes = candidates.measurements.passes
        while current is not None and left > 0:
            moved = _worthwhile(candidates, current)
            improved = None
            while left > 0 and improved is None:
                some = list(islice(moved, min(AT_A_TIME, left)))
                if not some:
                    break
                if passes.left <= 0:
                    passes.stopped("fewer moves")
                    return
                left -= len(some)
                rows = candidates.measure([candidates.allocated(a) for a in some])
                for assignment, row in zip(some, rows, strict=True):
                    step(candidates.note(row))
                    if candidates.is_best(row):
                        improved = assignment
            current = improved


def _worthwhile(candidates: Candidates, current: Assignment) -> Iterator[Assignment]:
    """The neighbours that save enough, or stay within the budget, the likeliest first."""
    goal, allocation, tries = candidates.goal, candidates.allocation, Counter[int]()
    cost = total_cost(allocation.groups, current)
    for assignment, down, saved in neighbours(allocation.groups, current):
        if goal.budget is not None:
            worth = cost - saved + allocation.fixed <= goal.budget
        else:
            worth = saved > cost * SAVING
        if not worth or tries[down] == TRIES:
            continue
        if choices_key(allocation.strategy(assignment)) not in candidates.assignments:
            tries[down] += 1
            yield assignment
