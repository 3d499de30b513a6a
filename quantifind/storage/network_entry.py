"""What an index says of one thing in a file, checked before memory is taken for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantifind.storage.network_writer import DTYPES
from quantifind.tensor.choice import STORAGES
from quantifind.tensor.rotation import SEEDS

# codes that a tensor may have whose bytes don't tell how many
MOST_CODES = 2**31


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


def count(value: Any) -> int:
    """A whole number that is not negative, or ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def shape_of(values: Any) -> tuple[int, ...]:
    """Of such numbers, or ValueError."""
    return tuple(map(count, values))


def check(entry: Entry, tables: Mapping[str, Entry]) -> None:
    """Raise ValueError unless parts belong together: what is decoded is then as large as the shape
    says."""
    facts, shapes = entry.facts, {part: shape for part, (_, shape) in entry.parts.items()}
    levels, offset = count(facts["levels"]), facts.get("offset", 0.0)
    if levels not in range(2, 2**32 + 1) or offset not in (0.0, 0.5):
        raise ValueError(f"a grid of {levels} levels with offset {offset!r}")
    rows = 1
    if (codes := shapes.pop("codes", None)) is not None:
        if (storage := facts.get("storage", "packed")) not in STORAGES:
            raise ValueError(f"storage is {storage!r}: {', '.join(STORAGES)} are known")
        shape = shape_of(facts["shape"])
        if not DTYPES[facts["dtype"]].is_floating_point:
            raise ValueError(f"values of {facts['dtype']}")
        most = 8 * codes[0] if storage == "packed" else MOST_CODES
        if len(codes) != 1 or math.prod(shape) > most:
            raise ValueError(f"{list(codes)} bytes for shape {list(shape)}")
        rows = _rows(shape, facts.get("axis"), facts.get("group"))
        if (rotation := facts.get("rotation")) is not None:
            turned, seed = map(count, rotation)
            if turned >= len(shape) or seed >= SEEDS:
                raise ValueError(f"rotation is {rotation!r}, of shape {list(shape)}")
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
    if axis is not None and type(axis) is not int:
        raise ValueError(f"axis is {axis!r}")
    channels = 1 if axis is None else shape[axis]
    length = math.prod(shape) // channels if channels else 0
    return channels if group is None else channels * -(-length // count(group))
