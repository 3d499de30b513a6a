"""What a limit may be of: what a quantized network lost, with intervals and bounds."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from quantifind.certification.certificate import (
    Columns,
    accuracy_drop_interval,
    ratio_bound,
    ratio_interval,
    share_interval,
)
from quantifind.utils.gains import gains_of

Interval = tuple[float, float]
# more examples than so many times those that there are, nobody asks for
MOST = 100


@dataclass(frozen=True)
class Measured:
    """A measure's value on some examples.

    interval: level of confidence → the two-sided interval.
    bound: level of confidence → the one-sided upper bound.
    """

    value: float
    interval: Callable[[float], Interval]
    bound: Callable[[float], float]


@dataclass(frozen=True)
class Measure:
    """One that a limit may be of.

    words, unit: for people.
    meaning: what it is, a clause for people; the formulas are in docs/grids.md.
    lossless: its value where nothing is lost.
    needs: the columns, of `quantifind.metrics.paired`, without which there is none.
    of: columns → its value.
    ratio: whether it is the ratio of the means of the two columns that it needs.
    hundredths: what people call a hundredth of it, where they read it in these.
    """

    words: str
    unit: str
    meaning: str
    lossless: float
    needs: tuple[str, ...]
    of: Callable[[Columns], Measured]
    ratio: bool = False
    hundredths: str = ""

    @property
    def scale(self) -> float:
        """What its values are multiplied with where people read them."""
        return 100.0 if self.hundredths else 1.0


def calibrated(columns: Columns, gain: float | None = None) -> Columns:
    """Columns with ``calibrated_loss``, where a gain suits the outputs.

    gain: what the quantized network's outputs are multiplied with, as it was fitted on validation
        data; by default it is fitted to these examples.
    """
    if "scaled_loss" not in columns:
        return columns
    losses = columns["scaled_loss"]
    gains = gains_of(losses)
    if gain is None:
        gain = gains.fitted(losses)
    loss = np.full(len(losses), math.nan) if math.isnan(gain) else gains.at(losses, gain)
    return {**columns, "calibrated_loss": loss, "gain": np.full(len(losses), gain)}


def degradation(
    columns: Columns, *, confidence: float = 0.95, gain: float | None = None
) -> dict[str, float]:
    """What a quantized network lost, by each measure that there is, with intervals.

    columns: by example, as `quantifind.metrics.paired` has them, and ``divergence``.
    confidence: of the intervals.
    gain: as `calibrated` takes it.
    Returns: of `MEASURES` those whose columns are there. Beside each its two-sided interval,
    ``…_low`` and ``…_high``, and the one-sided ``…_bound``, below which the true value lies with
    this confidence; where few examples carry the change it is above ``…_high``. ``temperature`` is
    what the outputs were divided by for the calibrated ratio.
    """
    row: dict[str, float] = {}
    columns = calibrated(columns, gain)
    for name, measure in MEASURES.items():
        if columns.keys() >= {*measure.needs}:
            found = measure.of(columns)
            low, high = found.interval(confidence)
            bound = found.bound(confidence)
            row |= {
                name: found.value,
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name}_bound": bound,
            }
    if "gain" in columns:
        row["temperature"] = float(1 / columns["gain"][0])
    return row


def matched(columns: Columns, control: np.ndarray, *, confidence: float = 0.95) -> dict[str, float]:
    """What was trained further beside float weights that had the same training.

    columns: by example, as `quantifind.metrics.paired` has them.
    control: the losses of those float weights, (examples,).
    confidence: of the intervals.
    Returns: ``matched_ratio``, the quantized network's mean loss over the control's, and
    ``control_ratio``, the control's over the float network's; with intervals and bounds, as
    `degradation` has them.
    """
    row: dict[str, float] = {}
    pairs = {
        "matched_ratio": (columns["loss"], control),
        "control_ratio": (control, columns["original_loss"]),
    }
    for name, (loss, original) in pairs.items():
        found = degradation({"loss": loss, "original_loss": original}, confidence=confidence)
        row |= {n.replace("criterion_ratio", name): value for n, value in found.items()}
    return row


def bounds_at(
    columns: Columns, measures: Iterable[str], confidence: float, gain: float | None = None
) -> dict[str, float]:
    """By ``…_look_bound`` the one-sided bounds of some measures at another confidence.

    columns, gain: as `degradation` takes them.
    confidence: such as that of a `quantifind.certification.ledger.Look`.
    """
    columns = calibrated(columns, gain)
    return {f"{name}_look_bound": MEASURES[name].of(columns).bound(confidence) for name in measures}


def examples_needed(
    columns: Columns, limits: Mapping[str, float], confidence: float, gain: float | None = None
) -> int | None:
    """About how many examples like these it takes until each bound is at most its limit.

    columns, gain: as `degradation` takes them.
    limits: by measure.
    Returns: None where a value itself is not below its limit, or `MOST` times as many are too few.
    """
    columns = calibrated(columns, gain)
    needs = {"loss", "weight", *(need for name in limits for need in MEASURES[name].needs)}
    columns = {name: column for name, column in columns.items() if name in needs}
    if not all(MEASURES[name].of(columns).value < limit for name, limit in limits.items()):
        return None
    have = len(columns["loss"])

    def enough(count: int) -> bool:
        again = {name: column[np.arange(count) % have] for name, column in columns.items()}
        return all(MEASURES[n].of(again).bound(confidence) <= v for n, v in limits.items())

    low, high = have, MOST * have
    if not enough(high):
        return None
    if enough(low):
        return low
    while high - low > max(1, 0.02 * low):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _ratio(above: str, below: str, near: float = 1.0) -> Callable[[Columns], Measured]:
    """The ratio of two columns' means."""

    def of(columns: Columns) -> Measured:
        loss, original = columns[above], columns[below]
        mean = original.mean()
        return Measured(
            float(loss.mean() / mean) if mean > 0 else math.nan,
            lambda level: ratio_interval(loss, original, confidence=level, near=near),
            lambda level: ratio_bound(loss, original, confidence=level, near=near),
        )

    return of


def _relative_error(columns: Columns) -> Measured:
    squares = _ratio("squared_error", "squared_norm", near=0.0)(columns)

    def root(interval: Interval) -> Interval:
        low, high = (math.sqrt(max(end, 0.0)) for end in interval)
        return low, high

    return Measured(
        math.sqrt(squares.value) if not math.isnan(squares.value) else math.nan,
        lambda level: root(squares.interval(level)),
        lambda level: math.sqrt(max(squares.bound(level), 0.0)),
    )


def _accuracy_drop(columns: Columns) -> Measured:
    right, was_right = _judged(columns, "correct"), _judged(columns, "original_correct")

    def interval(level: float) -> Interval:
        return accuracy_drop_interval(right, was_right, confidence=level)

    value = float(was_right.mean() - right.mean()) if len(right) else math.nan
    return Measured(value, interval, lambda level: interval(2 * level - 1)[1])


def _flips(columns: Columns) -> Measured:
    flipped = _judged(columns, "flipped")
    count, examples = int(flipped.sum()), len(flipped)
    return Measured(
        count / examples if examples else math.nan,
        lambda level: share_interval(count, examples, (1 - level) / 2),
        lambda level: share_interval(count, examples, 1 - level)[1],
    )


def _judged(columns: Columns, name: str) -> np.ndarray:
    return columns[name].astype(bool)[counts(columns)]


def counts(columns: Columns) -> np.ndarray:
    """Which examples are judged, (examples,) bool: those that are not ignored
    (test_ignored_labels_are_not_judged)."""
    if "weight" in columns:
        return columns["weight"] > 0
    return np.ones(len(next(iter(columns.values()))), dtype=bool)


MEASURES: Mapping[str, Measure] = {
    "criterion_ratio": Measure(
        "criterion ratio",
        "(1 is lossless)",
        "the mean loss of the quantized network over that of the float network",
        1.0,
        ("loss", "original_loss"),
        _ratio("loss", "original_loss"),
        ratio=True,
    ),
    "calibrated_ratio": Measure(
        "calibrated ratio",
        "(1 is lossless)",
        "the mean loss of the quantized network over that of the float network, the outputs of "
        "each divided by a temperature that fits them to validation data, so that softer outputs "
        "buy nothing",
        1.0,
        ("calibrated_loss", "original_calibrated_loss"),
        _ratio("calibrated_loss", "original_calibrated_loss"),
        ratio=True,
    ),
    "accuracy_drop": Measure(
        "accuracy drop",
        "(points of 100)",
        "the accuracy of the float network less that of the quantized one, in points of 100",
        0.0,
        ("correct", "original_correct"),
        _accuracy_drop,
        hundredths=" points",
    ),
    "flips": Measure(
        "share of answers that change",
        "(% of examples)",
        "the share of examples to which the two networks give different answers",
        0.0,
        ("flipped",),
        _flips,
        hundredths="%",
    ),
    "fidelity": Measure(
        "divergence from the float network over its loss",
        "(0 is lossless)",
        "the mean divergence of the quantized network's outputs from the float network's, over "
        "the float network's loss",
        0.0,
        ("divergence", "original_calibrated_loss"),
        _ratio("divergence", "original_calibrated_loss", near=0.0),
        ratio=True,
    ),
    "relative_error": Measure(
        "relative error of the outputs",
        "(share of their norm)",
        "the root of the mean square of what outputs are off, over that of the float network's "
        "outputs",
        0.0,
        ("squared_error", "squared_norm"),
        _relative_error,
        ratio=True,
    ),
}
