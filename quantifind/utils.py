"""Console, device, memory, and whether weights fit a network."""

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

console = Console(stderr=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar of ``total`` steps, quiet but on a terminal and in a notebook.

    Yields a function to call after each step, with text to show beside the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    quiet = not (console.is_terminal or console.is_jupyter)
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda note="", steps=1: bar.update(task, advance=steps, note=note)


def device() -> "torch.device":
    """The CUDA device where there is one, else the CPU.

    Apple's MPS is left out: it has no float64, in which codes are computed.
    """
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: "nn.Module") -> "torch.device":
    """Where a model's tensors are; the CPU for a model without any."""
    import torch

    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next pass; it would give it back to the system, and take
    it anew page by page, which takes longer than what is computed on it."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, 2**30)


def check_same_architecture(
    net: "nn.Module", weights: Mapping[str, "Tensor"], path: Path | str
) -> None:
    """Raise ValueError, naming up to three tensors, unless ``weights`` fit ``net``.

    path: the file that the weights come from.
    """
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    expected = {name: tensor.shape for name, tensor in net.state_dict().items()}
    different = [
        f"{name} is {_shape(shapes.get(name))}, not {_shape(expected.get(name))}"
        for name in sorted(shapes.keys() | expected.keys())
        if shapes.get(name) != expected.get(name)
    ]
    if different:
        raise ValueError(
            f"{path}: a checkpoint of another architecture: {'; '.join(different[:3])}"
            + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
        )


def _shape(shape: "torch.Size | None") -> str:
    return "missing" if shape is None else str(list(shape))
