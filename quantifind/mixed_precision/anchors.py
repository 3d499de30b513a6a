"""Where a limit lies on the scale of divergences: by one depth for all, measured whole."""

import math
from typing import Any

from quantifind.certification.goal import Goal
from quantifind.certification.measures import degradation
from quantifind.mixed_precision.rounded_options import RoundedOptions
from quantifind.mixed_precision.search_space import choice_key, nearest_in_bits
from quantifind.mixed_precision.sensitivity import increase_of
from quantifind.tensor.quantized import Quantized

# allocations that just keep a limit differ from one depth for all by such a factor of divergence
SPREAD = 2.0


def near_limit(rounded_options: RoundedOptions, goal: Goal) -> tuple[float, float]:
    """Divergences between which allocations that just keep a goal's limits lie; any for a budget.

    A limit alone does not tell: where the outputs diverge by as much as the loss, the loss itself
    may be what it was. Depths are halved between one that keeps the goal and one that doesn't.

    rounded_options: of which the stand-ins are made.
    """
    if goal.budget is not None:
        return 0.0, math.inf
    choices = rounded_options.space.tensors.values()
    widths = sorted({choice.width for some in choices for choice in some})
    low, high, keeps, fails = 0, len(widths), 0.0, math.inf
    while low < high:
        middle = (low + high) // 2
        key, quantized = _one_depth(rounded_options, widths[middle])
        columns = rounded_options.measurements.columns(key, quantized)
        if goal.keeps(degradation(columns)):
            high, keeps = middle, increase_of(columns)
        else:
            low, fails = middle + 1, increase_of(columns)
    return keeps / SPREAD, fails * SPREAD


def _one_depth(rounded_options: RoundedOptions, bits: int) -> tuple[str, Quantized]:
    """Every tensor by its choice nearest to so many bits, or by what stands in for it; named."""
    keys = {}
    for name, choices in rounded_options.space.tensors.items():
        nearest = nearest_in_bits(choices, bits)
        keys[name] = rounded_options.stand_in(choice_key("tensors", name, nearest))
    made: Any = {name: rounded_options[key] for name, key in keys.items()}
    return f"one depth {' '.join(keys.values())}", Quantized(made)
