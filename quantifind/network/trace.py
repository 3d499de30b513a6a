"""The facts of one pass, product by product: which weights and activations, how many MACs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quantifind.network.modules import own_tensors, plain_copy, run
from quantifind.network.products import Product, visiting
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import as_batch, rows_of
from quantifind.utils.devices import evaluating

# kinds of products whose weights GPTQ can round
GPTQ_KINDS = ("linear", "convolution", "embedding")
Shape = Sequence[int]


@dataclass(frozen=True)
class ProductFacts:
    """One product of a pass.

    kind, weight, activations: as `quantifind.network.products.Product` has them.
    float_bits: how wide its two operands are in the float network, the weight first.
    macs: multiply-adds of one example, NaN where torch doesn't say what it computes.
    """

    kind: str
    weight: str | None
    activations: tuple[str, ...]
    float_bits: tuple[int, int]
    macs: float

    @property
    def name(self) -> str:
        """Under which a cost is entered: the weight, or the left operand where there is none."""
        return self.activations[0] if self.weight is None else self.weight

    def operands(self, quantized: Quantized) -> list[QParams | None]:
        """Both operands, the weight first; None for one that stays in float."""
        right = quantized.activations.get(self.activations[-1])
        if self.weight is None:
            return [quantized.activations.get(self.name), right]
        weight = quantized.tensors.get(self.weight)
        return [None if weight is None else weight.qparams, right]

    def bits(self, quantized: Quantized) -> list[int]:
        """Widths of both operands, the weight first: whole, so 2 where there are three levels."""
        return [
            width if operand is None else (operand.grid.levels - 1).bit_length()
            for operand, width in zip(self.operands(quantized), self.float_bits, strict=True)
        ]


def trace(model: nn.Module, batch: Any) -> list[ProductFacts]:
    """The products of a pass, in their order.

    Products that `quantifind.network.products` doesn't see are left out.

    model: without parametrizations (`quantifind.network.modules.plain_copy`).
    batch: as `quantifind.network.modules.run` takes it.
    Raises: ValueError for a batch without examples or that doesn't fit.
    """
    batch = as_batch(batch, model)
    if rows_of(batch.data) == 0:
        raise ValueError(f"{batch} has no example")
    tensors = own_tensors(model)
    facts: list[ProductFacts] = []

    def visit(product: Product) -> Tensor:
        with FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED) as counter:
            result = product.compute(*product.operands)
        flops = counter.get_total_flops()
        full = all(operand.numel() for operand in (*product.operands, result))
        known = flops or not full or product.kind == "embedding"
        weights = [] if product.weight is None else [tensors[product.weight]]
        left, right = (8 * operand.element_size() for operand in (*weights, *product.operands))
        facts.append(
            ProductFacts(
                product.kind,
                product.weight,
                product.activations,
                (left, right),
                flops // 2 / len(batch) if known else math.nan,
            )
        )
        return result

    with evaluating(model), visiting(model, visit):
        run(model, batch)
    return facts


def weight_uses(facts: Sequence[ProductFacts]) -> Counter[str]:
    """The weights in the order in which a pass uses them, and how often."""
    return Counter(product.weight for product in facts if product.weight is not None)


def gptq_weights(facts: Sequence[ProductFacts]) -> set[str]:
    """The weights whose uses are all of `GPTQ_KINDS`."""
    other = {product.weight for product in facts if product.kind not in GPTQ_KINDS}
    return set(weight_uses(facts)) - other


def activation_names(facts: Sequence[ProductFacts]) -> list[str]:
    """The activations that meet in products, in the order of the pass.

    An activation has the name of the weight that it meets; in a product of two activations, the
    name of the module that computes it, the number of the product in the module, and left or right.
    """
    # what looks up an embedding is whole numbers
    products = [product for product in facts if product.kind != "embedding"]
    return list(dict.fromkeys(name for product in products for name in product.activations))


def macs(model: nn.Module, batch: Any) -> list[ProductFacts]:
    """The products of `trace`, one entry for all uses of a weight in the same kind of product.

    A product has as many multiply-adds (MACs) as its result has values, times the length of the
    axis that it sums over. Those with padding count; a bias, and the look-ups of an embedding, have
    none.

    model: any; weights that are parametrized have the names that strategies give them.
    batch: as `quantifind.network.modules.run` takes it.
    Raises: ValueError as `trace`, and for a product of which torch doesn't say what it computes.

    >>> for product in macs(nn.Conv1d(2, 6, 3), torch.zeros(5, 2, 10)):
    ...     print(product.kind, product.weight, product.macs)
    convolution weight 288.0
    """
    summed: dict[Any, ProductFacts] = {}
    for product in trace(plain_copy(model), as_batch(batch, model)):
        if math.isnan(product.macs):
            raise ValueError(f"{product.activations[0]}: a {product.kind} of unknown MACs")
        same = replace(product, macs=0.0)
        summed[same] = replace(same, macs=product.macs + summed.get(same, same).macs)
    return list(summed.values())


def _of_first(first: Shape, *_: Shape, out_shape: Shape, **__: float) -> int:
    return 2 * math.prod(first)


def _of_second(_: Shape, second: Shape, *__: Shape, out_shape: Shape, **___: float) -> int:
    return 2 * math.prod(second)


def _addbmm(_: Shape, left: Shape, right: Shape, *, out_shape: Shape, **__: float) -> int:
    return 2 * math.prod(left) * right[-1]


def _mul(*_: Shape, out_shape: Shape) -> int:
    return 2 * math.prod(out_shape)


# what torch's own counter leaves out: test_macs_of_functional_products
_ALSO_COUNTED = {
    torch.ops.aten.dot: _of_first,
    torch.ops.aten.mv: _of_first,
    torch.ops.aten.addmv: _of_second,
    torch.ops.aten.addbmm: _addbmm,
    torch.ops.aten.mul: _mul,  # which einsum takes where it sums over nothing
}
