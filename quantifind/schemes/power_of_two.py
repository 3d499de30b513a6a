"""Powers of two and 0 (INQ, arXiv:1702.03044), and sums of them (APoT, arXiv:1909.13144)."""

from typing import Any

import torch
from torch import Tensor

from quantifind.tensor.qparams import Grid
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.scales import quantize_to_grid, whole_number

MIN_BITS, MAX_BITS = 2, 8


def quantize(values: Tensor, bits: int, *, terms: int = 1, **options: Any) -> QuantizedTensor:
    """Round to nearest on 0 and ± sums of ``terms`` powers of two, times a scale.

    bits: 2 to 8, the sign included.
    terms: 1 to bits − 1, among which the other bits are divided, the first taking what is over.
    options: `axis`, `group`, `scale`, `importance`, `scale_dtype`, as
        `quantifind.tensor.scales.quantize_to_grid` has them.
    Returns: at most 2^bits − 1 distinct values for each scale, 0 among them.
    Raises: ValueError for a number of bits or terms that can't be, and as `quantize_to_grid`.

    >>> quantize(torch.tensor([1.0, 0.4, -0.2, 0.1]), 3).dequantize().tolist()
    [1.0, 0.5, -0.25, 0.0]
    """
    bits = whole_number("bits", bits, "power_of_two takes", MIN_BITS, MAX_BITS)
    terms = whole_number("terms", terms, f"{bits} bits take", 1, bits - 1)
    table = levels(bits, terms).to(values.device)
    return quantize_to_grid(values, Grid(len(table), table=table), **options)


def levels(bits: int, terms: int = 1) -> Tensor:
    """The levels in rising order, the largest of them below 2, float64.

    Of n terms, term i is 0 or one of 2^−i, 2^−(i + n), 2^−(i + 2n), …: as many as its bits tell
    apart (APoT, equation 3).

    >>> levels(3).tolist()
    [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    >>> levels(4, terms=2).tolist()[8:]
    [0.0625, 0.25, 0.5, 0.5625, 0.75, 1.0, 1.5]
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for term in range(terms):
        own_bits = (bits - 1) // terms + (term < (bits - 1) % terms)
        powers = torch.arange(2**own_bits - 1) * terms + term
        choices = torch.cat([torch.zeros(1, dtype=torch.float64), 2.0 ** -powers.double()])
        sums = (sums.unsqueeze(1) + choices).flatten()
    return torch.cat([sums, -sums]).unique()
