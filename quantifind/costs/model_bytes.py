"""Bytes of the stored network: packed codes, scales, zero points and codebooks, and what stays in
float, as `quantifind.quantize.mean_bits` counts them."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from quantifind.network.macs import ProductCount
from quantifind.network.modules import named_tensors
from quantifind.tensor.quantized import Quantized


def measure(
    model: nn.Module, quantized: Quantized, products: Sequence[ProductCount]
) -> dict[str, float]:
    """Bytes of each parameter, with the scale and zero point of the activations that meet it.

    products: not needed.
    Returns: by name of a parameter, a quantized buffer, or a site of a product of two activations.

    >>> measure(nn.Linear(3, 2), Quantized({}), [])
    {'weight': 24.0, 'bias': 8.0}
    """
    cost = {
        name: float(value.numel() * value.element_size())
        for name, value in named_tensors(model).items()
    }
    cost |= {name: tensor.stored_bits / 8 for name, tensor in quantized.tensors.items()}
    for site, levels in quantized.activations.items():
        beside = replace(levels, codes=levels.codes[:0]).stored_bits / 8
        cost[site] = cost.get(site, 0.0) + beside
    return cost
