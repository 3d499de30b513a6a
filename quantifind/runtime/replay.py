"""A forward pass recorded operation by operation, to be gone through again from where a tensor of
the network has changed; what lies before it is not computed twice."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from quantifind.network.modules import own_tensors
from quantifind.runtime.onednn import INSTEAD

# what such an operation returns may be of another kind for other values
VALUE_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# but of what these pick, only a mask's values tell the shape
PICKING = {torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default}
# torch's own, of whole layers, which hide what is inside
FUSED = {
    torch.ops.aten._transformer_encoder_layer_fwd.default,
    torch.ops.aten._native_multi_head_attention.default,
}
FUSING = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
# products (input, weight, bias, …), whose bias shifts what they give
BIASED = {
    torch.ops.aten.linear.default,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
}
BIAS = 2


class NotRepeatable(Exception):
    """A pass has an operation that can't be gone through again; the message names it."""


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
        return _tensors(INSTEAD.get(self.operation, self.operation)(*args, **kwargs))


class Tape:
    """One pass of a network, in eval mode, through one batch of inputs.

    Of the values only those are kept that a change of the tensors named needs: where the steps that
    follow from it begin. What doesn't follow from any tensor, such as masks, is a constant.

    names: of the network's tensors that may change. layers: by name, the fused layer of which a
        part is gone through, or None; by default as is cheaper, which takes a second pass to tell.
    Errors: NotRepeatable for a pass whose course depends on values that a tensor has a part in,
    that draws at random, or that works in place on memory which other values share. Not seen is
    what leaves torch by ``tolist`` or ``numpy``.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        names: Iterable[str],
        layers: Mapping[str, nn.Module | None] | None = None,
    ) -> None:
        self.own = own_tensors(model)

        @cache
        def recorded(layer: nn.Module | None) -> _Recording:
            if layer is None:
                return _record(model, self.own, inputs)
            try:
                with _in_parts(layer):
                    return _record(model, self.own, inputs)
            except AssertionError as error:
                # torch's own, of nested inputs: test_nested_inputs_go_through_whole_layers
                raise NotRepeatable(str(error)) from error

        names = list(names)
        self.layers = layers or {name: _split(model, name, recorded) for name in names}
        self.plans = {name: recorded(self.layers[name]).plan(name) for name in names}

    def outputs(self, name: str, value: Tensor) -> Tensor:
        """The network's outputs with ``value`` for the tensor ``name``."""
        own = self.own[name]
        if value.stride() != own.stride():
            # the steps are those of its layout: test_a_value_may_have_another_layout
            value = torch.empty_like(own, requires_grad=False).copy_(value)
        return self.plans[name].outputs(value)


@dataclass(frozen=True)
class Plan:
    """What follows from one tensor: the steps, and the values they begin with, by place."""

    place: int
    steps: list[Step]
    values: dict[int, Tensor]
    output: int

    def outputs(self, value: Tensor) -> Tensor:
        """What the pass gives with ``value`` for the tensor."""
        values = ChainMap({self.place: value}, self.values)
        for step in self.steps:
            values.update(zip(step.gives, step.run(values), strict=True))
        return values[self.output]


def _shifted(output: Tensor, was: Tensor, bias: Tensor, spatial: int) -> Tensor:
    return output + (bias - was).reshape(-1, *(1,) * spatial)


def _split(
    model: nn.Module, name: str, recorded: Callable[[nn.Module | None], "_Recording"]
) -> nn.Module | None:
    """The fused layer that a tensor is of, if what follows from it is only a part of the layer."""
    path = name.split(".")
    parents = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    layer = next((module for module in parents if isinstance(module, FUSING)), None)
    whole = recorded(None)
    following = whole.steps_from(name)
    if layer is None or not following or following[0].operation not in FUSED:
        return None
    try:
        parts = recorded(layer)
    except NotRepeatable:
        return None
    left = _products(parts.steps_from(name)) - _products(following)
    return layer if left < _products(parts.steps) - _products(whole.steps) else None


@contextmanager
def _in_parts(layer: nn.Module) -> Iterator[None]:
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


def _products(steps: list[Step]) -> int:
    return sum(step.operation in BIASED for step in steps)


def _record(model: nn.Module, own: Mapping[str, Tensor], inputs: Tensor) -> "_Recording":
    with _Recording(own) as recording:
        outputs = model(inputs)
    if id(outputs) not in recording.places:
        raise NotRepeatable("the outputs do not follow from the network's tensors")
    recording.output = recording.places[id(outputs)]
    return recording


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [part for part in tree_flatten(results)[0] if isinstance(part, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _random_state() -> list[Tensor]:
    with _disable_current_modes():
        on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [torch.get_rng_state(), *on_gpu]


def _depends_on_values(operation: Any, taken: Mapping[int, Tensor]) -> bool:
    if operation in PICKING:
        return any(i > 0 and t.dtype in (torch.bool, torch.uint8) for i, t in taken.items())
    return bool(taken) and not VALUE_DEPENDENT.isdisjoint(operation.tags)


class _Recording(TorchDispatchMode):
    """Writes down each operation in which a tensor of the network, or what follows from one, has a
    part."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.values: list[Tensor] = []
        # by id of a tensor its place; none may go while recording, so that no other gets its id
        self.places: dict[int, int] = {}
        self.alive: list[Tensor] = []
        # by memory, how many tensors were seen there
        self.seen: Counter[int] = Counter()
        # memory of what follows, and what must stay as it is: the network's, and steps' constants
        self.following: set[int] = set()
        self.own = {name: self._place(tensor) for name, tensor in own.items()}
        self.fixed = set(self.following)
        self.output = -1

    def steps_from(self, name: str) -> list[Step]:
        """The steps that follow from the network's tensor ``name``."""
        changed, steps = {self.own[name]}, []
        for step in self.steps:
            if not changed.isdisjoint(step.takes.values()):
                changed |= set(step.gives)
                steps.append(step)
        return steps

    def plan(self, name: str) -> Plan:
        """What to go through again from the network's tensor ``name``."""
        place, steps = self.own[name], self.steps_from(name)
        if self._only_shifts(place, steps):
            steps[0] = self._shift(place, steps[0])
        known, needed = {place}, set()
        for step in steps:
            needed |= set(step.takes.values()) - known
            known |= set(step.gives)
        if self.output not in known:
            needed.add(self.output)
        return Plan(place, steps, {place: self.values[place] for place in needed}, self.output)

    def _only_shifts(self, place: int, steps: list[Step]) -> bool:
        """Whether a tensor is nothing but a product's bias, of full precision."""
        uses = [(s.operation, i) for s in steps for i, at in s.takes.items() if at == place]
        exact = self.values[place].dtype in (torch.float32, torch.float64)
        return exact and len(uses) == 1 and uses[0][0] in BIASED and uses[0][1] == BIAS

    def _shift(self, place: int, step: Step) -> Step:
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
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        takes = {i: self.places[id(t)] for i, t in tensors.items() if id(t) in self.places}
        # such as what numpy was given and gave back
        if any(_memory(t) in self.following for i, t in tensors.items() if i not in takes):
            raise NotRepeatable(f"{operation} takes a tensor whose origin is not seen")
        if _depends_on_values(operation, {i: tensors[i] for i in takes}):
            raise NotRepeatable(f"the course of the pass depends on values ({operation})")
        changes = bool(takes) and operation._schema.is_mutable
        if operation._schema.is_mutable:
            self._check_alone(operation, args, kwargs, changes)
        if changes:
            # what it was before: test_what_works_in_place_is_gone_through_again
            leaves[0] = args[0].clone()
            if 0 in takes:
                self.values[takes[0]] = leaves[0]
        may_draw = torch.Tag.nondeterministic_seeded in operation.tags
        state = _random_state() if may_draw else []
        results = operation(*args, **kwargs)
        # dropout in eval mode draws nothing
        if state and not all(map(torch.equal, state, _random_state())):
            raise NotRepeatable(f"{operation} draws at random")
        given = _tensors(results)
        self.alive += given
        if not operation._schema.is_mutable:
            self.seen.update(map(_memory, given))
        if takes:
            if any(not isinstance(part, Tensor | None) for part in tree_flatten(results)[0]):
                raise NotRepeatable(f"the course of the pass depends on values ({operation})")
            leaves = [None if i in takes else leaf for i, leaf in enumerate(leaves)]
            self.fixed.update(map(_memory, _tensors(leaves)))
            gives = tuple(map(self._place, given))
            self.steps.append(Step(operation, tuple(leaves), spec, takes, gives, changes))
        return results

    def _place(self, tensor: Tensor) -> int:
        self.places[id(tensor)] = len(self.values)
        self.values.append(tensor)
        self.alive.append(tensor)
        if tensor.numel():
            self.following.add(_memory(tensor))
        return len(self.values) - 1

    def _check_alone(self, operation: Any, args: Any, kwargs: Any, changes: bool) -> None:
        """Raise NotRepeatable unless the memory that is written to may change, and, where this is a
        step, nothing else is in it."""
        arguments = operation._schema.arguments
        named = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        writes = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
        written = _tensors([named.get(name) for name in writes])
        alone = self.fixed.isdisjoint(map(_memory, written))
        if changes:
            alone &= len(written) == 1 and written[0] is args[0]
            alone &= all(self.seen[_memory(t)] == 1 for t in written)
            alone &= all(t.untyped_storage().nbytes() == t.nbytes for t in written)
        if not alone:
            raise NotRepeatable(f"{operation} works in place on memory that is shared")
