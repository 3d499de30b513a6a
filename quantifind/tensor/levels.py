"""Levels of the elements of rows, input by input: what a loop over inputs rounds to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantifind.tensor.output_error import OutputError
from quantifind.tensor.qparams import Grid
from quantifind.tensor.row_params import RowParams
from quantifind.tensor.stored_scales import stored_scale


@dataclass(frozen=True)
class Levels:
    """Quantization parameters with inputs in the order of an error, as columns.

    scale, zero_point, table_of: (groups, 1 or inputs, rows) of `RowParams`.
    """

    grid: Grid
    scale: Tensor | None
    zero_point: Tensor | None
    table_of: Tensor | None
    scale_dtype: torch.dtype | None

    @classmethod
    def of(cls, params: RowParams, error: OutputError) -> "Levels":
        def columns(each: Tensor | None) -> Tensor | None:
            if each is None:
                return None
            if each.shape[1] > 1:
                return error.to_order(each)
            return each.reshape(len(error.order), 1, -1)

        scale, zero, table = map(columns, (params.scale, params.zero_point, params.table_of))
        return cls(params.grid, scale, zero, table, params.scale_dtype)

    def rows(self, some: slice) -> "Levels":
        """Those of some rows of each group."""

        def of(each: Tensor | None) -> Tensor | None:
            return None if each is None else each[:, :, some]

        return replace(
            self,
            scale=of(self.scale),
            zero_point=of(self.zero_point),
            table_of=of(self.table_of),
        )

    def rescaled(self, share: Tensor) -> "Levels":
        """With the scales that are stored for so many times these: (groups, 1, rows) or numbers
        (copies,), each of which makes a copy of the rows, one after another."""
        if self.scale is None or self.scale_dtype is None:
            return self
        if share.dim() > 1:
            return replace(self, scale=_stored(self.scale * share, self.scale_dtype))
        copied = (self.scale.unsqueeze(2) * share.unsqueeze(1)).flatten(2)

        def repeated(each: Tensor | None) -> Tensor | None:
            return None if each is None else each.repeat(1, 1, len(share))

        return replace(
            self,
            scale=_stored(copied, self.scale_dtype),
            zero_point=repeated(self.zero_point),
            table_of=repeated(self.table_of),
        )

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes, (groups, inputs, rows), float64."""
        table = self.grid.table
        if table is not None and self.table_of is not None:
            values = table[self.table_of.long().expand_as(codes), codes.long()].double()
        else:
            values = self.grid.values(codes.double()).double()
        if self.zero_point is not None:
            values = values - self.zero_point
        return values if self.scale is None else values * self.scale


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return stored_scale(scale, dtype).double()


class Rounding:
    """Rounds columns, (groups, 1, rows), to their levels, in units of a weight's size."""

    def __init__(self, levels: Levels, inputs: int, unit: float, dtype: torch.dtype) -> None:
        def each(of: Tensor | None) -> list[Tensor] | None:
            if of is None:
                return None
            return [*of.split(1, 1)] if of.shape[1] > 1 else [of] * inputs

        grid, scale, zero = levels.grid, levels.scale, levels.zero_point
        if grid.table is not None:
            table = grid.table.double() / (unit if scale is None else 1.0)
            grid = replace(grid, table=table.to(dtype))
        scale = None if scale is None else (scale / unit).to(dtype)
        self.grid, self.scales = grid, each(scale)
        # a row of zeros has no scale: test_zeros_stay_zero
        self.divisors = each(None if scale is None else torch.where(scale > 0, scale, 1.0))
        self.zeros = each(None if zero is None else zero.to(dtype))
        self.table_of = each(levels.table_of)
        # tables are the same for all inputs, or looked up for each
        self.shared = None
        if self.table_of is not None and levels.table_of is not None:
            self.shared = self._tables(0) if levels.table_of.shape[1] == 1 else None

    def _tables(self, index: int) -> Grid:
        if self.shared is not None:
            return self.shared
        assert self.table_of is not None and self.grid.table is not None
        table = self.grid.table[self.table_of[index].flatten().long()]
        return replace(self.grid, table=table)  # (groups · rows, levels)

    def codes(self, values: Tensor, index: int) -> Tensor:
        """Codes of the levels nearest to one input's values."""
        if self.divisors is not None:
            values = values / self.divisors[index]
        if self.zeros is not None:
            values = values + self.zeros[index]
        if self.table_of is None:
            return self.grid.codes(values)
        return self._tables(index).codes(values.reshape(-1, 1)).reshape(values.shape)

    def __call__(self, values: Tensor, index: int) -> Tensor:
        """The levels nearest to one input's values."""
        codes = self.codes(values, index)
        if self.table_of is None:
            levels = self.grid.values(codes)
        else:
            levels = self._tables(index).values(codes.reshape(-1, 1)).reshape(codes.shape)
        if self.zeros is not None:
            levels = levels - self.zeros[index]
        return levels if self.scales is None else levels * self.scales[index]
