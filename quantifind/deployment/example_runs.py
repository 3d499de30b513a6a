"""Passes of a network on an example, which stays as it was."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def made_by(run: nn.Module, args: Any, kwargs: Any, seed: int = 0) -> list[Any] | None:
    """What it gives, by the same random numbers for a seed; None where it fails."""
    args, kwargs = copied((args, kwargs))
    devices = {v.device for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        torch.manual_seed(seed)
        try:
            return tree_leaves(run(*args, **kwargs))
        except Exception:  # of any code
            return None


def agree(wanted: list[Any], given: list[Any] | None, *, exactly: bool = False) -> bool:
    """Whether two passes gave the same, or nearly."""
    near = 0.0 if exactly else 1.0
    if given is None or len(wanted) != len(given):
        return False
    pairs = [(a, b) for a, b in zip(wanted, given, strict=True) if isinstance(a, Tensor)]
    return all(
        isinstance(b, Tensor)
        and a.shape == b.shape
        and torch.allclose(a, b, rtol=1e-2 * near, atol=1e-4 * near, equal_nan=True)
        for a, b in pairs
    )


def copied(example: Any) -> Any:
    """Its tensors are copies, since a network may work in place."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
