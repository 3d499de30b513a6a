"""Rounding that gradients pass through (straight-through estimation, Bengio et al. 2013,
arXiv:1308.3432)."""

from dataclasses import replace

import torch
from torch import Tensor

from quantifind.tensor.qparams import Grid, QParams


def in_float32(grid: Grid, device: torch.device) -> Grid:
    """The grid with its table, if any, in float32 on a device.

    Raises: ValueError for levels beyond float32, as a minifloat of 8 exponent bits may have.
    """
    if grid.table is None:
        return grid
    if grid.reach > torch.finfo(torch.float32).max:
        raise ValueError(f"levels up to {grid.reach:.3g} are beyond float32")
    return replace(grid, table=grid.table.to(device, torch.float32))


def round_through(values: Tensor, qparams: QParams) -> Tensor:
    """Each value's nearest (level − zero point) · scale, with gradients.

    The gradient is that of clipping to the levels, for the scale that of the rounding error too
    (LSQ, arXiv:1902.08153).

    values: float32, (rows, length) where the grid has tables by row, or the scale is (rows, 1).
    qparams: the grid in float32 (`in_float32`); a scale and a zero point of float32, if any.
    """
    grid, scale = qparams.grid, qparams.scale
    scale = values.new_ones(()) if scale is None else scale
    zero: Tensor | float = 0.0 if qparams.zero_point is None else qparams.zero_point
    scaled = values / torch.where(scale > 0, scale, 1.0) + zero
    levels = grid.values(grid.codes(scaled.detach()))
    if grid.table is not None:
        levels = torch.where(scaled.isnan(), scaled, levels)  # NaN is near no entry of a table
    if torch.is_grad_enabled() and (values.requires_grad or scale.requires_grad):
        low, high = grid.ends
        within = scaled.clamp(low, high)
        levels = levels + (within - within.detach())
    return (levels - zero) * scale
