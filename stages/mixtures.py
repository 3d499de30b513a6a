"""How many tensors of a network have which bits, in words."""

from collections import Counter
from collections.abc import Iterable


def mixture(bits: Iterable[float]) -> str:
    """Counts by width, the fewest bits first.

    bits: of each tensor.

    >>> mixture([8.0, 3.0, 8.0, 1.585])
    '1 × 1.58, 1 × 3, 2 × 8'
    """
    return ", ".join(f"{count} × {width:.3g}" for width, count in sorted(Counter(bits).items()))
