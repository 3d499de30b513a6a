"""What is done to a search's few best allocations: GPTQ layer by layer, scales fitted."""

from collections.abc import Sequence

from quantifind.mixed_precision.adjusted_scales import adjust_scales
from quantifind.mixed_precision.candidates import Candidates, choices_key, note
from quantifind.mixed_precision.measurements import Measurements
from quantifind.quantize import quantize
from quantifind.storage import artifact
from quantifind.storage.store import Store
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.console import progress
from quantifind.utils.naming import NotFinite

# quantized sequentially at a time, which takes longer than to measure them
FITTED = 2
# shares of the best cost so far: of allocations quantized sequentially, and of costlier ones
SEQUENTIAL = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
COSTLIER = (1.05, 1.1, 1.15, 1.2, 1.3)


def gptq_sequentially(candidates: Candidates) -> None:
    """The best allocations again: each layer makes up for what those before it lost; scales of
    these, and of the best as it is, are fitted."""
    best, goal, allocation = candidates.best_assignment(), candidates.goal, candidates.allocation
    if best is None:
        return
    row = candidates.best("allocated")
    assert row is not None
    adjust_scales(candidates, row)
    cost = allocation.total(best)
    shares = SEQUENTIAL if goal.budget is None else (1.0, 0.97)
    solved = (allocation.solve(cost * share) for share in shares)
    assignments = [a for a in dict.fromkeys([best, *solved]) if a is not None]
    failed = 0
    with progress("quantizing sequentially", total=len(assignments)) as step:
        passes = candidates.measurements.passes
        for first in range(0, len(assignments), FITTED):
            if passes.left <= 0:
                passes.stopped("fewer sequential ones")
                return
            strategies = [allocation.strategy(a) for a in assignments[first : first + FITTED]]
            fitted = _sequential(candidates.measurements, strategies)
            for strategy, quantized in zip(strategies, fitted, strict=True):
                if quantized is None:
                    continue
                (row,) = candidates.measure([candidates.trial("sequential", strategy, quantized)])
                row = adjust_scales(candidates, row)
                step(note(row))
                failed = 0 if goal.keeps(row) else failed + 1
                if failed == 2:  # each of these takes seconds
                    return


def _sequential(
    measurements: Measurements, strategies: Sequence[Strategy]
) -> list[Quantized | None]:
    """Strategies quantized by the workers, or as they are kept; None where what comes before a
    layer has lost so much that its inputs are no numbers (test_a_loss_that_is_nan_is_no_answer)."""
    keys = [f"sequential codes {choices_key(strategy)}" for strategy in strategies]
    missing = [i for i, key in enumerate(keys) if measurements.store.get(key) is None]
    made = measurements.workers.map(_quantize, measurements, [strategies[i] for i in missing])
    for i, quantized in zip(missing, made, strict=True):
        if quantized is not None:
            measurements.store.put(keys[i], *artifact.pack(quantized))
    return [stored(measurements.store, key) for key in keys]


def _quantize(measurements: Measurements, strategy: Strategy) -> Quantized | None:
    try:
        return quantize(measurements.model, strategy, measurements.calibration)
    except NotFinite:
        return None


def stored(store: Store, key: str) -> Quantized | None:
    entry = store.get(key)
    return None if entry is None else artifact.unpack(*entry)


def add_safer_allocations(candidates: Candidates) -> None:
    """Slightly larger allocations as fallbacks, in case the best one fails on test data."""
    best, goal = candidates.best(), candidates.goal
    if best is None or goal.budget is not None:
        return
    with progress("adding safer ones", total=len(COSTLIER)) as step:
        passes = candidates.measurements.passes
        for share in COSTLIER:
            if passes.left <= 0:
                passes.stopped("fewer safer ones")
                return
            assignment = candidates.allocation.solve(share * best[goal.cost])
            if assignment is not None:
                (row,) = candidates.measure([candidates.allocated(assignment)])
                step(note(row))
