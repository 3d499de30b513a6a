"""Where networks are, and how their passes are run: device, memory, mode, precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from quantifind.utils import memory

# of what is free, the share that moments of calibration inputs may take, and the least in bytes
SHARE, LEAST = 4, 2**28


def device() -> torch.device:
    """The CUDA device where there is one, else the CPU.

    Apple's MPS is left out: it has no float64, in which codes are computed.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are; the CPU for a model without any."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def allowed_bytes(where: torch.device) -> int:
    """Of the memory of a device, how much is taken at most where nobody says: a quarter of what is
    free, and 256 MB in any case."""
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else memory.free_bytes()
    return max(LEAST, free // SHARE)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, in full float32; each module gets back the mode it had."""
    training = {module: module.training for module in model.modules()}
    # within autocast, weights that are put in place would be those of before:
    # test_each_width_has_its_own_result_within_autocast
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        model.eval()
        # on a GPU convolutions would round their inputs to TF32's 10 bits
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for module, mode in training.items():
            module.training = mode


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch raises a plain RuntimeError on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "not enough memory" in str(error) or "out of memory" in str(error)
    )
