"""What calibration examples tell of a network's layers: the second moments of what meets a weight,
and what the float network makes of it."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantifind.network.modules import own_tensors, run
from quantifind.network.products import Product, visiting
from quantifind.tensor.gptq import Moments
from quantifind.utils.devices import evaluating

Batches = Sequence[Any]
# elements of an unfolded input held at a time
CHUNK = 2**24
COMPENSABLE = ("linear", "convolution", "embedding")


def calibration_batches(batches: Iterable[Any] | None) -> Batches:
    """Batches (inputs, …) kept, so that every pass sees the same.

    Errors: ValueError where there is none, none with an example, for a batch that is not (inputs,
    …), and for inputs that are not finite.
    """
    kept = list(batches) if batches is not None else []
    for batch in kept:
        # the first example of bare inputs would pass for a batch
        if not (isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor)):
            raise ValueError(
                f"a calibration batch is a {type(batch).__name__}: (inputs, …), a tuple or list "
                "with a tensor of inputs, is needed"
            )
        if bad := int((~batch[0].isfinite()).sum()):
            raise ValueError(f"calibration inputs: {bad} are NaN or infinite")
    kept = [batch for batch in kept if len(batch[0])]
    if not kept:
        raise ValueError("calibration has no examples: give batches (inputs, …) of training data")
    return kept


def compensable_weights(model: nn.Module, batches: Batches) -> set[str]:
    """The weights that all uses of in a pass of the first batch are of `COMPENSABLE` kinds."""
    kinds: dict[str, set[str]] = {}

    def visit(product: Product) -> Tensor:
        if product.weight is not None:
            kinds.setdefault(product.weight, set()).add(product.kind)
        return product.compute(*product.operands)

    with evaluating(model), visiting(model, visit):
        run(model, batches[0][0])
    return {name for name, seen in kinds.items() if seen <= set(COMPENSABLE)}


def weight_uses(model: nn.Module, batches: Batches) -> Counter[str]:
    """The weights in the order in which a pass of the first batch uses them, and how often."""
    uses: Counter[str] = Counter()

    def visit(product: Product) -> Tensor:
        if product.weight is not None:
            uses[product.weight] += 1
        return product.compute(*product.operands)

    with evaluating(model), visiting(model, visit):
        run(model, batches[0][0])
    return uses


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
        for inputs, *_ in batches:
            run(model, inputs)
    return {name: total / total.mean().clamp(min=1e-300) for name, total in sums.items()}


@torch.no_grad()
def layer_moments(
    model: nn.Module,
    work: nn.Module,
    name: str,
    batches: Batches,
    uses: int,
    rounded: Callable[[Product], Product],
) -> dict[tuple[int, int], Moments]:
    """Moments of the inputs that a weight meets in ``work``, by its rows (first, last + 1).

    model: the float network; work: the same, in part quantized. uses: of the weight in a pass.
    rounded: a product of ``work`` → the same with its operands on their levels.
    Errors: ValueError for a use that is none of `COMPENSABLE`, and for inputs that are not finite.
    """
    weight = own_tensors(work)[name]
    moments: dict[tuple[int, int], Moments] = {}
    look_ups = None
    for product, _, target in paired_uses(model, work, name, batches, uses, rounded):
        if product.kind not in COMPENSABLE:
            raise ValueError(
                f"{name}: rounding 'compensated': it is used in a "
                f"{product.kind.replace('_', ' ')}; {', '.join(COMPENSABLE)} are allowed"
            )
        first, last, _ = (product.rows or slice(None)).indices(len(weight))
        if product.kind == "embedding":
            look_ups = weight.new_zeros(len(weight)).double() if look_ups is None else look_ups
            counts = product.operands[0].flatten().bincount(minlength=last - first)
            look_ups[first:last] += counts
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
                x = chunk[group].to(precise)
                y = part[:, group * rows : (group + 1) * rows].to(precise)
                start = first + group * rows
                found = moments.setdefault((start, start + rows), _no_moments(weight, rows, inputs))
                found.inputs += x.T @ x
                found.outputs += y.T @ x
                found.positions += len(x)
    if any(not found.inputs.isfinite().all() for found in moments.values()):
        raise ValueError(f"{name}: its inputs on calibration data are NaN or infinite")
    spans = sorted(moments)
    if any(start < end for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ValueError(
            f"{name}: rounding 'compensated': a pass uses it whole and in parts; "
            "round it to 'nearest'"
        )
    if look_ups is not None:
        if not moments:
            moments[0, len(weight)] = _no_moments(weight, len(weight), weight[0].numel())
        for (first, last), found in moments.items():
            found.look_ups = look_ups[first:last]
    return moments


def _no_moments(weight: Tensor, rows: int, inputs: int) -> Moments:
    double = torch.float64
    return Moments(
        torch.zeros(inputs, inputs, dtype=double, device=weight.device),
        torch.zeros(rows, inputs, dtype=double, device=weight.device),
    )


@torch.no_grad()
def mean_shift(
    model: nn.Module,
    work: nn.Module,
    name: str,
    batches: Batches,
    uses: int,
    rounded: Callable[[Product], Product],
) -> tuple[str | None, Tensor]:
    """The bias beside a weight, and how much it must rise for the mean output of each channel to be
    the float network's (Nagel et al. 2019, arXiv:1906.04721); None where no bias is."""
    bias: str | None = None
    weight = own_tensors(work)[name]
    total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    positions = torch.zeros_like(total)
    paired = paired_uses(model, work, name, batches, uses, rounded, results=True)
    for product, result, target in paired:
        if product.bias_name is None or product.kind not in COMPENSABLE:
            continue
        assert result is not None
        bias = product.bias_name
        shift = _output_rows(target - result, product).double()
        # queries and keys of a packed projection may be of different lengths
        rows = product.rows or slice(None)
        total[rows] += shift.sum(0)
        positions[rows] += len(shift)
    return bias, total / positions.clamp(min=1)


class _LastUse(Exception):
    """Ends a pass: what follows is not needed."""


def paired_uses(
    model: nn.Module,
    work: nn.Module,
    name: str,
    batches: Batches,
    uses: int,
    rounded: Callable[[Product], Product],
    *,
    results: bool = False,
) -> Iterator[tuple[Product, Tensor | None, Tensor]]:
    """Each product with weight ``name`` in ``work``, its result, and the float network's.

    ``work`` may be ``model`` itself where ``rounded`` leaves products as they are. results: whether
    the last one's is needed too, which else is not computed.
    """
    for inputs, *_ in batches:
        products, targets = _uses(model, name, inputs, uses, lambda product: product)
        found = targets
        if work is not model:
            products, found = _uses(work, name, inputs, uses, rounded, compute_last=results)
        yield from itertools.zip_longest(products, found, targets)


def _uses(
    model: nn.Module,
    name: str,
    inputs: Tensor,
    uses: int,
    rounded: Callable[[Product], Product],
    *,
    compute_last: bool = True,
) -> tuple[list[Product], list[Tensor]]:
    """The products with a weight, and their results."""
    products: list[Product] = []
    results: list[Tensor] = []

    def visit(product: Product) -> Tensor:
        product = rounded(product)
        if product.weight != name:
            return product.compute(*product.operands)
        products.append(product)
        last = len(products) == uses
        if compute_last or not last:
            results.append(product.compute(*product.operands))
        if last:
            raise _LastUse
        return results[-1]

    try:
        with evaluating(model), visiting(model, visit):
            run(model, inputs)
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
