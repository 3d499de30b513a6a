"""Candidates of a search whose codes are learned: of few bits, or of which few are not 0."""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import TensorDataset

from quantifind.learning import learn as learn_codes
from quantifind.learning import train_control
from quantifind.mixed_precision.candidates import Candidates, Row, choices_key
from quantifind.mixed_precision.knapsack import Assignment, Option, pareto
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.refinement import stored
from quantifind.mixed_precision.search_space import nearest_in_bits
from quantifind.network.modules import plain_copy, run
from quantifind.runtime.control import Control
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.labels import LABELLED, are_shares, facts_of
from quantifind.storage import artifact
from quantifind.storage.checkpoints import random_state, set_random_state
from quantifind.storage.store import Store, fingerprint
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.quantized import Quantized
from quantifind.utils.console import console, progress
from quantifind.utils.devices import evaluating
from quantifind.utils.naming import NotFinite

# candidates of learning at most
LEARNED = 4
# learning here may take large steps; where few codes are not 0 larger ones, up to so many times:
# without labels, at 5% of dense_mnist's, the loss on validation data was 0.950 times the float
# network's with 2, 0.971 with 3.2, 0.988 with 4
LEARNING_RATE, LABEL_WEIGHT = 1e-3, 1.0
FASTER = {"following": 2.0, "trained": 4.0}
# a training that works leaves no network so many times as bad as it began: beside one that is,
# any codes would do well (test_a_control_far_worse_than_it_began_has_no_matched_ratio)
DIVERGED = 100
# bits that a weight, and another tensor, has at most where codes are learned
LEARNABLE, BESIDE = 4, 8
# which shares of the codes may be others than 0, of how many levels; and bits of other tensors
DENSITIES, LEVELS, BESIDE_CODED = (0.005, 0.5), 7, 6


def learn_candidates(candidates: Candidates, epochs: float, labels: bool) -> None:
    """Learn codes: of few bits; or, where the search space has coded ones, of which few are not 0.

    Where labels are learned, too, so are float weights, as a control.
    """
    criterion, sparse = candidates.measurements.criterion, _sparse_strategy(candidates)
    if labels and not isinstance(criterion, LABELLED):
        names = " and ".join(kind.__name__ for kind in LABELLED)
        console.print(f"Labels are learned with {names} alone: codes follow the outputs")
        labels = False
    density = None
    if sparse is None:
        start = _learn_allocations(candidates, epochs, labels)
    else:
        start, density = sparse, _learn_densities(candidates, sparse, epochs, labels)
    if labels and start is not None:
        # the same tensors are trained, of how many bits the codes may be
        candidates.control = _control(candidates.measurements, start, epochs, density)
        console.print(f"{candidates.control}", markup=False, highlight=False)


def _sparse_strategy(candidates: Candidates) -> Strategy | None:
    """Weights that may be coded on one step, others of about `BESIDE_CODED` bits; None where no
    weight may be coded. The same for every limit: test_another_limit_learns_nothing_anew.
    Activations, which only a budget chooses, are the best candidate's."""
    best, allocation = candidates.best(), candidates.allocation
    found: dict[str, Choice | None] = {}
    some = False
    for name, choices in allocation.rounded_options.space.tensors.items():
        coded = [c for c in choices if c.storage == "coded" and c.scheme == "uniform"]
        if coded and allocation.values[name].dim() > 1:
            # test_what_may_be_coded_learns_to_be_sparse
            own = ("scheme", "axis", "group", "storage", "scale_dtype")
            values = {k: v for k, v in coded[0].plain().items() if k in own}
            found[name] = Choice.of(values | {"levels": LEVELS, "rounding": "nearest"})
            some = True
        else:
            found[name] = nearest_in_bits(choices, BESIDE_CODED)
    if not some:
        return None
    activations = {} if best is None else best["strategy"].activations
    return Strategy(found, activations, allocation.folded)


def _learn_densities(candidates: Candidates, start: Strategy, epochs: float, labels: bool) -> float:
    """Learn codes at the middle, as ratios, of a range of densities that narrows: between the
    sparsest that keeps a limit and the densest that does not; for a budget, the other way round.

    Returns: the density of the best of them; the largest where none keeps the goal.
    """
    goal, tried, kept = candidates.goal, list[float](), dict[float, tuple[float, float]]()
    low, high = DENSITIES
    with progress("learning candidates", total=LEARNED) as step:
        for _ in range(LEARNED):
            density = math.sqrt(low * high)
            row = _learn(candidates, start, epochs, labels, density)
            tried.append(density)
            if row is not None and goal.keeps(row):
                kept[density] = goal.rank(row)
            step("" if row is None else candidates.note(row))
            sparser = (density in kept) == (goal.budget is None)
            low, high = (low, density) if sparser else (density, high)
    return min(kept, key=kept.__getitem__, default=max(tried))


def _learn_allocations(candidates: Candidates, epochs: float, labels: bool) -> Strategy | None:
    """Learn the codes of few-bit allocations: at the budget and below it; or, for a limit, where
    halving the ratio of the best cost to the cheapest leads.

    Returns: what the first of them began with; None where there was none.
    """
    allocation, goal, best = candidates.allocation, candidates.goal, candidates.best()
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
                row = _learn(
                    candidates, _begun(allocation.strategy(assignment, groups)), epochs, labels
                )
                learned[assignment] = row is not None and goal.keeps(row)
                step("" if row is None else candidates.note(row))
            if goal.budget is None:
                low, high = (low, target) if learned[assignment] else (target, high)
    return _begun(allocation.strategy(next(iter(learned)), groups)) if learned else None


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


def _learn(
    candidates: Candidates,
    start: Strategy,
    epochs: float,
    labels: bool,
    density: float | None = None,
) -> Row | None:
    measurements = candidates.measurements
    try:
        quantized = _learned(measurements, start, epochs, labels, density)
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
    few = "" if density is None else f", {density:.2%} not 0"
    exactly = "" if density is None else f" ({density!r})"
    trial = candidates.trial(f"{how} {epochs:g} epochs{few}", learned, quantized, exactly)
    (row,) = candidates.measure([trial])
    # what was learned for minutes is not given up by an eighth of the examples, by which the next
    # density would be chosen, too: test_what_was_learned_is_measured_whole
    return candidates.completed(row)


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


def _learned(
    measurements: Measurements,
    start: Strategy,
    epochs: float,
    labels: bool,
    density: float | None,
) -> Quantized:
    """The codes that a strategy learns, or as they are kept."""
    key, recipe = _recipe(measurements, epochs, labels, density)
    if density is not None:
        recipe["density"] = density
        key += f" {density}"
    key, store = f"learned codes {key} {choices_key(start)}", measurements.store
    recipe["checkpoints"] = resume = _resumed(store, key)
    if store.get(key) is None:
        loader = measurements.train_loader
        with _in_order(loader):
            quantized = learn_codes(measurements.model, start, loader, **recipe)
        store.put(key, *artifact.pack(quantized))
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    learned = stored(store, key)
    assert learned is not None
    return learned


def _control(
    measurements: Measurements, start: Strategy, epochs: float, density: float | None
) -> Control:
    """What becomes of float weights by the recipe of codes that learn from labels, or as it is
    kept.

    start: that the codes began with.
    """
    key, recipe = _recipe(measurements, epochs, True, density)
    trained = sorted(name for name, choice in start.tensors.items() if choice is not None)
    key, store = f"control {key} {fingerprint(trained, start.folded)}", measurements.store
    recipe["checkpoints"] = resume = _resumed(store, key)
    if store.get(key) is None:
        with _in_order(measurements.train_loader):
            store.put(key, *_trained_control(measurements, start, recipe))
    if resume is not None:
        shutil.rmtree(resume, ignore_errors=True)
    entry = store.get(key)
    assert entry is not None
    weights, facts = entry
    if not facts["fault"]:
        # also of what an earlier version kept
        facts["ratio"], facts["fault"] = beside(facts["ratio"], 1.0)
    folded = (*dict.fromkeys((*measurements.folded, *start.folded)),)
    return Control(weights, folded, math.nan if facts["fault"] else facts["ratio"], facts["fault"])


def _trained_control(
    measurements: Measurements, start: Strategy, recipe: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and what is said of them: no weights where their training diverges."""
    try:
        net = train_control(measurements.model, start, measurements.train_loader, **recipe)
        given = measurements.evaluator.given_batches()
        judged = Evaluator(net, given, measurements.criterion).outcome().criterion
    except NotFinite as error:
        return {}, {"ratio": None, "fault": str(error)}
    ratio, fault = beside(judged, measurements.original.criterion)
    if fault:
        return {}, {"ratio": None, "fault": fault}
    return {**dict(net.named_parameters())}, {"ratio": ratio, "fault": ""}


def beside(loss: float, original: float) -> tuple[float, str]:
    """The ratio of a control's loss to the float network's, and what is wrong with it."""
    if original == 0:
        return math.nan, "the float network's loss on validation data is 0"
    ratio = loss / original
    if not ratio <= DIVERGED:
        return math.nan, f"its loss on validation data is {loss:g}, the float one's {original:g}"
    return ratio, ""


def _recipe(
    measurements: Measurements, epochs: float, labels: bool, density: float | None
) -> tuple[str, dict[str, Any]]:
    """What `quantifind.learning.learn` is given, and a key of it and of the data."""
    label_weight = LABEL_WEIGHT if labels else 0.0
    # with the largest rate at each density, denser codes followed worse than sparser ones
    most = FASTER["trained" if labels else "following"]
    faster = 1.0 if density is None else min(most, math.sqrt(DENSITIES[1] / density))
    learning_rate = faster * LEARNING_RATE
    dataset = getattr(measurements.train_loader, "dataset", None)
    whole = dataset.tensors if isinstance(dataset, TensorDataset) else ()
    # 12 and 12.0 are the same: test_learning_is_kept
    options: list[Any] = [float(epochs), label_weight, learning_rate]
    recipe = {
        "epochs": epochs,
        "calibration": measurements.calibration,
        "forward": measurements.forward,
        "label_weight": label_weight,
        "learning_rate": learning_rate,
        "seed": measurements.seed,
    }
    if facts := _facts(measurements, labels):
        options.append(facts)
        recipe["criterion"] = measurements.criterion
    return fingerprint(*options, *whole), recipe


def _facts(measurements: Measurements, labels: bool) -> dict[str, Any]:
    """What of a criterion has a say in what is learned, beside what learning does without one."""
    facts, net = facts_of(measurements.criterion, labels=labels), plain_copy(measurements.model)
    with evaluating(net):
        outputs, *targets = run(net, measurements.calibration[0])
    shares = are_shares(measurements.criterion, outputs, targets)
    return facts | ({"shares": True} if shares else {})


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
