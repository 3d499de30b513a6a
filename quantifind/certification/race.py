"""When a candidate that was seen on a part of the examples is given up."""

import math

from quantifind.certification.certificate import Columns, ratio_interval
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


def outdone(
    columns: Columns, rival: Columns, *, confidence: float = 0.95, level: float = 0.68
) -> bool:
    """Whether a candidate, seen on a part of the examples, is likely to be worse than a rival.

    Worse is a higher bound of the criterion ratio on all examples. This is stochastic curtailment,
    as in `hopeless`, of the difference of the two bounds. The level is low, since giving up one
    step of many costs little.

    columns: of the examples seen so far, as `quantifind.metrics.paired` has them.
    rival: of all examples, those seen so far first.
    confidence: of the bounds.
    level: of the interval within which the difference may still move.
    Returns: False where too few are seen to tell.
    """
    examples, whole = len(columns["loss"]), len(rival["loss"])
    same = {name: column[:examples] for name, column in rival.items()}
    values, bounds = [], []
    for seen in (columns, same):
        found = MEASURES["criterion_ratio"].of(seen)
        values.append(found.value)
        bounds.append(found.bound(confidence))
    low, high = ratio_interval(columns["loss"], same["loss"], confidence=level)
    if not math.isfinite(bounds[0] + bounds[1] + high):
        return False  # test_what_was_seen_on_few_examples_is_not_outdone
    worse, wider = values[0] - values[1], bounds[0] - bounds[1]
    worse += (wider - worse) * math.sqrt(examples / whole)
    error = (high - low) / 2 * values[1]
    return worse > error * math.sqrt(1 - examples / whole)
