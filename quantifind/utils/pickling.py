"""Pickles in which tensors that share memory share it when they are read, too."""

import io
from typing import TYPE_CHECKING, Any

import cloudpickle

if TYPE_CHECKING:  # a worker may need no torch: test_processes_share_the_cores
    import torch
    from torch.storage import TypedStorage


def dumps(given: Any) -> bytes:
    """As `cloudpickle.dumps`, with the memory of several tensors once.

    Plain pickling writes it for each tensor, so that views come apart:
    test_views_stay_views_on_a_worker.
    """
    from torch.storage import TypedStorage

    with io.BytesIO() as file:
        _Pickler(file, TypedStorage).dump(given)
        return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, typed_storage: Any) -> None:
        super().__init__(file)
        self.typed_storage = typed_storage
        # of each memory the first object, to which the pickle refers where it meets another
        self.memories: dict[int, TypedStorage] = {}

    def reducer_override(self, given: Any) -> Any:
        if type(given) is self.typed_storage:
            first = self.memories.setdefault(given._untyped_storage._cdata, given)
            if first is not given:
                return _typed, (first, given.dtype)
        return super().reducer_override(given)


def _typed(first: "TypedStorage", dtype: "torch.dtype") -> "TypedStorage":
    return type(first)(wrap_storage=first._untyped_storage, dtype=dtype, _internal=True)
