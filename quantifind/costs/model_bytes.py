"""Bytes of the stored network: packed codes, scales, zero points and codebooks, and what stays in
float, as `quantifind.quantize.mean_bits` counts them."""

from collections.abc import Sequence

from torch import nn

from quantifind.network.folding import prepared_tensors
from quantifind.network.modules import stored_bytes
from quantifind.network.trace import ProductFacts
from quantifind.tensor.quantized import Quantized


def measure(
    model: nn.Module, quantized: Quantized, products: Sequence[ProductFacts]
) -> dict[str, float]:
    """Bytes of each parameter, with the scale and zero point of the activations that meet it, and
    of each buffer that inference needs (`quantifind.network.modules.stored_bytes`).

    products: not needed.
    Returns: by name of a parameter, a buffer, or an activation.

    >>> measure(nn.Linear(3, 2), Quantized({}), [])
    {'weight': 24.0, 'bias': 8.0}
    """
    stored = stored_bytes(prepared_tensors(model, quantized.folded))
    cost = {name: float(size) for name, size in stored.items()}
    cost |= {name: tensor.stored_bits / 8 for name, tensor in quantized.tensors.items()}
    for name, qparams in quantized.activations.items():
        cost[name] = cost.get(name, 0.0) + qparams.stored_bits / 8
    return cost
