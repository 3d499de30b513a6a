"""Quantization parameters by rows and inputs of a weight's matrices, however its scales lie."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantifind.tensor.matrices import Matrices, moves
from quantifind.tensor.qparams import QParams, from_rows
from quantifind.tensor.quantized import QuantizedTensor


@dataclass(frozen=True)
class RowParams(QParams):
    """Quantization parameters of each element of some rows of a weight.

    scale, zero_point: (rows, 1) or (rows, inputs) float64; None where there is none.
    scale_dtype: what the scale is stored in.
    table_of: where rows have tables of their own, which one, (rows, 1) or (rows, inputs).
    """

    scale_dtype: torch.dtype | None = None
    table_of: Tensor | None = None

    @classmethod
    def of(cls, tensor: QuantizedTensor, matrix: Matrices | None = None) -> "RowParams":
        """Those of the matrices of a quantized weight, one after another; by default its rows,
        flattened."""
        given, shape = tensor.qparams, tensor.codes.shape
        matrix = Matrices.rows(shape) if matrix is None else matrix
        groups, outputs, inputs = matrix.shape
        axis, group = given.axis, given.group

        def spread(each: Tensor | None) -> Tensor | None:
            if each is None:
                return None
            if each.numel() == 1:
                return each.double().reshape(1, 1).expand(groups * outputs, 1)
            if axis is not None and group is None and not moves(matrix.inputs, axis, shape):
                return each.double()[places(matrix, axis, shape).to(each.device)]
            rows = matrix.of(from_rows(each.double(), shape, axis, group))
            return rows.reshape(groups * outputs, inputs)

        table, table_of = given.grid.table, None
        if table is not None and table.dim() == 2:
            table_of = spread(torch.arange(len(table), device=table.device).unsqueeze(1))
        return cls(
            given.grid,
            spread(given.scale),
            spread(given.zero_point),
            scale_dtype=None if given.scale is None else given.scale.dtype,
            table_of=table_of,
        )


def places(matrix: Matrices, axis: int, shape: torch.Size) -> Tensor:
    """Where along an axis of a tensor of a shape each row of the matrices begins, (rows,)."""
    return replace(matrix, groups=(), outputs=matrix.groups + matrix.outputs).places(axis, shape)
