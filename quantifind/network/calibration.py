"""What calibration examples tell of a network's layers: the second moments of what meets a weight,
and what the float network makes of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.meetings import CHUNK
from quantifind.network.modules import own_tensors, run
from quantifind.network.products import Product, visiting
from quantifind.network.trace import together
from quantifind.tensor.gptq import Moments
from quantifind.tensor.matrices import Matrices
from quantifind.utils.batches import Batch, Forward, batches_of, kept, tensors_of
from quantifind.utils.devices import evaluating

Batches = Sequence[Batch]
Round = Callable[[Product], Product]


def _as_it_is(product: Product) -> Product:
    return product


def calibration_batches(
    batches: Iterable[Any] | None, model: nn.Module, forward: Forward | None = None
) -> Batches:
    """Batches kept, so that every pass sees the same.

    batches: of any kind that `quantifind.utils.batches.batches_of` takes, with a model and forward.
    Raises: ValueError where there is none, none with an example, and for inputs with NaN.
    """
    given = kept(batches_of([] if batches is None else batches, model, forward=forward))
    for batch in given:
        first = tensors_of(batch.data)[:1]
        if bad := sum(int((~tensor.isfinite()).sum()) for tensor in first):
            raise ValueError(f"calibration inputs: {bad} are NaN or infinite")
    if not given:
        raise ValueError("calibration has no examples: give batches of training data")
    return given


def second_moments(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """By weight, the mean square of the input that each of its elements meets.

    Returns: tensors that broadcast against the weight: of its shape, or (vocabulary, 1), how often
        each entry is looked up, for an embedding.
    """
    sums: dict[str, Tensor] = {}
    weights = own_tensors(model)

    def visit(product: Product) -> Tensor:
        matrices = product.matrices
        if product.weight is not None and matrices is not None and product.used:
            weight = weights[product.weight]
            # an embedding's by entry
            entries = product.kind == "embedding"
            shape = (len(weight), 1) if entries else weight.shape
            power = torch.zeros(shape, dtype=torch.float64, device=weight.device)
            if entries:
                first, count = matrices.offset // weight[0].numel(), matrices.shape[1]
                power[first : first + count, 0] += _look_ups(product, count)
            else:
                chunks = input_rows(product)
                found = torch.stack([x.double().square().sum(1) for x in chunks]).sum(0)
                matrices.put(power, found.unsqueeze(1))  # (groups, 1, inputs)
            sums[product.weight] = sums.get(product.weight, 0) + power
        return product.compute(*product.operands)

    with evaluating(model), visiting(model, visit):
        for batch in batches:
            run(model, batch)
    return {name: total / total.mean().clamp(min=1e-300) for name, total in sums.items()}


@torch.no_grad()
def layer_moments(
    model: nn.Module,
    name: str,
    batches: Batches,
    uses: Sequence[int],
    *,
    work: nn.Module | None = None,
    rounded: Round = _as_it_is,
) -> dict[Matrices, Moments]:
    """Moments of the inputs that a weight meets, by matrix of it.

    model: the float network, whose outputs are wanted.
    name: of the weight.
    batches: as `calibration_batches` gives them.
    uses: how often a pass of each batch uses the weight (`quantifind.network.trace.weight_uses`).
    work: the same network, in part quantized, whose inputs the weight meets; the float network by
        default, and for a batch of which the two choose other values, as where tokens go to other
        experts: there is nothing to pair.
    rounded: a product of ``work`` → the same with its operands on their levels.
    Raises: ValueError for a use in which the weight is no matrix, for uses of the same elements as
        other matrices, and for inputs that are not finite.
    """
    weight = own_tensors(model)[name]
    moments: dict[Matrices, Moments] = {}
    for batch in _paired_uses(model, work, name, batches, uses, rounded):
        waiting: dict[Matrices, list[tuple[Product, Tensor]]] = {}
        for product, target in batch:
            matrices = product.matrices
            if matrices is None:
                raise ValueError(
                    f"rounding 'gptq': it is no matrix in a {product.kind.replace('_', ' ')} that "
                    "a pass uses it in; round it to 'nearest'"
                )
            if product.kind == "embedding":
                found = moments.setdefault(matrices, _no_moments(weight, matrices))
                before = 0.0 if found.counts is None else found.counts
                found.counts = before + _look_ups(product, matrices.shape[1])
                continue
            if product.bias is not None:
                target = target - _along_outputs(product.bias, product)
            waiting.setdefault(matrices, []).append((product, target))
        for matrices, products in waiting.items():
            _add(moments, weight, matrices, products)
    if any(not found.inputs.isfinite().all() for found in moments.values()):
        raise ValueError("its inputs on calibration data are NaN or infinite")
    if not together(moments, weight.numel()):
        raise ValueError(
            "rounding 'gptq': a pass uses it whole and in parts, or its rows and its columns; "
            "round it to 'nearest'"
        )
    return moments


def _no_moments(weight: Tensor, matrices: Matrices) -> Moments:
    _, outputs, inputs = matrices.shape
    options: Any = {"dtype": torch.float64, "device": weight.device}
    return Moments(torch.zeros(inputs, inputs, **options), torch.zeros(outputs, inputs, **options))


def _look_ups(product: Product, count: int) -> Tensor:
    """How often each of so many entries is looked up; in bags, how much its error counts."""
    shares = None if product.shares is None else product.shares()
    return product.operands[0].flatten().bincount(shares, minlength=count).double()


def _add(
    moments: dict[Matrices, Moments],
    weight: Tensor,
    matrices: Matrices,
    uses: Sequence[tuple[Product, Tensor]],
) -> None:
    """Add what a batch's uses of a weight as some matrices tell."""
    _, count, _ = matrices.shape
    each = [moments.setdefault(m, _no_moments(weight, m)) for m in matrices.each()]
    for chunk, outputs in _joined(uses):
        # sums of half precision would lose what they add: test_half_precision_is_summed_in_full
        precise = torch.promote_types(outputs.dtype, torch.float32)
        for group, found in enumerate(each):
            part = outputs[:, group * count : (group + 1) * count]
            found.add(chunk[group].to(precise), part.to(precise))


def _joined(uses: Sequence[tuple[Product, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (groups, positions, inputs) and wanted outputs (positions, groups · outputs), those of
    the steps of a recurrent layer in one."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for product, target in uses:
        done, wanted = 0, output_rows(product, target)
        for chunk in input_rows(product):
            held = sum(rows.numel() for rows, _ in waiting)
            if waiting and held + chunk.numel() > CHUNK:
                yield _together(waiting)
                waiting = []
            waiting.append((chunk, wanted[done : done + chunk.shape[1]]))
            done += chunk.shape[1]
    yield _together(waiting)


def _together(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    rows, outputs = zip(*parts, strict=True)
    return torch.cat(rows, 1), torch.cat(outputs)


class _LastUse(Exception):
    """Ends a pass: what follows is not needed."""


@dataclass
class _Uses:
    """Of a pass the products with a weight, and their results; the values by which the pass chose
    and moved others, and how many it had when each product came."""

    products: list[Product] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    before: list[int] = field(default_factory=list)

    def pairs_with(self, other: "_Uses") -> bool:
        """Whether each product meets the same tokens in both."""
        if self.before != other.before or len(self.products) != len(other.products):
            return False
        shapes = [[o.shape for p in uses.products for o in p.operands] for uses in (self, other)]
        count = self.before[-1] if self.before else 0
        both = zip(self.chosen[:count], other.chosen[:count], strict=True)
        return shapes[0] == shapes[1] and all(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in both
        )


def _paired_uses(
    model: nn.Module,
    work: nn.Module | None,
    name: str,
    batches: Batches,
    uses: Sequence[int],
    rounded: Round,
) -> Iterator[list[tuple[Product, Tensor]]]:
    """By batch, each product with the weight in ``work``, and the float network's result."""
    for batch, count in zip(batches, uses, strict=True):
        if not count:
            continue
        wanted = _uses(model, name, batch, count, _as_it_is, choices=work is not None)
        products = wanted.products
        if work is not None:
            met = _uses(work, name, batch, count, rounded, choices=True, compute_last=False)
            # else its own inputs: test_tokens_that_go_elsewhere_are_not_paired
            paired = wanted.pairs_with(met)
            products = met.products if paired else [rounded(p) for p in wanted.products]
        yield [*zip(products, wanted.results, strict=True)]


def _uses(
    model: nn.Module,
    name: str,
    batch: Batch,
    count: int,
    rounded: Round,
    *,
    choices: bool,
    compute_last: bool = True,
) -> _Uses:
    """Those of a pass up to so many; the last one's result only where it is asked for."""
    found = _Uses()

    def note(chosen: Tensor) -> None:
        found.chosen.append(chosen.clone())

    def visit(product: Product) -> Tensor:
        product = rounded(product)
        if product.weight != name or not product.used:
            return product.compute(*product.operands)
        found.products.append(product)
        found.before.append(len(found.chosen))
        if len(found.products) == count:
            if compute_last:
                found.results.append(product.compute(*product.operands))
            raise _LastUse
        # what follows may work in place on both: test_what_changes_in_place_is_taken_before
        operands = tuple(operand.clone() for operand in product.operands)
        found.products[-1] = replace(product, operands=operands)
        result = product.compute(*product.operands)
        found.results.append(result.clone())
        return result

    try:
        with evaluating(model), visiting(model, visit, note if choices else None):
            run(model, batch)
    except _LastUse:
        pass
    return found


def input_rows(product: Product) -> Iterator[Tensor]:
    """What the weight's matrices are multiplied with, in chunks (groups, positions, inputs)."""
    meeting = product.meet()
    assert meeting is not None
    return meeting.rows(*product.operands)


def output_rows(product: Product, result: Tensor) -> Tensor:
    """(positions, groups · outputs), in the order of `input_rows`."""
    meeting = product.meet()
    assert meeting is not None
    return meeting.outputs(result)


def _along_outputs(bias: Tensor, product: Product) -> Tensor:
    return bias.reshape(-1, *(1,) * product.spatial) if product.spatial else bias
