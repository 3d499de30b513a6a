"""Which operands of a pass are the same."""

import weakref
from collections.abc import Hashable

from torch import Tensor


class Inputs:
    """Numbers what products meet: the same number where it is the same memory, unchanged since, in
    the same form."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def number(self, operand: Tensor, how: Hashable = None) -> int:
        """That of an operand.

        how: what is made of it (`quantifind.network.meetings.Meeting.how`).
        """
        self._count += 1
        if operand.is_inference():  # which counts no changes
            return self._count
        # a view is a new tensor each time, its base lives as long as the memory
        base = operand if operand._base is None else operand._base
        form = operand.dtype, operand.shape, operand.stride(), operand.data_ptr()
        key = id(base), operand._version, *form, how
        known = self._known.get(key)
        # else another tensor in the place of one that is gone: test_memory_used_anew_is_another
        if known is None or known[0]() is not base:
            known = self._known[key] = weakref.ref(base), self._count
        return known[1]

    def forget(self) -> None:
        """Before another pass: what was met in the last one is met no more."""
        self._known.clear()
