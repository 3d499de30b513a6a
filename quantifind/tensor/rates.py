"""What codes cost, and rounding that weighs it: of an error and the bits of its code the least sum
(entropy-constrained scalar quantization, Chou et al. 1989, doi:10.1109/29.17498)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantifind.tensor.coding import BORROWED, CLASSES, classes
from quantifind.tensor.qparams import Grid

# codes beyond so many have no prices: of so fine a grid they hardly differ
MOST = 2**10
# pairs of levels of some inputs that are compared at a time
TOGETHER = 2**24


@dataclass(frozen=True)
class Prices:
    """Bits of codes as `quantifind.tensor.coding` would store them, were its tables known.

    lowest: the first code that has a price; those beyond the last have none.
    bits: (classes, codes) float64.
    class_of: of each input, (groups, inputs).
    """

    lowest: int
    bits: Tensor
    class_of: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> "Prices":
        """Those of codes (groups, rows, inputs), by how often they occur there."""
        groups, rows, inputs = codes.shape
        lowest = int(codes.min())
        found = (codes - lowest).long().movedim(1, 0).flatten(1)  # (rows, groups · inputs)
        size = int(found.max()) + 1
        everything = torch.bincount(found.flatten(), minlength=size)
        distance = (found - everything.argmax()).abs().sum(0)
        which = torch.from_numpy(classes(distance.cpu().numpy(), rows)).to(found.device)
        found = (found + size * which).flatten()
        counts = torch.bincount(found, minlength=size * (len(CLASSES) + 1))
        counts = counts.reshape(-1, size).double()
        # a code that a class has not had may come: as the coder has it
        counts += BORROWED * (everything + 1.0 / size) / (everything.sum() + 1.0)
        bits = -(counts / counts.sum(1, keepdim=True)).log2()
        return cls(lowest, bits, which.reshape(groups, inputs))

    def bounds(self, grid: Grid, weight: Tensor) -> Tensor:
        """Between which values each code has the least (value − level)² + weight · bits.

        weight: (groups, inputs), of a bit, 0 or more.
        Returns: (groups, inputs, codes − 1), rising; a code between equal ones is never the best.
        """
        codes = torch.arange(self.lowest, self.lowest + self.bits.shape[1], device=weight.device)
        levels = grid.values(codes).double()
        bits, weight = self.bits[self.class_of.flatten()], weight.reshape(-1, 1)
        height = levels.square() + weight * bits  # (groups · inputs, codes)
        apart = (levels - levels.unsqueeze(1)).triu(1)
        apart = torch.where(apart > 0, apart, 1.0)
        upper = torch.ones_like(apart, dtype=torch.bool).triu(1)
        some = max(1, TOGETHER // apart.numel())
        found = [_slopes(part, apart, upper) for part in height.split(some)]
        return torch.cat(found).div_(2).reshape(*self.class_of.shape, -1)


def _slopes(height: Tensor, apart: Tensor, upper: Tensor) -> Tensor:
    """Those of the lower convex hull of points, (inputs, codes), from each to the next: of all
    lines from a point up to it to points beyond it the least, the largest of these."""
    if len(upper) == 1:
        return height[:, :0]
    slopes = (height.unsqueeze(1) - height.unsqueeze(2)) / apart
    slopes = torch.where(upper, slopes, torch.inf)
    least = slopes.flip(2).cummin(2).values.flip(2)[:, :-1, 1:]
    return torch.where(upper[:-1, 1:], least, -torch.inf).amax(1)
