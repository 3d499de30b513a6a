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

    def rows(self, some: Tensor) -> "Levels":
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


@dataclass(frozen=True)
class Bounds:
    """Where, in units of the scale, the elements of each input turn from one code to the next.

    lowest: the first code.
    between: (groups, inputs, codes − 1), rising.
    """

    lowest: int
    between: Tensor

    def codes(self, values: Tensor, index: int) -> Tensor:
        """Codes of an input's elements, (groups, 1, rows)."""
        codes = torch.searchsorted(self.between[:, index], values.squeeze(1).contiguous())
        return codes.unsqueeze(1) + self.lowest


class Rounding:
    """Rounds the elements of an input, (groups, 1, rows), in units of their rows, to levels.

    unit: of each row, (groups, 1, rows) float64: its scale where it has one, so that its levels are
        the grid's; else ``size``.
    """

    def __init__(
        self, levels: Levels, like: Tensor, size: float, bounds: Bounds | None = None
    ) -> None:
        """like: (groups, inputs, rows) in the dtype of what is rounded; size: of the weights;
        bounds: between levels, by default halfway."""
        self._bounds = bounds

        def each(of: Tensor, dtype: torch.dtype = like.dtype) -> list[Tensor]:
            of = of.to(dtype)
            return [*of.split(1, 1)] if of.shape[1] > 1 else [of] * like.shape[1]

        grid, scale = levels.grid, levels.scale
        self._scales: list[Tensor] | None = None
        if scale is not None and scale.shape[1] == 1:
            # a row of zeros has no scale: test_zeros_stay_zero
            self.unit = torch.where(scale > 0, scale, 1.0)
        else:
            source = like if scale is None else scale
            self.unit = torch.full_like(source[:, :1], size, dtype=torch.float64)
            if scale is not None:
                self._scales = each(torch.where(scale > 0, scale / size, 1.0))
        if grid.table is not None:
            table = grid.table.double() / (size if scale is None else 1.0)
            grid = replace(grid, table=table.to(like.dtype))
        self._grid = grid
        self._zeros = None if levels.zero_point is None else each(levels.zero_point)
        self._table_of = None if levels.table_of is None else each(levels.table_of, torch.int64)
        self._tables: tuple[Tensor, Grid] | None = None

    def _of(self, index: int) -> Grid:
        """The grid with tables by row, (groups · rows, levels), where rows have their own."""
        if self._table_of is None or self._grid.table is None:
            return self._grid
        which = self._table_of[index]
        if self._tables is None or self._tables[0] is not which:
            table = self._grid.table[which.flatten()]
            self._tables = which, replace(self._grid, table=table)
        return self._tables[1]

    def codes(self, values: Tensor, index: int) -> Tensor:
        """Codes of the levels nearest to an input's elements; of a grid with tables by row
        (groups · rows, 1)."""
        if self._scales is not None:
            values = values / self._scales[index]
        if self._zeros is not None:
            values = values + self._zeros[index]
        if self._bounds is not None:
            return self._bounds.codes(values, index)
        return self._of(index).codes(values if self._table_of is None else values.reshape(-1, 1))

    def put(self, values: Tensor, index: int, out: Tensor) -> None:
        """Write the levels nearest to an input's elements to ``out``."""
        levels = self._of(index).values(self.codes(values, index))
        if self._zeros is not None:
            levels = levels - self._zeros[index]
        if self._scales is not None:
            levels = levels * self._scales[index]
        out.copy_(levels.reshape(out.shape))

    def all_codes(self, values: Tensor) -> Tensor:
        """Codes of all inputs' elements, (groups, inputs, rows) int32."""
        columns = values.split(1, 1)
        codes = [self.codes(each, i).reshape(each.shape) for i, each in enumerate(columns)]
        return torch.cat(codes, 1).int()
