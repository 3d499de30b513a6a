"""Batches of any kind: what a network takes of one, what its criterion, and how several are one."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from quantifind.utils.devices import device_of

Forward = Callable[[nn.Module, Any], Any]
# under which a batch by names has its targets
TARGETS = ("labels", "label", "targets", "target", "y")


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

    def __getitem__(self, rows: Any) -> "Batch":
        """Some of its examples."""
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
    if not batches or any(rows_of(batch.data) is None for batch in batches):
        return None
    try:
        return Batch(with_tensors(_joined, *(batch.data for batch in batches)), batches[0].forward)
    except (_UnlikeError, ValueError, KeyError, TypeError):
        return None


def copied(data: Any) -> Any:
    """The tree with tensors in memory of their own."""
    return with_tensors(lambda t: t.clone() if isinstance(t, Tensor) else _packed_copy(t), data)


def _packed_copy(leaf: Any) -> Any:
    return leaf._replace(data=leaf.data.clone()) if isinstance(leaf, PackedSequence) else leaf


def rows_of(data: Any) -> int | None:
    """How many rows each tensor of a tree has; None where they differ or there is no tensor."""
    sizes: set[int | None] = set()
    with_tensors(lambda leaf: sizes.add(_rows(leaf)), data)
    sizes.discard(-1)
    return sizes.pop() if len(sizes) == 1 else None


def moved(data: Any, device: torch.device) -> Any:
    """The tree with its tensors on a device, without waiting for it
    (test_no_batch_waits_for_the_device)."""

    def move(leaf: Any) -> Any:
        known = isinstance(leaf, Tensor | PackedSequence)
        return leaf.to(device, non_blocking=True) if known else leaf

    return with_tensors(move, data)


def tensors_of(data: Any) -> list[Tensor]:
    """The tensors of a tree, in its order."""
    found: list[Tensor] = []

    def take(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            found.append(leaf.data)
        elif isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    with_tensors(take, data)
    return found


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
        if isinstance(first, PackedSequence):
            return change(first, *others)
        if dataclasses.is_dataclass(first) and not isinstance(first, type):
            names = [field.name for field in dataclasses.fields(first) if field.init]
            every = {
                n: with_tensors(change, *(getattr(t, n) for t in (first, *others))) for n in names
            }
            return dataclasses.replace(first, **every)
        if isinstance(first, Mapping):  # such as a tokenizer's
            mapped: Any = copy.copy(first)
            for key in first:
                mapped[key] = with_tensors(change, *(tree[key] for tree in (first, *others)))
            return mapped
        return change(first, *others)

    return tree_map(leaf, *trees, is_leaf=lambda part: isinstance(part, PackedSequence))


def _shapes(data: Any) -> str:
    named = dataclasses.is_dataclass(data) or isinstance(data, Mapping)
    if named and not isinstance(data, PackedSequence):
        return ", ".join(f"{name} {_shapes(part)}" for name, part in _by_name(data).items())
    found = ", ".join(str(list(tensor.shape)) for tensor in tensors_of(data))
    return found or type(data).__name__


def _by_name(data: Any) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return dict(data)
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}


class BatchError(ValueError):
    """It isn't known which parts of a batch are what."""


class DefaultForward:
    """How a network takes a batch that is inputs and targets, by what its forward asks for.

    A batch is (inputs, targets), (a, b, …, targets) or ((a, b), targets) for a forward of several
    arguments; a mapping or dataclass with the names of forward's arguments, and its targets under
    one of `TARGETS`; or inputs alone. Of outputs that have ``logits``, torch's own criteria get
    these.

    Raises: BatchError, when called, for a batch of which this does not say what its parts are.
    """

    def __init__(self, model: nn.Module, criterion: Any = None) -> None:
        self.takes_logits = criterion is None or type(criterion).__module__ == nn.L1Loss.__module__
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = inspect.Parameter
        positional = [
            p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        self.least = sum(p.default is p.empty for p in positional)
        some = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        self.most: float = math.inf if some else len(positional)
        named = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        self.names = [p.name for p in parameters if p.kind in named]
        self.any_name = any(p.kind is kinds.VAR_KEYWORD for p in parameters)

    def __call__(self, model: nn.Module, data: Any) -> tuple[Any, ...]:
        args, kwargs, targets = self.split(data)
        outputs = model(*args, **kwargs)
        if self.takes_logits and not isinstance(outputs, Tensor):
            outputs = logits_of(outputs)
        return outputs, *targets

    def split(self, data: Any) -> tuple[Sequence[Any], dict[str, Any], Sequence[Any]]:
        """The network's positional and named arguments, and the targets, of which there may be
        none."""
        if isinstance(data, Tensor | PackedSequence):
            return [data], {}, []
        if isinstance(data, Mapping) or dataclasses.is_dataclass(data):
            return self._named(_by_name(data))
        if not isinstance(data, list | tuple) or not data:
            raise BatchError(f"a batch is a {type(data).__name__}: {_ADVICE}")
        *inputs, last = data
        if not inputs:
            return *self._arguments(last), []
        if len(inputs) == 1:
            if self.least == 2 and self._plain(inputs[0]):
                return data, {}, []
            return *self._arguments(inputs[0]), [last]
        if self._fits(len(inputs)):
            return inputs, {}, [last]
        if self._fits(len(data)):
            return data, {}, []
        raise BatchError(
            f"a batch has {len(data)} parts, and the network's forward takes {self._count()}: "
            f"{_ADVICE}"
        )

    def _arguments(self, inputs: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        if isinstance(inputs, Mapping) and all(map(self._takes, inputs)):
            return [], dict(inputs)
        several = isinstance(inputs, list | tuple) and not isinstance(inputs, PackedSequence)
        if several and len(inputs) > 1 and self._fits(len(inputs)):
            return inputs, {}
        return [inputs], {}

    def _named(self, data: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any], Sequence[Any]]:
        targets = [name for name in TARGETS if name in data]
        inputs = {name: part for name, part in data.items() if name not in targets}
        if len(targets) > 1 or not inputs:
            raise BatchError(f"a batch has {', '.join(data)}: {_ADVICE}")
        judged = [data[name] for name in targets]
        if all(map(self._takes, inputs)):
            return [], inputs, judged
        if len(inputs) == 1 and self._fits(1):
            return [*inputs.values()], {}, judged
        unknown = [name for name in inputs if not self._takes(name)]
        raise BatchError(
            f"a batch has {', '.join(unknown)}, and the network's forward takes "
            f"{', '.join(self.names)}: {_ADVICE}"
        )

    def _takes(self, name: str) -> bool:
        return self.any_name or name in self.names

    def _fits(self, count: int) -> bool:
        return self.least <= count <= self.most

    def _plain(self, part: Any) -> bool:
        return isinstance(part, Tensor | PackedSequence)

    def _count(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"


def logits_of(outputs: Any) -> Any:
    """The logits of outputs that have some by this name; else the outputs."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


_ADVICE = (
    "say what the criterion gets of it by forward=lambda model, batch: (model(batch[0]), batch[1])"
)
