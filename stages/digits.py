"""Numbers that promise, shown so that no digit promises more:
test_what_is_shown_is_not_surer_than_it_is."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

UP, DOWN = (Context(prec=4, rounding=way) for way in (ROUND_CEILING, ROUND_FLOOR))


def sure(confidence: float) -> str:
    """A confidence in hundredths, of four digits, rounded down."""
    return f"{float(DOWN.create_decimal(100 * _exactly(confidence))):g}%"


def at_most(bound: float | None) -> str:
    """A bound with four digits, rounded up; that it is not known where it is no number."""
    if bound is None or not math.isfinite(bound):
        return "not known"
    return f"{float(UP.create_decimal(_exactly(bound))):.4g}"


def chance(share: float) -> str:
    """The most that a chance may be, in hundredths, of four digits, rounded up."""
    return f"{float(UP.create_decimal(100 * _exactly(share))):.4g}%"


def _exactly(value: float) -> Decimal:
    """Without what sums in floating point leave in the last digits."""
    return Decimal(f"{value:.12g}")
