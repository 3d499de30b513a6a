"""Judge quantized networks on the examples of a loader, beside the original.

The arguments after the model may stand in either order, ``(test_loader, criterion)`` or
``(criterion, test_loader)``: the criterion is the one that can be called.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from torch import nn

from quantifind.certification.measures import degradation
from quantifind.metrics import Outcome, columns_of, compared
from quantifind.network.calibration import calibration_batches
from quantifind.network.folding import Pairs, prepared
from quantifind.quantize import mean_bits, quantize
from quantifind.runtime.checks import in_one_line
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.finite import float_outcome
from quantifind.runtime.workers import Workers
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.arguments import check
from quantifind.utils.batches import Batch, Forward
from quantifind.utils.console import progress
from quantifind.workflow.quantize_workflow import BIT_DEPTHS, BitQuantizer, check_depth


def compute_test_loss(
    model: nn.Module, test_loader: Any, criterion: Any, *, forward: Forward | None = None
) -> float:
    """The criterion over the loader's examples, each weighted alike, in eval mode.

    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    """
    loader, criterion = _loader_and_criterion(test_loader, criterion)
    with in_one_line():
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
    Raises: ValueError for a parameter with NaN or infinity, a width out of range, an empty loader,
        and outputs or losses of the float network that are not finite.
    """
    loader, criterion = _loader_and_criterion(test_loader, criterion)
    needed = "a list of Strategy is needed"
    check(isinstance(strategies, Iterable), "strategies", strategies, needed)
    strategies = list(strategies)
    for one in strategies:
        check(isinstance(one, Strategy), "one of strategies", one, needed)
    given = strategies if quantized is None else list(quantized)
    known_temperatures = [None] * len(strategies) if temperatures is None else temperatures
    if len(known_temperatures) != len(strategies):
        raise ValueError(f"{len(known_temperatures)} temperatures of {len(strategies)} strategies")
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
        original = float_outcome(evaluator, "these data")
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
        beside: dict[str, Any] = {"columns": columns_of(measured)} if self.columns else {}
        if self.original.gain is not None:
            beside["original_temperature"] = 1 / self.original.gain
        return {"bit_depth": depth, "mean_bits": bits, "signal_to_complexity": scr} | row | beside


def _loader_and_criterion(first: Any, second: Any) -> tuple[Any, Any]:
    if callable(first) and not callable(second):
        return second, first
    return first, second


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
