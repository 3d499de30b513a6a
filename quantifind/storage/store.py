"""A folder of measured results by key: nothing is measured twice, and a kill loses nothing."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantifind.storage.padding import unpadded
from quantifind.tensor.parts import is_strided, parts
from quantifind.utils.batches import Batch, rows_of, tensors_of, texts_of
from quantifind.utils.whole_files import written_whole

Entry = tuple[dict[str, Tensor], Any]


class Store:
    """Tensors and plain values by key, in memory, and in a folder where one is given."""

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.entries: dict[str, Entry] = {}

    def get(self, key: str) -> Entry | None:
        """What was put under ``key``, or None; a file that can't be read counts as none."""
        if key not in self.entries and self.folder is not None and self._path(key).exists():
            try:
                with safe_open(self._path(key), "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    self.entries[key] = tensors, json.loads(file.metadata()["values"])
            except (SafetensorError, ValueError, KeyError, TypeError):
                return None  # is measured anew: test_a_damaged_entry_is_measured_again
        return self.entries.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor], values: Any = None) -> None:
        """Keep tensors and plain values; the file gets its name when it is whole."""
        # copies, since safetensors refuses tensors that share memory, and callers may go on with
        # theirs: test_what_was_put_stays_when_the_tensor_changes
        whole = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        self.entries[key] = whole, values
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self._path(key)) as partial:
                save_file(whole, partial, {"values": json.dumps(values)})

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{fingerprint(key)[:24]}.safetensors"


def fingerprint(*parts: Any) -> str:
    """A digest of plain values, tensors, tensors by name, and networks: their tensors, and what
    else is in their state."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            # what an extra state may do to the passes: test_extra_state_is_in_a_fingerprint
            others = {k: v for k, v in part.state_dict().items() if not isinstance(v, Tensor)}
            if others:
                digest.update(repr(others).encode())
            part = dict([*part.named_parameters(), *part.named_buffers()])
        if isinstance(part, dict) and any(isinstance(value, Tensor) for value in part.values()):
            for name, tensor in part.items():
                digest.update(name.encode())
                digest.update(_bytes(tensor))
        elif isinstance(part, Tensor):
            digest.update(_bytes(part))
        else:
            digest.update(json.dumps(part, default=repr, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def fingerprint_of_examples(batches: Iterable[Batch]) -> str:
    """A digest of examples, whatever their order and the batches that they come in; and, where
    these are not alike, whatever they are padded to (`quantifind.storage.padding.unpadded`)."""
    digests: list[bytes] = []
    apart: list[list[Tensor]] = []
    for batch in batches:
        tensors, rows = [t.detach().cpu() for t in tensors_of(batch.data)], rows_of(batch.data)
        if rows is None or not batch.apart:
            whole = fingerprint(*tensors, *texts_of(batch.data))
            digests.append(bytes.fromhex(whole))
        else:
            apart.append(tensors)
    for example in unpadded(apart):
        digest = hashlib.sha256()
        for tensor in example:
            digest.update(_bytes(tensor))
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
    if not is_strided(tensor):
        inside = b"".join(map(_bytes, parts(tensor)))
        return f"{tensor.dtype}{tensor.layout}".encode() + inside
    described = f"{tensor.dtype}{list(tensor.shape)}".encode()
    if not tensor.numel():
        return described
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return described + values.numpy().tobytes()
