"""Quantized tensors: codes and their parameters; of a network, one by name for each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quantifind.tensor import coding, packing
from quantifind.tensor.qparams import QParams, from_rows, row_of, to_rows
from quantifind.tensor.rotation import Rotation

# what codes are kept in, the first that holds all of a grid's
NARROW = (torch.int8, torch.uint8, torch.int16)
# values that are dequantized together
AT_A_TIME = 2**18


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor on the levels of a grid.

    codes: whole numbers, of the shape of the values.
    qparams: what turns them into values.
    dtype: of the values.
    storage: of the codes, "packed", at a fixed width, or "coded", by how frequent they are.
    rotation: what the values were mixed by before they were put on the grid, and are mixed back by.
    """

    codes: Tensor
    qparams: QParams
    dtype: torch.dtype
    storage: str = "packed"
    rotation: Rotation | None = None

    def __repr__(self) -> str:
        """Without the codes, which are many."""
        return f"QuantizedTensor: {list(self.codes.shape)} at {self.bits:g} bits"

    def dequantize(self) -> Tensor:
        """The values, (level − zero point) · scale, in ``dtype``; never beyond its finite range.

        >>> from quantifind.tensor.qparams import Grid
        >>> qparams = QParams(Grid(4), torch.tensor(0.5))
        >>> QuantizedTensor(torch.tensor([-2, 1]), qparams, torch.float32).dequantize().tolist()
        [-1.0, 0.5]
        """
        if self.rotation is not None:
            wide = torch.promote_types(self.dtype, torch.float32)
            mixed = replace(self, rotation=None, dtype=wide).dequantize()
            return self.rotation.undone(mixed, self.dtype)
        axis, group = self.qparams.axis, self.qparams.group
        rows = to_rows(self.codes, axis, group)
        if rows.numel() <= AT_A_TIME:
            values = self._values(rows, self.qparams)
        else:
            # few float64 at a time: test_large_tensors_are_dequantized_in_little_memory
            values = torch.empty(rows.shape, dtype=self.dtype, device=rows.device)
            for some in _blocks(*rows.shape):
                values[some] = self._values(rows[some], self.qparams.of_rows(some[0]))
        return from_rows(values, self.codes.shape, axis, group)

    def _values(self, rows: Tensor, qparams: QParams) -> Tensor:
        return values_of(rows, qparams, self.dtype)

    def narrowed(self) -> "QuantizedTensor":
        """With the codes in as few bytes as their levels take."""
        grid = self.qparams.grid
        fitting = (
            dtype
            for dtype in NARROW
            if torch.iinfo(dtype).min <= grid.lowest_code
            and grid.highest_code <= torch.iinfo(dtype).max
        )
        narrow = replace(self, codes=self.codes.to(next(fitting, self.codes.dtype)))
        if "stored_bits" in self.__dict__:
            narrow.__dict__["stored_bits"] = self.stored_bits
        return narrow

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, such as for a worker."""
        return {each.name: getattr(self.narrowed(), each.name) for each in fields(self)}

    @property
    def bits(self) -> int | float:
        """Width of one packed code: whole, or 1.6 where there are three levels."""
        return self.qparams.bits

    @cached_property
    def stored_bits(self) -> int:
        """Bits of the bytes of the codes, and of scales, zero points and a codebook beside them."""
        if self.storage == "coded":
            size = len(self.pack())
        else:
            size = packing.packed_bytes(self.codes.numel(), self.qparams.grid.levels)
        return 8 * size + self.qparams.stored_bits

    def pack(self) -> Tensor:
        """The codes as bytes, uint8, in the order of the flattened values: `packing.pack`, or
        `coding.encode`."""
        grid = self.qparams.grid
        put = coding.encode if self.storage == "coded" else packing.pack
        return put(self.codes.long() - grid.lowest_code, grid.levels)

    @classmethod
    def unpack(
        cls,
        packed: Tensor,
        shape: torch.Size,
        qparams: QParams,
        dtype: torch.dtype,
        storage: str = "packed",
        rotation: Rotation | None = None,
    ) -> "QuantizedTensor":
        """The tensor of a shape whose codes `pack` made bytes of.

        Raises: ValueError for bytes that it can't have made.
        """
        grid = qparams.grid
        if storage == "coded":
            codes = coding.decode(packed, grid.levels, shape)
        else:
            codes = packing.unpack(packed, grid.levels, shape.numel()).reshape(shape)
        # what fits in a byte needs no more to become less
        codes = codes.int() if codes.dtype == torch.uint8 else codes.long()
        tensor = cls(codes.add_(grid.lowest_code).int(), qparams, dtype, storage, rotation)
        # what is known need not be coded again
        tensor.__dict__["stored_bits"] = 8 * len(packed) + qparams.stored_bits
        return tensor


def values_of(rows: Tensor, qparams: QParams, dtype: torch.dtype) -> Tensor:
    """The values of codes, (rows, length), never beyond the finite range of their dtype."""
    # the lowest level lies half a step under −max|x|: test_extreme_values_stay_finite
    finite = torch.finfo(dtype)
    return qparams.values(rows).clamp(finite.min, finite.max).to(dtype)


def values_from(
    first: int, codes: Tensor, shape: torch.Size, qparams: QParams, dtype: torch.dtype
) -> Tensor:
    """The values of some codes that follow each other among the flattened ones of a shape.

    first: the place of the first.
    codes: whole numbers, (number,).
    """
    axis, group = qparams.axis, qparams.group
    if axis is not None or group is not None:
        places = torch.arange(first, first + len(codes), device=codes.device)
        qparams = qparams.of_rows(row_of(places, shape, axis, group))
    return values_of(codes.unsqueeze(1), qparams, dtype).flatten()


def _blocks(rows: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Of rows, some at a time; or of each row a part."""
    high, wide = max(1, AT_A_TIME // length), min(length, AT_A_TIME)
    for row in range(0, rows, high):
        for column in range(0, length, wide):
            yield slice(row, row + high), slice(column, column + wide)


@dataclass(frozen=True)
class Quantized:
    """What has become of a network: tensors, and the parameters of activations, by name.

    folded: pairs of names (module, norm), of norms folded into what is before them first of all.
    notes: by tensor, in words, what was done less well than asked for, such as for want of memory;
        and how many inputs no calibration example has.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    activations: dict[str, QParams] = field(default_factory=dict)
    folded: tuple[tuple[str, str], ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Without the codes, which are many."""
        values = sum(tensor.codes.numel() for tensor in self.tensors.values())
        inputs = f", {len(self.activations)} activations" if self.activations else ""
        return f"Quantized: {len(self.tensors)} tensors, {values:,} values{inputs}"

    def stored(self, storage: str) -> "Quantized":
        """With all codes packed, or all coded."""
        tensors = {name: replace(tensor, storage=storage) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def with_scales(self, scales: Mapping[str, Tensor]) -> "Quantized":
        """With other scales, of the same shape and dtype, of the tensors named."""
        other = {
            name: replace(tensor, qparams=replace(tensor.qparams, scale=scales[name]))
            for name, tensor in self.tensors.items()
            if name in scales
        }
        return replace(self, tensors=self.tensors | other)
