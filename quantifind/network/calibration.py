"""What calibration examples tell of a network's layers: the second moments of what meets a weight,
and what the float network makes of it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantifind.network.modules import own_tensors, run
from quantifind.network.products import Product, visiting
from quantifind.network.trace import GPTQ_KINDS
from quantifind.tensor.gptq import Moments
from quantifind.utils.batches import Batch, Forward, batches_of, kept, tensors_of
from quantifind.utils.devices import evaluating

Batches = Sequence[Batch]
# elements of an unfolded input held at a time
CHUNK = 2**24
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

    Returns: tensors that broadcast against the weight: (1, inputs) for a linear map, (outputs,
    inputs of a group, kernel …) for a convolution; (vocabulary, 1), how often each entry is looked
    up, for an embedding.
    """
    sums: dict[str, Tensor] = {}
    weights = own_tensors(model)

    def visit(product: Product) -> Tensor:
        if product.weight is not None:
            weight = weights[product.weight]
            if product.kind == "embedding":
                first, last, _ = (product.rows or slice(None)).indices(len(weight))
                counts = product.operands[0].flatten().bincount(minlength=last - first)
                power = weight.new_zeros(len(weight), 1, dtype=torch.float64)
                power[first:last, 0] += counts
            elif product.kind in ("linear", "convolution"):
                chunks = input_rows(product, weight)
                power = torch.stack([x.double().square().sum(1) for x in chunks]).sum(0)
                # (groups, inputs) → each group's rows
                power = power.repeat_interleave(len(weight) // len(power), 0)
                power = power.reshape(weight.shape)
                if product.rows is not None:
                    part = torch.zeros_like(power)
                    part[product.rows] = power[product.rows]
                    power = part
            else:
                return product.compute(*product.operands)
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
    uses: int,
    *,
    work: nn.Module | None = None,
    rounded: Round = _as_it_is,
) -> dict[tuple[int, int], Moments]:
    """Moments of the inputs that a weight meets, by its rows (first, last + 1).

    model: the float network, whose outputs are wanted.
    name: of the weight.
    batches: as `calibration_batches` gives them.
    uses: how often a pass uses the weight.
    work: the same network, in part quantized, whose inputs the weight meets; the float network by
        default.
    rounded: a product of ``work`` → the same with its operands on their levels.
    Raises: ValueError for a use that is none of `GPTQ_KINDS`, and for inputs that are not finite.
    """
    weight = own_tensors(model)[name]
    moments: dict[tuple[int, int], Moments] = {}
    looked_up = None
    for product, target in _paired_uses(model, work, name, batches, uses, rounded):
        if product.kind not in GPTQ_KINDS:
            raise ValueError(
                f"rounding 'gptq': it is used in a {product.kind.replace('_', ' ')}; "
                f"{', '.join(GPTQ_KINDS)} are allowed"
            )
        first, last, _ = (product.rows or slice(None)).indices(len(weight))
        if product.kind == "embedding":
            looked_up = weight.new_zeros(len(weight)).double() if looked_up is None else looked_up
            counts = product.operands[0].flatten().bincount(minlength=last - first)
            looked_up[first:last] += counts
            continue
        if product.bias is not None:
            target = target - _along_outputs(product.bias, product)
        target = _output_rows(target, product)  # (positions, rows)
        # sums of half precision would lose what they add: test_half_precision_is_summed_in_full
        precise = torch.promote_types(target.dtype, torch.float32)
        for chunk, part in _chunks(product, weight, target):
            groups, _, inputs = chunk.shape
            rows = (last - first) // groups
            for group in range(groups):
                start = first + group * rows
                found = moments.setdefault((start, start + rows), _no_moments(weight, rows, inputs))
                outputs = part[:, group * rows : (group + 1) * rows]
                found.add(chunk[group].to(precise), outputs.to(precise))
    if any(not found.inputs.isfinite().all() for found in moments.values()):
        raise ValueError("its inputs on calibration data are NaN or infinite")
    spans = sorted(moments)
    if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError(
            "rounding 'gptq': a pass uses it whole and in parts; round it to 'nearest'"
        )
    if looked_up is not None:
        if not moments:
            moments[0, len(weight)] = _no_moments(weight, len(weight), weight[0].numel())
        for (first, last), found in moments.items():
            found.counts = looked_up[first:last]
    return moments


def _no_moments(weight: Tensor, rows: int, inputs: int) -> Moments:
    double = torch.float64
    return Moments(
        torch.zeros(inputs, inputs, dtype=double, device=weight.device),
        torch.zeros(rows, inputs, dtype=double, device=weight.device),
    )


class _LastUse(Exception):
    """Ends a pass: what follows is not needed."""


def _paired_uses(
    model: nn.Module,
    work: nn.Module | None,
    name: str,
    batches: Batches,
    uses: int,
    rounded: Round,
) -> Iterator[tuple[Product, Tensor]]:
    """Each product with the weight in ``work``, and the float network's result."""
    for batch in batches:
        products, targets = _uses(model, name, batch, uses, _as_it_is)
        if work is not None:
            products, _ = _uses(work, name, batch, uses, rounded, compute_last=False)
        yield from zip(products, targets, strict=True)


def _uses(
    model: nn.Module,
    name: str,
    batch: Batch,
    uses: int,
    rounded: Round,
    *,
    compute_last: bool = True,
) -> tuple[list[Product], list[Tensor]]:
    """The products with a weight, and their results; the last one's only where it is asked for."""
    products: list[Product] = []
    results: list[Tensor] = []

    def visit(product: Product) -> Tensor:
        product = rounded(product)
        if product.weight != name:
            return product.compute(*product.operands)
        products.append(product)
        if len(products) == uses:
            if compute_last:
                results.append(product.compute(*product.operands))
            raise _LastUse
        # what follows may work in place on both: test_what_changes_in_place_is_taken_before
        products[-1] = replace(product, operands=tuple(o.clone() for o in product.operands))
        result = product.compute(*product.operands)
        results.append(result.clone())
        return result

    try:
        with evaluating(model), visiting(model, visit):
            run(model, batch)
    except _LastUse:
        pass
    return products, results


def _chunks(product: Product, weight: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    for chunk in input_rows(product, weight):
        yield chunk, target[done : done + chunk.shape[1]]
        done += chunk.shape[1]


def input_rows(product: Product, weight: Tensor) -> Iterator[Tensor]:
    """What the weight's rows are multiplied with, in chunks (groups, positions, inputs)."""
    (operand,) = product.operands
    if product.kind == "linear":
        yield operand.reshape(1, -1, operand.shape[-1])
        return
    if operand.dim() == product.spatial + 1:
        operand = operand.unsqueeze(0)
    per_example = operand[:1].numel() * weight[0, 0].numel()
    for part in operand.split(max(1, CHUNK // max(per_example, 1))):
        yield _patches(part, weight.shape[2:], **product.options)


def _patches(
    operand: Tensor,
    kernel: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """(examples, channels, …) → (groups, examples · positions, channels of a group · kernel)."""
    count = len(kernel)
    strides, dilations = _each(stride, count), _each(dilation, count)
    reaches = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if padding == "same":
        pads = [(reach // 2, reach - reach // 2) for reach in reaches]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, count)]
    operand = F.pad(operand, [side for pair in reversed(pads) for side in pair])
    for axis, (reach, step, gap) in enumerate(zip(reaches, strides, dilations, strict=True)):
        operand = operand.unfold(2 + axis, reach + 1, step)[..., ::gap]
    # (examples, channels, positions …, kernel …)
    operand = operand.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1 - count)
    positions = operand.shape[1 : 2 + count]
    return operand.reshape(groups, positions.numel(), -1)


def _each(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


def _output_rows(result: Tensor, product: Product) -> Tensor:
    """(positions, outputs), in the order of `input_rows`."""
    if product.kind == "convolution":
        # (examples, outputs, positions …), or without examples
        result = result.movedim(-1 - product.spatial, -1)
    return result.reshape(-1, result.shape[-1])


def _along_outputs(bias: Tensor, product: Product) -> Tensor:
    return bias.reshape(-1, *(1,) * product.spatial)
