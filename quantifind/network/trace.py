"""The facts of a pass, product by product: which weights and activations, how many MACs."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quantifind.network.inputs import Inputs
from quantifind.network.modules import own_tensors, plain_copy, run
from quantifind.network.products import Product, visiting
from quantifind.tensor.matrices import Matrices, compatible, output_axis
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized
from quantifind.tensor.rotation import rotation_axis
from quantifind.utils.batches import as_batch, rows_of
from quantifind.utils.devices import evaluating

# what weights GPTQ can round are used in, in words
GPTQ_KINDS = ("linear", "convolution", "embedding", "other product")
Shape = Sequence[int]


@dataclass(frozen=True)
class ProductFacts:
    """One product of a pass.

    kind, weight, activations: as `quantifind.network.products.Product` has them.
    float_bits: how wide its two operands are in the float network, the weight first.
    macs: multiply-adds of one example in the mean, of all uses that a pass makes of the weight so;
        NaN where torch doesn't say what it computes.
    matrices: which elements of the weight are an output's; None where there is no telling.
    axis: the weight's axis of outputs.
    count: the weight's elements.
    uses: how often a pass of each batch has it.
    positions: in all batches, at which the weight as these matrices meets an input.
    meets: a number that those weights share which meet the same inputs in all their uses.
    """

    kind: str
    weight: str | None
    activations: tuple[str, ...]
    float_bits: tuple[int, int]
    macs: float
    matrices: Matrices | None = None
    axis: int = 0
    count: int = 0
    uses: tuple[int, ...] = (1,)
    positions: int = field(default=0, compare=False)
    meets: int = field(default=0, compare=False)

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


def trace(model: nn.Module, batches: Sequence[Any]) -> list[ProductFacts]:
    """The products of a pass of each batch, in the order in which they are first met, one entry for
    all that are alike.

    Products that `quantifind.network.products` doesn't see are left out, and those that nothing
    meets: an expert without a token.

    model: without parametrizations (`quantifind.network.modules.plain_copy`).
    batches: each as `quantifind.network.modules.run` takes it.
    Raises: ValueError for a batch without examples or that doesn't fit.
    """
    tensors = own_tensors(model)
    uses: dict[ProductFacts, list[int]] = {}
    totals: Counter[ProductFacts] = Counter()
    counted: dict[Any, dict[Shape, float]] = {}
    order: list[ProductFacts] = []
    places: dict[ProductFacts, int] = {}
    examples, place, index, met = 0, 0, 0, _Met()

    def visit(product: Product) -> Tensor:
        nonlocal place
        if not product.used:
            return product.compute(*product.operands)
        facts = _facts(product, tensors)
        # a stride is in the result's shape alone: test_macs_of_one_kernel_with_other_options
        of_result = counted.setdefault((facts, *(o.shape for o in product.operands)), {})
        if of_result:
            result = product.compute(*product.operands)
        if not of_result or result.shape not in of_result:
            result, count = _macs(product)
            of_result[result.shape] = count
        met.add(product, result)
        totals[facts] += of_result[result.shape]  # type: ignore[assignment]
        if facts not in places:  # after what came before it: test_what_a_later_batch_meets
            order.insert(place, facts)
            places.update((later, at) for at, later in enumerate(order[place:], place))
        place = max(place, places[facts] + 1)
        of_batches = uses.setdefault(facts, [])
        of_batches += [0] * (index + 1 - len(of_batches))
        of_batches[index] += 1
        return result

    with evaluating(model), visiting(model, visit):
        for index, given in enumerate(batches):  # noqa: B007
            batch = as_batch(given, model)
            if rows_of(batch.data) == 0:
                raise ValueError(f"{batch} has no example")
            examples, place = examples + len(batch), 0
            met.inputs.forget()
            run(model, batch)
    return [
        replace(
            facts,
            macs=totals[facts] / examples,
            uses=(*uses[facts], *(0,) * (len(batches) - len(uses[facts]))),
            positions=met.positions[facts.weight, facts.matrices],
            meets=met.number(facts.weight, facts.matrices),
        )
        for facts in order
    ]


class _Met:
    """What weights meet as some matrices: at how many positions, and which inputs."""

    def __init__(self) -> None:
        self.positions: Counter[tuple[str | None, Matrices | None]] = Counter()
        self.inputs = Inputs()
        self._of: dict[tuple[str | None, Matrices | None], list[int]] = {}
        self._first: dict[tuple[int, ...], int] = {}

    def add(self, product: Product, result: Tensor) -> None:
        meeting = product.meet()
        if meeting is not None:
            key, (groups, outputs, _) = (product.weight, meeting.matrices), meeting.matrices.shape
            self.positions[key] += result.numel() // max(groups * outputs, 1)
            number = self.inputs.number(product.operands[0], meeting.how)
            self._of.setdefault(key, []).append(number)

    def number(self, weight: str | None, matrices: Matrices | None) -> int:
        """The same for those that meet the same inputs."""
        inputs = tuple(self._of.get((weight, matrices), ()))
        return self._first.setdefault(inputs, len(self._first)) if inputs else -1


def _facts(product: Product, tensors: Mapping[str, Tensor]) -> ProductFacts:
    """Those of one product, without its MACs."""
    weight = None if product.weight is None else tensors[product.weight]
    operands = product.operands if weight is None else (weight, *product.operands)
    left, right = (8 * operand.element_size() for operand in operands)
    matrices, own = product.matrices, (product.kind, product.weight, product.activations)
    if weight is None:
        return ProductFacts(*own, (left, right), 0.0)
    axis = 0 if matrices is None else output_axis(matrices, weight.shape)
    return ProductFacts(*own, (left, right), 0.0, matrices, axis, weight.numel())


def _macs(product: Product) -> tuple[Tensor, float]:
    """The result of a product, and its multiply-adds."""
    with FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED) as counter:
        result = product.compute(*product.operands)
    flops = counter.get_total_flops()
    full = all(tensor.numel() for tensor in (*product.operands, result))
    known = flops or not full or product.kind == "embedding"
    return result, flops // 2 if known else math.nan


def weight_uses(facts: Sequence[ProductFacts]) -> dict[str, tuple[int, ...]]:
    """The weights in the order in which a pass uses them, and how often that of each batch does."""
    uses: dict[str, tuple[int, ...]] = {}
    for product in facts:
        if product.weight is not None:
            before = uses.get(product.weight, (0,) * len(product.uses))
            uses[product.weight] = tuple(map(sum, zip(before, product.uses, strict=True)))
    return uses


def gptq_weights(facts: Sequence[ProductFacts]) -> set[str]:
    """The weights that are matrices in all their uses, the same or parts with nothing in common."""
    return {
        weight
        for weight in weight_uses(facts)
        for used in [[product for product in facts if product.weight == weight]]
        if together([product.matrices for product in used], used[0].count)
    }


def check_rotation(name: str, shape: torch.Size, facts: Sequence[ProductFacts]) -> None:
    """Raise ValueError for a weight of a shape whose inputs can't be rotated."""
    used = [product for product in facts if product.weight == name]
    if any(product.kind == "embedding" for product in used):
        raise ValueError("an embedding is looked up, no inputs meet it: None is allowed")
    # where it is no matrix, GPTQ is refused in other words
    known = [product.matrices for product in used if product.matrices is not None]
    if known:
        rotation_axis(known, shape)


def rotatable(name: str, shape: torch.Size, facts: Sequence[ProductFacts]) -> bool:
    """Whether a weight of a shape has inputs that can be rotated."""
    try:
        check_rotation(name, shape, facts)
    except ValueError:
        return False
    return True


def together(uses: Iterable[Matrices | None], count: int) -> bool:
    """Whether a weight of so many elements is matrices in all its uses, and the same or disjoint
    ones."""
    known = set(uses)
    return None not in known and compatible([m for m in known if m is not None], count)


def output_axes(facts: Sequence[ProductFacts]) -> dict[str, int]:
    """By weight the axis of its outputs; of those used in several ways that of the most MACs."""
    most: dict[str, ProductFacts] = {}
    for product in facts:
        if product.weight is not None:
            known = most.setdefault(product.weight, product)
            if product.macs > known.macs:
                most[product.weight] = product
    return {weight: product.axis for weight, product in most.items()}


def activation_names(facts: Sequence[ProductFacts]) -> list[str]:
    """The activations that meet in products, in the order of the pass.

    An activation has the name of the weight that it meets; in a product of two activations, the
    name of the module that computes it, the number of the product in the module, and left or right.
    """
    # what looks up an embedding is whole numbers
    products = [product for product in facts if product.kind != "embedding"]
    return list(dict.fromkeys(name for product in products for name in product.activations))


def macs(model: nn.Module, batch: Any) -> list[ProductFacts]:
    """The products of `trace`, all of whose multiply-adds are known.

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
    products = trace(plain_copy(model), [batch])
    for product in products:
        if math.isnan(product.macs):
            raise ValueError(f"{product.activations[0]}: a {product.kind} of unknown MACs")
    return products


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
