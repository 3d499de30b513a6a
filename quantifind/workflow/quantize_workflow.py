"""Put a tensor, a network or a loader's inputs on 2^bit_depth uniform levels."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quantifind.quantize import quantize_model
from quantifind.schemes import uniform
from quantifind.strategy import uniform_strategy
from quantifind.tensor.scales import whole_number

BIT_DEPTHS = range(2, 33)


def check_depth(bit_depth: int) -> None:
    """Raise ValueError unless ``bit_depth`` is a whole number from 2 to 32."""
    whole_number("bit depth", bit_depth, "it takes", BIT_DEPTHS[0], BIT_DEPTHS[-1])


class BitQuantizer:
    """The uniform grid at one bit depth, 2 to 32."""

    def __init__(self, bit_depth: int) -> None:
        check_depth(bit_depth)
        self.bit_depth = bit_depth

    def quantize(self, tensor: Tensor) -> Tensor:
        """The tensor rounded to at most 2^bit_depth values, same shape, dtype and device.

        Integers and booleans are discrete already and come back unchanged.
        Raises: ValueError for NaN, infinity or complex numbers.
        """
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.clone()
        return uniform.quantize(tensor.detach(), self.bit_depth).dequantize()

    def quantize_model(self, model: nn.Module) -> nn.Module:
        """A deep copy with every parameter quantized, each with a scale of its own."""
        return quantize_model(model, uniform_strategy(model, self.bit_depth))

    def quantized_dataloader(self, loader: DataLoader) -> DataLoader:
        """The same loader, all its options kept, with its inputs quantized and its labels not.

        One scale serves the whole loader: its inputs are read once to find the largest. Batches are
        (inputs, labels); integer inputs, such as character codes, come unchanged.
        """
        # reading draws no random number: test_loader_passes_integer_inputs_and_draws_no_...
        generator = loader.generator
        state = generator.get_state() if isinstance(generator, torch.Generator) else None
        with torch.random.fork_rng(devices=[]):
            largest = _largest_input(loader)
        if state is not None:
            loader.generator.set_state(state)
        quantized = copy.copy(loader)
        quantized.collate_fn = partial(
            _collate_quantized, loader.collate_fn, self.bit_depth, largest
        )
        quantized._iterator = None  # persistent workers stay with the loader that started them
        return quantized


def _largest_input(batches: Iterable[Any]) -> float:
    """The largest |input| of batches (inputs, labels); 0 where inputs are integers."""
    return max(
        (
            inputs.abs().max().item()
            for inputs, _ in batches
            if inputs.is_floating_point() and inputs.numel()
        ),
        default=0.0,
    )


def _collate_quantized(
    collate: Callable[[Any], Any], bit_depth: int, largest: float, batch: Any
) -> list[Any]:
    """Inputs on 2^bit_depth levels that reach ``largest``; integers as they are."""
    inputs, labels = collate(batch)
    if inputs.is_floating_point():
        scale = 2 * largest / (2**bit_depth - 1)
        inputs = uniform.quantize(inputs, bit_depth, scale=scale).dequantize()
    return [inputs, labels]
