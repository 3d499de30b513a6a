"""Record a forward pass, then replay only the operations that depend on a changed tensor."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from quantifind.network.modules import own_tensors
from quantifind.utils.batches import as_batch

# what such an operation returns may be of another kind for other values
VALUE_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# but of what these pick, only a mask's values tell the shape
PICKING = {torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default}
# layers that torch computes by one operation, which hides what is inside
FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
# products (input, weight, bias, …), whose bias shifts what they give
BIASED = {
    torch.ops.aten.linear.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
}
BIAS = 2


class NotReplayable(Exception):
    """A pass has an operation that can't be replayed; the message names it."""


@dataclass(frozen=True)
class Step:
    """One operation of a pass.

    leaves, spec: its arguments, positional and by name, taken apart.
    takes: by index of a leaf, the place of the value that goes there.
    gives: the places of its results.
    changes: whether it works in place on its first argument, which then is a copy.
    """

    operation: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    takes: Mapping[int, int]
    gives: tuple[int, ...]
    changes: bool

    def run(self, values: Mapping[int, Tensor]) -> list[Tensor]:
        """Its results, with the values at the places that it takes."""
        leaves = list(self.leaves)
        for index, place in self.takes.items():
            leaves[index] = values[place]
        args, kwargs = tree_unflatten(leaves, self.spec)
        if self.changes:
            args = (args[0].clone(), *args[1:])
        return _tensors(self.operation(*args, **kwargs))


class Replay:
    """One pass of a network, in eval mode, through one batch, for one changing tensor.

    Kept are the steps that depend on the tensor, and the values with which they begin. What depends
    on no tensor of the network, such as a mask, is a constant.

    name: of the network's tensor that changes.
    batch: a `quantifind.utils.batches.Batch`, or what its `DefaultForward` takes.
    targets: of the batch, as its forward gives them.
    share: of the pass's operations, those that are replayed.
    Raises: NotReplayable for a pass whose course depends on values of the network's tensors, that
        draws at random, or that works in place on shared memory. Not seen is what leaves torch by
        ``tolist`` or ``numpy``.
    """

    def __init__(self, model: nn.Module, batch: Any, name: str) -> None:
        recording = _record(model, batch, name)
        self.own, self.place = recording.own[name], recording.own_places[name]
        self.steps, self.spec = recording.steps_from(self.place), recording.spec
        self.leaves, self.constants = recording.leaves, recording.constants
        self.targets = recording.targets
        self.share = len(self.steps) / len(recording.steps)
        if recording.only_shifts(self.place, self.steps):
            self.steps[0] = recording.shift(self.place, self.steps[0])
        known, needed = {self.place}, set()
        for step in self.steps:
            needed |= set(step.takes.values()) - known
            known |= set(step.gives)
        needed |= set(self.leaves.values()) - known
        self.values = {place: recording.values[place] for place in needed}

    def outputs(self, value: Tensor) -> Any:
        """The network's outputs with ``value`` for the tensor."""
        if value.stride() != self.own.stride():
            # the steps are those of its layout: test_a_value_may_have_another_layout
            value = torch.empty_like(self.own, requires_grad=False).copy_(value)
        values = ChainMap({self.place: value}, self.values)
        for step in self.steps:
            values.update(zip(step.gives, step.run(values), strict=True))
        leaves = list(self.constants)
        for index, place in self.leaves.items():
            leaves[index] = values[place]
        return tree_unflatten(leaves, self.spec)


def _record(model: nn.Module, batch: Any, name: str) -> "_Recording":
    """A pass in which the fused layer of the tensor is split, where torch can."""
    layer = _fused_layer(model, name)
    if layer is not None:
        # torch asserts that nested inputs are fused: test_nested_inputs_are_replayed_fused
        with suppress(AssertionError, NotReplayable), _split(layer):
            return _Recording(model, batch)
    return _Recording(model, batch)


def _fused_layer(model: nn.Module, name: str) -> nn.Module | None:
    """The fused layer of a tensor, if replaying a part of it is less than replaying all of it."""
    *path, last = name.split(".")
    if last.startswith("in_proj"):  # with which the layer begins
        return None
    parents = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1))
    return next((module for module in parents if isinstance(module, FUSED)), None)


@contextmanager
def _split(layer: nn.Module) -> Iterator[None]:
    """Within it, a pass doesn't fuse the layer."""
    fuse, fused = torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
    hooks = [
        layer.register_forward_pre_hook(lambda *_: fuse(False)),
        layer.register_forward_hook(lambda *_: fuse(fused), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shifted(output: Tensor, was: Tensor, bias: Tensor, spatial: int) -> Tensor:
    return output + (bias - was).reshape(-1, *(1,) * spatial)


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [part for part in tree_flatten(results)[0] if isinstance(part, Tensor)]


def _is_plain(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, Tensor | int | float | str)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _random_state() -> list[Tensor]:
    with _disable_current_modes():
        on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [torch.get_rng_state(), *on_gpu]


class _Recording(TorchDispatchMode):
    """Each operation of a pass that depends on a tensor of the network."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.values: list[Tensor] = []
        # by id of a tensor its place; none may go while recording, so that no other gets its id
        self.places: dict[int, int] = {}
        self.alive: list[Tensor] = []
        # by memory, how many tensors were seen there
        self.seen: Counter[int] = Counter()
        # memory of what depends on the network's tensors, and what must stay as it is: these
        # tensors, and steps' constants
        self.dependent: set[int] = set()
        self.own = own_tensors(model)
        self.own_places = {name: self._place(tensor) for name, tensor in self.own.items()}
        self.fixed = set(self.dependent)
        with self:
            outputs, *self.targets = as_batch(batch, model).run(model)
        # the outputs' leaves: the places of those that follow from the network, and the others
        leaves, self.spec = tree_flatten(outputs)
        self.leaves = {i: self.places[id(x)] for i, x in enumerate(leaves) if id(x) in self.places}
        self.constants = [None if i in self.leaves else leaf for i, leaf in enumerate(leaves)]
        if not self.leaves or not all(_is_plain(leaf) for leaf in leaves):
            raise NotReplayable("the outputs do not follow from the network's tensors")

    def steps_from(self, place: int) -> list[Step]:
        """The steps that depend on the value at a place."""
        changed, steps = {place}, []
        for step in self.steps:
            if not changed.isdisjoint(step.takes.values()):
                changed |= set(step.gives)
                steps.append(step)
        return steps

    def only_shifts(self, place: int, steps: list[Step]) -> bool:
        """Whether a tensor is nothing but a product's bias, of full precision."""
        uses = [(s.operation, i) for s in steps for i, at in s.takes.items() if at == place]
        exact = self.values[place].dtype in (torch.float32, torch.float64)
        return exact and len(uses) == 1 and uses[0][0] in BIASED and uses[0][1] == BIAS

    def shift(self, place: int, step: Step) -> Step:
        """Instead of a product with another bias: its output, shifted."""
        (output,), bias = step.gives, self.values[place]
        weight = self.values[step.takes[1]] if 1 in step.takes else step.leaves[1]
        leaves, spec = tree_flatten(((None, bias, None, weight.dim() - 2), {}))
        return Step(_shifted, tuple(leaves), spec, {0: output, 2: place}, (output,), False)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        takes = {
            i: self.places[id(leaf)] for i, leaf in enumerate(leaves) if id(leaf) in self.places
        }
        self._check_arguments(operation, leaves, takes)
        mutable = operation._schema.is_mutable
        changes = bool(takes) and mutable
        if mutable:
            self._check_unshared(operation, args, kwargs, changes)
        if changes:
            # what it was before: test_what_works_in_place_is_replayed
            leaves[0] = args[0].clone()
            if 0 in takes:
                self.values[takes[0]] = leaves[0]
        results = _run_without_drawing(operation, args, kwargs)
        given = _tensors(results)
        self.alive += given
        if not mutable:
            self.seen.update(map(_memory, given))
        if takes:
            if any(not isinstance(part, Tensor | None) for part in tree_flatten(results)[0]):
                raise NotReplayable(f"the course of the pass depends on values ({operation})")
            constants = tuple(None if i in takes else leaf for i, leaf in enumerate(leaves))
            self.fixed.update(map(_memory, _tensors(constants)))
            gives = tuple(map(self._place, given))
            self.steps.append(Step(operation, constants, spec, takes, gives, changes))
        return results

    def _place(self, tensor: Tensor) -> int:
        self.places[id(tensor)] = len(self.values)
        self.values.append(tensor)
        self.alive.append(tensor)
        if tensor.numel():
            self.dependent.add(_memory(tensor))
        return len(self.values) - 1

    def _check_arguments(self, operation: Any, leaves: list[Any], takes: dict[int, int]) -> None:
        """Raise NotReplayable for arguments from elsewhere, and where values tell the course."""
        others = [leaf for i, leaf in enumerate(leaves) if i not in takes]
        # such as what numpy was given and gave back
        if not self.dependent.isdisjoint(map(_memory, _tensors(others))):
            raise NotReplayable(f"{operation} takes a tensor whose origin is not seen")
        if operation in PICKING:
            masks = (torch.bool, torch.uint8)
            depends = any(i > 0 and leaves[i].dtype in masks for i in takes)
        else:
            depends = bool(takes) and not VALUE_DEPENDENT.isdisjoint(operation.tags)
        if depends:
            raise NotReplayable(f"the course of the pass depends on values ({operation})")

    def _check_unshared(self, operation: Any, args: Any, kwargs: Any, changes: bool) -> None:
        """Raise NotReplayable unless the memory that is written to may change, and, where this is a
        step, nothing else is in it."""
        arguments = operation._schema.arguments
        named = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        writes = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
        written = _tensors([named.get(name) for name in writes])
        unshared = self.fixed.isdisjoint(map(_memory, written))
        if changes:
            unshared &= len(written) == 1 and written[0] is args[0]
            unshared &= all(self.seen[_memory(t)] == 1 for t in written)
            unshared &= all(t.untyped_storage().nbytes() == t.nbytes for t in written)
        if not unshared:
            raise NotReplayable(f"{operation} works in place on memory that is shared")


def _run_without_drawing(operation: Any, args: Any, kwargs: Any) -> Any:
    """What the operation returns, or NotReplayable; dropout in eval mode draws nothing."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return operation(*args, **kwargs)
    before = _random_state()
    results = operation(*args, **kwargs)
    if not all(map(torch.equal, before, _random_state())):
        raise NotReplayable(f"{operation} draws at random")
    return results
