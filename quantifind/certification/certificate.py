"""How sure a criterion ratio is: paired intervals, and what a ladder of strategies certifies."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special


def ratio_interval(
    losses: ArrayLike,
    original_losses: ArrayLike,
    *,
    confidence: float = 0.95,
    near: float = 1.0,
) -> tuple[float, float]:
    """Two-sided interval of mean(losses) / mean(original_losses), paired (Fieller 1954).

    It holds the ratios r that a paired t-test of mean(losses − r · original_losses) = 0 does not
    reject. near: a ratio it is likely to be close to, about which it is computed exactly.
    (-inf, inf) where the original losses' mean can't be told from 0 or is below it, or for one
    example.

    >>> low, high = ratio_interval([2.0, 4.0, 6.3], [1.0, 2.0, 3.1])
    >>> low < 2.0 < high
    True
    """
    original = np.asarray(original_losses, dtype=np.float64)
    # r − 1 is estimated, not r: exact where nothing changed (test_ratio_of_equal_losses_is_one)
    rise = np.asarray(losses, dtype=np.float64) - near * original
    examples = len(original)
    if examples < 2:
        return -math.inf, math.inf
    t = special.stdtrit(examples - 1, (1 + confidence) / 2)
    variance = t**2 * np.cov(rise, original) / examples
    mean_rise, mean = rise.mean(), original.mean()
    a = mean**2 - variance[1, 1]
    b = mean * mean_rise - variance[0, 1]
    c = mean_rise**2 - variance[0, 0]
    if not (a > 0 and mean > 0):
        return -math.inf, math.inf
    spread = math.sqrt(max(b**2 - a * c, 0.0))
    return near + (b - spread) / a, near + (b + spread) / a


def ratio_bound(
    losses: ArrayLike, original_losses: ArrayLike, *, confidence: float = 0.95
) -> float:
    """The one-sided upper bound of the ratio: a paired t-test at level 1 − confidence rejects
    "the ratio is above the limit" for the limits at or above it, and for no others."""
    return ratio_interval(losses, original_losses, confidence=2 * confidence - 1)[1]


def drop_interval(
    right: ArrayLike, was_right: ArrayLike, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Two-sided interval of mean(was_right) − mean(right), of a classifier's answers.

    The shares of flips to wrong and to right each have their exact interval (Clopper and Pearson
    1934) at half the level, so that both hold at once; wider than one of the normal distribution,
    but right for few flips, too.

    >>> drop_interval([True] * 50, [True] * 50)[1] > 0  # no flip among 50 is no proof
    True
    """
    right, was_right = np.asarray(right, dtype=bool), np.asarray(was_right, dtype=bool)
    examples = len(right)
    tail = (1 - confidence) / 4

    def share(flips: np.ndarray) -> tuple[float, float]:
        count = int(flips.sum())
        low = special.betaincinv(count, examples - count + 1, tail) if count else 0.0
        high = special.betaincinv(count + 1, examples - count, 1 - tail)
        return low, high if count < examples else 1.0

    lost, won = share(was_right & ~right), share(~was_right & right)
    return float(lost[0] - won[1]), float(lost[1] - won[0])


def drops(columns: Mapping[str, np.ndarray], *, confidence: float = 0.95) -> dict[str, float]:
    """What a quantized network lost, by each measure of a limit, with intervals.

    columns: by example, as `quantifind.metrics.paired` has them.
    Returns: ``criterion_ratio`` CR, mean loss / mean original loss; ``relative_error``
    ‖f_b − f‖/‖f‖ of the outputs over all examples; for a classifier ``accuracy_drop``. Beside each
    its two-sided interval, ``…_low`` and ``…_high``, and ``…_bound``, below which the true one lies
    with this confidence (one-sided, so it is below ``…_high``).
    """
    loss, original = columns["loss"], columns["original_loss"]
    error, norm = columns["squared_error"], columns["squared_norm"]
    ratio = loss.mean() / original.mean() if original.mean() > 0 else math.nan
    row = _with_interval(
        "criterion_ratio", ratio, lambda level: ratio_interval(loss, original, confidence=level),
        confidence,
    )  # fmt: skip
    if "correct" in columns:
        right, was_right = columns["correct"], columns["original_correct"]
        row |= _with_interval(
            "accuracy_drop", was_right.mean() - right.mean(),
            lambda level: drop_interval(right, was_right, confidence=level), confidence,
        )  # fmt: skip
    share = error.sum() / norm.sum() if norm.sum() else math.nan
    return row | _with_interval(
        "relative_error", math.sqrt(share),
        lambda level: _root(ratio_interval(error, norm, confidence=level, near=0.0)), confidence,
    )  # fmt: skip


def _root(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = (math.sqrt(max(end, 0.0)) for end in interval)
    return low, high


def _with_interval(
    name: str, value: float, interval: Callable[[float], tuple[float, float]], confidence: float
) -> dict[str, float]:
    low, high = interval(confidence)
    bound = interval(2 * confidence - 1)[1]
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_bound": bound}


def certified_steps(bounds: Sequence[float], limit: float) -> int:
    """How many strategies of a ladder, from most bits to fewest, pass: fixed-sequence testing.

    bounds: one-sided upper bounds of their criterion ratios, in the ladder's order. The walk stops
    at the first that is above the limit, so the last one passed is certified at the level of each
    single test, although many were tried (Learn then Test, arXiv:2110.01052).

    >>> certified_steps([1.0, 1.004, 1.02, 1.001], limit=1.01)
    2
    """
    return next((i for i, bound in enumerate(bounds) if not bound <= limit), len(bounds))


def certified_depth(results: pd.DataFrame, limit: float) -> int | None:
    """The fewest bits certified to keep the criterion ratio at ``limit``, or None.

    results: a table of `quantifind.workflow.evaluation_workflow.evaluate_bit_depths`.
    """
    ladder = results.sort_values("bit_depth", ascending=False)
    steps = certified_steps(ladder["criterion_ratio_bound"].tolist(), limit)
    return int(ladder["bit_depth"].iloc[steps - 1]) if steps else None


def mark_certified(results: pd.DataFrame, limits: Sequence[float]) -> pd.DataFrame:
    """The table with a column ``certified_at``: a limit, at the lowest depth certified for it (the
    lowest limit, where it is the depth of several), and missing elsewhere."""
    certified_at = pd.Series(np.nan, index=results.index)
    for limit in sorted(limits, reverse=True):
        certified_at[results["bit_depth"] == certified_depth(results, limit)] = limit
    return results.assign(certified_at=certified_at)
