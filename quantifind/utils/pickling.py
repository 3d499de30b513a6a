"""Pickles in which tensors that share memory share it when they are read, too."""

import io
from typing import Any

import cloudpickle
import torch
from torch.storage import TypedStorage, UntypedStorage


def dumps(given: Any) -> bytes:
    """As `cloudpickle.dumps`, with the memory of several tensors once.

    Plain pickling writes it for each tensor, so that views come apart:
    test_views_stay_views_on_a_worker.
    """
    with io.BytesIO() as file:
        _Pickler(file).dump(given)
        return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # one object for each memory, which a pickle refers to where it meets it again
        self.memories: dict[int, UntypedStorage] = {}

    def reducer_override(self, given: Any) -> Any:
        if type(given) is TypedStorage:
            memory = given._untyped_storage
            memory = self.memories.setdefault(memory._cdata, memory)
            return _typed, (memory, given.dtype)
        return super().reducer_override(given)


def _typed(memory: UntypedStorage, dtype: torch.dtype) -> TypedStorage:
    return TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True)
