"""When a candidate that was seen on a part of the examples is given up."""

import math

from quantifind.certification.certificate import Columns
from quantifind.certification.measures import MEASURES, calibrated


def hopeless(
    columns: Columns,
    measure: str,
    limit: float,
    examples: int,
    *,
    confidence: float = 0.95,
    level: float = 0.95,
) -> bool:
    """Whether a candidate, seen on a part of the examples, is unlikely to keep a limit on all.

    This is stochastic curtailment: the bound on all examples is extrapolated. Its distance to the
    value falls with the root of their number, and the value moves within an interval for those not
    seen yet. On all examples, it is whether the bound is above the limit.

    columns: of the examples seen so far, as `quantifind.metrics.paired` has them.
    measure: one of `quantifind.certification.measures.MEASURES`.
    limit: the most that the bound on all examples may be.
    examples: how many there are in all.
    confidence: of the bound.
    level: of the interval within which the value may still move.
    Returns: False where too few are seen to tell.
    """
    found = MEASURES[measure].of(calibrated(columns))
    value, bound, low = found.value, found.bound(confidence), found.interval(level)[0]
    share = len(columns["loss"]) / examples
    if not math.isfinite(bound - low):
        return False
    lowest = value + (bound - value) * math.sqrt(share) - (value - low) * math.sqrt(1 - share)
    return lowest > limit
