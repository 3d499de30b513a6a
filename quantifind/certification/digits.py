"""Numbers for people: with units, and those that promise so that no digit promises more:
test_what_is_shown_is_not_surer_than_it_is."""

import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeGuard

from quantifind.certification.measures import MEASURES

UNKNOWN = "not known"
UP, DOWN = (Context(prec=4, rounding=way) for way in (ROUND_CEILING, ROUND_FLOOR))


def sure(confidence: float) -> str:
    """A confidence in hundredths, of four digits, rounded down."""
    return f"{float(DOWN.create_decimal(100 * _exactly(confidence))):g}%"


def at_most(bound: float | None) -> str:
    """A bound with four digits, rounded up; that it is not known where it is no number."""
    if bound is None or not math.isfinite(bound):
        return UNKNOWN
    return f"{float(UP.create_decimal(_exactly(bound))):.4g}"


def chance(share: float) -> str:
    """The most that a chance may be, in hundredths, of four digits, rounded up."""
    return f"{float(UP.create_decimal(100 * _exactly(share))):.4g}%"


def _exactly(value: float) -> Decimal:
    """Without what sums in floating point leave in the last digits."""
    return Decimal(f"{value:.12g}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is there, and finite: JSON has null for what is not."""
    return value is not None and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """A number for people, with thousands; `UNKNOWN` for what is none.

    value: a number, or None.
    digits: that count.

    >>> number(1234567), number(0.00123456), number(float("nan")), number(2.0)
    ('1,234,567', '0.001235', 'not known', '2')
    """
    if not is_number(value):
        return UNKNOWN
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{digits}g}"


def percent(share: float | None, digits: int = 3) -> str:
    """A share in hundredths; what is not all of it is not 100%.

    >>> percent(0.12345), percent(0.00004), percent(float("nan"))
    ('12.3%', '0.004%', 'not known')
    >>> percent(0.99999), percent(1), percent(12.34, 2)
    ('>99.9%', '100%', '1,200%')
    """
    if not is_number(share):
        return UNKNOWN
    text = f"{100 * share:.{digits}g}"
    if share < 1 <= float(text) / 100:
        return f">{100 - 10.0 ** (2 - digits):g}%"
    # with thousands, not with an exponent
    return f"{float(text):,.0f}%" if "e+" in text else f"{text}%"


def interval(value: Any, low: Any, high: Any, measure: str = "") -> str:
    """A value with its interval; without it, where that has no ends.

    measure: of which it is, where it is of one (`amount`).
    """
    if not (is_number(low) and is_number(high)):
        return f"{amount(measure, value)} (no interval)"
    return f"{amount(measure, value)} [{amount(measure, low)}, {amount(measure, high)}]"


def amount(measure: str, value: Any, digits: int = 4) -> str:
    """A value of a measure with its unit: what is a share of examples in hundredths.

    >>> amount("calibrated_ratio", 1.01), amount("accuracy_drop", 0.003), amount("flips", 0.0125)
    ('1.01', '0.3 points', '1.25%')
    """
    unit = _hundredths(measure)
    if not unit or not is_number(value):
        return number(value, digits)
    shown = number(round(100 * value, 10), digits)
    return f"{shown}{unit.removesuffix('s') if shown == '1' else unit}"


def _hundredths(measure: str) -> str:
    return MEASURES[measure].hundredths if measure in MEASURES else ""


def limit(measure: str, most: float) -> str:
    """A limit of a measure with its unit, as it was given: test_a_limit_is_shown_as_it_is.

    >>> limit("criterion_ratio", 1.0004), limit("accuracy_drop", 0.00012)
    ('1.0004', '0.012 points')
    """
    return amount(measure, most, digits=8)


def limits_in_words(limits: Mapping[str, float]) -> str:
    """By measure the most that it may be, as a clause."""
    return " and ".join(f"{MEASURES[n].words} at most {limit(n, v)}" for n, v in limits.items())


def kept_in_words(limits: Mapping[str, float]) -> str:
    """Likewise, as a sentence without its end."""
    first, *others = (f"{MEASURES[n].words} is at most {limit(n, v)}" for n, v in limits.items())
    return " and ".join([f"its {first}", *(f"its {other}" for other in others)])


def bound(measure: str, most: Any) -> str:
    """A bound in the unit of its measure, rounded up."""
    unit = _hundredths(measure)
    return f"{at_most(100 * most)}{unit}" if unit and is_number(most) else at_most(most)
