"""What is done to a search's few best allocations: layers compensated in order, scales adjusted,
codes learned."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils.data import TensorDataset

from quantifind.learning import calibrating_temperature
from quantifind.learning import learn as learn_codes
from quantifind.mixed_precision.allocation import Assignment, Option, total_cost
from quantifind.mixed_precision.candidates import (
    ADJUSTED,
    Candidates,
    Row,
    Trial,
    choices_key,
    note,
)
from quantifind.mixed_precision.measurements import Measurements
from quantifind.quantize import quantize
from quantifind.storage import artifact
from quantifind.storage.checkpoints import random_state, set_random_state
from quantifind.storage.store import Store, fingerprint
from quantifind.strategy import Choice, Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.tensor.scales import scaled
from quantifind.utils.console import progress

# candidates of learning at most
LEARNED = 4
# compensated in order at a time, which takes longer than to measure them
FITTED = 2
# shares of the best cost so far: of allocations compensated in order, and of surer, costlier ones
IN_ORDER = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
COSTLIER = (1.05, 1.1, 1.15, 1.2, 1.3)
# what the scales of a tensor are multiplied with, step by step
FACTORS = (0.94, 1.06)
# learned rounding here follows the labels too, and may take large steps
LEARNING_RATE, LABELS = 1e-3, 1.0
LABELLED = (nn.CrossEntropyLoss, nn.MSELoss)
# bits that a weight, and another tensor, has at most where codes are learned
LEARNABLE, BESIDE = 4, 8


def compensate_in_order(candidates: Candidates) -> None:
    """The best allocations again, each layer compensated for what those before it lost, then their
    scales adjusted."""
    best, goal = candidates.best_assignment(), candidates.goal
    if best is None:
        return
    cost = total_cost(candidates.units, best) + candidates.fixed
    shares = IN_ORDER if goal.budget is None else (1.0, 0.97)
    budgets = (candidates.allocate(cost * share) for share in shares)
    assignments = [a for a in dict.fromkeys([best, *budgets]) if a is not None]
    failed = 0
    with progress("compensating in order", total=len(assignments)) as step:
        for first in range(0, len(assignments), FITTED):
            strategies = [candidates.strategy(a) for a in assignments[first : first + FITTED]]
            fitted = _compensated(candidates, strategies)
            for strategy, quantized in zip(strategies, fitted, strict=True):
                (row,) = candidates.measure([candidates.trial("in order", strategy, quantized)])
                row, _ = adjust_scales(candidates, row, candidates.factors)
                step(note(row))
                failed = 0 if goal.keeps(row) else failed + 1
                if failed == 2:  # each of these takes seconds
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
    """Allocations somewhat costlier than the best, each with scales adjusted for itself: steps of
    the ladder that are surer, should the best not hold on test data."""
    best, goal = candidates.best(), candidates.goal
    if best is None or goal.budget is not None:
        return
    with progress("steadying", total=len(COSTLIER)) as step:
        for share in COSTLIER:
            assignment = candidates.allocate(share * best[goal.cost])
            if assignment is not None:
                (row,) = candidates.measure([candidates.allocated(assignment)])
                if candidates.is_whole(row):
                    row, _ = adjust_scales(candidates, row)
                step(note(row))


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
            assignment = candidates.allocate(target, units)
            if assignment is None:
                break
            if assignment not in learned:
                row = _learn(candidates, candidates.strategy(assignment, units), epochs)
                learned[assignment] = goal.keeps(row)
                step(note(row))
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
