"""Max pooling before ReLU instead of after it, which leaves fewer values to compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def pool_first(model: nn.Module) -> list[tuple[nn.Sequential, int]]:
    """Swap, in place, each ReLU with the max pooling that follows it, but for those with hooks.

    Only in an `nn.Sequential` that is the model or, through others, a part of it: a forward of
    another kind may use one of the two alone (test_what_may_be_gone_through_in_part_stays).
    Returns: the places, of the first of two swapped.
    """
    if type(model) is not nn.Sequential:
        return []
    swapped = [place for module in model for place in pool_first(module)]
    for i in range(len(model) - 1):
        relu, pool = model[i], model[i + 1]
        plain = type(relu) is nn.ReLU and type(pool) in POOLS and not pool.return_indices
        if plain and not _pads_whole_windows(pool) and not any(map(_has_hooks, (relu, pool))):
            model[i], model[i + 1] = pool, relu
            swapped.append((model, i))
    return swapped


@contextmanager
def pooling_first(model: nn.Module) -> Iterator[None]:
    """Within it, `pool_first`; then the model is as it was."""
    swapped = pool_first(model)
    try:
        yield
    finally:
        for module, i in reversed(swapped):
            module[i], module[i + 1] = module[i + 1], module[i]


def _pads_whole_windows(pool: Any) -> bool:
    """Whether a dilated window may hold nothing but padding, which is −∞, and no ReLU's."""
    padding, dilation = (np.ravel(given) for given in (pool.padding, pool.dilation))
    return bool(padding.any() and (dilation > 1).any())


def _has_hooks(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in hooks)
