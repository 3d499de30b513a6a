"""Floating point of few bits, with subnormals (OCP MX formats, arXiv:2310.10537)."""

from typing import Any

import torch
from torch import Tensor

from quantifind.tensor.qparams import Grid
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.scales import quantize_to_grid, whole_number

MIN_BITS, MAX_BITS = 3, 16
SPECIALS = ("none", "nan", "infinity")
# by exponent and mantissa bits, what the standard's 8-bit formats keep codes for
OCP_SPECIALS = {(4, 3): "nan", (5, 2): "infinity"}


def quantize(
    values: Tensor,
    bits: int,
    *,
    exponent: int | None = None,
    specials: str | None = None,
    **options: Any,
) -> QuantizedTensor:
    """Round to nearest on the finite values of a floating point format, times a scale.

    bits: 3 to 16: a sign, ``exponent`` bits, and a mantissa of what is left.
    exponent: 1 to 8, by default half of the bits but at most 5: e2m1, e3m2, e4m3, e5m10.
    specials: which codes are kept for what is no number: "none"; "nan", the one with all bits set,
        of either sign; "infinity", the highest exponent, as IEEE 754 does. By default those of the
        OCP formats: "nan" for e4m3, "infinity" for e5m2, else "none".
    options: `axis`, `group`, `scale`, `importance`, `scale_dtype`, as
        `quantifind.tensor.scales.quantize_to_grid` has them. MX is ``axis=0``, ``group=32`` and
        ``scale_dtype="power_of_two"``; the format itself, as a processor has it, ``scale=1.0``.
    Raises: ValueError for a format that can't be, and as `quantize_to_grid`.

    >>> quantize(torch.tensor([0.2, -1.6, 2.4, 7.0]), 4, scale=1.0).dequantize().tolist()
    [0.0, -1.5, 2.0, 6.0]
    """
    bits = whole_number("bits", bits, "minifloat takes", MIN_BITS, MAX_BITS)
    if exponent is None:
        exponent = min(bits // 2, 5)
    exponent = whole_number("exponent", exponent, f"{bits} bits take", 1, min(bits - 1, 8))
    table = levels(exponent, bits - 1 - exponent, specials)
    grid = Grid(len(table), table=table.to(values.device))
    return quantize_to_grid(values, grid, **options)


def levels(exponent: int, mantissa: int, specials: str | None = None) -> Tensor:
    """The finite values of a format in rising order, 0 once, float64; the exponent's bias is
    2^(exponent − 1) − 1.

    exponent, mantissa: their bits.
    specials: as in `quantize`.

    >>> levels(2, 1).tolist()[7:]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if specials is None:
        specials = OCP_SPECIALS.get((exponent, mantissa), "none")
    if specials not in SPECIALS:
        raise ValueError(f"specials is {specials!r}: {', '.join(SPECIALS)} are allowed")
    codes = torch.arange(2 ** (exponent + mantissa))
    if specials == "nan":
        codes = codes[:-1]
    elif specials == "infinity":
        codes = codes[: -(2**mantissa)]
    power, fraction = codes >> mantissa, (codes % 2**mantissa).double() / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    subnormal = power == 0
    significand = torch.where(subnormal, fraction, 1 + fraction)
    magnitudes = torch.ldexp(significand, torch.where(subnormal, 1, power) - bias)
    return torch.cat([-magnitudes.flip(0)[:-1], magnitudes])
