"""Energy of one example's inference on a 45 nm chip: multiplying, adding, and reading parameters
(Horowitz, ISSCC 2014, doi:10.1109/ISSCC.2014.6757323)."""

from collections.abc import Sequence

from torch import nn

from quantifind.network.folding import prepared_tensors
from quantifind.network.modules import stored_bytes
from quantifind.network.trace import ProductFacts
from quantifind.tensor.quantized import Quantized

# picojoules
MULTIPLY_INT8, MULTIPLY_INT32, MULTIPLY_FLOAT32 = 0.2, 3.1, 3.7
ADD_INT32, ADD_FLOAT32 = 0.1, 0.9
READ_DRAM_BIT = 640 / 32


def measure(
    model: nn.Module, quantized: Quantized, products: Sequence[ProductFacts]
) -> dict[str, float]:
    """Picojoules of each parameter and each buffer that inference needs: its MACs, and reading its
    stored bits once from DRAM.

    Where both operands are on levels, a multiply-add multiplies integers of the widths of their
    codes and adds to an integer of 32 bits; a grid that is no integer's, such as a minifloat or
    powers of two, counts as an integer of its width. Where one is in float, on a stored codebook,
    which means nothing until it is looked up, or rotated, and so in float once it is turned back,
    it is a multiply-add of 32-bit floats, whatever the width. Reading activations, and caches, are
    left out.

    products: as `quantifind.network.trace.macs` returns them.
    Returns: by name of a parameter, a buffer, or the left operand of a product of two activations.
    """
    sizes = stored_bytes(prepared_tensors(model, quantized.folded))
    stored = {name: 8 * size for name, size in sizes.items()}
    stored |= {name: tensor.stored_bits for name, tensor in quantized.tensors.items()}
    cost = {name: READ_DRAM_BIT * bits for name, bits in stored.items()}
    rotated = {n for n, tensor in quantized.tensors.items() if tensor.rotation is not None}
    for product in products:
        operands = product.operands(quantized)
        floats = any(operand is None or operand.grid.stored for operand in operands)
        if floats or product.weight in rotated:
            each = MULTIPLY_FLOAT32 + ADD_FLOAT32
        else:
            left, right = product.bits(quantized)
            each = multiply_integers(left, right) + ADD_INT32
        cost[product.name] = cost.get(product.name, 0.0) + product.macs * each
    return cost


def multiply_integers(left_bits: int, right_bits: int) -> float:
    """Picojoules: the line in left · right bits through both published points, 8 × 8 and 32 × 32.

    A multiplier adds up left · right bits, and the line nearly meets 0 where there are none.

    >>> [round(multiply_integers(bits, bits), 3) for bits in (1, 4, 8, 32)]
    [0.01, 0.055, 0.2, 3.1]
    """
    slope = (MULTIPLY_INT32 - MULTIPLY_INT8) / (32 * 32 - 8 * 8)
    return MULTIPLY_INT8 + slope * (left_bits * right_bits - 8 * 8)
