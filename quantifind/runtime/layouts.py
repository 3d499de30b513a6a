"""The memory layout and the batch size in which a network passes its examples."""

from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.memory import blocks
from quantifind.network.modules import own_tensors
from quantifind.utils.batches import Batch, moved, tensors_of
from quantifind.utils.devices import device_of

CPU_BATCH, GPU_BATCH = 256, 4_096
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
FORMATS = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}


def layout_and_batch(model: nn.Module, examples: Batch) -> tuple[str, int]:
    """Layout and batch size for examples: by a rule, not timed, since other batches
    give other digits (test_two_processes_give_the_same_digits)."""
    images = any(tensor.dim() == 4 for tensor in tensors_of(examples.data))
    convolves = images and any(t.dim() == 4 for t in own_tensors(model).values())
    batch = GPU_BATCH if device_of(model).type == "cuda" else CPU_BATCH
    return CHANNELS_LAST if convolves else CONTIGUOUS, batch


@torch.no_grad()
def to_layout(model: nn.Module, layout: str) -> None:
    """Give the tensors of a network's convolutions this layout, in place. Those that share memory
    stay: they would no longer share it (test_views_follow_wherever_they_are_measured)."""
    apart = {
        block[0]
        for block in blocks(dict(model.named_parameters()) | dict(model.named_buffers()))
        if len(block) == 1
    }
    for name, tensor in own_tensors(model).items():
        if tensor.dim() == 4 and name in apart:
            tensor.data = tensor.data.contiguous(memory_format=FORMATS[layout])


def in_layout(inputs: Tensor, layout: str) -> Tensor:
    """Images (examples, channels, height, width) in this layout; other inputs contiguous."""
    if layout == CONTIGUOUS or inputs.dim() != 4:
        return inputs.contiguous()
    _, channels, height, width = inputs.shape
    if channels > 1:
        return inputs.contiguous(memory_format=torch.channels_last)
    # with one channel both layouts are the same memory, but a convolution goes by the strides:
    # test_one_channel_is_laid_out_too
    strides = (height * width, 1, width, 1)
    return inputs.contiguous().as_strided(inputs.shape, strides)


def on_device(device: torch.device, data: Any) -> Any:
    """On the device, where a quarter of its free memory holds it; else it goes batch by batch."""
    size = sum(tensor.nbytes for tensor in tensors_of(data))
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 4:
        return data
    return moved(data, device)
