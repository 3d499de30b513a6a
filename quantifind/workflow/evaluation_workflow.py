"""Judge quantized networks on the examples of a loader, beside the original.

The arguments after the model may stand in either order, ``(test_loader, criterion)`` or
``(criterion, test_loader)``: the criterion is the one that can be called.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor, nn

from quantifind.certification.certificate import degradation
from quantifind.metrics import is_classification, paired
from quantifind.quantize import mean_bits, quantize
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.workers import Workers
from quantifind.strategy import Strategy, uniform_strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.console import progress
from quantifind.workflow.quantize_workflow import BIT_DEPTHS, BitQuantizer, check_depth


def compute_test_loss(model: nn.Module, test_loader: Any, criterion: Any) -> float:
    """The criterion over the loader's examples, each weighted alike, in eval mode."""
    loader, criterion = _loader_and_criterion(test_loader, criterion)
    return Evaluator(model, loader, criterion).outcome()["loss"].mean().item()


def evaluate_quantized_model(
    model: nn.Module, test_loader: Any, criterion: Any, bit_depth: int
) -> float:
    """The criterion of a copy of ``model`` quantized to ``bit_depth`` (2 to 32)."""
    return compute_test_loss(BitQuantizer(bit_depth).quantize_model(model), test_loader, criterion)


def evaluate_bit_depths(
    model: nn.Module,
    test_loader: Any,
    criterion: Any,
    bit_depths: Iterable[int] = BIT_DEPTHS,
    *,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> pd.DataFrame:
    """A row per bit depth, from most bits to fewest, with the columns of `evaluate_strategies`.

    bit_depths: whole numbers, 2 to 32.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    """
    depths = sorted(set(bit_depths), reverse=True)
    for depth in depths:
        check_depth(depth)
    strategies = [uniform_strategy(model, depth) for depth in depths]
    return evaluate_strategies(
        model, strategies, test_loader, criterion, engine=engine, scheduler=scheduler
    )


def evaluate_strategies(
    model: nn.Module,
    strategies: Iterable[Strategy],
    test_loader: Any,
    criterion: Any,
    *,
    quantized: Iterable[Quantized] | None = None,
    calibration: Iterable[Any] | None = None,
    confidence: float = 0.95,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> pd.DataFrame:
    """Judge strategies beside the float network on the examples of a loader.

    test_loader, criterion: in either order.
    quantized: what each strategy has come to; by default they are quantized here.
    calibration: batches of training data, for strategies that need some.
    confidence: of the intervals.
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Returns: a row per strategy, in their order: ``bit_depth`` (missing where widths differ),
        ``mean_bits`` per parameter with everything counted, ``signal_to_complexity`` (criterion per
        bit of depth, or per mean bit where widths differ), and the columns of `compare`.
    Raises: ValueError for a parameter with NaN or infinity, a width out of range, an empty loader.
    """
    loader, criterion = _loader_and_criterion(test_loader, criterion)
    strategies = list(strategies)
    given = strategies if quantized is None else list(quantized)
    tasks = list(zip(strategies, given, strict=True))
    for number, (strategy, known) in enumerate(tasks):
        if isinstance(known, Quantized) and not _belongs(known, strategy):
            raise ValueError(f"quantized {number} is not what strategy {number} names")
    with Workers(engine, scheduler=scheduler) as workers:
        evaluator = Evaluator(model, loader, criterion)
        batches = None if calibration is None else list(calibration)
        judge = _Judge(model, evaluator, evaluator.outcome(), batches, confidence)
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
    evaluator: Evaluator
    original: dict[str, Tensor]
    calibration: list[Any] | None
    confidence: float

    def row(self, task: tuple[Strategy, Strategy | Quantized]) -> dict[str, Any]:
        strategy, given = task
        quantized = quantize(self.model, given, self.calibration)
        depth, bits = strategy.bit_depth, mean_bits(self.model, quantized)
        row = compare(self.evaluator.outcome(quantized), self.original, confidence=self.confidence)
        scr = row["criterion"] / (depth or bits)
        return {"bit_depth": depth, "mean_bits": bits, "signal_to_complexity": scr} | row


def _loader_and_criterion(first: Any, second: Any) -> tuple[Any, Any]:
    if callable(first) and not callable(second):
        return second, first
    return first, second


def compare(
    quantized: dict[str, Tensor], original: dict[str, Tensor], *, confidence: float = 0.95
) -> dict[str, float]:
    """A quantized network's outcome beside the original's, on the same examples in the same order.

    quantized, original: as `quantifind.metrics.outcome` has them.
    confidence: of the intervals.
    Returns: ``criterion``, ``original_criterion``, the degradation and its intervals as
    `quantifind.certification.certificate.degradation` has them; for a classifier also ``accuracy``,
    ``original_accuracy`` and the flips ``right_to_wrong`` and ``wrong_to_right`` (examples).
    """
    columns = paired(quantized, original)
    row = {
        "criterion": columns["loss"].mean(),
        "original_criterion": columns["original_loss"].mean(),
        **degradation(columns, confidence=confidence),
    }
    if is_classification(original):
        right, was_right = columns["correct"], columns["original_correct"]
        row["accuracy"] = right.mean()
        row["original_accuracy"] = was_right.mean()
        row["right_to_wrong"] = int((was_right & ~right).sum())
        row["wrong_to_right"] = int((~was_right & right).sum())
    return row
