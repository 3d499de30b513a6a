"""The multiply-adds of one example's pass, product by product, from which costs are computed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quantifind.network.modules import own_tensors, plain_copy, run
from quantifind.network.products import Product, visiting
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.devices import evaluating

Shape = Sequence[int]


@dataclass(frozen=True)
class ProductCount:
    """One product of a pass, or all that a weight has a part in at the same kind of product.

    kind, weight, sites: as `quantifind.network.products.Product` has them.
    float_bits: how wide its two operands are in the float network, the weight first.
    multiply_adds: of one example.
    """

    kind: str
    weight: str | None
    sites: tuple[str, ...]
    float_bits: tuple[int, int]
    multiply_adds: float

    @property
    def name(self) -> str:
        """Under which a cost is entered: the weight, or the left site where there is none."""
        return self.sites[0] if self.weight is None else self.weight

    def operands(self, quantized: Quantized) -> list[QuantizedTensor | None]:
        """Both operands, the weight first; None for one that stays in float."""
        left = quantized.activations if self.weight is None else quantized.tensors
        return [left.get(self.name), quantized.activations.get(self.sites[-1])]

    def bits(self, quantized: Quantized) -> list[int]:
        """Widths of both operands, the weight first: whole, so 2 where there are three levels."""
        return [
            width if operand is None else (operand.grid.levels - 1).bit_length()
            for operand, width in zip(self.operands(quantized), self.float_bits, strict=True)
        ]


def multiply_adds(model: nn.Module, batch_inputs: Tensor) -> list[ProductCount]:
    """The products of a pass in their order, with the mean of their multiply-adds over the batch.

    A product has as many as its result has values, times the length of the axis that it sums over.
    Those with padding count; a bias, and the look-ups of an embedding, have none.

    batch_inputs: (examples, …), as ``model`` takes them.
    Returns: one entry for all uses of a weight in the same kind of product. Products that
    `quantifind.network.products` doesn't see are left out.
    Errors: ValueError for inputs that are no example or don't fit, and for a product of which torch
    doesn't say what it computes.

    >>> for product in multiply_adds(nn.Conv1d(2, 6, 3), torch.zeros(5, 2, 10)):
    ...     print(product.kind, product.weight, product.multiply_adds)
    convolution weight 288.0
    """
    if not len(batch_inputs):
        raise ValueError(f"inputs of shape {list(batch_inputs.shape)} have no example")
    model = plain_copy(model)
    tensors = own_tensors(model)
    counts: Counter[tuple[str, str | None, tuple[str, ...], tuple[int, int]]] = Counter()

    def visit(product: Product) -> Tensor:
        with FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED) as counter:
            result = product.compute(*product.operands)
        flops = counter.get_total_flops()
        full = all(operand.numel() for operand in (*product.operands, result))
        if not flops and full and product.kind != "embedding":
            raise ValueError(f"{product.sites[0]}: a {product.kind} of unknown multiply-adds")
        weights = [] if product.weight is None else [tensors[product.weight]]
        left, right = (8 * operand.element_size() for operand in (*weights, *product.operands))
        counts[product.kind, product.weight, product.sites, (left, right)] += flops // 2
        return result

    with evaluating(model), visiting(model, visit):
        run(model, batch_inputs)
    return [ProductCount(*which, total / len(batch_inputs)) for which, total in counts.items()]


def _of_first(first: Shape, *_: Shape, out_shape: Shape, **__: float) -> int:
    return 2 * math.prod(first)


def _of_second(_: Shape, second: Shape, *__: Shape, out_shape: Shape, **___: float) -> int:
    return 2 * math.prod(second)


def _addbmm(_: Shape, left: Shape, right: Shape, *, out_shape: Shape, **__: float) -> int:
    return 2 * math.prod(left) * right[-1]


def _mul(*_: Shape, out_shape: Shape) -> int:
    return 2 * math.prod(out_shape)


# what torch's own counter leaves out: test_multiply_adds_of_functional_products
_ALSO_COUNTED = {
    torch.ops.aten.dot: _of_first,
    torch.ops.aten.mv: _of_first,
    torch.ops.aten.addmv: _of_second,
    torch.ops.aten.addbmm: _addbmm,
    torch.ops.aten.mul: _mul,  # which einsum takes where it sums over nothing
}
