"""Numbers that promise, shown so that no digit promises more:
test_what_is_shown_is_not_surer_than_it_is."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context

UP, DOWN = (Context(prec=4, rounding=way) for way in (ROUND_CEILING, ROUND_FLOOR))


def sure(confidence: float) -> str:
    """A confidence in hundredths, of four digits, rounded down."""
    return f"{float(DOWN.create_decimal(repr(100 * float(confidence)))):g}%"


def at_most(bound: float) -> str:
    """A bound with four digits, rounded up."""
    if not math.isfinite(bound):
        return "not known"
    return f"{float(UP.create_decimal(repr(float(bound)))):.4g}"


def chance(share: float) -> str:
    """The most that a chance may be, in hundredths, rounded up."""
    return f"{at_most(round(100 * share, 9))}%"
