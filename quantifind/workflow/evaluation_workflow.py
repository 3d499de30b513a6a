"""Judge quantized networks on the examples of a loader, beside the original.

The arguments after the model may stand in either order, ``(test_loader, criterion)`` or
``(criterion, test_loader)``: the criterion is the one that can be called.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from torch import Tensor, nn

from quantifind.certification.certificate import certified_depth, drops
from quantifind.metrics import is_classification, paired
from quantifind.quantize import mean_bits, quantize
from quantifind.runtime.evaluator import Evaluator
from quantifind.runtime.workers import Workers
from quantifind.strategy import Strategy, uniform_strategy
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
    calibration: Iterable[Any] | None = None,
    confidence: float = 0.95,
    engine: str = "sequential",
    scheduler: str | None = None,
) -> pd.DataFrame:
    """A row per strategy, in their order.

    Columns: ``bit_depth`` (missing where widths differ), ``mean_bits`` per parameter with
    everything counted, ``signal_to_complexity`` (criterion per bit of depth, or per mean bit where
    widths differ), and those of `quantifind.metrics.compare`.
    calibration: batches of training data, for strategies that need some (`strategy.quantize`).
    engine, scheduler: who measures, as `quantifind.runtime.workers.Workers` takes them.
    Errors: ValueError for a parameter with NaN or infinity, a width out of range, an empty loader.
    """
    loader, criterion = _loader_and_criterion(test_loader, criterion)
    strategies = list(strategies)
    with Workers(engine, scheduler=scheduler) as workers:
        judge = _Judge(model, loader, criterion, calibration, confidence)
        rows = []
        with progress("judging", total=len(strategies)) as step:
            for row in workers.map(_Judge.row, judge, strategies):
                rows.append(row)
                step(f"{row['mean_bits']:.4g} bits CR {row['criterion_ratio']:.4f}")
    return pd.DataFrame(rows)


class _Judge:
    """What it takes to judge strategies, on whichever worker."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        criterion: Any,
        calibration: Iterable[Any] | None,
        confidence: float,
    ) -> None:
        self.model, self.confidence = model, confidence
        self.evaluator = Evaluator(model, loader, criterion)
        self.calibration = None if calibration is None else list(calibration)
        self.original = self.evaluator.outcome()

    def row(self, strategy: Strategy) -> dict[str, Any]:
        quantized = quantize(self.model, strategy, self.calibration)
        depth, bits = strategy.bit_depth, mean_bits(self.model, quantized)
        row = compare(self.evaluator.outcome(quantized), self.original, confidence=self.confidence)
        scr = row["criterion"] / (depth or bits)
        return {"bit_depth": depth, "mean_bits": bits, "signal_to_complexity": scr} | row


def summarize(results: pd.DataFrame, limits: Iterable[float]) -> dict[str, Any]:
    """The answer in few numbers, from a table of `evaluate_strategies`, most bits first.

    Returns: ``float`` criterion and accuracy; ``certified_depth`` by limit, None where not even the
    first strategy passes; ``lowest_scr``, the lowest signal-to-complexity ratio, and the depth that
    has it; the ``criterion_ratio`` and ``relative_error`` of the depths 2, 4 and 8.
    """
    first = results.iloc[0]
    floats = {"criterion": first["original_criterion"]}
    if "original_accuracy" in results:
        floats["accuracy"] = first["original_accuracy"]
    best = results.iloc[results["signal_to_complexity"].argmin()]
    shown = results[results["bit_depth"].isin([2, 4, 8])].sort_values("bit_depth")
    by_depth = [f"{depth:g}_bits" for depth in shown["bit_depth"]]
    return {
        "float": floats,
        "certified_depth": {f"at_{limit:g}": certified_depth(results, limit) for limit in limits},
        "lowest_scr": {
            "value": best["signal_to_complexity"],
            "bit_depth": int(best["bit_depth"]),
        },
        "criterion_ratio": dict(zip(by_depth, shown["criterion_ratio"], strict=True)),
        "relative_error": dict(zip(by_depth, shown["relative_error"], strict=True)),
    }


def _loader_and_criterion(first: Any, second: Any) -> tuple[Any, Any]:
    if callable(first) and not callable(second):
        return second, first
    return first, second


def compare(
    quantized: dict[str, Tensor], original: dict[str, Tensor], *, confidence: float = 0.95
) -> dict[str, float]:
    """A quantized network's outcome beside the original's, on the same examples in the same order.

    Returns: ``criterion``, ``original_criterion``, the drops and their intervals as
    `quantifind.certification.certificate.drops` has them; for a classifier also ``accuracy``,
    ``original_accuracy`` and the flips ``right_to_wrong`` and ``wrong_to_right`` (examples).
    """
    columns = paired(quantized, original)
    row = {
        "criterion": columns["loss"].mean(),
        "original_criterion": columns["original_loss"].mean(),
        **drops(columns, confidence=confidence),
    }
    if is_classification(original):
        right, was_right = columns["correct"], columns["original_correct"]
        row["accuracy"] = right.mean()
        row["original_accuracy"] = was_right.mean()
        row["right_to_wrong"] = int((was_right & ~right).sum())
        row["wrong_to_right"] = int((~was_right & right).sum())
    return row
