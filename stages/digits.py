"""Numbers that promise, shown so that no digit promises more."""

import math


def sure(confidence: float) -> str:
    """A confidence in percent, rounded down: test_what_is_shown_is_not_surer_than_it_is."""
    return f"{math.floor(round(1e4 * confidence, 6)) / 100:g}%"


def at_most(bound: float) -> str:
    """A bound with four digits, rounded up: test_what_is_shown_is_not_surer_than_it_is."""
    if not math.isfinite(bound):
        return "not known"
    if bound == 0:
        return "0"
    digit = 10.0 ** (math.floor(math.log10(abs(bound))) - 3)
    return f"{math.ceil(round(bound / digit, 6)) * digit:.4g}"
