"""Bit operations (BOPs) of one example's inference (UNIQ, arXiv:1804.10969; HAWQ-V3,
arXiv:2011.10680)."""

from collections.abc import Sequence

from torch import nn

from quantifind.network.macs import ProductCount
from quantifind.network.modules import named_tensors
from quantifind.tensor.quantized import Quantized


def measure(
    model: nn.Module, quantized: Quantized, products: Sequence[ProductCount]
) -> dict[str, float]:
    """Multiply-adds times the widths of both operands, b_w · b_a, as HAWQ-V3 counts them: the bits
    of the sums, which UNIQ adds, are left out.

    A width is that of the codes, whatever their grid, in whole bits: three levels have 2; a float
    has its own.

    products: as `quantifind.network.macs.multiply_adds` returns them.
    Returns: by name of a parameter or buffer that is a weight, or of the left site of a product of
    two activations; 0 for parameters in no product, such as biases.

    >>> import torch
    >>> from quantifind.network.macs import multiply_adds
    >>> net = nn.Linear(3, 2)
    >>> measure(net, Quantized({}), multiply_adds(net, torch.zeros(5, 3)))
    {'weight': 6144.0, 'bias': 0.0}
    """
    cost = dict.fromkeys(named_tensors(model), 0.0)
    for product in products:
        left, right = product.bits(quantized)
        cost[product.name] = cost.get(product.name, 0.0) + product.multiply_adds * left * right
    return cost
