"""In which layout and batch size this machine passes a network's examples the fastest: timed once,
and remembered."""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
from platformdirs import user_cache_dir
from torch import Tensor, nn

from quantifind.network.modules import own_tensors
from quantifind.runtime.onednn import laying_out_once
from quantifind.storage.store import fingerprint
from quantifind.utils.devices import device_of, evaluating

# sizes of batches that are tried, the large ones on a GPU; with few examples, the default is taken
SIZES = (32, 64, 128, 512)
LARGE = (2048, 8192, 32768)
DEFAULT, FEW = 64, 512
# a part of the name of what is remembered, to be raised where passes themselves have changed
PASSES = 3
# how often a layout and size is timed; what takes longer than the fastest so far by this factor is
# not timed again, nor are larger sizes
ROUNDS, SLOWER = 4, 1.3
# seconds: a timing may end after the first, and no batch that takes the second is tried, which
# would gain nothing and might not fit in memory
BRIEF, LONGEST = 0.1, 0.25
REMEMBERED = Path(user_cache_dir("quantifind")) / "layouts.json"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}


@torch.inference_mode(False)
@torch.no_grad()
def to_layout(model: nn.Module, layout: str) -> None:
    """Lay a network's tensors of convolutions out so, in place."""
    for tensor in own_tensors(model).values():
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=FORMATS[layout])


def in_layout(inputs: Tensor, layout: str) -> Tensor:
    """Inputs (examples, …); if they are images (examples, channels, height, width), laid out so."""
    if layout == CONTIGUOUS or inputs.dim() != 4:
        return inputs.contiguous()
    _, channels, height, width = inputs.shape
    if channels > 1:
        return inputs.contiguous(memory_format=torch.channels_last)
    # with one channel both layouts are the same memory, but a convolution goes by the strides:
    # test_one_channel_is_laid_out_too
    strides = (height * width, 1, width, 1)
    return inputs.contiguous().as_strided(inputs.shape, strides)


def fastest(model: nn.Module, inputs: Tensor) -> tuple[str, int]:
    """Layout and batch size: timed, or remembered; the default for few examples.

    inputs: (examples, …). Errors: none for what fails while it is timed, which is not taken.
    """
    if len(inputs) < FEW:
        return CONTIGUOUS, DEFAULT
    device = device_of(model)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.node()
    own = {name: [list(t.shape), str(t.dtype)] for name, t in own_tensors(model).items()}
    size = min(len(inputs), max(_sizes(device)))
    facts = [str(model), own, list(inputs.shape[1:]), str(inputs.dtype), str(device), on, size]
    key = fingerprint(PASSES, *facts, torch.get_num_threads(), torch.__version__)[:24]
    if found := _remembered().get(key):
        return found
    found = _timed(model, inputs)
    # read again, since others may have written meanwhile: test_no_timing_of_others_is_lost
    remembered = _remembered() | {key: found}
    with suppress(OSError):  # test_a_folder_that_cannot_be_written_is_no_error
        REMEMBERED.parent.mkdir(parents=True, exist_ok=True)
        partial = REMEMBERED.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(remembered, indent=1))
        os.replace(partial, REMEMBERED)
    return found


def _sizes(device: torch.device) -> tuple[int, ...]:
    return SIZES + LARGE if device.type == "cuda" else SIZES


def _remembered() -> dict[str, tuple[str, int]]:
    try:
        found = json.loads(REMEMBERED.read_text())
        return {
            key: (layout, size)
            for key, (layout, size) in found.items()
            if layout in FORMATS and size in SIZES + LARGE
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # is timed anew: test_a_damaged_memory_of_layouts_is_none


def _timed(model: nn.Module, inputs: Tensor) -> tuple[str, int]:
    """The fastest of all layouts and sizes, timed in turn, so that what else the machine does meets
    each alike."""
    convolves = any(tensor.dim() == 4 for tensor in own_tensors(model).values())
    layouts = list(FORMATS) if convolves and inputs.dim() == 4 else [CONTIGUOUS]
    taken: dict[tuple[str, int], float] = {}
    with evaluating(model), laying_out_once(model):
        for layout in layouts:
            for size in _sizes(device_of(model)):
                least = min(taken.values(), default=0.0)
                if size > len(inputs) or (size > SIZES[0] and size * least > LONGEST):
                    break
                taken[layout, size] = _seconds(model, inputs, layout, size)
                if taken[layout, size] > SLOWER * min(taken.values()):
                    break
        least = min(taken.values())
        rounds = {tried: [taken[tried]] for tried in taken if taken[tried] <= SLOWER * least}
        for _ in range(ROUNDS - 1):
            for tried in rounds:
                rounds[tried].append(_seconds(model, inputs, *tried))
    # not the least of each, which on a busy machine is luck
    return min(rounds, key=lambda tried: sum(rounds[tried]))


def _seconds(model: nn.Module, inputs: Tensor, layout: str, size: int) -> float:
    """Of an example; infinite where the pass fails."""
    device = device_of(model)
    to_layout(model, layout)
    try:
        some = in_layout(inputs[: max(size, 4 * FEW)].to(device, copy=True), layout)
        model(some[:size])  # warms up
        _wait(device)
        done, started = 0, time.perf_counter()
        for part in some.split(size):
            model(part)
            done += len(part)
            if device.type == "cpu" and time.perf_counter() - started > BRIEF:
                break
        _wait(device)
        return (time.perf_counter() - started) / done
    except (RuntimeError, MemoryError):
        return float("inf")  # is not taken: test_what_fails_while_timed_is_not_taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
