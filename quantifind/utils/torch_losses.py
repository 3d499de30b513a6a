"""torch's losses as functions are its modules."""

import functools
import inspect
from typing import Any

import torch.nn.functional as F
from torch import nn


def as_module(criterion: Any) -> Any:
    """The module that does what one of torch's functions does, perhaps with options, such as
    ``partial(F.cross_entropy, label_smoothing=0.1)``; any other criterion as it is.

    >>> as_module(functools.partial(F.huber_loss, delta=2.0)).delta
    2.0
    """
    function, options = criterion, {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        function, options = criterion.func, criterion.keywords
    kind = _modules().get(function) if inspect.isfunction(function) else None
    if kind is None:
        return criterion
    try:
        inspect.signature(kind).bind(**options)
    except TypeError:  # of what the module has no option for
        return criterion
    return kind(**options)


@functools.cache
def _modules() -> dict[Any, type[nn.Module]]:
    """By each function its module, of nearly the same name."""
    losses: dict[str, Any] = vars(inspect.getmodule(nn.L1Loss))
    kinds = {_letters(name): kind for name, kind in losses.items() if name.endswith("Loss")}
    functions = {_letters(name): f for name, f in vars(F).items() if inspect.isfunction(f)}
    return {functions[name]: kinds[name] for name in functions.keys() & kinds.keys()}


def _letters(name: str) -> str:
    letters = name.lower().replace("_", "").removesuffix("loss")
    return letters.replace("binarycrossentropy", "bce")
