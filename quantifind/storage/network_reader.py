"""Reads what `quantifind.storage.network_writer` writes, tensor by tensor as they are asked for;
nothing in a file is executed, and what it says is checked before memory is taken."""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from quantifind.storage.network_writer import DTYPES, FORMAT, SECTIONS, VERSION
from quantifind.storage.states import unpack_state
from quantifind.tensor.qparams import Grid, QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.naming import first_line, naming

# what is read of a header, so that it can't ask for more memory than a network would:
# test_a_bomb_is_refused_before_memory_is_taken
MOST_HEADER, MOST_INDEX = 2**12, 2**26
# how codes are bytes, and how many codes a tensor may have whose bytes don't tell
STORAGES, MOST_CODES = ("packed", "coded"), 2**31
# what is raised by an index that no `write_network` wrote
_BAD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Entry:
    """Where something lies in the file.

    facts: of the index.
    start, size: of its parts, one after another, in bytes.
    parts: by name, dtype and shape.
    """

    facts: Mapping[str, Any]
    start: int
    size: int
    parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class NetworkFile:
    """What `write_network` wrote, open: each tensor is read, checked and decoded when asked for.

    index: all that is said of it, plain values.
    bytes, header_bytes: of the file, and of these what is no tensor's.
    Raises: ValueError naming the file that can't be read, isn't whole, or is of a later version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise ValueError(f"{path}: can't be read ({error.strerror})") from error
        try:
            with naming(str(path)):
                self._open()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "NetworkFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _open(self) -> None:
        self.bytes = os.fstat(self._file.fileno()).st_size
        metadata, spans = _read_header(self._file, self.bytes)
        (self._data, size), (place, count) = spans["data"], spans["index"]
        packed = self._bytes(place, count)
        if str(zlib.crc32(packed)) != metadata.get("index_crc32"):
            raise ValueError("altered: its index is not that which was written")
        try:
            self.index = _read_index(packed)
            entries = self._places()
            self.tables, self.tensors, self.activations, self.others = (
                entries[section] for section in SECTIONS
            )
            end = sum(entry.size for section in entries.values() for entry in section.values())
        except (*_BAD, RecursionError, zlib.error) as error:
            reason = first_line(error) or type(error).__name__
            raise ValueError(f"its index can't be read ({reason})") from error
        if end != size:
            raise ValueError(f"not whole: its index tells of {end} bytes, and there are {size}")
        self.folded = tuple((module, norm) for module, norm in self.index["folded"])
        counted = (self.tensors, self.activations, self.others)
        self.header_bytes = self.bytes - sum(e.size for one in counted for e in one.values())

    def _places(self) -> dict[str, dict[str, Entry]]:
        found: dict[str, dict[str, Entry]] = {}
        start = self._data
        for section in SECTIONS:
            found[section] = {}
            for name, facts in self.index[section].items():
                parts = {
                    part: (DTYPES[dtype], _shape(shape))
                    for part, (dtype, *shape) in facts["parts"].items()
                }
                size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts.values())
                entry = found[section][name] = Entry(facts, start, size, parts)
                start += size
                with naming(name):
                    if section in ("tensors", "activations"):
                        _check(entry, found["tables"])
        return found

    def _bytes(self, start: int, count: int) -> bytearray:
        self._file.seek(start)
        found = bytearray(count)
        if self._file.readinto(found) != count:
            raise ValueError("truncated")
        return found

    def _parts(self, what: str, entry: Entry) -> dict[str, Tensor]:
        raw = self._bytes(entry.start, entry.size)
        if zlib.crc32(raw) != entry.facts["crc32"]:
            raise ValueError(f"{what} altered: its bytes are not those that were written")
        found, place, data = {}, 0, torch.from_numpy(np.frombuffer(raw, np.uint8))
        for part, (dtype, shape) in entry.parts.items():
            size = math.prod(shape) * dtype.itemsize
            # a copy, since other types don't begin at any byte
            own = data[place : place + size]
            own = own if dtype == torch.uint8 else own.clone()
            found[part] = (
                own.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
            )
            place += size
        return found

    def _qparams(self, entry: Entry, parts: Mapping[str, Tensor]) -> QParams:
        facts, table = entry.facts, parts.get("table")
        if (standard := facts.get("table")) is not None:
            table = self._parts("a table is", self.tables[standard])[""]
        grid = Grid(facts["levels"], facts.get("offset", 0.0), table, "table" in parts)
        scale, zero_point = parts.get("scale"), parts.get("zero_point")
        return QParams(grid, scale, zero_point, facts.get("axis"), facts.get("group"))

    def tensor(self, name: str) -> QuantizedTensor:
        """A quantized tensor: its codes, and what they stand for.

        Raises: ValueError naming the file and the tensor, where it was altered.
        """
        with self._reading(name):
            entry = self.tensors[name]
            parts = self._parts("it was", entry)
            shape, dtype = torch.Size(entry.facts["shape"]), DTYPES[entry.facts["dtype"]]
            qparams = self._qparams(entry, parts)
            storage = entry.facts.get("storage", "packed")
            return QuantizedTensor.unpack(parts["codes"], shape, qparams, dtype, storage)

    def activation(self, name: str) -> QParams:
        """The parameters of an activation."""
        with self._reading(f"activations of {name}"):
            entry = self.activations[name]
            return self._qparams(entry, self._parts("they were", entry))

    def values(self, name: str) -> Tensor:
        """The values of any tensor, quantized or not."""
        if name in self.tensors:
            tensor = self.tensor(name)
            with self._reading(name):
                return tensor.dequantize()
        with self._reading(name):
            entry = self.others[name]
            parts = self._parts("it was", entry)
            if "layout" not in entry.facts:
                return parts[""]
            own = {f"{name}/{part}": values for part, values in parts.items()}
            return unpack_state(own, {name: entry.facts}, {})[name]

    def described(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of the values of any tensor, of which none is read."""
        if name in self.tensors:
            facts = self.tensors[name].facts
            return DTYPES[facts["dtype"]], tuple(facts["shape"])
        dtype, shape = list(self.others[name].parts.values())[-1]
        return dtype, tuple(self.others[name].facts.get("shape", shape))

    def quantized(self) -> Quantized:
        """All of it, as `quantifind.quantize.quantize` gave it."""
        return Quantized(
            {name: self.tensor(name) for name in self.tensors},
            {name: self.activation(name) for name in self.activations},
            self.folded,
            self.index.get("notes", {}),
        )

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        with naming(f"{self.path}: {name}"):
            try:
                yield
            except _BAD as error:
                raise ValueError(first_line(error)) from error


def _read_header(file: BinaryIO, size: int) -> tuple[Mapping[str, str], dict[str, tuple[int, int]]]:
    """The texts of a header, and where its tensors lie: their first byte, and how many.

    size: of the file, in bytes.
    """
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > MOST_HEADER:
            raise ValueError(f"its header would be {length} bytes, and has at most {MOST_HEADER}")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}")
        version = int(metadata["version"])
        ends = {name: facts["data_offsets"] for name, facts in header.items()}
        spans = {n: (8 + length + _count(a), _count(b - a)) for n, (a, b) in ends.items()}
        _ = spans["data"], spans["index"]
    except (*_BAD, RecursionError) as error:
        raise ValueError(f"no file that quantifind.save wrote ({first_line(error)})") from error
    if version > VERSION:
        raise ValueError(
            f"version {version} of the format, of which this quantifind reads up to {VERSION}: "
            "a later quantifind reads it"
        )
    if (end := max(start + count for start, count in spans.values())) != size:
        raise ValueError(f"truncated or altered: {size} bytes, its header tells of {end}")
    return metadata, spans


def _read_index(packed: bytearray) -> dict[str, Any]:
    inflater = zlib.decompressobj()
    text = inflater.decompress(packed, MOST_INDEX)
    if inflater.unconsumed_tail:
        raise ValueError(f"it is longer than {MOST_INDEX} bytes")
    return dict(json.loads(text))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _shape(values: Any) -> tuple[int, ...]:
    return tuple(map(_count, values))


def _check(entry: Entry, tables: Mapping[str, Entry]) -> None:
    """Raise ValueError unless parts belong together: what is decoded is then as large as the shape
    says."""
    facts, shapes = entry.facts, {part: shape for part, (_, shape) in entry.parts.items()}
    levels, offset = _count(facts["levels"]), facts.get("offset", 0.0)
    if levels not in range(2, 2**32 + 1) or offset not in (0.0, 0.5):
        raise ValueError(f"a grid of {levels} levels with offset {offset!r}")
    rows = 1
    if (codes := shapes.pop("codes", None)) is not None:
        if (storage := facts.get("storage", "packed")) not in STORAGES:
            raise ValueError(f"storage is {storage!r}: {', '.join(STORAGES)} are known")
        shape = _shape(facts["shape"])
        if not DTYPES[facts["dtype"]].is_floating_point:
            raise ValueError(f"values of {facts['dtype']}")
        most = 8 * codes[0] if storage == "packed" else MOST_CODES
        if len(codes) != 1 or math.prod(shape) > most:
            raise ValueError(f"{list(codes)} bytes for shape {list(shape)}")
        rows = _rows(shape, facts.get("axis"), facts.get("group"))
    elif "shape" in facts:
        raise ValueError("it has no codes")
    allowed = {"scale": [(), (rows, 1)], "zero_point": [(), (rows, 1)]}
    allowed["table"] = [(levels,), (rows, levels)]
    for part, shape in shapes.items():
        if shape not in allowed[part]:
            raise ValueError(f"{part} of shape {list(shape)} beside {rows} rows")
    if "table" in facts and tables[facts["table"]].parts[""][1] != (levels,):
        raise ValueError(f"a table of other than {levels} levels")


def _rows(shape: tuple[int, ...], axis: Any, group: Any) -> int:
    """As many as `quantifind.tensor.qparams.to_rows` makes."""
    channels = 1 if axis is None else shape[axis]
    length = math.prod(shape) // channels if channels else 0
    return channels if group is None else channels * -(-length // _count(group))
