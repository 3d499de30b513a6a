"""Functions of a copied network that keep to the copy: what they close over is the copy's, too."""

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from quantifind.utils.naming import described

# what holds others, beside what has attributes
_CONTAINERS = (list, tuple, set, frozenset, dict)


def rebind(model: nn.Module, memo: dict[int, Any]) -> None:
    """Give the functions and hooks of a network, in place, the copies of what they close over.

    `copy.deepcopy` takes a function as it is, so that ``self.act = lambda x: x * self.slope`` would
    compute with the slope of the network that was copied (test_functions_of_a_copy_are_its_own). So
    are lists, dictionaries, partial functions and objects copied that hold something of the
    network's, and the names of a module that are the network's own.

    memo: by id of what was copied, its copy, as `copy.deepcopy` fills it.
    Raises: ValueError naming what can't be copied of that.
    """
    rebinding = _Rebinding(memo)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                bound = rebinding.bound(value)
                if bound is not value:
                    module.__dict__[name] = bound


class _Rebinding:
    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        # by id, copies, which may be changed
        self.own = {id(made) for made in memo.values()}
        # by id, what has been looked at, and what it has become
        self.found: dict[int, Any] = {}
        # keeps alive what is known by its id
        self.seen: list[Any] = []

    def bound(self, value: Any) -> Any:
        """A function with the copies; anything else as it is, with such functions in it: it is the
        copy's own, and handles of hooks refer to theirs."""
        if id(value) in self.found:
            return self.found[id(value)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            function = self.bound(value.__func__)
            changed = function is not value.__func__
            return types.MethodType(function, value.__self__) if changed else value
        if type(value) is functools.partial:
            parts = [value.func, value.args, value.keywords]
            new = [self.bound(part) for part in parts]
            if all(one is other for one, other in zip(new, parts, strict=True)):
                return value
            return functools.partial(new[0], *new[1], **new[2])
        if type(value) is tuple:
            items = tuple(map(self.bound, value))
            return items if any(map(_is_not, items, value)) else value
        self._remember(value, value)
        if isinstance(value, list | dict):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if (new := self.bound(item)) is not item:
                    value[key] = new
        elif id(value) in self.own and _has_parts(value):
            for name, item in list(_attributes(value)):
                if (new := self.bound(item)) is not item:
                    object.__setattr__(value, name, new)
        return value

    def _remember(self, value: Any, made: Any) -> None:
        self.found[id(value)] = made
        self.seen.append(value)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__ or ()
        own = _names(function.__code__) & function.__globals__.keys()
        named = {n: self.memo[i] for n in own if (i := id(function.__globals__[n])) in self.memo}
        copied = types.FunctionType(
            function.__code__,
            {**function.__globals__, **named} if named else function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(types.CellType() for _ in cells),
        )
        copied.__kwdefaults__, copied.__qualname__ = function.__kwdefaults__, function.__qualname__
        copied.__dict__.update(vars(function))
        # first, for a function that closes over itself
        self._remember(function, copied)
        changed = bool(named)
        for old, new in zip(cells, copied.__closure__ or (), strict=True):
            try:
                value = old.cell_contents
            except ValueError:  # an empty cell
                continue
            new.cell_contents = self._copy_of(value)
            changed |= new.cell_contents is not value and new.cell_contents is not copied
        if function.__defaults__:
            copied.__defaults__ = tuple(map(self._copy_of, function.__defaults__))
            changed |= any(map(_is_not, copied.__defaults__, function.__defaults__))
        if function.__kwdefaults__:
            given = function.__kwdefaults__
            copied.__kwdefaults__ = {name: self._copy_of(value) for name, value in given.items()}
            changed |= any(copied.__kwdefaults__[name] is not given[name] for name in given)
        if not changed:
            self.found[id(function)] = function
        return self.found[id(function)]

    def _copy_of(self, value: Any) -> Any:
        """The copy of a value that a function closes over, where it is a part of the network, or
        holds one."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, types.FunctionType):
            return self.bound(value)
        if not self._reaches(value, set()):
            return value
        try:
            made = copy.deepcopy(value, self.memo)
        except Exception as error:
            kind, reason = type(value).__name__, described(error)
            raise ValueError(
                f"a function of the network closes over a {kind}, which holds tensors of the "
                f"network and can't be copied ({reason}): keep it out of the function, or give "
                f"{kind} a __deepcopy__"
            ) from error
        self.own.update(map(id, self.memo.values()))
        return self.bound(made)

    def _reaches(self, value: Any, seen: set[int]) -> bool:
        """Whether it holds something of the network's, or a function that does."""
        waiting = [value]
        while waiting:
            part = waiting.pop()
            if id(part) in seen:
                continue
            seen.add(id(part))
            if id(part) in self.memo and isinstance(part, Tensor | nn.Module):
                return True
            if isinstance(part, types.FunctionType):
                if self.bound(part) is not part:
                    return True
            elif _has_parts(part):
                waiting += _parts(part)
        return False


def _has_parts(value: Any) -> bool:
    kinds = (*_CONTAINERS, functools.partial, types.MethodType)
    if isinstance(value, kinds):
        return True
    if isinstance(value, type | types.ModuleType | types.FunctionType | Tensor | nn.Module):
        return False
    return bool(_own_attributes(value)) or hasattr(type(value), "__slots__")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, _CONTAINERS):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    for _, part in _attributes(value):
        yield part


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from list(_own_attributes(value).items())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _own_attributes(value: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}


def _names(code: types.CodeType) -> set[str]:
    """The names that a function's code, and that of functions in it, may look up in its module."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _is_not(one: Any, other: Any) -> bool:
    return one is not other
