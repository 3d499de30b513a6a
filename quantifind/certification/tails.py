"""Whether few examples carry a change, so that a t-test of it would err more often than it says."""

import math
from collections.abc import Mapping

import numpy as np
from scipy import special

from quantifind.certification.measures import MEASURES

# by how much the t-test may err more often than it says before that is worth a warning
WARNING = 0.01


def change_skewness(columns: Mapping[str, np.ndarray], measure: str = "criterion_ratio") -> float:
    """Skewness of what an example adds to a change: its loss − ratio · its original loss.

    columns: by example, as `quantifind.metrics.paired` has them.
    measure: one of `quantifind.certification.measures.MEASURES`; of a relative error
        it is what an example adds to its square.
    Returns: 0 where nothing changed; NaN where the ratio is not known, and for a measure whose
        interval is exact.

    >>> change_skewness({"loss": np.array([1.0, 1, 1, 5]), "original_loss": np.ones(4)}) > 1
    True
    """
    if not MEASURES[measure].ratio:
        return math.nan
    changed, original = (
        np.asarray(columns[name], dtype=np.float64) for name in MEASURES[measure].needs
    )
    if not original.sum() > 0:
        return math.nan
    change = changed - changed.sum() / original.sum() * original
    spread = math.sqrt(np.mean(change**2))
    return float(np.mean((change / spread) ** 3)) if spread else 0.0


def excess_error(skewness: float, examples: int, *, confidence: float = 0.95) -> float:
    """How much more often than it says a one-sided t-test errs, where a change is so skew.

    It is the first term of its Edgeworth expansion, (2z² + 1) φ(z) / 6 · skewness / √examples: at
    95% confidence 0.11 · skewness / √examples (Johnson 1978; Hall 1992, section 2.6).

    skewness: of the change, as `change_skewness` has it; its sign is not looked at.
    examples: how many.
    confidence: of the test.

    >>> round(excess_error(9.0, 10_000), 4)
    0.0099
    """
    z = float(special.ndtri(confidence))
    density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return (2 * z**2 + 1) * density / 6 * abs(skewness) / math.sqrt(examples)


def tail_warning(skewness: float, examples: int) -> str:
    """A sentence where few examples carry the change, else nothing.

    skewness, examples: as `excess_error` takes them.
    """
    error = excess_error(skewness, examples)
    if not error > WARNING:
        return ""
    return (
        f"Few examples carry the change (skewness {skewness:.3g} over {examples:,} examples): a "
        f"t-test alone would err about {error:.1%} more often than it says, and the bound, which "
        "counts the worst example once more, may err a little more often, too."
    )
