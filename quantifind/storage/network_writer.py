"""A quantized network in one file, as docs/format.md describes it, written whole or not at all."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantifind.storage.states import parts_of, sparse_facts
from quantifind.tensor.parts import is_strided
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized
from quantifind.utils.naming import naming
from quantifind.utils.whole_files import written_whole

# of files in which nothing is rotated, and of others
FORMAT, PLAIN, VERSION = "quantifind", 1, 2
SECTIONS = ("tables", "tensors", "activations", "others")
_WIDTHS = ("8", "16", "32", "64")
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *(f"{kind}{width}" for kind in ("int", "uint") for width in _WIDTHS),
        *("bool", "float16", "bfloat16", "float32", "float64", "complex32", "complex64"),
        *("complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
        "float8_e8m0fnu",
    )
}


def most_unpacked(packed: int) -> int:
    """Bytes that an index of so many packed ones may have, so that a small file can't ask for more
    memory than a network would: test_a_bomb_is_refused_before_memory_is_taken; real ones are 10 to
    40 times as long."""
    return min(2**26, 2**22 + 128 * packed)


def write_network(
    path: Path | str, quantized: Quantized, others: Mapping[str, Tensor], about: Mapping[str, Any]
) -> int:
    """Write a quantized network; the file gets its name when it is whole.

    others: what is not quantized, by name.
    about: plain values that stand in the index.
    Returns: bytes of the file.
    Raises: ValueError naming a tensor of a kind that can't be written, or the path.
    """
    index: dict[str, Any] = {"folded": [list(pair) for pair in quantized.folded], **about}
    parts: list[Tensor] = []
    entries = _entries(quantized, others)
    for section in SECTIONS:
        index[section] = {}
        for key, (facts, own) in entries[section].items():
            own = {part: tensor.detach().cpu().contiguous() for part, tensor in own.items()}
            check = 0
            for tensor in own.values():
                check = zlib.crc32(_buffer(tensor), check)
            described = {p: [_dtype_name(t.dtype), *t.shape] for p, t in own.items()}
            index[section][key] = {**facts, "parts": described, "crc32": check}
            parts += own.values()
    # asked for, too, where there was no memory to: an older reader knows no such choice
    rotated = '"rotation"' in json.dumps(index)
    text = json.dumps(index, separators=(",", ":")).encode()
    packed = zlib.compress(text, 9)
    if len(text) > most_unpacked(len(packed)):
        # what could not be read is not written: test_what_is_said_of_a_network_is_read_or_refused
        raise ValueError(f"judged takes {len(json.dumps(about.get('judged'))):,} bytes: too many")
    size = sum(part.numel() * part.element_size() for part in parts)
    header = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(VERSION if rotated else PLAIN),
            "index_crc32": str(zlib.crc32(packed)),
        },
        "data": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "index": {
            "dtype": "U8",
            "shape": [len(packed)],
            "data_offsets": [size, size + len(packed)],
        },
    }
    first = json.dumps(header, separators=(",", ":")).encode()
    first += b" " * (-len(first) % 8)
    whole: list[Any] = [len(first).to_bytes(8, "little"), first, *map(_buffer, parts), packed]
    with written_whole(path) as partial, partial.open("wb") as file:
        for some in whole:
            file.write(some)
    return 8 + len(first) + size + len(packed)


def _entries(
    quantized: Quantized, others: Mapping[str, Tensor]
) -> dict[str, dict[str, tuple[dict[str, Any], dict[str, Tensor]]]]:
    """By section and name: facts, and the tensors that are its parts."""
    found: dict[str, Any] = {section: {} for section in SECTIONS}
    tables: dict[bytes, str] = {}

    def put(qparams: QParams) -> tuple[dict[str, Any], dict[str, Tensor]]:
        grid, parts = qparams.grid, {}
        facts: dict[str, Any] = {
            "levels": grid.levels,
            "offset": grid.offset or None,
            "axis": qparams.axis,
        }
        facts["group"] = qparams.group
        if grid.table is not None and not grid.stored:
            # a standard one, which is no tensor's own: each stands once in the file
            key = bytes(_buffer(grid.table.cpu().contiguous()))
            facts["table"] = tables.setdefault(key, str(len(tables)))
            found["tables"][facts["table"]] = {}, {"": grid.table}
        own = grid.table if grid.stored else None
        for part, tensor in zip(
            ("scale", "zero_point", "table"), (qparams.scale, qparams.zero_point, own), strict=True
        ):
            if tensor is not None:
                parts[part] = tensor
        return {key: value for key, value in facts.items() if value is not None}, parts

    for name, tensor in quantized.tensors.items():
        facts, parts = put(tensor.qparams)
        facts |= {"shape": list(tensor.codes.shape), "dtype": _dtype_name(tensor.dtype)}
        if tensor.storage != "packed":
            facts["storage"] = tensor.storage
        if (rotation := tensor.rotation) is not None:
            facts["rotation"] = [rotation.axis, rotation.seed]
        found["tensors"][name] = facts, {"codes": tensor.pack(), **parts}
    for name, qparams in quantized.activations.items():
        found["activations"][name] = put(qparams)
    for name, value in others.items():
        with naming(name):
            own_parts = parts_of(value)
            for part in own_parts.values():
                _dtype_name(part.dtype)
                if not is_strided(part):
                    raise ValueError(f"a {type(part).__name__} can't be written")
        sparse = {} if value.layout == torch.strided else sparse_facts(value)
        found["others"][name] = sparse, own_parts
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"a tensor of {dtype} can't be written")
    return name


def checksum(tensor: Tensor) -> int:
    """Of the bytes of a strided tensor's values, in order."""
    return zlib.crc32(_buffer(tensor.detach().cpu().contiguous()))


def _buffer(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
