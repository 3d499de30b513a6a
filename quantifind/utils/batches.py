"""Batches of any kind: what a network takes of one, what its criterion, and how several are one."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from quantifind.utils.devices import device_of
from quantifind.utils.forwards import DefaultForward, by_name

Forward = Callable[[nn.Module, Any], Any]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a loader gave, and how a network takes it.

    data: a tree of tensors and other values.
    forward: (model, data) → the outputs, or a tuple of what the criterion gets: outputs, targets.
    """

    data: Any
    forward: Forward

    def run(self, model: nn.Module) -> tuple[Any, ...]:
        """What the criterion gets: outputs, then targets, of which there may be none."""
        made = self.forward(model, moved(self.data, device_of(model)))
        return made if isinstance(made, tuple) else (made,)

    def __len__(self) -> int:
        """Its examples, where each of its tensors has a row for each; else 1, taken as one."""
        return rows_of(self.data) or 1

    @property
    def apart(self) -> bool:
        """Whether some of its examples can be taken: each tensor has a row for each, and no list or
        array of other things has (test_what_stands_beside_tensors_is_not_cut)."""
        count = rows_of(self.data)
        return count is not None and not any(
            _length(part) == count for part in _leaves(self.data, _holds_no_tensor)
        )

    def __getitem__(self, rows: Any) -> "Batch":
        """Some of its examples, where they are `apart`."""
        return Batch(
            with_tensors(lambda t: t[rows] if isinstance(t, Tensor) else t, self.data), self.forward
        )

    def clone(self) -> "Batch":
        """In memory of its own."""
        return Batch(copied(self.data), self.forward)

    def __str__(self) -> str:
        return f"a batch of {_shapes(self.data)}"


def batches_of(
    loader: Iterable[Any], model: nn.Module, criterion: Any = None, forward: Forward | None = None
) -> Iterator[Batch]:
    """The batches of a loader; what is a `Batch` already stays as it is.

    criterion: what they are judged by, as `DefaultForward` takes it.
    forward: (model, batch) → what the criterion gets; by default a `DefaultForward`.
    """
    if isinstance(loader, Tensor):
        # its rows, single examples, would pass for batches
        raise ValueError(
            f"a loader is a tensor of shape {list(loader.shape)}: a list of batches is needed"
        )
    if isinstance(loader, Batch):
        raise ValueError("a loader is a single batch: a list of batches is needed")
    given = DefaultForward(model, criterion) if forward is None else forward
    for data in loader:
        yield data if isinstance(data, Batch) else Batch(data, given)


def as_batch(data: Any, model: nn.Module) -> Batch:
    """A `Batch`, or what `DefaultForward` takes, as one."""
    return data if isinstance(data, Batch) else Batch(data, DefaultForward(model))


def kept(batches: Iterable[Batch]) -> list[Batch]:
    """All of them that have an example, in memory of their own, since a loader may use its memory
    again (test_a_loader_may_use_its_memory_again)."""
    return [batch.clone() for batch in batches if rows_of(batch.data) != 0]


def regrouped(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same examples, so many at a time; batches that are not alike stay as they are."""
    whole = joined(batches)
    if whole is None:
        return list(batches)
    return [whole[first : first + size] for first in range(0, len(whole), size)]


def joined(batches: Sequence[Batch]) -> Batch | None:
    """One batch of all examples; None where their tensors are not alike, or have not one row an
    example."""
    if not batches or not all(batch.apart for batch in batches):
        return None
    try:
        return Batch(with_tensors(_joined, *(batch.data for batch in batches)), batches[0].forward)
    except (_UnlikeError, ValueError, LookupError, TypeError, AttributeError):
        return None


def copied(data: Any) -> Any:
    """The tree with tensors in memory of their own."""
    return with_tensors(lambda t: t.clone() if isinstance(t, Tensor) else _packed_copy(t), data)


def _packed_copy(leaf: Any) -> Any:
    return leaf._replace(data=leaf.data.clone()) if isinstance(leaf, PackedSequence) else leaf


def rows_of(data: Any) -> int | None:
    """How many rows each tensor of a tree has; None where they differ or there is no tensor."""
    sizes = {_rows(leaf) for leaf in _leaves(data)} - {-1}
    return sizes.pop() if len(sizes) == 1 else None


def moved(data: Any, device: torch.device) -> Any:
    """The tree with its tensors on a device, without waiting for it
    (test_no_batch_waits_for_the_device)."""

    def move(leaf: Any) -> Any:
        known = isinstance(leaf, Tensor | PackedSequence)
        return leaf.to(device, non_blocking=True) if known else leaf

    return with_tensors(move, data)


def tensors_of(data: Any) -> list[Tensor]:
    """The tensors of a tree, in its order; of a packed sequence its data."""
    return [
        leaf.data if isinstance(leaf, PackedSequence) else leaf
        for leaf in _leaves(data)
        if isinstance(leaf, Tensor | PackedSequence)
    ]


def texts_of(data: Any) -> list[Any]:
    """The texts and numbers of a tree, in its order."""
    return [leaf for leaf in _leaves(data) if isinstance(leaf, str | bytes | int | float)]


def _leaves(data: Any, stop: Callable[[Any], bool] = lambda _: False) -> Iterator[Any]:
    """What a tree holds, in its order, and whatever ``stop`` says is none."""
    if type(data) in (list, tuple) and all(type(part) is Tensor for part in data):
        yield from data  # as most are
        return
    for leaf in tree_leaves(
        data, is_leaf=lambda part: isinstance(part, PackedSequence) or stop(part)
    ):
        if _has_names(leaf) and not stop(leaf):
            for part in by_name(leaf).values():
                yield from _leaves(part, stop)
        else:
            yield leaf


def _has_names(leaf: Any) -> bool:
    """Whether it is a mapping or dataclass, which torch doesn't look into."""
    return isinstance(leaf, Mapping) or (
        dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
    )


def _holds_no_tensor(part: Any) -> bool:
    return type(part) in (list, tuple) and not tensors_of(part)


def _length(part: Any) -> int:
    """How many things it holds; -1 of a tensor, a text, and what holds none."""
    if isinstance(part, Tensor | PackedSequence | str | bytes):
        return -1
    try:
        return len(part)
    except TypeError:
        return -1


class _UnlikeError(Exception):
    """Batches that can't be one."""


def _joined(*leaves: Any) -> Any:
    first = leaves[0]
    if not isinstance(first, Tensor):
        if any(type(leaf) is not type(first) or leaf != first for leaf in leaves):
            raise _UnlikeError
        return first
    alike = {(t.shape[1:], t.dtype, t.layout) if isinstance(t, Tensor) else None for t in leaves}
    if len(alike) > 1 or first.layout != torch.strided:
        raise _UnlikeError
    return torch.cat(leaves)


def _rows(leaf: Any) -> int | None:
    """-1 of what is no tensor."""
    if isinstance(leaf, PackedSequence):
        return None
    if not isinstance(leaf, Tensor):
        return -1
    return len(leaf) if leaf.dim() and leaf.layout == torch.strided else None


def with_tensors(change: Callable[..., Any], *trees: Any) -> Any:
    """``change`` of each leaf, in trees of the same structure."""
    pair = trees[0]
    if type(pair) in (list, tuple) and all(type(part) is Tensor for part in pair):
        # as most are: torch's own walk of a tree takes as long as a small pass
        return type(pair)(change(*parts) for parts in zip(*trees, strict=True))

    def leaf(first: Any, *others: Any) -> Any:
        if isinstance(first, PackedSequence) or not _has_names(first):
            return change(first, *others)
        parts = [by_name(tree) for tree in (first, *others)]
        return _like(
            first, {name: with_tensors(change, *(p[name] for p in parts)) for name in parts[0]}
        )

    return tree_map(leaf, *trees, is_leaf=lambda part: isinstance(part, PackedSequence))


def _like(first: Any, parts: dict[Any, Any]) -> Any:
    """A mapping or dataclass of the same kind with other parts, made without running its code
    (test_a_batch_of_ones_own_kind_is_left_alone); of a mapping whose copy isn't its own, a dict."""
    made: Any
    if not isinstance(first, Mapping):
        made = copy.copy(first)
        for name, part in parts.items():
            object.__setattr__(made, name, part)
        return made
    try:
        if isinstance(first, dict | UserDict):  # such as a tokenizer's
            made = copy.copy(first)
            if getattr(first, "__dict__", None) is first:  # whose items are its attributes
                made.__dict__ = made
            for name, part in parts.items():
                made[name] = part
            return made
        memo = {id(first[name]): part for name, part in parts.items()}
        made = copy.deepcopy(first, memo)
        return made if all(made[name] is part for name, part in parts.items()) else parts
    except Exception:
        return parts


def _shapes(data: Any) -> str:
    if _has_names(data):
        return ", ".join(f"{name} {_shapes(part)}" for name, part in by_name(data).items())
    found = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(data))
    return found or type(data).__name__
