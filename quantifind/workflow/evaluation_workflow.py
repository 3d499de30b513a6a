"""Judge quantized networks on the examples of a loader, beside the original.

The arguments after the model may stand in either order, ``(test_loader, criterion)`` or
``(criterion, test_loader)``: the criterion is the one that can be called.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn
from torch.utils._pytree import tree_leaves

from quantifind.certification.goal import Goal, Limit, steps_that_keep
from quantifind.certification.ledger import Look, look
from quantifind.certification.measures import MEASURES, bounds_at, degradation, examples_needed
from quantifind.metrics import Outcome, columns_of, compared
from quantifind.network.calibration import calibration_batches
from quantifind.network.folding import Pairs, prepared
from quantifind.quantize import mean_bits, quantize
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.workers import Workers
from quantifind.storage.artifact import pack
from quantifind.storage.store import fingerprint
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch, Forward
from quantifind.utils.console import progress
from quantifind.workflow.matched_workflow import matched_ratios
from quantifind.workflow.quantize_workflow import BIT_DEPTHS, BitQuantizer, check_depth

if TYPE_CHECKING:  # so that a new search judges nothing again
    from quantifind.mixed_precision.found import Found


def compute_test_loss(
    model: nn.Module, test_loader: Any, criterion: Any, *, forward: Forward | None = None
) -> float:
    """The criterion over the loader's examples, each weighted alike, in eval mode.

    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    """
    loader, criterion = _loader_and_criterion(test_loader, criterion)
    return Evaluator(model, loader, criterion, forward=forward).outcome().criterion


def evaluate_quantized_model(
    model: nn.Module,
    test_loader: Any,
    criterion: Any,
    bit_depth: int,
    *,
    forward: Forward | None = None,
) -> float:
    """The criterion of a copy of ``model`` quantized to ``bit_depth`` (2 to 32)."""
    quantized = BitQuantizer(bit_depth).quantize_model(model)
    return compute_test_loss(quantized, test_loader, criterion, forward=forward)


def evaluate_bit_depths(
    model: nn.Module,
    test_loader: Any,
    criterion: Any,
    bit_depths: Iterable[int] = BIT_DEPTHS,
    *,
    forward: Forward | None = None,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> pd.DataFrame:
    """A row per bit depth, from most bits to fewest, with the columns of `evaluate_strategies`.

    bit_depths: whole numbers, 2 to 32.
    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    """
    depths = sorted(set(bit_depths), reverse=True)
    for depth in depths:
        check_depth(depth)
    strategies = [uniform_strategy(model, depth) for depth in depths]
    how: Any = {"forward": forward, "engine": engine, "scheduler": scheduler}
    return evaluate_strategies(model, strategies, test_loader, criterion, **how)


def evaluate_strategies(
    model: nn.Module,
    strategies: Iterable[Strategy],
    test_loader: Any,
    criterion: Any,
    *,
    quantized: Iterable[Quantized] | None = None,
    calibration: Iterable[Any] | None = None,
    temperatures: Sequence[float] | None = None,
    original_temperature: float | None = None,
    forward: Forward | None = None,
    confidence: float = 0.95,
    columns: bool = False,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> pd.DataFrame:
    """Judge strategies beside the float network on the examples of a loader.

    test_loader, criterion: in either order.
    quantized: what each strategy has come to; by default they are quantized here.
    calibration: batches of training data, for strategies that need some.
    temperatures, original_temperature: what each quantized network's logits, and the float one's,
        are divided by for the calibrated ratio, as a search fitted them to validation data; by
        default they are fitted to the loader's examples.
    forward: (model, batch) → (outputs, targets), what the criterion gets; by default
        `quantifind.utils.forwards.DefaultForward`.
    confidence: of the intervals.
    columns: also what was measured of each example, as `quantifind.metrics.paired` has it, in a
        column ``columns``.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Returns: a row per strategy, in their order: ``bit_depth`` (missing where widths differ),
        ``mean_bits`` per parameter with everything counted, ``signal_to_complexity`` (criterion per
        bit of depth, or per mean bit where widths differ), and the columns of `compare`.
    Raises: ValueError for a parameter with NaN or infinity, a width out of range, an empty loader.
    """
    loader, criterion = _loader_and_criterion(test_loader, criterion)
    strategies = list(strategies)
    given = strategies if quantized is None else list(quantized)
    known_temperatures = [None] * len(strategies) if temperatures is None else temperatures
    tasks = list(zip(strategies, given, known_temperatures, strict=True))
    for number, (strategy, known, _) in enumerate(tasks):
        if isinstance(known, Quantized) and not _belongs(known, strategy):
            raise ValueError(f"quantized {number} is not what strategy {number} names")
    with Workers(engine, scheduler=scheduler) as workers:
        evaluator = Evaluator(model, loader, criterion, forward=forward)
        batches = None
        if calibration is not None:
            batches = calibration_batches(calibration, model, forward)
        evaluators: dict[Pairs, Evaluator] = {(): evaluator}
        for pairs in {one.folded for one in given} - {()}:
            net = prepared(model, pairs)
            evaluators[pairs] = Evaluator(net, evaluator.given_batches(), criterion)
        original = evaluator.original()
        if original_temperature is None:
            original = original.calibrated()
        elif not math.isnan(original_temperature):
            original = replace(original, gain=1 / original_temperature)
        judge = _Judge(model, evaluators, original, batches, confidence, columns)
        rows = []
        with progress("judging", total=len(tasks)) as step:
            for row in workers.map(_Judge.row, judge, tasks):
                rows.append(row)
                step(f"{row['mean_bits']:.4g} bits CR {row['criterion_ratio']:.4f}")
    return pd.DataFrame(rows)


def _belongs(quantized: Quantized, strategy: Strategy) -> bool:
    pairs = (
        (quantized.tensors, strategy.tensors),
        (quantized.activations, strategy.activations),
    )
    return all(
        have.keys() == {name for name, choice in named.items() if choice is not None}
        for have, named in pairs
    )


@dataclass(frozen=True)
class _Judge:
    """What it takes to judge strategies, on whichever worker."""

    model: nn.Module
    evaluators: dict[Pairs, Evaluator]
    original: Outcome
    calibration: Sequence[Batch] | None
    confidence: float
    columns: bool

    def row(self, task: tuple[Strategy, Strategy | Quantized, float | None]) -> dict[str, Any]:
        strategy, given, temperature = task
        quantized = quantize(self.model, given, self.calibration)
        evaluator = self.evaluators[quantized.folded]
        measured = evaluator.outcome(quantized, beside=self.original)
        depth, bits = strategy.bit_depth, mean_bits(self.model, quantized)
        gain = None if temperature is None else 1 / temperature
        row = _row(measured, self.original.criterion, self.confidence, gain)
        scr = row["criterion"] / (depth or bits)
        beside = {"columns": columns_of(measured)} if self.columns else {}
        return {"bit_depth": depth, "mean_bits": bits, "signal_to_complexity": scr} | row | beside


def _loader_and_criterion(first: Any, second: Any) -> tuple[Any, Any]:
    if callable(first) and not callable(second):
        return second, first
    return first, second


@dataclass(frozen=True)
class Certificate:
    """What test data say of what a search found.

    limits, confidence: what is certified: that each measure is at most its limit.
    look: which of the ladders judged on these data it is, where they are counted; its level is what
        counts, and all of them together have the confidence.
    needed: where nothing is certified, about how many examples it would take for the first.
    steps: a row per strategy of the ladder, from most bytes to fewest: the columns of
        `evaluate_strategies`, and ``certified``; of what was trained further, those of
        `quantifind.workflow.matched_workflow.matched_ratios`.
    strategy, quantized: the last that passed, None where none did.
    """

    limits: Mapping[str, float]
    confidence: float
    steps: pd.DataFrame
    strategy: Strategy | None
    quantized: Quantized | None
    look: Look | None = None
    needed: int | None = None

    def __str__(self) -> str:
        certified = self.steps[self.steps["certified"]]
        row = self.steps.iloc[0] if certified.empty else certified.iloc[-1]
        bits = f"{row['mean_bits']:.4g} bits per parameter"
        limits = " and ".join(f"{MEASURES[n].words} {v:g}" for n, v in self.limits.items())
        bound = "bound" if self.look is None else "look_bound"
        found = "; ".join(
            f"{MEASURES[n].words} {row[n]:.4g}, at most {row[f'{n}_{bound}']:.4g}"
            for n in self.limits
        )
        counted = "" if self.look is None else f", of all {self.look.k} looks at them together"
        if certified.empty:
            more = "" if self.needed is None else f"; it takes about {self.needed:,} examples"
            return f"Nothing is certified at {limits}: {bits} have {found}{more}"
        return (
            f"{bits} are certified at {limits}: {found} "
            f"with {self.confidence:.0%} confidence on test data{counted}"
        )


def certify(
    model: nn.Module,
    found: "Found",
    test_loader: Iterable[Any],
    *,
    limit: Limit | None = None,
    looks: Path | str | None = None,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> Certificate:
    """Walk down the ladder of a search on test data, for as long as each step keeps the limit.

    Several strategies are tried, and what passes last is certified at the level of a single test
    (`quantifind.certification.goal.steps_that_keep`).

    model: the network of the search.
    found: of `quantifind.search.find_strategy`, whose measure, criterion and confidence count.
    test_loader: batches of test data, which took no part in the search.
    limit: as `quantifind.search.find_strategy` takes it, by default that of the search; one is
        needed where that had a budget. A number is of the search's measure.
    looks: a file in which each ladder that is judged on these data, in their order, is counted
        (`quantifind.certification.ledger`): the k-th is certified at 5%/(k(k + 1)), so that all
        answers together have the confidence. By default this is taken to be the only one.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Raises: ValueError as `evaluate_strategies`, and where there is no limit.
    """
    limits, measure = found.goal.limits, found.goal.measure
    if limit is not None:
        limits = Goal.of(limit if isinstance(limit, Mapping) else {measure: limit}, None).limits
    if not limits:
        raise ValueError(f"the search had a budget: give the limit of {measure} to certify")
    ladder = found.ladder
    steps = evaluate_strategies(
        model,
        ladder["strategy"],
        test_loader,
        found.criterion,
        quantized=ladder["quantized"],
        temperatures=ladder["temperature"].tolist() if "temperature" in ladder else None,
        original_temperature=found.temperature,
        forward=found.forward,
        confidence=found.confidence,
        columns=True,
        engine=engine,
        scheduler=scheduler,
    )
    columns, bound, counted = steps.pop("columns"), "bound", None
    gains: list[float | None] = [None] * len(ladder)
    if "temperature" in ladder:
        gains = [1 / temperature for temperature in ladder["temperature"]]
    if looks is not None:
        parts = (part for quantized in ladder["quantized"] for part in pack(quantized))
        split = fingerprint(*(leaf for batch in test_loader for leaf in tree_leaves(batch)))
        judged = fingerprint(*parts, dict(limits))
        counted = look(looks, split, judged, confidence=found.confidence)
        at = [
            bounds_at(each, limits, counted.confidence, gain)
            for each, gain in zip(columns, gains, strict=True)
        ]
        steps, bound = steps.join(pd.DataFrame(at)), "look_bound"
    if found.control is not None and not found.control.fault:
        trained = [
            one if answer == "trained" else None
            for one, answer in zip(columns, ladder["answer"], strict=True)
        ]
        control = found.control.network(model)
        how: Any = {"forward": found.forward, "confidence": found.confidence}
        steps = steps.join(matched_ratios(trained, control, test_loader, found.criterion, **how))
    passed = steps_that_keep(steps, limits, bound)
    steps["certified"] = [number < passed for number in range(len(steps))]
    last = ladder.iloc[passed - 1] if passed else {"strategy": None, "quantized": None}
    kept = last["strategy"], last["quantized"]
    sure = found.confidence if counted is None else counted.confidence
    needed = None if passed else examples_needed(columns.iloc[0], limits, sure, gains[0])
    return Certificate(limits, found.confidence, steps, *kept, counted, needed)


def compare(quantized: Outcome, original: Outcome, *, confidence: float = 0.95) -> dict[str, float]:
    """A quantized network's outcome beside the original's, on the same examples in the same order.

    quantized, original: as `quantifind.metrics.outcome` has them.
    confidence: of the intervals.
    Returns: ``criterion``, ``original_criterion``, the degradation and its intervals as
    `quantifind.certification.measures.degradation` has them; for a classifier also ``accuracy``,
    ``original_accuracy`` and the flips ``right_to_wrong`` and ``wrong_to_right`` (examples).
    """
    measured = compared(quantized, original.calibrated())
    return _row(measured, original.criterion, confidence)


def _row(
    measured: Outcome, original_criterion: float, confidence: float, gain: float | None = None
) -> dict[str, float]:
    """That of what was `quantifind.metrics.compared`."""
    columns = columns_of(measured)
    row = {
        "criterion": measured.criterion,
        "original_criterion": original_criterion,
        **degradation(columns, confidence=confidence, gain=gain),
    }
    if "correct" in columns:
        judged = columns["weight"] > 0
        right, was_right = (columns[c][judged] for c in ("correct", "original_correct"))
        row["accuracy"] = right.mean()
        row["original_accuracy"] = was_right.mean()
        row["right_to_wrong"] = int((was_right & ~right).sum())
        row["wrong_to_right"] = int((~was_right & right).sum())
    return row
