"""How sure a degradation is: paired intervals and bounds, and what they certify."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

if TYPE_CHECKING:  # test_heavy_imports_are_rare
    import pandas as pd

# by name a value for each example
Columns = Mapping[str, np.ndarray]


def ratio_interval(
    losses: ArrayLike,
    original_losses: ArrayLike,
    *,
    confidence: float = 0.95,
    near: float = 1.0,
) -> tuple[float, float]:
    """Two-sided interval of mean(losses) / mean(original_losses), paired (Fieller 1954).

    It holds the ratios r that a paired t-test of mean(losses − r · original_losses) = 0 does not
    reject.

    losses: (examples,), those of the quantized network.
    original_losses: (examples,), those of the original, in the same order.
    confidence: of the interval.
    near: a ratio it is likely to be close to, about which it is computed exactly.
    Returns: (-inf, inf) where the original losses' mean can't be told from 0 or is below it, or for
    one example.

    >>> low, high = ratio_interval([2.0, 4.0, 6.3], [1.0, 2.0, 3.1])
    >>> low < 2.0 < high
    True
    """
    original, excess = _beside(losses, original_losses, near)
    examples = len(original)
    if examples < 2:
        return -math.inf, math.inf
    t = special.stdtrit(examples - 1, (1 + confidence) / 2)
    means = np.array([excess.mean(), original.mean()])
    low, high = _ends(means, np.cov(excess, original) / examples, t)
    return near + low, near + high


def _beside(
    losses: ArrayLike, original_losses: ArrayLike, near: float
) -> tuple[np.ndarray, np.ndarray]:
    original = np.asarray(original_losses, dtype=np.float64)
    # r − 1 is estimated, not r: exact where nothing changed (test_ratio_of_equal_losses_is_one)
    return original, np.asarray(losses, dtype=np.float64) - near * original


def _ends(means: np.ndarray, covariance: np.ndarray, t: float) -> tuple[float, float]:
    """Where (means[0] − r · means[1])² is t² times its variance (Fieller 1954)."""
    variance, (mean_excess, mean) = t**2 * covariance, means
    a = mean**2 - variance[1, 1]
    b = mean * mean_excess - variance[0, 1]
    c = mean_excess**2 - variance[0, 0]
    if not (a > 0 and mean > 0):
        return -math.inf, math.inf
    spread = math.sqrt(max(b**2 - a * c, 0.0))
    return (b - spread) / a, (b + spread) / a


def ratio_bound(
    losses: ArrayLike,
    original_losses: ArrayLike,
    *,
    confidence: float = 0.95,
    near: float = 1.0,
) -> float:
    """The one-sided upper bound of the ratio of mean losses, which holds on tails, too.

    A paired t-test at level 1 − confidence, in which the worst example counts `times_more`, at 5%
    once more, rejects "the ratio is above the limit" for the limits at or above the bound, and for
    no others. The worst is the one that has the most of loss − limit · original loss: where few
    examples carry the change, a sample that has met too few of them has also too small a spread
    (docs/statistics.md has how often each bound errs).

    losses: (examples,), those of the quantized network.
    original_losses: (examples,), those of the original, in the same order.
    confidence: that the true ratio is below the bound.
    near: a ratio it is likely to be close to, about which it is computed exactly.
    Returns: at least the one-sided bound of the t-test alone; inf where `ratio_interval` has it.
    """
    bound = ratio_interval(losses, original_losses, confidence=2 * confidence - 1, near=near)[1]
    original, excess = _beside(losses, original_losses, near)
    examples = len(original)
    if not math.isfinite(bound):
        return bound
    t, more = special.stdtrit(examples - 1, confidence), times_more(confidence)
    means, covariance = np.array([excess.mean(), original.mean()]), np.cov(excess, original)
    count = examples + more
    while True:
        # the worst at a higher bound adds more to it than any other, so that the bound rises until
        # its own worst is counted: test_bound_is_the_limit_at_which_scipy_starts_to_reject
        worst = int(np.argmax(excess - (bound - near) * original))
        off = np.array([excess[worst], original[worst]]) - means
        # moments of so many examples more (Welford 1962)
        squares = covariance * (examples - 1) + np.outer(off, off) * examples * more / count
        error = squares / (count - 1) / count
        higher = near + _ends(means + off * more / count, error, t)[1]
        if not higher > bound:
            return bound
        bound = higher


def times_more(confidence: float) -> float:
    """How many times more the worst example counts in a bound: once at 95%, more at higher ones.

    What n examples have not shown may be, in an error e of all cases, ln(1 / e) / n of all there is
    (the rule of three); and a t-test's error for skewness grows alike, by its quantile's square.

    >>> [round(times_more(confidence), 2) for confidence in (0.95, 0.975, 0.9975)]
    [1.0, 1.23, 2.0]
    """
    return math.log(1 - confidence) / math.log(0.05)


def accuracy_drop_interval(
    right: ArrayLike, was_right: ArrayLike, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Two-sided interval of mean(was_right) − mean(right), of a classifier's answers.

    The shares of flips to wrong and to right each have their exact interval at half the level, so
    that both hold at once. It is wider than one of the normal distribution, but right for few
    flips, too.

    right: which examples the quantized network gets right.
    was_right: which examples the original gets right, in the same order.
    confidence: of the interval.

    >>> accuracy_drop_interval([True] * 50, [True] * 50)[1] > 0  # no flip among 50 is no proof
    True
    """
    right, was_right = np.asarray(right, dtype=bool), np.asarray(was_right, dtype=bool)
    tail = (1 - confidence) / 4
    lost = share_interval(int((was_right & ~right).sum()), len(right), tail)
    won = share_interval(int((~was_right & right).sum()), len(right), tail)
    return lost[0] - won[1], lost[1] - won[0]


def share_interval(count: int, examples: int, tail: float) -> tuple[float, float]:
    """The exact interval of a binomial share (Clopper and Pearson 1934)."""
    # scipy.stats.binomtest has the same by a search, in milliseconds that a race has not:
    # test_a_share_has_the_interval_of_scipy
    low = special.betaincinv(count, examples - count + 1, tail) if count else 0.0
    high = special.betaincinv(count + 1, examples - count, 1 - tail) if count < examples else 1.0
    return float(low), float(high)


def certified_steps(bounds: Sequence[float], limit: float) -> int:
    """How many strategies of a ladder, from most bits to fewest, pass: fixed-sequence testing.

    The walk stops at the first that is above the limit. So the last one passed is certified at the
    level of each single test, although many were tried (Learn then Test, arXiv:2110.01052).

    bounds: one-sided upper bounds of what they lose, in the ladder's order.
    limit: the most that a bound may be.

    >>> certified_steps([1.0, 1.004, 1.02, 1.001], limit=1.01)
    2
    """
    return next((i for i, bound in enumerate(bounds) if not bound <= limit), len(bounds))


def certified_depth(results: "pd.DataFrame", limit: float) -> int | None:
    """The fewest bits certified to keep the criterion ratio at ``limit``, or None.

    results: a table of `quantifind.workflow.evaluation_workflow.evaluate_bit_depths`.
    limit: the most that the bound of the criterion ratio may be.
    """
    ladder = results.sort_values("bit_depth", ascending=False)
    steps = certified_steps(ladder["criterion_ratio_bound"].tolist(), limit)
    return int(ladder["bit_depth"].iloc[steps - 1]) if steps else None


def minimum_safe_bits(
    sensitivity: "pd.DataFrame", limit: float, *, errors: float = 0.0
) -> dict[str, float | None]:
    """By quantized tensor, the fewest bits predicted to be safe when it alone is quantized.

    At these bits and at all more bits that were tried, 1 + loss increase / float loss, with the
    least loss increase of a width, is at most the limit. Nothing is certified by this.

    sensitivity: a table of `quantifind.mixed_precision.sensitivity.measure_sensitivity`.
    limit: of the criterion ratio.
    errors: standard errors that are added to each loss increase, as it was measured on a part of
        the examples: from −2 to 2 gives the range in which the bits are. None is known, and none
        added, of what was not measured.
    Returns: by name, activations as ``input of …``; None where even the most bits are not safe.
    """
    found: dict[str, float | None] = {}
    increase = sensitivity["loss_increase"]
    if errors:
        increase = increase + errors * sensitivity["increase_error"].fillna(0.0)
    sensitivity = sensitivity.assign(loss_increase=increase)
    for kind, name in dict.fromkeys(zip(sensitivity["kind"], sensitivity["name"], strict=True)):
        rows = sensitivity[(sensitivity["kind"] == kind) & (sensitivity["name"] == name)]
        least = rows.groupby("bits")["loss_increase"].min().sort_index(ascending=False)
        within = least <= (limit - 1) * rows["original_criterion"].iloc[0]
        passed = within.cummin()
        key = name if kind == "tensors" else f"input of {name}"
        found[key] = float(least.index[passed][-1]) if passed.any() else None
    return found
