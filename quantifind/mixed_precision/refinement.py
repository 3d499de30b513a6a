"""What is done to a search's few best allocations: GPTQ layer by layer, scales fitted."""

from collections.abc import Sequence

from quantifind.certification.goal import SURE
from quantifind.mixed_precision.adjusted_scales import adjust_scales
from quantifind.mixed_precision.candidates import Candidates, choices_key
from quantifind.mixed_precision.measurements import Measurements
from quantifind.quantize import WAVES, quantize_within, sequential_examples
from quantifind.storage import artifact
from quantifind.storage.store import Store
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.console import progress
from quantifind.utils.naming import NotFinite

# quantized sequentially at a time, which takes longer than to measure them
FITTED = 2
# shares of the best cost so far: of allocations quantized sequentially, and of costlier ones
SEQUENTIAL_COSTS = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
COSTLIER = (1.05, 1.1, 1.15, 1.2, 1.3)
# and of still costlier ones, until one is far from the limit
SAFE = (1.6, 2.5, 4.0, 6.3, 10.0)


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
    shares = SEQUENTIAL_COSTS if goal.budget is None else (1.0, 0.97)
    solved = (allocation.solve(cost * share) for share in shares)
    assignments = [a for a in dict.fromkeys([best, *solved]) if a is not None]
    failed = 0
    with progress("quantizing sequentially", total=len(assignments)) as step:
        strategies = [allocation.strategy(a) for a in assignments]
        waves = _waves(candidates.measurements, strategies[:FITTED])
        for first in range(0, len(strategies), FITTED):
            some = strategies[first : first + FITTED]
            fitted = _sequential(candidates.measurements, some, waves)
            if len(fitted) < len(some):
                candidates.measurements.passes.stopped("fewer sequential ones")
            for strategy, quantized in zip(some, fitted, strict=False):
                if quantized is None:
                    continue
                how = f" in {waves} waves"
                trial = candidates.trial("sequential", strategy, quantized, how)
                (row,) = candidates.measure([trial])
                row = adjust_scales(candidates, row)
                step(candidates.note(row))
                failed = 0 if goal.keeps(row) else failed + 1
                if failed == 2:  # each of these takes seconds
                    return
            if len(fitted) < len(some):
                return


def _waves(measurements: Measurements, strategies: Sequence[Strategy]) -> int:
    """The most waves with which what strategies take is within the passes that are left."""
    waves, network = WAVES, measurements.network
    while waves > 1:
        taken = sum(sequential_examples(network, strategy, waves) for strategy in strategies)
        if taken <= measurements.passes.left * measurements.examples:
            break
        waves //= 2
    return waves


def _sequential(
    measurements: Measurements, strategies: Sequence[Strategy], waves: int
) -> list[Quantized | None]:
    """The first strategies, as many as there are passes for, quantized by the workers or as kept;
    None where what comes before a layer has lost so much that its inputs are no numbers
    (test_a_loss_that_is_nan_is_no_answer)."""
    passes, affordable = measurements.passes, list[Strategy]()
    for strategy in strategies:
        taken = sequential_examples(measurements.network, strategy, waves)
        if taken > passes.left * measurements.examples:
            break
        passes.add(taken)
        affordable.append(strategy)
    keys = [f"sequential codes {waves} {choices_key(strategy)}" for strategy in affordable]
    missing = [i for i, key in enumerate(keys) if measurements.store.get(key) is None]
    tasks = [(affordable[i], waves) for i in missing]
    made = measurements.workers.map(_quantize, measurements, tasks)
    for i, quantized in zip(missing, made, strict=True):
        if quantized is not None:
            measurements.store.put(keys[i], *artifact.pack(quantized))
    return [stored(measurements.store, key) for key in keys]


def _quantize(measurements: Measurements, task: tuple[Strategy, int]) -> Quantized | None:
    strategy, waves = task
    try:
        return quantize_within(measurements.network, strategy, waves)
    except NotFinite:
        return None


def stored(store: Store, key: str) -> Quantized | None:
    entry = store.get(key)
    return None if entry is None else artifact.unpack(*entry)


def add_safer_allocations(candidates: Candidates) -> None:
    """Larger allocations as fallbacks, in case the best one fails on test data: slightly larger
    ones, and still larger ones, until one is `quantifind.certification.goal.SURE`."""
    best, goal = candidates.best(), candidates.goal
    if best is None or goal.budget is not None:
        return
    shares = COSTLIER + SAFE
    with progress("adding safer ones", total=len(shares)) as step:
        passes = candidates.measurements.passes
        for share in shares:
            if share in SAFE and _has_sure(candidates, share * best[goal.cost]):
                return
            if passes.left <= 0:
                passes.stopped("fewer safer ones")
                return
            assignment = candidates.allocation.solve(share * best[goal.cost])
            if assignment is not None:
                (row,) = candidates.measure([candidates.allocated(assignment)])
                step(candidates.note(row))


def _has_sure(candidates: Candidates, most: float) -> bool:
    """Whether a candidate of a cost of at most ``most`` is far from the limit."""
    goal = candidates.goal
    return any(r[goal.cost] <= most and goal.margin(r) >= SURE for r in candidates.whole())
