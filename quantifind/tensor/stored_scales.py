"""In which dtype scales and tables are stored, and what is lost by that."""

import torch
from torch import Tensor

from quantifind.tensor.qparams import POWER_OF_TWO

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "power_of_two": POWER_OF_TWO}


def storage_dtype(option: str, name: str | None, values: torch.dtype) -> torch.dtype:
    """What scales or tables are stored in.

    option: its name, "scale_dtype" or "table_dtype".
    name: what it is given as; None for float32, or float64 where ``values`` are.
    Raises: ValueError for a name that is none of `SCALE_DTYPES`, or of a table "power_of_two".
    """
    allowed = [n for n in SCALE_DTYPES if option == "scale_dtype" or n != "power_of_two"]
    if name is None:
        return torch.promote_types(values, torch.float32)
    if name not in allowed:
        raise ValueError(f"{option} is {name!r}: {', '.join(allowed)} are allowed")
    return SCALE_DTYPES[name]


def stored_scale(scale: Tensor, dtype: torch.dtype, *, up: bool = False) -> Tensor:
    """Positive scales in the dtype they are stored in, to nearest or ``up``, never to 0.

    The nearest to one above the largest that can be stored is that.
    Raises: ValueError for such a one when it is to go ``up``.
    """
    if up:
        check_storable(scale, dtype)
    scale = scale.clamp(max=torch.finfo(dtype).max)
    if dtype == POWER_OF_TWO:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa · 2^exponent, ½ ≤ mantissa < 1
        middle = 0.5 if up else 0.75
        power = torch.where(mantissa > middle, exponent, exponent - 1)
        power = torch.where(scale > 0, power, -127).clamp(min=-127)
        return torch.exp2(power.double()).to(dtype)
    stored = scale.to(dtype)
    if up:
        above = torch.nextafter(stored, torch.full_like(stored, torch.inf))
        # rounded up, the levels still reach the largest value: test_error_is_at_most_half_a_step
        stored = torch.where(stored.double() < scale, above, stored)
    smallest = torch.nextafter(torch.zeros_like(stored), torch.ones_like(stored))
    return torch.where((stored == 0) & (scale > 0), smallest, stored)


def check_storable(scale: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where a scale is larger than the dtype's largest value."""
    largest = torch.finfo(dtype).max
    if (scale > largest).any():
        name = next((n for n, kept in SCALE_DTYPES.items() if kept == dtype), "float64")
        raise ValueError(
            f"a scale of {scale.max().item():.3g} is too large for scale_dtype {name}: "
            f"at most {largest:.3g} is allowed"
        )
