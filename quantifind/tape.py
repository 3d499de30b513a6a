"""A forward pass recorded operation by operation, to be gone through again from where a tensor of
the network has changed; what lies before it is not computed twice."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from quantifind.products import own_tensors

# what such an operation returns may be of another kind for other values
VALUE_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


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
        return _tensors(self.operation(*args, **kwargs))


# torch's own, of whole layers, which hide what is inside
FUSED = {
    torch.ops.aten._transformer_encoder_layer_fwd.default,
    torch.ops.aten._native_multi_head_attention.default,
}


class Tape:
    """One pass of a network, in eval mode, through one batch of inputs.

    Of the values only those are kept that a change of the tensors named needs: where the steps that
    follow from it begin. What doesn't follow from any tensor, such as masks, is a constant.

    names: of the network's tensors that may change.
    Errors: NotRepeatable for a pass whose course depends on values that a tensor has a part in,
    that draws at random, or that works in place on memory which other values share.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, names: Iterable[str]) -> None:
        own, names = own_tensors(model), list(names)
        recording = _record(model, own, inputs)
        self.plans = {name: recording.plan(name) for name in names}
        # of the last fused layer only a part need be gone through, which then is cheaper
        split = [name for name in names if _fused(self.plans[name].steps) == [0]]
        if split:
            fused = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                recording = _record(model, own, inputs)
            finally:
                torch.backends.mha.set_fastpath_enabled(fused)
            self.plans |= {name: recording.plan(name) for name in split}
        kept = {_memory(v): v for plan in self.plans.values() for v in plan.values.values()}
        given = set(map(_memory, own.values()))
        # of what is kept, the network's own tensors aside
        self.memory_bytes = sum(
            value.untyped_storage().nbytes() for at, value in kept.items() if at not in given
        )

    def outputs(self, name: str, value: Tensor) -> Tensor:
        """The network's outputs with ``value`` for the tensor ``name``."""
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


def _fused(steps: list["Step"]) -> list[int]:
    return [i for i, step in enumerate(steps) if step.operation in FUSED]


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
        return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


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
        self.own = {name: self._place(tensor) for name, tensor in own.items()}
        self.output = -1

    def plan(self, name: str) -> Plan:
        """The steps that follow from the network's tensor ``name``."""
        place = self.own[name]
        changed, steps, needed = {place}, [], set()
        for step in self.steps:
            if not changed.isdisjoint(step.takes.values()):
                needed |= set(step.takes.values()) - changed
                changed |= set(step.gives)
                steps.append(step)
        if self.output not in changed:
            needed.add(self.output)
        return Plan(place, steps, {place: self.values[place] for place in needed}, self.output)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        takes = {i: self.places[id(t)] for i, t in tensors.items() if id(t) in self.places}
        changes = bool(takes) and operation._schema.is_mutable
        if takes and VALUE_DEPENDENT.intersection(operation.tags):
            raise NotRepeatable(f"the course of the pass depends on values ({operation})")
        if changes:
            self._check_alone(operation, args)
            # what it was before: test_what_works_in_place_is_gone_through_again
            leaves[0] = args[0].clone()
            if 0 in takes:
                self.values[takes[0]] = leaves[0]
        may_draw = torch.Tag.nondeterministic_seeded in operation.tags
        state = _random_state() if takes and may_draw else []
        results = operation(*args, **kwargs)
        # dropout in eval mode draws nothing
        if state and not all(map(torch.equal, state, _random_state())):
            raise NotRepeatable(f"{operation} draws at random")
        given = _tensors(results)
        self.alive += given
        if not changes:
            self.seen.update(map(_memory, given))
        if takes:
            if len(given) != len(tree_flatten(results)[0]):
                raise NotRepeatable(f"{operation} gives what is no tensor")
            leaves = [None if i in takes else leaf for i, leaf in enumerate(leaves)]
            gives = tuple(map(self._place, given))
            self.steps.append(Step(operation, tuple(leaves), spec, takes, gives, changes))
        return results

    def _place(self, tensor: Tensor) -> int:
        self.places[id(tensor)] = len(self.values)
        self.values.append(tensor)
        self.alive.append(tensor)
        return len(self.values) - 1

    def _check_alone(self, operation: Any, args: Any) -> None:
        written = [a for a in operation._schema.arguments if a.alias_info and a.alias_info.is_write]
        own = isinstance(args[0], Tensor) and self.seen[_memory(args[0])] == 1
        whole = own and args[0].untyped_storage().nbytes() == args[0].nbytes
        if written != [operation._schema.arguments[0]] or not whole:
            raise NotRepeatable(f"{operation} works in place on memory that is shared")
