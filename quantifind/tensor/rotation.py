"""A weight's inputs mixed by a randomized Hadamard transform, so that none stands out and what is
rounded is nearly Gaussian (QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456)."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from quantifind.tensor.matrices import Matrices, moves, output_axis
from quantifind.tensor.qparams import from_rows, to_rows

# seeds there are
SEEDS = 2**31
# values that are mixed at a time, as float64
AT_A_TIME = 2**18
# by which seeds lie apart, and the bits of a place are spread (the last steps of murmur3)
_APART, _SPREAD = 0x9E3779B1, ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))


@dataclass(frozen=True)
class Rotation:
    """What mixes the inputs of each output of a weight. It is orthogonal: mixed weights make of
    mixed inputs the outputs there were. Inputs that are always 0 take part: what is lost along them
    is not met (test_more_codes_than_inputs_that_are_met_lose_less).

    axis: of the weight, whose indices are its outputs; all else of one is its inputs, in order.
    seed: of the signs, 0 to `SEEDS` − 1.
    """

    axis: int
    seed: int

    def of(self, weight: Tensor) -> Tensor:
        """A weight mixed, in its dtype."""
        return self._turned(weight, weight.dtype, back=False)

    def undone(self, mixed: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight as it was, in a dtype and never beyond its finite range."""
        return self._turned(mixed, dtype, back=True)

    def of_form(self, form: Tensor) -> Tensor:
        """Σ x xᵀ of inputs, (…, inputs, inputs), as it is of mixed ones, float64."""
        half = mixed(form.flatten(0, -2).double(), self.seed).reshape(form.shape).mT
        return mixed(half.flatten(0, -2), self.seed).reshape(form.shape)

    def _turned(self, weight: Tensor, dtype: torch.dtype, *, back: bool) -> Tensor:
        rows, finite = to_rows(weight, self.axis, None), torch.finfo(dtype)
        together = max(1, AT_A_TIME // max(1, rows.shape[1]))
        # few float64 at a time: test_rotated_tensors_are_dequantized_in_parts
        turned = [
            mixed(some.double(), self.seed, back=back).clamp(finite.min, finite.max).to(dtype)
            for some in rows.split(together)
        ]
        return from_rows(torch.cat(turned), weight.shape, self.axis, None)


def rotation_axis(matrices: Collection[Matrices], shape: torch.Size) -> int:
    """The axis of a weight whose indices are its outputs, each with all its inputs in order.

    Raises: ValueError where there is none, as where the same elements are the inputs of several.
    """
    axes = {output_axis(matrix, shape) for matrix in matrices}
    if len(axes) != 1 or not all(_whole(matrix, min(axes), shape) for matrix in matrices):
        raise ValueError("its inputs can't be rotated: its outputs don't lie along one axis")
    return axes.pop()


def _whole(matrix: Matrices, axis: int, shape: torch.Size) -> bool:
    """Whether each output is one whole channel of an axis, its inputs in row-major order."""
    steps = [step for _, step in matrix.inputs]
    whole = matrix.shape[2] * shape[axis] == shape.numel()
    return whole and steps == sorted(steps, reverse=True) and not moves(matrix.inputs, axis, shape)


def mixed(rows: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """Rows, (rows, inputs) float64, times signs and a Hadamard matrix of as many inputs as the
    largest power of two there is: the first of them, and where more are left, then the last; or
    ``back`` from that.

    Sums of two numbers, one after another, which are the same everywhere.

    >>> mixed(torch.eye(2, dtype=torch.float64), seed=0).abs().square().mul(10).round().tolist()
    [[5.0, 5.0], [5.0, 5.0]]
    """
    inputs = rows.shape[1]
    if not rows.numel():
        return rows
    size = 2 ** (inputs.bit_length() - 1)
    own = signs(2 * size, seed, rows.device).to(rows.dtype).split(size)
    for start in sorted({0, inputs - size}, reverse=back):
        sign, part = own[start > 0], rows[:, start : start + size]
        part = _hadamard(part) * sign if back else _hadamard(part * sign)
        rows = torch.cat([rows[:, :start], part, rows[:, start + size :]], 1)
    return rows


def _hadamard(rows: Tensor) -> Tensor:
    """Rows times the orthogonal Hadamard matrix of their length, a power of two."""
    length, apart = rows.shape[1], 1
    while apart < length:
        first, second = rows.reshape(len(rows), -1, 2, apart).unbind(2)
        rows = torch.stack([first + second, first - second], 2)
        apart *= 2
    return rows.reshape(-1, length) / math.sqrt(length)


def signs(count: int, seed: int, device: torch.device) -> Tensor:
    """So many of ±1, int64, drawn by a seed."""
    bits = (torch.arange(count, device=device) + seed * _APART) & 0xFFFFFFFF
    for shift, factor in _SPREAD:
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return 1 - 2 * (bits & 1)
