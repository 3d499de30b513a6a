"""The fewest bits of a network, and where: what keeps a limit, or spends a budget best."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quantifind import artifact
from quantifind.allocation import Assignment, Option, allocate, moves, total_cost
from quantifind.candidates import Candidates, Row, choices_key
from quantifind.checkpoints import random_state, set_random_state
from quantifind.goal import Goal, Limit, ladder
from quantifind.learning import learn as learn_codes
from quantifind.measuring import Measurements
from quantifind.metrics import calibrating_temperature, is_classification
from quantifind.sensitivity import WIDER, WIDTHS, Menus, default_menus
from quantifind.store import Store, fingerprint
from quantifind.strategy import Choice, Quantized, Strategy, quantize, scaled
from quantifind.utils import progress

# candidates at most, of a sweep over budgets, of local moves, and of learning
SWEEP, MOVES, LEARNED = 20, 24, 4
# a walk down falling budgets ends when so many in a row fail
FAILURES = 3
# shares of the best cost so far, at which a finer sweep allocates, and layers are compensated in
# order
FINER = tuple(0.94**i for i in range(SWEEP))
IN_ORDER = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
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
    folder: Path | str | None = None,
    seed: int = 0,
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
    folder: keeps all that is measured: a call that was killed goes on, and another limit for the
    same network and data does not measure again what is there.
    Returns: the strategy, with its codes in ``fitted``; and a row per candidate, but for scales
    that were adjusted further, from most bytes to fewest: ``strategy``, ``origin``, ``mean_bits``,
    ``model_bytes``, the budget's cost, ``predicted_ratio``, ``examples`` it was measured on, those
    of `quantifind.certificate.drops`, ``on_ladder`` and ``chosen``.
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
    measurements = Measurements(
        model, train_loader, val_loader, criterion, folder=folder, seed=seed
    )
    if goal.measure == "accuracy_drop" and not is_classification(measurements.original):
        raise ValueError("limit accuracy_drop needs targets that are class labels")
    for tried in (WIDTHS, WIDER) if widths is None and menus is None else (widths or WIDTHS,):
        given = menus or default_menus(measurements, tried, activation_bits)
        candidates = Candidates(measurements, given, goal, confidence)
        sweep(candidates)
        if candidates.best() is not None:
            break
    move(candidates)
    compensate_in_order(candidates)
    if learn:
        learn_allocations(candidates, learn)
    return answer(candidates)


def sweep(candidates: Candidates) -> None:
    """Uniform strategies, and allocations under falling budgets; once more with the scales of the
    best adjusted."""
    goal = candidates.goal
    for strategy in candidates.uniform():
        quantized = candidates.alone(strategy.tensors, {})
        if goal.budget is None or candidates.cost(quantized) <= goal.budget:
            candidates.measure("uniform", strategy, quantized)
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
    failed = 0
    allocated = (_allocate(candidates, candidates.units, budget) for budget in budgets)
    with progress("allocating", total=len(budgets)) as step:
        for assignment in dict.fromkeys(allocated):
            if assignment is None:
                continue
            row = candidates.measure_assignment(assignment)
            step(_note(row))
            failed = 0 if candidates.goal.keeps(row) else failed + 1
            if failed == FAILURES:
                break


def move(candidates: Candidates) -> None:
    """From the best allocation, local moves for as long as one is better when it is measured."""
    left, current, goal = MOVES, candidates.best_assignment(), candidates.goal
    with progress("moving", total=MOVES) as step:
        while current is not None and left > 0:
            cost, improved = total_cost(candidates.units, current), None
            for assignment in moves(candidates.units, current):
                moved = total_cost(candidates.units, assignment)
                if goal.budget is not None:
                    worth = moved + candidates.fixed <= goal.budget
                else:
                    worth = moved < cost * (1 - SAVING)
                key = choices_key(candidates.strategy(assignment))
                if not worth or key in candidates.assignments:
                    continue
                left -= 1
                row = candidates.measure_assignment(assignment)
                step(_note(row))
                if candidates.best() is row:
                    improved = assignment
                if improved or left == 0:
                    break
            current = improved


def compensate_in_order(candidates: Candidates) -> None:
    """The best allocations again, each layer compensated for what those before it lost, then their
    scales adjusted."""
    best, goal, model = candidates.best_assignment(), candidates.goal, candidates.model
    if best is None:
        return
    cost = total_cost(candidates.units, best) + candidates.fixed
    shares = IN_ORDER if goal.budget is None else (1.0, 0.97)
    budgets = (_allocate(candidates, candidates.units, cost * share) for share in shares)
    failed = 0
    with progress("compensating in order", total=1 + len(shares)) as step:
        for assignment in dict.fromkeys([best, *budgets]):
            if assignment is None:
                continue
            strategy = candidates.strategy(assignment)
            quantized = _kept(
                candidates.measurements.store,
                f"in order {choices_key(strategy)}",
                lambda strategy=strategy: quantize(  # type: ignore[misc]
                    model, strategy, candidates.measurements.calibration
                ),
            )
            row = candidates.measure("in order", strategy, quantized)
            row, _ = adjust_scales(candidates, row, candidates.factors)
            step(_note(row))
            failed = 0 if goal.keeps(row) else failed + 1
            if failed == FAILURES - 1:  # each of these takes seconds
                break


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

    quantized = _kept(store, key, make)
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    learned = {n: None if c is None else {**c, "rounding": "learned"} for n, c in tensors.items()}
    row = candidates.measure(
        f"learned {epochs:g} epochs", Strategy(learned, start.activations), quantized
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
    best, factors = row, {}

    def better(grown: dict[str, float]) -> bool:
        nonlocal best, factors
        key = f"{row['origin']} {json.dumps(grown)} {choices_key(strategy)}"
        origin = f"{row['origin']}, scales adjusted"
        quantized = scaled(strategy.fitted, grown)
        tried = candidates.measured(key, origin, strategy, quantized)
        if not (candidates.is_whole(tried) and tried[drop] < best[drop]):
            return False
        candidates.drop(best)
        candidates.keep(key, tried)
        best, factors = tried, grown
        return True

    if start:
        better(dict(start))
        weights = [name for name in weights if name in start]
    for name in weights[::-1]:
        for factor in FACTORS:
            while better(factors | {name: factors.get(name, 1.0) * factor}):
                pass
    return best, factors


def answer(candidates: Candidates) -> tuple[Strategy, pd.DataFrame]:
    """The best candidate, and all of them."""
    best = candidates.best()
    if best is None:
        raise ValueError(_nearest(candidates))
    rows = sorted(candidates.rows.values(), key=lambda row: -row["model_bytes"])
    on_ladder = {id(row) for row in ladder(candidates.whole(), best, candidates.goal)}
    table = pd.DataFrame(rows)
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


def _kept(store: Store, key: str, make: Callable[[], Quantized]) -> Quantized:
    entry = store.get(f"codes {key}")
    if entry is None:
        quantized = make()
        store.put(f"codes {key}", *artifact.pack(quantized))
        return quantized
    return artifact.unpack(*entry)


def _note(row: Row) -> str:
    return f"{row['mean_bits']:.3g} bits CR {row['criterion_ratio']:.4f}"
