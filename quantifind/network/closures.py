"""Functions of a copied network that keep to the copy: what they close over is the copy's, too."""

import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn


def rebind(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Give the functions and hooks of a network, in place, the copies of what they close over.

    `copy.deepcopy` takes a function as it is, so that ``self.act = lambda x: x * self.slope`` would
    compute with the slope of the network that was copied (test_functions_of_a_copy_are_its_own).

    memo: by id of what was copied, its copy, as `copy.deepcopy` fills it.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                bound = _bound(value, memo, found)
                if bound is not value:
                    module.__dict__[name] = bound


def _bound(value: Any, memo: Mapping[int, Any], found: dict[int, Any]) -> Any:
    """A function with the copies; anything else as it is, a list or dictionary with such functions
    in it, in place: both are the copy's own, and handles of hooks refer to theirs."""
    if id(value) in found:
        return found[id(value)]
    if isinstance(value, types.FunctionType):
        return _function(value, memo, found)
    if type(value) is functools.partial:
        function = _bound(value.func, memo, found)
        if function is not value.func:
            return functools.partial(function, *value.args, **value.keywords)
    elif type(value) is tuple:
        items = tuple(_bound(item, memo, found) for item in value)
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return items
    elif type(value) in (list, dict, OrderedDict):
        found[id(value)] = value
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _bound(item, memo, found)
            if new is not item:
                value[key] = new
    return value


def _function(
    function: types.FunctionType, memo: Mapping[int, Any], found: dict[int, Any]
) -> types.FunctionType:
    cells = function.__closure__ or ()
    copied = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(types.CellType() for _ in cells),
    )
    copied.__kwdefaults__, copied.__qualname__ = function.__kwdefaults__, function.__qualname__
    copied.__dict__.update(vars(function))
    # first, for a function that closes over itself
    found[id(function)] = copied
    changed = False
    for old, new in zip(cells, copied.__closure__ or (), strict=True):
        try:
            value = old.cell_contents
        except ValueError:  # an empty cell
            continue
        new.cell_contents = _copy_of(value, memo, found)
        changed |= new.cell_contents is not value and new.cell_contents is not copied
    defaults = tuple(_copy_of(value, memo, found) for value in function.__defaults__ or ())
    if any(new is not old for new, old in zip(defaults, function.__defaults__ or (), strict=True)):
        copied.__defaults__, changed = defaults, True
    if not changed:
        found[id(function)] = function
    return found[id(function)]


def _copy_of(value: Any, memo: Mapping[int, Any], found: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    return _bound(value, memo, found) if isinstance(value, types.FunctionType) else value
