"""Reads what `quantifind.storage.network_writer` writes, tensor by tensor as they are asked for;
nothing in a file is executed, and what it says is checked before memory is taken."""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from quantifind.storage.network_entry import Entry, check, count, shape_of
from quantifind.storage.network_writer import (
    DTYPES,
    FORMAT,
    SECTIONS,
    VERSION,
    most_unpacked,
)
from quantifind.storage.states import unpack_state
from quantifind.tensor import coding, packing
from quantifind.tensor.qparams import Grid, QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor, values_from
from quantifind.tensor.rotation import Rotation
from quantifind.utils.naming import first_line, naming

# what is read of a header, so that it can't ask for more memory than a network would:
# test_a_bomb_is_refused_before_memory_is_taken
MOST_HEADER = 2**12
# what an index may say beside its sections
KEYS = (
    *("folded", "versions", "model_bytes", "strategy", "judged", "notes", "same", "views", "made"),
    "modules",
)
# values, or bytes, that are read together
STEP = 2**13 * packing.TOGETHER
# what is raised by an index that no `write_network` wrote
_BAD = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
            if unknown := sorted(self.index.keys() - {*SECTIONS, *KEYS}):
                raise ValueError(f"it has {unknown[0][:40]!r}, which is not known")
            entries = self._places()
            self.tables, self.tensors, self.activations, self.others = (
                entries[section] for section in SECTIONS
            )
            end = sum(entry.size for section in entries.values() for entry in section.values())
            self.folded = tuple((module, norm) for module, norm in self.index["folded"])
            _check_texts(dict(self.folded))
            for key in ("same", "views", "notes"):
                _check_texts(self.index.get(key, {}))
            _check_counts(self.index.get("made", {}))
            if any(type(facts) is not dict for facts in self.index.get("modules", {}).values()):
                raise ValueError("modules of other than facts")
        except (*_BAD, RecursionError, zlib.error) as error:
            reason = first_line(error) or type(error).__name__
            raise ValueError(f"its index can't be read ({reason})") from error
        if end != size:
            raise ValueError(f"not whole: its index tells of {end} bytes, and there are {size}")
        counted = (self.tensors, self.activations, self.others)
        self.header_bytes = self.bytes - sum(e.size for one in counted for e in one.values())

    def _places(self) -> dict[str, dict[str, Entry]]:
        found: dict[str, dict[str, Entry]] = {}
        start = self._data
        for section in SECTIONS:
            found[section] = {}
            for name, facts in self.index[section].items():
                parts = {
                    part: (DTYPES[dtype], shape_of(shape))
                    for part, (dtype, *shape) in facts["parts"].items()
                }
                size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts.values())
                entry = found[section][name] = Entry(facts, start, size, parts)
                start += size
                with naming(name):
                    if section in ("tensors", "activations"):
                        check(entry, found["tables"])
        return found

    def _bytes(self, start: int, count: int) -> bytearray:
        self._file.seek(start)
        found = bytearray(count)
        if self._file.readinto(found) != count:
            raise ValueError("truncated")
        return found

    def put(self, name: str, into: Tensor) -> None:
        """Copy the values of a tensor into one of its dtype and shape, contiguous, a few at a time:
        beside it, that takes little memory, but for what is rotated.

        Raises: ValueError as `tensor`; what was copied by then stays.
        """
        with self._reading(name), torch.no_grad():
            entry = self.tensors.get(name) or self.others[name]
            self._check_bytes(entry)
            values, flat, step = self._between(entry), into.view(-1), STEP
            if len(entry.parts.get("table", (None, ()))[1]) == 2:
                # each value has the table of its row beside it
                step = packing.TOGETHER * max(1, STEP // packing.TOGETHER // entry.facts["levels"])
            for first in range(0, len(flat), step):
                last = min(first + step, len(flat))
                flat[first:last] = values(first, last)

    def _between(self, entry: Entry) -> Callable[[int, int], Tensor]:
        """(first, last) → these of the flattened values."""
        if "" in entry.parts:
            return partial(self._some, entry, "")
        if "rotation" in entry.facts:  # whose values are of whole outputs
            turned = self._tensor(entry).dequantize().flatten()
            return lambda first, last: turned[first:last]
        facts, (size,) = entry.facts, entry.parts["codes"][1]
        beside = {part: shape for part, (_, shape) in entry.parts.items() if part != "codes"}
        own = {
            part: self._some(entry, part, 0, math.prod(shape)).reshape(shape)
            for part, shape in beside.items()
        }
        qparams = self._qparams(entry, own)
        shape, dtype = torch.Size(facts["shape"]), DTYPES[facts["dtype"]]
        grid, number, coded = qparams.grid, shape.numel(), facts.get("storage") == "coded"
        read = partial(self._some, entry, "codes")
        whole = coding.decode(read(0, size), grid.levels, shape).reshape(-1) if coded else None
        if not coded:
            packing.check_size(size, grid.levels, number)

        def values(first: int, last: int) -> Tensor:
            codes = (
                packing.unpack_some(read, grid.levels, number, first=first, last=last)
                if whole is None
                else whole[first:last]
            )
            return values_from(first, codes.long() + grid.lowest_code, shape, qparams, dtype)

        return values

    def _some(self, entry: Entry, part: str, first: int, last: int) -> Tensor:
        """Values ``first`` to ``last`` − 1 of a part."""
        start = entry.start
        for own, (dtype, shape) in entry.parts.items():
            if own == part:
                break
            start += math.prod(shape) * dtype.itemsize
        size = dtype.itemsize
        raw = self._bytes(start + first * size, (last - first) * size)
        return torch.from_numpy(np.frombuffer(raw, np.uint8)).view(dtype)

    def _check_bytes(self, entry: Entry) -> None:
        """Raise ValueError unless they are those that were written; they are read in pieces."""
        found = 0
        for start in range(0, entry.size, STEP):
            some = self._bytes(entry.start + start, min(STEP, entry.size - start))
            found = zlib.crc32(some, found)
        if found != entry.facts["crc32"]:
            raise ValueError("it was altered: its bytes are not those that were written")

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
            return self._tensor(self.tensors[name])

    def _tensor(self, entry: Entry) -> QuantizedTensor:
        parts = self._parts("it was", entry)
        shape, dtype = torch.Size(entry.facts["shape"]), DTYPES[entry.facts["dtype"]]
        qparams = self._qparams(entry, parts)
        storage = entry.facts.get("storage", "packed")
        turned = entry.facts.get("rotation")
        rotation = None if turned is None else Rotation(*turned)
        return QuantizedTensor.unpack(parts["codes"], shape, qparams, dtype, storage, rotation)

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

    def layout(self, name: str) -> str:
        """Of the values of any tensor: "strided", "sparse_csr", …."""
        entry = self.others.get(name)
        return "strided" if entry is None else str(entry.facts.get("layout", "strided"))

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
        if not length:
            raise ValueError("it has no header")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if type(metadata["version"]) is not str or int(metadata["version"]) < 1:
            raise ValueError(f"its version is {metadata['version']!r}")
        version = int(metadata["version"])
        ends = {name: facts["data_offsets"] for name, facts in header.items()}
        spans = {n: (8 + length + count(a), count(b - a)) for n, (a, b) in ends.items()}
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


def _check_texts(named: Any) -> None:
    """Raise ValueError unless these are texts by name."""
    if not isinstance(named, dict) or any(type(v) is not str for v in (*named, *named.values())):
        raise ValueError(f"a {type(named).__name__} of other than texts")


def _check_counts(named: Any) -> None:
    """Raise ValueError unless these are whole numbers by name."""
    if not isinstance(named, dict) or any(type(v) is not int for v in named.values()):
        raise ValueError(f"a {type(named).__name__} of other than whole numbers")


def _read_index(packed: bytearray) -> dict[str, Any]:
    inflater, most = zlib.decompressobj(), most_unpacked(len(packed))
    text = inflater.decompress(packed, most)
    if inflater.unconsumed_tail:
        raise ValueError(f"it is longer than {most} bytes")
    return dict(json.loads(text))
