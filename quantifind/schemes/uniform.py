"""Evenly spaced levels, with a scale and perhaps a zero point (Jacob et al. 2018,
arXiv:1712.05877)."""

from typing import Any

from torch import Tensor

from quantifind.tensor.qparams import Grid
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.scales import level_count, quantize_to_grid

MIN_BITS, MAX_BITS = 1, 32


def quantize(
    values: Tensor,
    bits: int | None = None,
    *,
    levels: int | None = None,
    half_integer: bool | None = None,
    **options: Any,
) -> QuantizedTensor:
    """Round to nearest on evenly spaced levels.

    By default, of b bits: levels from −2^(b−1) to 2^(b−1)−1 times 2·max|x| / (2^b − 1).

    bits: 1 to 32.
    levels: instead of bits, how many there are, 2 to 2^32; 3 for ternary, −1, 0, 1.
    half_integer: whether the levels are ±½, ±1½, …, for an even number of them; by default at 1 bit
        alone, where whole numbers would leave none above 0.
    options: `axis`, `group`, `scale`, `importance`, `scale_dtype`, `zero_point`, as
        `quantifind.tensor.scales.quantize_to_grid` has them.
    Returns: at most so many distinct values for each scale. With ``scale`` "max_abs" each value is
    at most half a step and one unit in the last place of its dtype from the original, and a
    constant tensor keeps its value.
    Raises: ValueError for a number of levels that can't be, and as `quantize_to_grid`.

    >>> import torch
    >>> quantize(torch.tensor([0.0, 0.3, -0.3, 0.75]), bits=3).codes.tolist()
    [0, 1, -1, 3]
    """
    count = level_count("uniform", bits, levels, low=MIN_BITS, high=MAX_BITS)
    zero_point = options.get("zero_point", False)
    if half_integer is None:
        half_integer = count == 2 and not zero_point
    if half_integer and (count % 2 or zero_point):
        raise ValueError(
            f"half_integer needs an even number of levels and no zero point, not {count} levels"
            + ", zero_point=True" * zero_point
        )
    return quantize_to_grid(values, Grid(count, offset=0.5 if half_integer else 0.0), **options)
