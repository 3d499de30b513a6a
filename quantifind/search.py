"""The fewest bits of a network, and where: what keeps a limit, or spends a budget best."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quantifind import artifact
from quantifind.allocation import Assignment, Option, allocate, moves, total_cost
from quantifind.candidates import ADJUSTED, Candidates, Row, Trial, choices_key
from quantifind.checkpoints import random_state, set_random_state
from quantifind.goal import Goal, Limit, ladder
from quantifind.learning import learn as learn_codes
from quantifind.measuring import Measurements
from quantifind.metrics import calibrating_temperature, is_classification
from quantifind.sensitivity import PRECISION, WIDER, WIDTHS, Menus, default_menus
from quantifind.store import Store, fingerprint
from quantifind.strategy import Choice, Quantized, Strategy, quantize, scaled
from quantifind.utils import progress
from quantifind.workers import Workers

# candidates at most, of a sweep over budgets, of local moves, and of learning
SWEEP, MOVES, LEARNED = 20, 24, 4
# candidates measured at a time, by as many workers as there are
WAVE = 4
# the same, of those compensated in order, which takes longer than to measure them
FITTED = 2
# a walk down falling budgets ends when so many in a row fail
FAILURES = 3
# shares of the best cost so far, at which a finer sweep allocates, and layers are compensated in
# order
FINER = tuple(0.94**i for i in range(SWEEP))
IN_ORDER = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
DEARER = (1.05, 1.1, 1.15, 1.2, 1.3)
# moves that take the same tensor down, before the next tensor has its turn
TRIES = 3
# of its cost, what a move saves at least: else there would be one for each small tensor
SAVING = 0.003
# what the scales of a tensor are multiplied with, step by step
FACTORS = (0.94, 1.06)
# learned rounding here follows the labels too, and may take large steps
LEARNING_RATE, LABELS = 1e-3, 1.0
LABELLED = (nn.CrossEntropyLoss, nn.MSELoss)
# bits that a weight, and another tensor, has at most where codes are learned
LEARNABLE, BESIDE = 4, 8


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
    `quantifind.certificate.drops`, ``on_ladder`` and ``chosen``.
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
    allocated = (_allocate(candidates, candidates.units, budget) for budget in budgets)
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
            step(_note(row))
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
                    step(_note(row))
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


def compensate_in_order(candidates: Candidates) -> None:
    """The best allocations again, each layer compensated for what those before it lost, then their
    scales adjusted."""
    best, goal = candidates.best_assignment(), candidates.goal
    if best is None:
        return
    cost = total_cost(candidates.units, best) + candidates.fixed
    shares = IN_ORDER if goal.budget is None else (1.0, 0.97)
    budgets = (_allocate(candidates, candidates.units, cost * share) for share in shares)
    assignments = [a for a in dict.fromkeys([best, *budgets]) if a is not None]
    failed = 0
    with progress("compensating in order", total=len(assignments)) as step:
        for first in range(0, len(assignments), FITTED):
            strategies = [candidates.strategy(a) for a in assignments[first : first + FITTED]]
            fitted = _compensated(candidates, strategies)
            for strategy, quantized in zip(strategies, fitted, strict=True):
                (row,) = candidates.measure([candidates.trial("in order", strategy, quantized)])
                row, _ = adjust_scales(candidates, row, candidates.factors)
                step(_note(row))
                failed = 0 if goal.keeps(row) else failed + 1
                if failed == FAILURES - 1:  # each of these takes seconds
                    return


def _compensated(candidates: Candidates, strategies: Sequence[Strategy]) -> list[Quantized]:
    """Strategies fitted in order, by the workers, or as they are kept."""
    measurements = candidates.measurements
    keys = [f"codes in order {choices_key(strategy)}" for strategy in strategies]
    missing = [i for i, key in enumerate(keys) if measurements.store.get(key) is None]
    made = measurements.workers.map(_fit_in_order, measurements, [strategies[i] for i in missing])
    for i, quantized in zip(missing, made, strict=True):
        measurements.store.put(keys[i], *artifact.pack(quantized))
    return [_stored(measurements.store, key) for key in keys]


def _fit_in_order(measurements: Measurements, strategy: Strategy) -> Quantized:
    return quantize(measurements.model, strategy, measurements.calibration)


def _stored(store: Store, key: str) -> Quantized:
    entry = store.get(key)
    assert entry is not None
    return artifact.unpack(*entry)


def steady(candidates: Candidates) -> None:
    """Allocations somewhat dearer than the best, each with scales adjusted for itself: rungs of the
    ladder that are surer, should the best not hold on test data."""
    best, goal = candidates.best(), candidates.goal
    if best is None or goal.budget is not None:
        return
    with progress("steadying", total=len(DEARER)) as step:
        for share in DEARER:
            assignment = _allocate(candidates, candidates.units, share * best[goal.cost])
            if assignment is not None:
                (row,) = candidates.measure([candidates.allocated(assignment)])
                if candidates.is_whole(row):
                    row, _ = adjust_scales(candidates, row)
                step(_note(row))


def learn_allocations(candidates: Candidates, epochs: float) -> None:
    """Learned rounding of few-bit allocations: at the budget and below it; or, for a limit, where
    halving the ratio of the best cost to the cheapest leads."""
    units = [[o for o in unit if _learnable(o)] or unit[-1:] for unit in candidates.units]
    goal, best = candidates.goal, candidates.best()
    low, high = (candidates.fixed + sum(unit[end].cost for unit in units) for end in (-1, 0))
    high = min(high, math.inf if best is None else best[goal.cost], goal.budget or math.inf)
    learned: dict[Assignment, bool] = {}
    with progress("learning candidates", total=LEARNED) as step:
        for number in range(LEARNED):
            if goal.budget is None:
                target = math.sqrt(low * high)
            else:
                target = high * (low / high) ** (number / (2 * LEARNED))
            assignment = _allocate(candidates, units, target)
            if assignment is None:
                break
            if assignment not in learned:
                row = _learn(candidates, candidates.strategy(assignment, units), epochs)
                learned[assignment] = goal.keeps(row)
                step(_note(row))
            if goal.budget is None:
                low, high = (low, target) if learned[assignment] else (target, high)


def _learnable(option: Option) -> bool:
    """Whether all its tensors are of few bits, weights compensated to begin with."""
    for choice in option.tensors.values():
        weight = choice is not None and "axis" in choice
        if choice is None or choice.get("bits", 2) > (LEARNABLE if weight else BESIDE):
            return False
        if weight and choice.get("rounding") != "compensated":
            return False
    return True


def _learn(candidates: Candidates, start: Strategy, epochs: float) -> Row:
    measurements = candidates.measurements
    tensors: dict[str, Choice | None] = dict(start.tensors)
    for name, choice in tensors.items():
        two_bits = choice is not None and "rounding" in choice and choice.get("bits") == 2
        if choice is not None and two_bits and choice["scheme"] == "uniform":
            # ±½ and ±1½ waste no level, which learned codes make use of
            tensors[name] = {**choice, "half_integer": not choice.get("zero_point")}
    start = Strategy(tensors, start.activations)
    # a network trained to the end is too sure of itself, and so would its followers be
    softening = calibrating_temperature(measurements.model, measurements.batches())
    labels = LABELS if isinstance(measurements.criterion, LABELLED) else 0.0
    loader, store = measurements.train_loader, measurements.store
    whole = loader.dataset.tensors if isinstance(loader.dataset, TensorDataset) else ()
    options = [epochs, softening, labels, LEARNING_RATE]
    key = f"learned {fingerprint(*options, *whole)} {choices_key(start)}"
    resume = None if store.folder is None else store.folder / f"learning-{fingerprint(key)[:16]}"

    def make() -> Quantized:
        # each candidate sees the same order: test_a_killed_learning_search_goes_on
        before = random_state(loader)
        try:
            return learn_codes(
                measurements.model,
                start,
                loader,
                epochs=epochs,
                calibration=measurements.calibration,
                softening=softening,
                labels=labels,
                rate=LEARNING_RATE,
                checkpoints=resume,
                seed=measurements.seed,
            )
        finally:
            set_random_state(before, loader)

    if store.get(f"codes {key}") is None:
        store.put(f"codes {key}", *artifact.pack(make()))
    quantized = _stored(store, f"codes {key}")
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    learned = {n: None if c is None else {**c, "rounding": "learned"} for n, c in tensors.items()}
    strategy = Strategy(learned, start.activations)
    (row,) = candidates.measure(
        [candidates.trial(f"learned {epochs:g} epochs", strategy, quantized)]
    )
    return adjust_scales(candidates, row)[0]


def adjust_scales(
    candidates: Candidates, row: Row, start: Mapping[str, float] | None = None
) -> tuple[Row, dict[str, float]]:
    """The row of a candidate whose scales of weights are multiplied, tensor after tensor from the
    last, for as long as the measured drop falls; and the factors. The row itself where it doesn't.

    start: factors to begin with, of the tensors that are adjusted at all; by default all weights.
    """
    strategy, drop = row["strategy"], f"{candidates.goal.measure}_bound"
    weights = [
        name
        for name, tensor in strategy.fitted.tensors.items()
        if candidates.values[name].dim() > 1 and tensor.scale is not None
    ]
    origin = row["origin"].removesuffix(ADJUSTED) + ADJUSTED
    best, factors = candidates.completed(row), dict[str, float]()

    def improve(tried: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
        """The factors that are better than the best so far, if any of those tried are."""
        nonlocal best, factors
        trials = [
            Trial(
                f"{row['key']} {json.dumps(grown)}",
                origin,
                strategy,
                scaled(strategy.fitted, grown),
            )
            for grown in tried
        ]
        found = None
        for grown, measured in zip(tried, candidates.measured(trials, best), strict=True):
            if candidates.is_whole(measured) and measured[drop] < best[drop]:
                candidates.drop(best)
                candidates.keep(measured)
                best, factors, found = measured, dict(grown), grown
        return found

    if start:
        improve([start])
        weights = [name for name in weights if name in start]
    for name in weights[::-1]:
        steps: Sequence[float] = FACTORS
        while steps:
            before = factors.get(name, 1.0)
            found = improve([factors | {name: before * factor} for factor in steps])
            # on in the direction that was better, two steps at a time
            factor = 1.0 if found is None else FACTORS[found[name] > before]
            steps = () if found is None else (factor, factor**2)
    return best, factors


def answer(candidates: Candidates) -> tuple[Strategy, pd.DataFrame]:
    """The best candidate, and all of them."""
    best = candidates.best()
    if best is None:
        raise ValueError(_nearest(candidates))
    rows = sorted(candidates.rows.values(), key=lambda row: -row["model_bytes"])
    on_ladder = {id(row) for row in ladder(candidates.whole(), best, candidates.goal)}
    table = pd.DataFrame(rows).drop(columns="key")
    costs = pd.DataFrame([candidates.costs(row["strategy"].fitted) for row in rows])
    table = table.join(costs[costs.columns.difference(table.columns)])
    table["on_ladder"] = [id(row) in on_ladder for row in rows]
    table["chosen"] = [row is best for row in rows]
    return best["strategy"], table


def _nearest(candidates: Candidates) -> str:
    measure, limit = candidates.goal.measure, candidates.goal.limit
    rows = candidates.whole() or [*candidates.rows.values()]
    if limit is None:
        return "no candidate within the budget can be measured: all losses are NaN or infinite"
    row = min(rows, key=lambda row: row[f"{measure}_bound"])
    value, bound, examples = row[measure], row[f"{measure}_bound"], row["examples"]
    text = (
        f"no candidate keeps {measure} at most {limit:g} with {candidates.confidence:.0%} "
        f"confidence on {examples} validation examples; the nearest has {value:.6g} (at most "
        f"{bound:.6g}) at {row['mean_bits']:.4g} bits"
    )
    if value < limit and bound < math.inf:
        # a standard error falls with the root of the number of examples
        needed = math.ceil(examples * ((bound - value) / (limit - value)) ** 2)
        text += f"; with about {needed:,} examples it would be certain enough"
    return text


def _allocate(
    candidates: Candidates, units: Sequence[Sequence[Option]], budget: float
) -> Assignment | None:
    # a budget that an allocation meets exactly is met: test_a_budget_is_spent_to_the_last_byte
    return allocate(units, (budget - candidates.fixed) * (1 + 1e-9))


def _note(row: Row) -> str:
    return f"{row['mean_bits']:.3g} bits CR {row['criterion_ratio']:.4f}"
