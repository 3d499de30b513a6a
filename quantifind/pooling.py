"""Max pooling before ReLU instead of after it: the same values and gradients, fewer to compute."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def pool_first(model: nn.Module) -> list[tuple[nn.Sequential, int]]:
    """Swap, in place, each ReLU with the max pooling that follows it in an `nn.Sequential`, but for
    those with hooks. Returns where: the first of two swapped."""
    swapped = []
    for module in model.modules():
        if type(module) is nn.Sequential:
            for i in range(len(module) - 1):
                relu, pool = module[i], module[i + 1]
                plain = type(relu) is nn.ReLU and type(pool) in POOLS and not pool.return_indices
                if plain and not any(map(_has_hooks, (relu, pool))):
                    module[i], module[i + 1] = pool, relu
                    swapped.append((module, i))
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


def _has_hooks(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in hooks)
