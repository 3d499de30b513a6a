"""What is done to a search's few best allocations: GPTQ layer by layer, scales fitted, codes
learned."""

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import TensorDataset

from quantifind.learning import fit_temperature
from quantifind.learning import learn as learn_codes
from quantifind.mixed_precision.adjusted_scales import adjust_scales
from quantifind.mixed_precision.candidates import Candidates, Row, choices_key, note
from quantifind.mixed_precision.knapsack import Assignment, Option, pareto
from quantifind.mixed_precision.matched import control_of
from quantifind.mixed_precision.measurements import Measurements
from quantifind.quantize import WAVES, quantize, sequential_examples
from quantifind.runtime.control import Control
from quantifind.storage import artifact
from quantifind.storage.checkpoints import random_state, set_random_state
from quantifind.storage.store import Store, fingerprint
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import Quantized
from quantifind.utils.console import console, progress
from quantifind.utils.naming import NotFinite

# candidates of learning at most
LEARNED = 4
# quantized sequentially at a time, which takes longer than to measure them
FITTED = 2
# shares of the best cost so far: of allocations quantized sequentially, and of costlier ones
SEQUENTIAL = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6)
COSTLIER = (1.05, 1.1, 1.15, 1.2, 1.3)
# learning here may take large steps
LEARNING_RATE, LABEL_WEIGHT = 1e-3, 1.0
LABELLED = (nn.CrossEntropyLoss, nn.MSELoss)
# bits that a weight, and another tensor, has at most where codes are learned
LEARNABLE, BESIDE = 4, 8


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
                (row,) = candidates.measure([candidates.trial("sequential", strategy, quantized)])
                row = adjust_scales(candidates, row)
                step(note(row))
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
    return [_stored(measurements.store, key) for key in keys]


def _quantize(measurements: Measurements, task: tuple[Strategy, int]) -> Quantized | None:
    strategy, waves = task
    try:
        return quantize(measurements.model, strategy, measurements.network, waves=waves)
    except NotFinite:
        return None


def _stored(store: Store, key: str) -> Quantized | None:
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


def learn_allocations(candidates: Candidates, epochs: float, labels: bool) -> None:
    """Learn the codes of few-bit allocations: at the budget and below it; or, for a limit, where
    halving the ratio of the best cost to the cheapest leads."""
    allocation, goal, best = candidates.allocation, candidates.goal, candidates.best()
    criterion = candidates.measurements.criterion
    if labels and not isinstance(criterion, LABELLED):
        names = " and ".join(kind.__name__ for kind in LABELLED)
        console.print(f"Labels are learned with {names} alone: codes follow the outputs")
        labels = False
    groups = [
        pareto([o for o in options if _learnable(candidates, o)]) or group[-1:]
        for options, group in zip(allocation.options, allocation.groups, strict=True)
    ]
    low, high = (allocation.fixed + sum(group[end].cost for group in groups) for end in (-1, 0))
    high = min(high, math.inf if best is None else best[goal.cost], goal.budget or math.inf)
    learned: dict[Assignment, bool] = {}
    with progress("learning candidates", total=LEARNED) as step:
        for number in range(LEARNED):
            if goal.budget is None:
                target = math.sqrt(low * high)
            else:
                target = high * (low / high) ** (number / (2 * LEARNED))
            assignment = allocation.solve(target, groups)
            if assignment is None:
                break
            if assignment not in learned:
                row = _learn(candidates, allocation.strategy(assignment, groups), epochs, labels)
                learned[assignment] = row is not None and goal.keeps(row)
                step("" if row is None else note(row))
            if goal.budget is None:
                low, high = (low, target) if learned[assignment] else (target, high)
    if labels and learned:
        # the same tensors are trained, of how many bits the codes may be
        start = _begun(allocation.strategy(next(iter(learned)), groups))
        candidates.control = _control(candidates.measurements, start, epochs)
        console.print(f"{candidates.control}", markup=False, highlight=False)


def _learnable(candidates: Candidates, option: Option) -> bool:
    """Whether all its tensors are of few bits, weights rounded by GPTQ to begin with."""
    for name, choice in option.tensors.items():
        is_weight = candidates.allocation.values[name].dim() > 1
        most = LEARNABLE if is_weight else BESIDE
        if choice is None or choice.width > most:
            return False
        if is_weight and choice.rounding != "gptq":
            return False
    return True


def _learn(candidates: Candidates, strategy: Strategy, epochs: float, labels: bool) -> Row | None:
    measurements = candidates.measurements
    start = _begun(strategy)
    try:
        quantized = _learned(measurements, start, epochs, labels)
    except NotFinite:
        return None
    learned = Strategy(
        {
            name: None if c is None else Choice.of({**c.plain(), "rounding": "learned"})
            for name, c in start.tensors.items()
        },
        start.activations,
        start.folded,
    )
    how = "trained" if labels else "following"
    trial = candidates.trial(f"{how} {epochs:g} epochs", learned, quantized)
    (row,) = candidates.measure([trial])
    return row


def _begun(strategy: Strategy) -> Strategy:
    """What learning begins with."""
    tensors = {n: None if c is None else _to_begin_with(c) for n, c in strategy.tensors.items()}
    return Strategy(tensors, strategy.activations, strategy.folded)


def _to_begin_with(choice: Choice) -> Choice:
    """±½ and ±1½ waste no level, which learned codes make use of."""
    if choice.rounding == "nearest" or choice.bits != 2 or choice.scheme != "uniform":
        return choice
    half_integer = not choice.options.get("zero_point")
    return Choice.of({**choice.plain(), "half_integer": half_integer})


def _learned(measurements: Measurements, start: Strategy, epochs: float, labels: bool) -> Quantized:
    """The codes that a strategy learns, or as they are kept."""
    key, recipe = _recipe(measurements, epochs, labels)
    key, store = f"learned codes {key} {choices_key(start)}", measurements.store
    recipe["checkpoints"] = resume = _resumed(store, key)
    if store.get(key) is None:
        loader = measurements.train_loader
        with _in_order(loader):
            quantized = learn_codes(measurements.model, start, loader, **recipe)
        store.put(key, *artifact.pack(quantized))
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    learned = _stored(store, key)
    assert learned is not None
    return learned


def _control(measurements: Measurements, start: Strategy, epochs: float) -> Control:
    """What becomes of float weights by the recipe of codes that learn from labels."""
    key, recipe = _recipe(measurements, epochs, True)
    trained = sorted(name for name, choice in start.tensors.items() if choice is not None)
    key = f"control {key} {fingerprint(trained, start.folded)}"
    recipe["checkpoints"] = _resumed(measurements.store, key)
    with _in_order(measurements.train_loader):
        return control_of(measurements, start, key, recipe)


def _recipe(measurements: Measurements, epochs: float, labels: bool) -> tuple[str, dict[str, Any]]:
    """What `quantifind.learning.learn` is given, and a key of it and of the data."""
    label_weight, temperature = LABEL_WEIGHT if labels else 0.0, 1.0
    if labels:
        # a network trained to the end is overconfident, and so would its followers be; by training
        # data, which is all that learning sees
        temperature = fit_temperature(measurements.model, measurements.calibration)
    dataset = getattr(measurements.train_loader, "dataset", None)
    whole = dataset.tensors if isinstance(dataset, TensorDataset) else ()
    options = [epochs, temperature, label_weight, LEARNING_RATE]
    recipe = {
        "epochs": epochs,
        "calibration": measurements.calibration,
        "forward": measurements.forward,
        "temperature": temperature,
        "label_weight": label_weight,
        "learning_rate": LEARNING_RATE,
        "seed": measurements.seed,
    }
    return fingerprint(*options, *whole), recipe


def _resumed(store: Store, key: str) -> Path | None:
    """Where a learning that was killed goes on."""
    return None if store.folder is None else store.folder / f"learning-{fingerprint(key)[:16]}"


@contextmanager
def _in_order(loader: Iterable[Any]) -> Iterator[None]:
    """Each learning sees the same order: test_a_killed_learning_search_goes_on."""
    before = random_state(loader)
    try:
        yield
    finally:
        set_random_state(before, loader)
