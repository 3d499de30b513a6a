"""A tensor on few levels: its codes, and what turns them back into values."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantifind.tensor import packing

# what codes are pickled as, the first that holds all of a grid's
NARROW = (torch.int8, torch.uint8, torch.int16)
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
        return self.lowest_code + self.offset, self.lowest_code + self.levels - 1 + self.offset

    def codes(self, scaled: Tensor) -> Tensor:
        """Each value's nearest level, by its code in the values' dtype or, of a table, int64.

        scaled: values in units of the scale, (rows, length). Ties go to the even code; those of a
        table to the level an even number of levels from the middle one.
        """
        if self.table is None:
            steps = (scaled - self.offset).round_() if self.offset else scaled.round()
            return steps.clamp_(self.lowest_code, self.lowest_code + self.levels - 1)
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
class QuantizedTensor:
    """Values that are levels of a grid, less a zero point, times a scale.

    codes: integers, of the shape of the values.
    grid: what levels the codes stand for.
    scale: floating point, (rows, 1), one for each row of `to_rows`, or (); how wide it is stored is
        its dtype. None where the levels are the values.
    dtype: of the values.
    axis, group: what shares a scale, as in `to_rows`.
    zero_point: integers, (rows, 1), the code of 0; None where it is 0.
    """

    codes: Tensor
    grid: Grid
    scale: Tensor | None
    dtype: torch.dtype
    axis: int | None = None
    group: int | None = None
    zero_point: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values, (level − zero point) · scale, in ``dtype``; never beyond its finite range.

        >>> codes = torch.tensor([-2, 1])
        >>> QuantizedTensor(codes, Grid(4), torch.tensor(0.5), torch.float32).dequantize().tolist()
        [-1.0, 0.5]
        """
        values = self.grid.values(to_rows(self.codes, self.axis, self.group)).double()
        if self.zero_point is not None:
            values = values - self.zero_point
        if self.scale is not None:
            values = values * self.scale.double()
        # the lowest level lies half a step under −max|x|: test_extreme_values_stay_finite
        finite = torch.finfo(self.dtype)
        values = values.clamp(finite.min, finite.max).to(self.dtype)
        return from_rows(values, self.codes.shape, self.axis, self.group)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, such as for a worker: the codes in as few bytes as their levels take."""
        lowest = self.grid.lowest_code
        highest = lowest + self.grid.levels - 1
        fitting = (
            d for d in NARROW if torch.iinfo(d).min <= lowest and highest <= torch.iinfo(d).max
        )
        codes, scale = self.codes.to(next(fitting, self.codes.dtype)), self.scale
        if scale is not None and scale.dtype == POWER_OF_TWO:  # which torch can't pickle
            scale = scale.view(torch.uint8)
        return self.__dict__ | {"codes": codes, "codes_dtype": self.codes.dtype, "scale": scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own, scale = dict(state), state["scale"]
        own["codes"] = own["codes"].to(own.pop("codes_dtype"))
        if scale is not None and scale.dtype == torch.uint8:
            own["scale"] = scale.view(POWER_OF_TWO)
        self.__dict__.update(own)

    @property
    def bits(self) -> int | float:
        """Width of one packed code: whole, or 1.6 where there are three levels."""
        return packing.width(self.grid.levels)

    @property
    def stored_bits(self) -> int:
        """Bits of the packed bytes, and of scales, zero points and a codebook beside them."""
        beside = [self.scale, self.zero_point, self.grid.table if self.grid.stored else None]
        size = packing.packed_bytes(self.codes.numel(), self.grid.levels)
        return 8 * (size + sum(t.numel() * t.element_size() for t in beside if t is not None))

    def pack(self) -> Tensor:
        """The codes as bytes, uint8, in the order of the flattened values (`packing.pack`)."""
        return packing.pack(self.codes.long() - self.grid.lowest_code, self.grid.levels)

    def unpack(self, packed: Tensor) -> "QuantizedTensor":
        """This tensor with the codes that are packed in bytes."""
        codes = packing.unpack(packed, self.grid.levels, self.codes.numel())
        codes = codes.to(self.codes.dtype) + self.grid.lowest_code
        return replace(self, codes=codes.reshape(self.codes.shape))


@dataclass(frozen=True)
class Quantized:
    """What `quantize` makes of a network: tensors and activations by name, on their levels."""

    tensors: dict[str, QuantizedTensor]
    activations: dict[str, QuantizedTensor] = field(default_factory=dict)


def to_rows(values: Tensor, axis: int | None, group: int | None) -> Tensor:
    """The values that share a scale as one row each, (rows, length).

    axis: None for one row of all; or the axis of which each index, a channel, has a row of its own.
    group: instead of a whole row, each so many values of it in turn; the last of a row may be
        fewer, zeros fill it up.
    Errors: ValueError for an axis that the values haven't, or a group below 1 or longer than a row;
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
