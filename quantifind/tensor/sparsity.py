"""Codes of which most are 0, as only the largest latent values have others (gradual pruning,
arXiv:1710.01878; shares by shape, arXiv:1911.11134), with gradients that bring some back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantifind.tensor.qparams import QParams

# the part of the training in which codes become 0; in what is left of it, those that are stay few
FALLING = 0.3


def is_sparse(qparams: QParams) -> bool:
    """Whether a grid has the level 0, and others on both sides, evenly spaced."""
    grid = qparams.grid
    even = grid.table is None and grid.offset == 0 and grid.levels > 2
    return even and qparams.zero_point is None and qparams.scale is not None


def shares(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """By name, which share of a weight's codes is not 0, ``density`` of all of them: the number of
    those is in proportion to the sum of the sides of a weight as a matrix (outputs, inputs), so
    that small weights have larger shares, up to all.

    >>> shares({"a": torch.Size([100, 100]), "b": torch.Size([100, 10])}, 0.1)
    {'a': 0.07096774193548387, 'b': 0.3903225806451613}
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    sides = {name: shape[0] + shape[1:].numel() for name, shape in shapes.items()}
    left, found = density * sum(sizes.values()), dict.fromkeys(shapes, 1.0)
    growing = set(shapes)
    while growing:
        each = left / sum(sides[name] for name in growing)
        full = {name for name in growing if each * sides[name] >= sizes[name]}
        if not full:
            return found | {name: each * sides[name] / sizes[name] for name in sorted(growing)}
        left -= sum(sizes[name] for name in full)
        growing -= full
    return found


def falling(share: float, done: float) -> float:
    """The share of codes that are not 0 when so much of the training is done, 0 to 1: from 1 along
    a cubic to ``share``."""
    left = max(0.0, 1 - done / FALLING)
    return share + (1 - share) * left**3


def threshold(latent: Tensor, share: float) -> Tensor:
    """The largest magnitude of the values whose codes are 0, so that at most such a share of them
    is above; −1 for all."""
    zeros = latent.numel() - int(share * latent.numel() + 0.5)
    if zeros <= 0:
        return latent.new_tensor(-1.0)
    return latent.detach().abs().flatten().kthvalue(zeros).values


def sparse_codes(values: Tensor, qparams: QParams, least: Tensor) -> Tensor:
    """The nearest codes that are not 0 of values above a threshold, and 0 of others."""
    assert qparams.scale is not None
    scaled = values / torch.where(qparams.scale > 0, qparams.scale, 1.0)
    codes = qparams.grid.codes(scaled)
    codes = torch.where(codes == 0, scaled.sign(), codes)
    return torch.where(values.abs() > least, codes, 0.0)


def sparse_through(values: Tensor, qparams: QParams, least: Tensor) -> Tensor:
    """What `sparse_codes` stand for, with gradients: of values as if they were not rounded, that
    zeros may come back; of scales, as of fixed codes.

    values: float32, (rows, length).
    qparams: with a float32 scale.
    """
    assert qparams.scale is not None
    codes = sparse_codes(values.detach(), qparams, least).detach()
    return codes * qparams.scale + (values - values.detach())


def first_factor(latent: Tensor, qparams: QParams, share: float) -> float:
    """What to multiply scales with, so that the mean magnitude of what will not be 0 lies where
    values of an exponential distribution have it, of ternary grids at the outer levels."""
    assert qparams.scale is not None
    magnitudes = latent.detach().abs().flatten()
    mean = magnitudes.topk(max(1, int(share * len(magnitudes)))).values.mean().item()
    half = qparams.grid.highest_code
    scale = qparams.scale.double().mean().item()
    wanted = mean / (1 if half == 1 else 0.6 * half)
    return wanted / scale if wanted > 0 and scale > 0 else 1.0
