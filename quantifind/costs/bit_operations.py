"""Bit operations (BOPs) of one example's inference (UNIQ, arXiv:1804.10969; HAWQ-V3,
arXiv:2011.10680)."""

from collections.abc import Sequence

from torch import nn

from quantifind.network.folding import prepared_tensors
from quantifind.network.modules import named_tensors
from quantifind.network.trace import ProductFacts
from quantifind.tensor.quantized import Quantized


def measure(
    model: nn.Module, quantized: Quantized, products: Sequence[ProductFacts]
) -> dict[str, float]:
    """MACs times the widths of both operands, b_w · b_a, as HAWQ-V3 counts them: the bits
    of the sums, which UNIQ adds, are left out.

    A width is that of the codes, whatever their grid, in whole bits: three levels have 2; a float
    has its own.

    products: as `quantifind.network.trace.macs` returns them.
    Returns: by name of a parameter or buffer that is a weight, or of the left operand of a product
        of two activations; 0 for parameters in no product, such as biases.

    >>> import torch
    >>> from quantifind.network.trace import macs
    >>> net = nn.Linear(3, 2)
    >>> measure(net, Quantized({}), macs(net, torch.zeros(5, 3)))
    {'weight': 6144.0, 'bias': 0.0}
    """
    cost = dict.fromkeys(named_tensors(prepared_tensors(model, quantized.folded)), 0.0)
    for product in products:
        left, right = product.bits(quantized)
        cost[product.name] = cost.get(product.name, 0.0) + product.macs * left * right
    return cost
