"""Symmetric integer grids, one scale per tensor (Jacob et al. 2018, arXiv:1712.05877)."""

from numbers import Integral

import torch
from torch import Tensor

from quantifind.quantized import QuantizedTensor

MIN_BITS, MAX_BITS = 2, 32


def quantize(values: Tensor, bits: int, *, largest: float | None = None) -> QuantizedTensor:
    """Round to nearest on levels from −2^(bits−1) to 2^(bits−1)−1, times 2·max|x| / (2^bits − 1).

    values: floating point, finite, any shape. bits: 2 to 32, the sign included.
    largest: what to take for max|x|, values beyond it are clipped; by default that of ``values``.
    Returns: at most 2^bits distinct values, each at most half a step and one unit in the last place
    of its dtype from the original. A constant tensor is its own step, so it keeps its value.
    Errors: ValueError for bits out of range, for values that are not floating point, and for NaN or
    infinity, saying how many there are.

    >>> quantize(torch.tensor([0.0, 0.3, -0.3, 0.75]), bits=3).codes.tolist()
    [0, 1, -1, 3]
    """
    whole = isinstance(bits, Integral) and not isinstance(bits, bool)
    if not whole or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits!r}: uniform takes whole numbers {MIN_BITS} to {MAX_BITS}")
    if not values.is_floating_point():
        raise ValueError(f"values are {values.dtype}: only floating point can be quantized")
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(f"{bad} of {values.numel()} values are NaN or infinite")
    bits, exact = int(bits), values.double()
    scale = _scale(exact, bits, largest, torch.promote_types(values.dtype, torch.float32))
    steps = exact / scale.double() if scale > 0 else torch.zeros_like(exact)
    # float32 could not hold codes of more than 24 bits: test_error_is_at_most_half_a_step
    codes = steps.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return QuantizedTensor(codes.to(torch.int32), scale, bits, values.dtype)


def _scale(values: Tensor, bits: int, largest: float | None, dtype: torch.dtype) -> Tensor:
    reach = (2**bits - 1) / 2  # steps from zero to the largest magnitude
    if largest is not None:
        step = torch.tensor(largest / reach, dtype=torch.float64, device=values.device)
    elif values.numel() == 0:
        step = values.new_zeros(())
    elif (low := values.min()) == values.max():
        # a constant tensor has no range: test_constant_tensor_keeps_its_value
        step = low.abs()
    else:
        step = values.abs().max() / reach
    scale = step.to(dtype)
    # rounded up, the levels still reach the largest value: test_error_is_at_most_half_a_step
    return torch.nextafter(scale, torch.full_like(scale, torch.inf)) if scale < step else scale
