"""Quantization parameters: the grid, scale and zero point that turn codes into values."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantifind.tensor import packing

POWER_OF_TWO = torch.float8_e8m0fnu


@dataclass(frozen=True)
class Grid:
    """The levels that codes stand for, before they are scaled.

    levels: how many there are, 2 to 2^32.
    offset: evenly spaced levels are code + offset, for codes from −(levels // 2) up; an offset of ½
        puts them at ±½, ±1½, ….
    table: or the levels themselves in rising order, (levels,), or (rows, levels) where each row of
        the tensor has levels of its own; a code is the position in it.
    stored: whether the table has to be kept with the codes, being no standard one.
    """

    levels: int
    offset: float = 0.0
    table: Tensor | None = None
    stored: bool = False

    @property
    def lowest_code(self) -> int:
        return 0 if self.table is not None else -(self.levels // 2)

    @property
    def highest_code(self) -> int:
        return self.lowest_code + self.levels - 1

    @property
    def reach(self) -> float:
        """The largest magnitude that is at most half a step from a level, on either side."""
        if self.table is not None:
            return self.table.abs().max().item()
        return (self.levels - 1) / 2

    @property
    def ends(self) -> tuple[Any, Any]:
        """The lowest and the highest level; of tables by row, (rows, 1) each."""
        if self.table is not None:
            return self.table[..., :1].detach(), self.table[..., -1:].detach()
        return self.lowest_code + self.offset, self.highest_code + self.offset

    def codes(self, scaled: Tensor) -> Tensor:
        """Each value's nearest level, by its code in the values' dtype or, of a table, int64.

        scaled: values in units of the scale, (rows, length). Ties go to the even code; those of a
            table to the level an even number of levels from the middle one.
        """
        if self.table is None:
            steps = (scaled - self.offset).round_() if self.offset else scaled.round()
            return steps.clamp_(self.lowest_code, self.highest_code)
        table = self.table.to(scaled.dtype)
        middles = (table[..., 1:] + table[..., :-1]) / 2
        scaled = scaled.contiguous()
        codes = torch.searchsorted(middles, scaled)
        above = codes.clamp(max=self.levels - 2)
        tie = scaled == _look_up(middles, above)
        odd = (codes - (self.levels - 1) // 2) % 2 != 0
        return codes + (tie & odd)

    def values(self, codes: Tensor) -> Tensor:
        """The level of each code, (rows, length), in the codes' dtype, or the table's."""
        if self.table is None:
            return codes + self.offset if self.offset else codes
        return _look_up(self.table, codes.long())


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    return table[codes] if table.dim() == 1 else table.gather(1, codes)


@dataclass(frozen=True)
class QParams:
    """What a weight and an activation share: value = (level of the code − zero point) · scale.

    grid: what levels the codes stand for.
    scale: floating point, (rows, 1), one for each row of `to_rows`, or (); how wide it is stored is
        its dtype. None where the levels are the values.
    zero_point: integers, (rows, 1), the code of 0; None where it is 0.
    axis, group: what shares a scale, as in `to_rows`.
    """

    grid: Grid
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    axis: int | None = None
    group: int | None = None

    def nearest(self, rows: Tensor) -> Tensor:
        """The codes of the levels nearest to values (rows, length) float64."""
        if self.scale is not None:
            scale = self.scale.double()
            # a row of zeros has no scale: test_zeros_stay_zero
            rows = rows / torch.where(scale > 0, scale, 1.0)
        return self.grid.codes(rows if self.zero_point is None else rows + self.zero_point)

    def values(self, codes: Tensor) -> Tensor:
        """The values, float64, of codes (rows, length)."""
        # float32 has no half steps beyond 2^23: test_half_integer_levels_are_half_a_step_near
        values = self.grid.values(codes.double() if self.grid.offset else codes).double()
        if self.zero_point is not None:
            values = values - self.zero_point
        return values if self.scale is None else values * self.scale.double()

    def of_rows(self, some: slice | Tensor) -> "QParams":
        """Those of some of the rows."""

        def own(each: Tensor | None) -> Tensor | None:
            if each is None or each.dim() < 2:
                return each
            # which torch picks no rows of: test_every_scheme_comes_back_and_is_read_by_others
            if each.dtype == POWER_OF_TWO:
                return each.view(torch.uint8)[some].view(POWER_OF_TWO)
            return each[some]

        grid = replace(self.grid, table=own(self.grid.table))
        return replace(self, grid=grid, scale=own(self.scale), zero_point=own(self.zero_point))

    @property
    def bits(self) -> int | float:
        """Width of one packed code: whole, or 1.6 where there are three levels."""
        return packing.width(self.grid.levels)

    @property
    def stored_bits(self) -> int:
        """Bits of the scales, the zero points, and a codebook."""
        kept = (self.scale, self.zero_point, self.grid.table if self.grid.stored else None)
        return 8 * sum(t.numel() * t.element_size() for t in kept if t is not None)

    def __getstate__(self) -> dict[str, Any]:
        scale = self.scale
        if scale is not None and scale.dtype == POWER_OF_TWO:  # which torch can't pickle
            scale = scale.view(torch.uint8)
        return self.__dict__ | {"scale": scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        scale = state["scale"]
        if scale is not None and scale.dtype == torch.uint8:
            state = state | {"scale": scale.view(POWER_OF_TWO)}
        self.__dict__.update(state)


def with_table(qparams: QParams, table: Tensor) -> QParams:
    """The parameters with other levels in the place of the grid's table."""
    return replace(qparams, grid=replace(qparams.grid, table=table))


def to_rows(values: Tensor, axis: int | None, group: int | None) -> Tensor:
    """The values that share a scale as one row each, (rows, length).

    axis: None for one row of all; or the axis of which each index, a channel, has a row of its own.
    group: instead of a whole row, each so many values of it in turn; the last of a row may be
        fewer, zeros fill it up.
    Raises: ValueError for an axis that the values haven't, or a group below 1 or longer than a row;
        where there are no values, any group will do.

    >>> to_rows(torch.arange(6).reshape(2, 3), axis=0, group=2).tolist()
    [[0, 1], [2, 0], [3, 4], [5, 0]]
    """
    if axis is None:
        rows = values.reshape(1, -1)
    elif axis not in range(-values.dim(), values.dim()):
        raise ValueError(f"axis is {axis}: the tensor's shape is {list(values.shape)}")
    else:
        moved = values.movedim(axis, 0)
        rows = moved.reshape(len(moved), moved[:1].numel())
    if group is None:
        return rows
    most = rows.shape[1] if values.numel() else max(group, 1)
    if group not in range(1, most + 1):
        raise ValueError(f"group is {group}: whole numbers 1 to {most} are allowed for this shape")
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group))
    return rows.reshape(-1, group)


def row_of(places: Tensor, shape: torch.Size, axis: int | None, group: int | None) -> Tensor:
    """The row of `to_rows` in which values of a shape are, by their places among the flattened.

    places: int64, any shape.

    >>> row_of(torch.arange(6), torch.Size([2, 3]), axis=0, group=2).tolist()
    [0, 0, 1, 2, 2, 3]
    """
    inner = 1 if axis is None else shape[axis % len(shape) + 1 :].numel()
    channels = 1 if axis is None else shape[axis]
    length = shape.numel() // channels
    channel = places // inner % channels
    if group is None:
        return channel
    inside = places // (inner * channels) * inner + places % inner  # (place in the channel)
    return channel * -(-length // group) + inside // group


def from_rows(rows: Tensor, shape: torch.Size, axis: int | None, group: int | None) -> Tensor:
    """What `to_rows` made rows of, with its ``shape``; rows of length 1 are spread out.

    >>> from_rows(torch.tensor([[1], [2], [3], [4]]), torch.Size([2, 3]), 0, 2).tolist()
    [[1, 1, 2], [3, 3, 4]]
    """
    moved = shape if axis is None else torch.Size([shape[axis], *_without(shape, axis)])
    channels = 1 if axis is None else shape[axis]
    length = shape.numel() // channels if channels else 0
    rows = rows.expand(-1, length if group is None else group)
    rows = rows.reshape(channels, -1 if channels else 0)[:, :length]
    values = rows.reshape(moved)
    return values if axis is None else values.movedim(0, axis)


def _without(shape: torch.Size, axis: int) -> list[int]:
    return [size for index, size in enumerate(shape) if index != axis % len(shape)]
