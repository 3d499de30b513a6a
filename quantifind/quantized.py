"""A tensor on few levels: its codes, and what turns them back into values."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Values that are integer codes times a scale.

    codes: integers, of the shape of the values.
    scale: floating point, a shape that broadcasts against the codes; how wide it is stored is its
        dtype.
    bits: width of one code.
    dtype: of the values.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """The values, codes · scale, in ``dtype``; never beyond its finite range.

        >>> q = QuantizedTensor(torch.tensor([-2, 1]), torch.tensor(0.5), 2, torch.float32)
        >>> q.dequantize().tolist()
        [-1.0, 0.5]
        """
        # the lowest level lies half a step under −max|x|: test_extreme_values_stay_finite
        finite = torch.finfo(self.dtype)
        values = self.codes.double() * self.scale.double()
        return values.clamp(finite.min, finite.max).to(self.dtype)

    @property
    def stored_bits(self) -> int:
        """Bits of the packed bytes: codes side by side, filled up to a whole byte, and scales."""
        code_bytes = -(-self.codes.numel() * self.bits // 8)
        return 8 * (code_bytes + self.scale.numel() * self.scale.element_size())
