"""Mixed-precision search: the cheapest strategy within a loss limit, or the smallest loss within a
budget."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from quantifind.certification.goal import Goal, Limit
from quantifind.mixed_precision.asked import asked_goal, measurable
from quantifind.mixed_precision.candidates import Candidates, Told
from quantifind.mixed_precision.exploration import explore, try_neighbours
from quantifind.mixed_precision.found import Found, found_by
from quantifind.mixed_precision.learned_candidates import learn_candidates
from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.passes import OutOfTime, Passes
from quantifind.mixed_precision.refinement import (
    add_safer_allocations,
    gptq_sequentially,
)
from quantifind.mixed_precision.search_space import (
    WIDER,
    WIDTHS,
    SearchSpace,
    default_search_space,
)
from quantifind.mixed_precision.sensitivity import PRECISION, Sensitivity, predict_sensitivity
from quantifind.mixed_precision.survey import least_effort, survey
from quantifind.network.modules import named_tensors
from quantifind.runtime.workers import Workers
from quantifind.tensor.choice import STORAGES, Choice
from quantifind.tensor.parts import quantizable
from quantifind.utils.batches import Forward
from quantifind.utils.console import board, console
from quantifind.utils.interrupts import interruptible
from quantifind.utils.loaders import length_of
from quantifind.utils.naming import naming

# passes that a search may take; and of those left, the share that each phase may. What a phase does
# not use, the next ones may.
EFFORT = 200
SURVEYED, SWEPT, MOVED, SEQUENTIAL = 0.4, 0.6, 0.4, 0.6


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
    labels: bool = False,
    effort: float | None = None,
    seconds: float | None = None,
    max_memory: float | None = None,
    widths: Iterable[int] | None = None,
    activation_bits: Iterable[int] = (),
    storage: str = "packed",
    grids: Iterable[Choice | Mapping[str, Any]] = (),
    search_space: SearchSpace | Mapping[str, Any] | None = None,
    confidence: float = 0.95,
    precision: float = PRECISION,
    proxies: bool = False,
    random: int = 0,
    told: Told | None = None,
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
    limit: by measure of `quantifind.certification.measures.MEASURES`, such as
        ``{"calibrated_ratio": 1.01, "accuracy_drop": 0.003}``, which is the default as far as the
        data have them; a number is of the criterion ratio. The candidate's one-sided bounds on
        validation data are at most that.
    budget: instead, mean bits per parameter, or one of ``mean_bits`` and the modules of
        `quantifind.costs`, such as ``{"model_bytes": 100_000}``.
    learn: epochs of training of each of the few best allocations, whose codes learn to follow the
        float network's outputs; 0 for none.
    labels: whether they follow the labels of the training data, too. That trains the network
        further, which quantization alone does not: its ratio is not that of quantization. Float
        weights then have the same training, as a control (`quantifind.runtime.control.Control`).
    effort: passes over the validation data that the search may take, without learning; a part of
        the examples, or of the network, counts as that part of one. What was left out is said. By
        default 200, or as many as the smallest search takes where validation examples are few.
    seconds: that it may take; the best so far is the answer. None for no end.
    max_memory: bytes that moments of training inputs may take, as
        `quantifind.quantize.quantize` takes it.
    widths: bits of the default search space, 1 to 32; by default 1 to 16, and up to 32 where none
        of those keeps the limit.
    activation_bits: bits that activations may have besides float, for a budget of what they save.
    storage: of the weights' codes in the default search space: "packed", at fixed widths; or
        "coded", where what is frequent takes little, and which is decoded before it runs.
    grids: choices that every weight has besides in the default search space, such as
        ``{"scheme": "codebook", "bits": 3, "axis": 0, "rounding": "gptq"}``.
    search_space: instead of these, the choices of each tensor and activation, a `SearchSpace` or
        its fields.
    confidence: of the bounds, above 0.5 and below 1.
    precision: stop measuring a tensor once the standard error of its loss increase is this fraction
        of the increase (`quantifind.mixed_precision.sensitivity.measure_sensitivity`); 0: use every
        example.
    proxies: whether the sensitivity table also has what is predicted without measuring.
    random: how many allocations with widths at random are measured besides, each in a pass.
    told: gets passes, and of the best so far mean bits and what it loses, after each candidate.
    folder: keeps all that is measured. A call that was killed goes on, and another limit for the
        same network and data does not measure again what is there.
    seed: of the order of the examples, of which training data calibrate, and of learning.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Returns: the chosen strategy, its codes, and the tables.
    Raises: ValueError for an argument out of range; for data and criteria that
        `quantifind.mixed_precision.measurements.Measurements` can't take; and, naming the nearest,
        for a limit or budget that no candidate keeps.
    """
    goal, activation_bits = asked_goal(limit, budget, criterion), list(activation_bits)
    most = {"effort": effort, "seconds": seconds, "max_memory": max_memory}
    _check(goal, train_loader, learn, labels, confidence, activation_bits, most, storage, random)
    deadline = None if seconds is None else time.monotonic() + seconds
    own = _given_space(search_space), _given_grids(grids, search_space)
    with Workers(engine, scheduler=scheduler) as workers, interruptible():
        how: Any = {"forward": forward, "folder": folder, "seed": seed, "workers": workers}
        how["max_memory"] = max_memory
        measurements = Measurements.start(model, train_loader, val_loader, criterion, **how)
        goal = measurable(goal, measurements.original, default=(limit, budget) == (None, None))
        passes = measurements.passes
        passes.deadline = deadline
        candidates: Candidates | None = None
        try:
            with board(lambda: _standing(passes, candidates)):
                for space in _spaces(measurements, goal, *own, widths, activation_bits, storage):
                    passes.effort = effort or _default_effort(measurements, space, goal)
                    with passes.of("sensitivity", SURVEYED):
                        sensitivity, allocation = survey(measurements, space, goal, precision)
                    candidates = Candidates(measurements, allocation, confidence, told)
                    with passes.of("budgets", SWEPT):
                        sensitivity = explore(candidates, sensitivity, precision)
                    if candidates.best() is not None:
                        break
                if candidates is not None:
                    refine(candidates, learn, labels)
        except (KeyboardInterrupt, OutOfTime) as error:
            _cut_short(error, candidates, seconds, folder)
        assert candidates is not None
        table = _sensitivities(measurements, sensitivity, proxies)
        return found_by(candidates, table, criterion, forward, random=random, seed=seed)


def _default_effort(measurements: Measurements, space: SearchSpace, goal: Goal) -> float:
    """As many passes as the smallest search takes, at least: of few validation examples a pass is
    little (test_few_validation_examples_are_searched_with)."""
    return max(EFFORT, least_effort(measurements, space, goal))


def _sensitivities(measurements: Measurements, found: Sensitivity, proxies: bool) -> Any:
    # who wants it to end does not want minutes of derivatives
    asked = proxies and "interrupted" not in measurements.passes.left_out
    return predict_sensitivity(measurements, found) if asked else found.table


def _cut_short(
    error: BaseException,
    candidates: Candidates | None,
    seconds: float | None,
    folder: Path | str | None,
) -> None:
    """Note that a search ended early; raise where there is no answer yet."""
    late = isinstance(error, OutOfTime)
    if candidates is not None and candidates.best() is not None:
        what = "what would have come after the time" if late else "interrupted"
        candidates.measurements.passes.stopped(what)
        if not late:
            console.print("Interrupted: the search ends with the best so far")
    elif late:
        kept = "give a folder" if folder is None else f"what was done is in {folder}"
        raise ValueError(
            f"seconds is {seconds:g}: over before any candidate kept the goal; {kept}, and another "
            "call goes on from there"
        ) from error
    else:
        kept = "no folder was given, so nothing is kept"
        if folder is not None:
            kept = f"what was measured is in {folder}, and the same call goes on from there"
        console.print(f"Interrupted before there was an answer; {kept}", markup=False)
        raise error


def _standing(passes: Passes, candidates: Candidates | None) -> str:
    """How a search stands, in one line."""
    best = None if candidates is None else candidates.best()
    if candidates is None or best is None:
        return passes.standing()
    return f"{passes.standing()}; best so far {candidates.note(best)}"


def refine(candidates: Candidates, learn: float, labels: bool) -> None:
    """Better candidates near the best: moves, GPTQ layer by layer, safer ones, learned ones."""
    passes = candidates.measurements.passes
    with passes.of("moves", MOVED):
        try_neighbours(candidates)
    with passes.of("sequential", SEQUENTIAL):
        gptq_sequentially(candidates)
    with passes.of("safer"):
        add_safer_allocations(candidates)
    if learn:
        with passes.of("learning", math.inf):
            learn_candidates(candidates, learn, labels)


def _check(
    goal: Goal,
    train_loader: Iterable[Any],
    learn: float,
    labels: bool,
    confidence: float,
    activation_bits: Sequence[int],
    most: Mapping[str, float | None],
    storage: str,
    random: int,
) -> None:
    if storage not in STORAGES:
        raise ValueError(f"storage is {storage!r}: {', '.join(STORAGES)} are allowed")
    if not 0 <= learn < math.inf:
        raise ValueError(f"learn is {learn!r}: epochs, 0 or more, are needed")
    if not isinstance(labels, bool) or (labels and not learn):
        raise ValueError(f"labels is {labels!r}: False, or True where learn is above 0, is needed")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}: above 0.5 and below 1 is needed")
    if not isinstance(random, int) or random < 0:
        raise ValueError(f"random is {random!r}: a whole number, 0 or more, is needed")
    for name, value in most.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value!r}: a number above 0 is needed")
    if activation_bits and goal.cost in ("model_bytes", "mean_bits"):
        raise ValueError(
            f"activation_bits is {activation_bits}: activations on levels save no {goal.cost}; "
            "give a budget of bit_operations or energy_picojoules"
        )
    if learn and isinstance(train_loader, Iterator):
        length_of(train_loader)  # says that it can't be gone through again


def _say_what_stays(model: nn.Module) -> None:
    """Say which parameters have no choice."""
    stay = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in named_tensors(model).items()
        if tensor.numel() and not quantizable(tensor)
    ]
    if stay:
        more = f" and {len(stay) - 3} more" if len(stay) > 3 else ""
        console.print(
            f"Not quantized, since no dense floats of 16 bits or more: {', '.join(stay[:3])}{more}",
            markup=False,
        )


def _given_space(given: SearchSpace | Mapping[str, Any] | None) -> SearchSpace | None:
    if given is None or isinstance(given, SearchSpace):
        return given
    if not {"tensors"} <= given.keys() <= {"tensors", "activations"}:
        named = ", ".join(given) or "nothing"
        raise ValueError(f"search_space has {named}: tensors, and perhaps activations")
    return SearchSpace(**given)


def _given_grids(given: Iterable[Any], space: Any) -> list[Choice]:
    if isinstance(given, Mapping | str):
        raise ValueError(f"grids is {given!r}: a list of choices is needed")
    with naming("grids"):
        grids = [Choice.of(one) for one in given]
    if grids and space is not None:
        raise ValueError("grids stand beside the default search space: put them in search_space")
    return grids


def _spaces(
    measurements: Measurements,
    goal: Goal,
    given: SearchSpace | None,
    grids: Sequence[Choice],
    widths: Iterable[int] | None,
    activation_bits: Sequence[int],
    storage: str,
) -> Iterator[SearchSpace]:
    """The search space that is given; or the default one, and a wider one where it is too small."""
    if given is not None:
        yield given
        return
    facts, passes = measurements.facts, measurements.passes
    _say_what_stays(measurements.model)
    for tried in (WIDTHS, WIDER) if widths is None else (list(widths) or WIDTHS,):
        space = default_search_space(
            measurements.model, facts, tried, activation_bits, storage, grids
        )
        if tried is WIDER and passes.effort < least_effort(measurements, space, goal):
            # what was found says more: test_an_effort_too_small_for_wider_widths
            passes.stopped(f"more than {WIDTHS[-1]} bits")
            return
        yield space
