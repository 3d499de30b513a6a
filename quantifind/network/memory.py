"""Which of a network's tensors share memory, and the same sharing in a copy."""

import bisect
import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantifind.tensor.parts import is_strided, stored_bytes


def has_memory(tensor: Tensor) -> bool:
    """Whether it has values in memory that others may share."""
    return is_strided(tensor) and tensor.numel() > 0


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses, in bytes, of its first value and of the end of its last."""
    first, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return first, first + size * tensor.numel()
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + size * (1 + reach)


def fills(tensor: Tensor) -> bool:
    """Whether its values, each at a place of its own, fill all of its `span`."""
    expected = 1
    for step, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count > 1:
            if step != expected:
                return False
            expected *= count
    return True


def blocks(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors with memory, those whose spans meet together, directly or by others."""
    spans: defaultdict[torch.device, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if has_memory(tensor):
            spans[tensor.device].append((*span(tensor), name))
    found: list[list[str]] = []
    for on_device in spans.values():
        end = 0
        for first, last, name in sorted(on_device):
            if first < end:
                found[-1].append(name)
            else:
                found.append([name])
            end = max(end, last)
    return found


def owners(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """By name of each parameter that lies in another's memory, the name of that one, its owner.

    Of several with the same memory, the first that is contiguous is the owner. Parts of one memory
    that don't meet, such as cudnn's flattened weights, are owners of their own.
    Raises: ValueError for parameters that meet in a part of their memory, with none that has it
        all.
    """
    places = {name: place for place, name in enumerate(parameters)}
    found: dict[str, str] = {}
    for block in blocks(parameters):
        if len(block) == 1:
            continue
        sizes = {name: _size(parameters[name]) for name in block}
        # test_the_first_of_the_same_is_the_owner
        ranks = {
            name: (-sizes[name], _repeats(p := parameters[name]), not p.is_contiguous())
            for name in block
        }
        own: list[str] = []
        for name in sorted(block, key=lambda name: (*ranks[name], places[name])):
            meets = [other for other in own if _shared(parameters[name], parameters[other])]
            if not meets:
                own.append(name)
                continue
            (owner, *others), shared = meets, _shared(parameters[name], parameters[meets[0]])
            if others or shared < sizes[name] or _repeats(parameters[owner]):
                raise ValueError(
                    f"{name} shares a part of its memory with {', '.join(meets)}, and none has all "
                    "of it: register the whole as a parameter, or give each its own (`.clone()`)"
                )
            found[name] = owner
    return found


def view_places(parameters: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """By name of each parameter that lies in another's memory: its owner's name, and which of the
    owner's values, flattened, it shows. So a view follows values that are put in its owner's place.

    Raises: ValueError as `owners`, and for a view of another type.
    """
    found = {}
    for name, owner in owners(parameters).items():
        view, whole = parameters[name], parameters[owner]
        if view.dtype != whole.dtype:
            raise ValueError(f"{name} is {view.dtype} over memory of {owner}, {whole.dtype}")
        places = torch.zeros(1 + (span(whole)[1] - span(whole)[0]) // whole.element_size()).long()
        own = torch.arange(whole.numel()).reshape(whole.shape)
        places.as_strided(whole.shape, whole.stride(), 0).copy_(own)
        start = (view.data_ptr() - whole.data_ptr()) // view.element_size()
        found[name] = owner, places.as_strided(view.shape, view.stride(), start).clone()
    return found


def own_bytes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of each tensor that none before it has."""
    order = {name: place for place, name in enumerate(tensors)}
    found = {name: stored_bytes(tensor) for name, tensor in tensors.items()}
    for block in blocks(tensors):
        if len(block) == 1:
            continue
        first = min(span(tensors[name])[0] for name in block)
        last = max(span(tensors[name])[1] for name in block)
        taken, before = torch.zeros(last - first, dtype=torch.bool), 0
        for name in sorted(block, key=order.__getitem__):
            _mark(taken, tensors[name], first)
            after = int(taken.sum())
            found[name], before = after - before, after
    return found


def _size(tensor: Tensor) -> int:
    """Bytes of its own."""
    return stored_bytes(tensor) if fills(tensor) else int(_cells(tensor).sum())


def _repeats(tensor: Tensor) -> bool:
    """Whether several of its values are one in memory."""
    return _size(tensor) < stored_bytes(tensor)


def _shared(one: Tensor, other: Tensor) -> int:
    """Bytes that are both's."""
    (a, b), (c, d) = span(one), span(other)
    first, last = max(a, c), min(b, d)
    if first >= last or (fills(one) and fills(other)):
        return max(0, last - first)
    mine, theirs = _cells(one)[first - a : last - a], _cells(other)[first - c : last - c]
    return int((mine & theirs).sum())


def _cells(tensor: Tensor) -> Tensor:
    """Which bytes of its span are its own."""
    first, last = span(tensor)
    cells = torch.zeros(last - first, dtype=torch.bool)
    _mark(cells, tensor, first)
    return cells


def _mark(cells: Tensor, tensor: Tensor, first: int) -> None:
    """Set the bytes of a tensor, of those from the address ``first``."""
    size = tensor.element_size()
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    # an expanded axis is one place
    steps = [(count if step else 1, step * size) for count, step in axes]
    shape, strides = [count for count, _ in steps], [step for _, step in steps]
    place = tensor.data_ptr() - first
    cells.as_strided([*shape, size], [*strides, 1], place).fill_(True)


class Copies(TorchFunctionMode):
    """Copies of tensors that share memory as the originals do; within it, `copy.deepcopy` makes
    such of whatever is a view of theirs, too, and detached ones of results of a pass.

    tensors: the network's own, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        # by device, the addresses where copied memory begins and ends, and its copy
        self.memory: defaultdict[torch.device, list[tuple[int, int, Tensor]]] = defaultdict(list)
        self.memo: dict[int, Any] = {}
        for block in blocks(tensors):
            self._copy_block([tensors[name] for name in block])
        for memory in self.memory.values():
            memory.sort(key=lambda part: part[0])
        same: dict[Any, nn.Parameter] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in self.memo:
                key = _identity(name, tensor)
                # parameters over the same memory are one: test_parameters_over_the_same_memory_...
                self.memo[id(tensor)] = same.setdefault(key, self._parameter(tensor))

    def _copy_block(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        if len({id(tensor) for tensor in tensors}) == 1 and not fills(tensors[0]):
            return
        widest = max(tensors, key=lambda tensor: tensor.element_size())
        first = min(span(tensor)[0] for tensor in tensors)
        # so that the values of each lie at whole numbers of its width
        first -= (first - widest.data_ptr()) % widest.element_size()
        last = max(span(tensor)[1] for tensor in tensors)
        memory = torch.empty(last - first, dtype=torch.uint8, device=widest.device)
        self.memory[widest.device].append((first, last, memory))
        for tensor in tensors:
            once = [slice(None) if step else slice(1) for step in tensor.stride()]
            _placed(tensor, first, memory)[*once].copy_(tensor.detach()[*once])

    def _parameter(self, tensor: nn.Parameter) -> Any:
        placed = self._view(tensor)
        if placed is None:
            placed = tensor.detach().clone()
        if type(tensor) is nn.Parameter:
            made = nn.Parameter(placed, tensor.requires_grad)
            made.__dict__.update(vars(tensor))
            return made
        made = copy.deepcopy(tensor)
        if has_memory(tensor):
            made.data = placed
        return made

    def _view(self, tensor: Tensor) -> Tensor | None:
        """The same view of copied memory, where there is such."""
        if not has_memory(tensor):
            return None
        first, last = span(tensor)
        memory = self.memory[tensor.device]
        place = bisect.bisect_right(memory, first, key=lambda part: part[0]) - 1
        if place < 0 or last > memory[place][1]:
            return None
        start, _, copied = memory[place]
        if (first - start) % tensor.element_size():
            return None
        return _placed(tensor, start, copied)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            own = type(tensor) is Tensor
            made = self._view(tensor) if own else None
            if made is None and tensor.is_leaf and (not own or is_strided(tensor)):
                return func(*args)
            # torch copies no results of a pass, which a next one makes anew, and not all layouts:
            # test_results_of_a_pass_are_no_obstacle, test_tensors_of_every_kind
            made = tensor.detach().clone() if made is None else made
            made.__dict__.update(vars(tensor))
            memo[id(tensor)] = made.requires_grad_(tensor.requires_grad and tensor.is_leaf)
        return memo[id(tensor)]


def _identity(name: str, tensor: Tensor) -> Any:
    return place_of(tensor) if has_memory(tensor) else name


def place_of(tensor: Tensor) -> Any:
    """What two tensors have in common that are the same view of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _placed(tensor: Tensor, first: int, memory: Tensor) -> Tensor:
    """The view of ``memory`` that ``tensor`` is of the memory that begins at ``first``."""
    offset = (tensor.data_ptr() - first) // tensor.element_size()
    view = torch.empty(0, dtype=tensor.dtype, device=memory.device)
    return view.set_(memory.untyped_storage(), offset, tensor.shape, tensor.stride())
