"""Codes entropy coded: what is frequent costs little (asymmetric numeral systems, arXiv:1311.2540,
by the constriction package), with tables that follow from the codes before and are not stored."""

from binascii import crc_hqx
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from constriction import stream
from torch import Tensor

from quantifind.tensor import packing

# the first byte of a stream: how the codes follow. Packed, as `packing.pack`; or coded, of a matrix
# (outputs, inputs) one output after another, or one input after another
PACKED, BY_OUTPUTS, BY_INPUTS = 0, 1, 2
# how far from the most frequent code others may lie to be coded
FARTHEST = 2**12
# columns whose codes so far are this many times as far from the most frequent one as all are on
# average share a table
CLASSES = np.array([0.1, 0.25, 0.5, 0.7, 0.9, 1.1, 1.4, 2.0])
# a table begins as if so many codes had been as in all columns, and these as by the first byte
BORROWED = 8
# by the same tables follow an eighth of the rows there are before, and codes as many as LEAST
GROWTH, LEAST = 8, 128
DAMAGED = "the coded stream is damaged"


def encode(codes: Tensor, levels: int) -> Tensor:
    """Whole numbers 0 to levels − 1, of any shape → bytes, uint8: the shortest way there is, with a
    byte that says which, so at most one more than packed.

    >>> len(encode(torch.zeros(1000, 1000, dtype=torch.int64), 256))
    7
    """
    packed = packing.pack(codes, levels).cpu().numpy().tobytes()
    found, flat = [bytes([PACKED]) + packed], codes.detach().cpu().numpy()
    if flat.size and int(flat.max()) - int(flat.min()) <= FARTHEST:
        for way in (BY_OUTPUTS, BY_INPUTS):
            matrix = flat.reshape(_sides(codes.shape))
            body = _coded(np.ascontiguousarray(matrix if way == BY_OUTPUTS else matrix.T))
            check = crc_hqx(body, _seed(way, codes.shape, levels))
            found.append(bytes([way]) + check.to_bytes(2, "little") + body)
    return torch.frombuffer(bytearray(min(found, key=len)), dtype=torch.uint8)


def decode(coded: Tensor, levels: int, shape: torch.Size) -> Tensor:
    """The codes of a shape, of what `encode` made: whole numbers of any dtype.

    Raises: ValueError for what it can't have made: by its length, its check, or what it says.
    """
    whole = coded.cpu().numpy().tobytes()
    way, body = (whole[0], whole[3:]) if whole else (PACKED, b"")
    if way == PACKED and whole:
        return packing.unpack(coded[1:].cpu(), levels, shape.numel()).reshape(shape)
    if way not in (BY_OUTPUTS, BY_INPUTS) or not body:
        raise ValueError(f"{DAMAGED}: {len(whole)} bytes, the first {way}")
    # before anything of that shape is made: test_a_damaged_stream_is_refused
    if crc_hqx(body, _seed(way, shape, levels)) != int.from_bytes(whole[1:3], "little"):
        raise ValueError(
            f"{DAMAGED}: {len(whole)} bytes are not those of {list(shape)} codes of {levels} levels"
        )
    rows, columns = _sides(shape)
    if way == BY_OUTPUTS:
        matrix = _decoded(body, (rows, columns), levels)
    else:
        matrix = np.ascontiguousarray(_decoded(body, (columns, rows), levels).T)
    return torch.from_numpy(matrix).reshape(shape)


def _seed(way: int, shape: torch.Size, levels: int) -> int:
    """What a stream is of counts in its check as if it stood in it."""
    return crc_hqx(repr((way, *shape, levels)).encode(), 0)


def _sides(shape: torch.Size) -> tuple[int, int]:
    """Outputs and inputs of codes of a shape."""
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (shape.numel(), 1)


@dataclass(frozen=True)
class _Header:
    """What tables begin with.

    mode: the most frequent code.
    below, above: how far the others reach.
    fall: in 1/256, how much rarer each code is than the one nearer to it, to begin with.
    """

    mode: int
    below: int
    above: int
    fall: int

    @classmethod
    def of(cls, matrix: np.ndarray) -> "_Header":
        lowest = int(matrix.min())
        counts = np.bincount((matrix - lowest).ravel())
        mode = int(counts.argmax())
        far = counts @ np.abs(np.arange(len(counts)) - mode) / matrix.size
        # of a two-sided geometric distribution far = 2 f / (1 − f²)
        fall = far / (1 + np.sqrt(1 + far**2))
        fall = int(np.clip(np.round(256 * fall), 1, 255))
        return cls(mode + lowest, mode, len(counts) - 1 - mode, fall)

    def write(self) -> bytes:
        numbers = (self.mode, self.below, self.above)
        return b"".join(map(_written, numbers)) + bytes([self.fall])

    @classmethod
    def read(cls, body: bytes, levels: int) -> "tuple[_Header, bytes]":
        numbers = []
        for _ in range(3):
            number, body = _read(body)
            numbers.append(number)
        mode, below, above = numbers
        reach = below <= mode and mode + above < levels and below + above <= FARTHEST
        if not reach or not body or not body[0]:
            raise ValueError(f"{DAMAGED}: no table has codes {mode} − {below} to {mode} + {above}")
        return cls(mode, below, above, body[0]), body[1:]

    @property
    def lowest(self) -> int:
        return self.mode - self.below

    @property
    def range(self) -> int:
        """How many codes there are from the lowest to the highest."""
        return self.below + 1 + self.above

    @property
    def weights(self) -> np.ndarray:
        """How frequent codes are held to be before any is known, (range,)."""
        farthest = max(self.below, self.above)
        falling = np.cumprod(np.append(1.0, np.full(farthest, self.fall / 256)))
        falling = np.maximum(falling, 2.0**-20)
        return np.concatenate([falling[self.below : 0 : -1], falling[: self.above + 1]])


def classes(distance: np.ndarray, rows: int) -> np.ndarray:
    """Which of the classes of columns each is in, by how far the codes of its rows are from the
    most frequent one, all together."""
    mean = int(distance.sum()) / len(distance)
    # as if one more row had been as all are on average
    more = mean / max(rows, 1) or 1.0
    return np.searchsorted(CLASSES, (distance + more) / (mean + more))


class _Tables:
    """Tables of the codes to come, by those before: what both sides know. Whole numbers, sums,
    products and quotients alone, which are the same everywhere."""

    def __init__(self, header: _Header, columns: int) -> None:
        self.away = np.abs(np.arange(-header.below, header.above + 1))
        self.counts = np.zeros((len(CLASSES) + 1, len(self.away)), dtype=np.int64)
        self.distance = np.zeros(columns, dtype=np.int64)
        weights = header.weights
        self.start = weights * (BORROWED / weights.sum())

    def steps(self, rows: int) -> Iterator[tuple[slice, list[tuple[int, np.ndarray]]]]:
        """Rows that come next, and each class there is with its columns."""
        start = 0
        while start < rows:
            least = -(-LEAST // len(self.distance))
            stop = min(rows, start + max(least, start // GROWTH))
            yield slice(start, stop), self._classes(start)
            start = stop

    def _classes(self, rows: int) -> list[tuple[int, np.ndarray]]:
        which = classes(self.distance, rows)
        order = which.argsort(kind="stable")
        ends = np.bincount(which, minlength=len(CLASSES) + 1).cumsum()
        parts = np.split(order, ends[:-1])
        return [(which, part) for which, part in enumerate(parts) if len(part)]

    def model(self, which: int) -> Any:
        """The table of a class."""
        everything = self.counts.sum(0)
        total = int(everything.sum())
        shared = (everything + self.start) * (BORROWED / (total + BORROWED))
        return stream.model.Categorical(self.counts[which] + shared, perfect=False)

    def learn(self, found: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Classes with their columns, and what codes (rows, columns) they had."""
        for which, columns, codes in found:
            self.counts[which] += np.bincount(codes.ravel(), minlength=len(self.away))
            self.distance[columns] += self.away[codes].sum(0)


def _coded(matrix: np.ndarray) -> bytes:
    """Header and words of codes: rows follow one another, tables tell columns apart."""
    header = _Header.of(matrix)
    if header.range == 1:
        return header.write()
    codes = (matrix - header.lowest).astype(np.int32)
    tables, pieces = _Tables(header, codes.shape[1]), []
    for rows, parts in tables.steps(len(codes)):
        found = [(which, columns, codes[rows].take(columns, 1)) for which, columns in parts]
        pieces += [(some.ravel(), tables.model(which)) for which, _, some in found]
        tables.learn(found)
    coder = stream.stack.AnsCoder()
    for symbols, model in reversed(pieces):
        coder.encode_reverse(symbols, model)
    # the last word is not 0, and zeros at its end are known
    return header.write() + coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def _decoded(body: bytes, shape: tuple[int, int], levels: int) -> np.ndarray:
    header, words = _Header.read(body, levels)
    if header.range == 1:
        if words:
            raise ValueError(f"{DAMAGED}: {len(words)} bytes follow codes that are all the same")
        return np.full(shape, header.mode, dtype=np.int64)
    words += bytes(-len(words) % 4)
    coder = stream.stack.AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    codes, tables = np.empty(shape, dtype=np.int32), _Tables(header, shape[1])
    for rows, parts in tables.steps(len(codes)):
        found = []
        for which, columns in parts:
            size = rows.stop - rows.start, len(columns)
            some = coder.decode(tables.model(which), size[0] * size[1]).reshape(size)
            codes[rows, columns] = some
            found.append((which, columns, some))
        tables.learn(found)
    if not coder.is_empty():
        raise ValueError(f"{DAMAGED}: it is longer than its codes")
    # of 32 bits the highest are beyond int32: test_extremes_come_back
    return codes.astype(np.int64) + header.lowest


def _written(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    found = []
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _read(body: bytes) -> tuple[int, bytes]:
    number = 0
    for place, byte in enumerate(body[:5]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, body[place + 1 :]
    raise ValueError(f"{DAMAGED}: a number in it has no end")
