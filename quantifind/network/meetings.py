"""How a weight meets its operand in a product: as matrices, y[g, p, o] = Σ x[g, p, i] · w[g, o, i],
with groups g, positions p, outputs o and inputs i."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantifind.tensor.matrices import Axes, Matrices

# elements of an unfolded input held at a time
CHUNK = 2**24
Labels = Sequence[Any]


@dataclass(frozen=True)
class View:
    """A part of a tensor, or the tensor with its axes in another order.

    offset, steps: in elements of the tensor in row-major order.
    """

    offset: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    def axis(self, index: int) -> Axes:
        return ((self.sizes[index], self.steps[index]),)


@dataclass(frozen=True)
class Meeting:
    """A product as matrices.

    matrices: of the weight.
    rows: operand, the positions taken, by default all → (groups, positions, inputs), in chunks.
    outputs: result → (positions, groups · outputs).
    how: what the rows depend on beside the operand.
    """

    matrices: Matrices
    rows: Callable[..., Iterator[Tensor]]
    outputs: Callable[[Tensor], Tensor]
    how: Hashable


def view_of(part: Tensor, whole: Tensor) -> View | None:
    """``part`` as a view of ``whole``, whose memory it shares; None where it is no such thing."""
    first = int(part.storage_offset()) - int(whole.storage_offset())
    if part.dtype != whole.dtype or not 0 <= first <= first + extent(part) - 1 < extent(whole):
        return None
    own = _row_major(whole.shape)
    if whole.is_contiguous():
        return View(first, tuple(part.shape), part.stride())
    if part.shape == whole.shape and part.stride() == whole.stride():
        return View(0, tuple(part.shape), own)
    # such as channels_last: test_moments_tell_what_a_change_of_the_weight_does
    known = sorted(zip(whole.stride(), whole.shape, own, strict=True), reverse=True)
    known = [axis for axis in known if axis[1] > 1]
    steps = {step: new for step, _, new in known} | {0: 0}
    sizes = zip(part.shape, part.stride(), strict=True)
    if len(steps) <= len(known) or any(n > 1 and step not in steps for n, step in sizes):
        return None
    offset = 0
    for step, _, new in known:
        offset, first = offset + first // step * new, first % step
    return View(offset, tuple(part.shape), tuple(steps.get(step, 0) for step in part.stride()))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def extent(tensor: Tensor) -> int:
    """Elements of the memory from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def by_labels(view: View, weight: Labels, operand: Labels, result: Labels) -> Meeting | None:
    """The meeting in a product that is an einsum; None where a label stands twice in a tensor, or
    is summed over in one of both alone.

    view: of the weight.
    weight, operand, result: a label for each axis.
    """
    # what is repeated along a weight's axis, or has one element there, is no axis of it
    own = [label for label, step in zip(weight, view.steps, strict=True) if step]
    own = [label for label in own if view.sizes[weight.index(label)] > 1]
    met = [label for label in operand if label in own]
    if any(len(set(labels)) < len(labels) for labels in (weight, operand, result)):
        return None
    if any(label not in met and label not in result for label in own):
        return None
    repeated = [label for label in weight if label not in own]
    sizes = {label: view.sizes[weight.index(label)] for label in repeated}
    if any(n > 1 and k in result and k not in operand for k, n in sizes.items()):
        return None
    groups = [label for label in own if label in met and label in result]
    inputs = [label for label in own if label in met and label not in result]
    outputs = [label for label in own if label not in met]
    positions = [label for label in operand if label not in own]
    # a tuple labels an axis of one element
    summed = [label for label in positions if label not in result and sizes.get(label) != 1]
    if not all(isinstance(label, tuple) for label in summed):
        return None

    def axes(labels: Labels) -> Axes:
        return tuple(axis for label in labels for axis in view.axis(weight.index(label)))

    matrices = Matrices(view.offset, axes(groups), axes(outputs), axes(inputs))
    counts = matrices.shape
    x_order = [operand.index(label) for label in (*groups, *positions, *inputs)]

    def rows(x: Tensor, taken: Tensor | None = None) -> Iterator[Tensor]:
        every = x.permute(x_order).reshape(counts[0], -1, counts[2])
        yield every if taken is None else every[:, taken]

    def to_rows(y: Tensor) -> Tensor:
        # the summed axes of one element are no axis of the result
        kept = [label for label in positions if label in result]
        rest = [label for label in result if label not in (*kept, *groups, *outputs)]
        order = [result.index(label) for label in (*kept, *rest, *groups, *outputs)]
        return y.permute(order).reshape(-1, counts[0] * counts[1])

    return Meeting(matrices, rows, to_rows, (*x_order, counts[0], counts[2]))


def linear(view: View, operand: Tensor) -> Meeting | None:
    """That of F.linear: rows are outputs."""
    positions = list(range(operand.dim() - 1))
    outputs = ["out"] * (len(view.sizes) - 1)
    return by_labels(view, [*outputs, "in"], [*positions, "in"], [*positions, *outputs])


def matmul(left: Tensor, right: Tensor) -> tuple[Labels, Labels, Labels]:
    """The labels of both operands and of the result of a product of matrices or vectors."""
    count = max(left.dim(), right.dim()) - 2
    batch = range(max(count, 0))

    def labels(tensor: Tensor, last: Labels, side: str) -> Labels:
        own = batch[len(batch) - max(tensor.dim() - 2, 0) :]
        sizes = zip(own, tensor.shape[: len(own)], strict=True)
        # an axis of one element is repeated along the other's
        return [*(label if size > 1 else (side, label) for label, size in sizes), *last]

    ends = (
        ["rows", "in"] if left.dim() > 1 else ["in"],
        ["in", "columns"] if right.dim() > 1 else ["in"],
    )
    first, second = labels(left, ends[0], "left"), labels(right, ends[1], "right")
    return first, second, [*batch, *(label for end in ends for label in end if label != "in")]


def tensordot(left: Tensor, right: Tensor, dims: Any) -> tuple[Labels, Labels, Labels] | None:
    """The labels of both operands and of the result of a tensordot."""
    if isinstance(dims, Tensor):
        return None
    if isinstance(dims, int):
        dims = list(range(-dims, 0)), list(range(dims))
    one, other = ([dims[i]] if isinstance(dims[i], int) else dims[i] for i in (0, 1))
    first: list[Any] = [f"left {axis}" for axis in range(left.dim())]
    second: list[Any] = [f"right {axis}" for axis in range(right.dim())]
    result = [*first, *second]
    for a, b in zip(one, other, strict=True):
        result.remove(first[a])
        result.remove(second[b])
        first[a] = second[b] = f"in {a} {b}"
    return first, second, result


def einsum(equation: str, left: Tensor, right: Tensor) -> tuple[Labels, Labels, Labels]:
    """The labels of both operands and of the result of an einsum of two."""
    terms, arrow, last = equation.replace(" ", "").partition("->")
    one, other = terms.split(",")
    longest = 0
    named: list[list[Any]] = []
    for term, tensor in ((one, left), (other, right)):
        before, dots, after = term.partition("...")
        hidden = tensor.dim() - len(before) - len(after) if dots else 0
        longest = max(longest, hidden)
        named.append([*before, *range(-hidden, 0), *after])
    if not arrow:
        letters = [letter for letter in terms if letter.isalpha()]
        last = "..." + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    before, dots, after = last.partition("...")
    result = [*before, *range(-longest, 0), *after] if dots else list(before)
    # broadcast axes of one element
    for labels, tensor, side in ((named[0], left, "left"), (named[1], right, "right")):
        for axis, label in enumerate(labels):
            if tensor.shape[axis] == 1:
                labels[axis] = (side, label)
    return named[0], named[1], result


def convolution(view: View, spatial: int, options: Mapping[str, Any]) -> Meeting:
    """That of a convolution: weight (outputs, inputs of a group, kernel …)."""
    groups, kernel = options.get("groups", 1), view.sizes[2:]
    each, step = view.sizes[0] // groups, view.steps[0]
    inputs = tuple(axis for index in range(1, len(view.sizes)) for axis in view.axis(index))
    matrices = Matrices(view.offset, ((groups, each * step),), ((each, step),), inputs)
    return _unfolded(matrices, patches, spatial, kernel, math.prod(kernel), options)


def transposed_convolution(view: View, spatial: int, options: Mapping[str, Any]) -> Meeting:
    """That of a transposed convolution: weight (inputs, outputs of a group, kernel …)."""
    groups, kernel = options.get("groups", 1), view.sizes[2:]
    each, step = view.sizes[0] // groups, view.steps[0]
    spread = tuple(axis for index in range(2, len(view.sizes)) for axis in view.axis(index))
    matrices = Matrices(
        view.offset, ((groups, each * step),), view.axis(1), ((each, step), *spread)
    )
    grown = math.prod(kernel) * math.prod(each_axis(options.get("stride", 1), spatial))
    return _unfolded(matrices, transposed_patches, spatial, kernel, grown, options)


def _unfolded(
    matrices: Matrices,
    unfold: Callable[..., Tensor],
    spatial: int,
    kernel: Sequence[int],
    growth: int,
    options: Mapping[str, Any],
) -> Meeting:
    def rows(x: Tensor, taken: Tensor | None = None) -> Iterator[Tensor]:
        x = x.unsqueeze(0) if x.dim() == spatial + 1 else x
        if taken is None:
            each = max(1, CHUNK // max(x[:1].numel() * growth, 1))
            return (unfold(part, kernel, **options) for part in x.split(each))
        each = max(1, CHUNK // (x.shape[1] * math.prod(kernel)))
        return (unfold(x, kernel, **options, taken=some) for some in taken.split(each))

    how = unfold.__name__, *kernel, str(sorted(options.items()))
    return Meeting(matrices, rows, lambda y: _positions(y, spatial), how)


def _positions(result: Tensor, spatial: int) -> Tensor:
    # (examples, outputs, positions …), or without examples
    result = result.movedim(-1 - spatial, -1)
    return result.reshape(-1, result.shape[-1])


def patches(
    operand: Tensor,
    kernel: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    taken: Tensor | None = None,
) -> Tensor:
    """(examples, channels, …) → (groups, examples · positions, channels of a group · kernel).

    taken: the positions to unfold, by default all.
    """
    count = len(kernel)
    strides, dilations = each_axis(stride, count), each_axis(dilation, count)
    reaches = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if padding == "same":
        pads = [(reach // 2, reach - reach // 2) for reach in reaches]
    else:
        pads = [(p, p) for p in each_axis(0 if padding == "valid" else padding, count)]
    operand = F.pad(operand, [side for pair in reversed(pads) for side in pair])
    # runs of channels are copied faster where they are longer than a kernel's
    runs = operand.shape[1] // groups > kernel[-1]
    if runs:
        operand = operand.movedim(1, -1).contiguous().movedim(-1, 1)
    for axis, (reach, step, gap) in enumerate(zip(reaches, strides, dilations, strict=True)):
        operand = operand.unfold(2 + axis, reach + 1, step)[..., ::gap]
    # (groups, examples, positions …, then channels and kernel …, the runs last)
    operand = (
        operand.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1 if runs else -1 - count)
    )
    positions = operand.shape[1 : 2 + count]
    if taken is None:
        rows = operand.reshape(groups, positions.numel(), *operand.shape[2 + count :])
    else:
        places: Any = (slice(None), *torch.unravel_index(taken, positions))
        rows = operand[places]
    rows = rows.movedim(-1, 2) if runs else rows
    return rows.flatten(2)


def transposed_patches(
    operand: Tensor,
    kernel: Sequence[int],
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    taken: Tensor | None = None,
) -> Tensor:
    """As `patches`, of a transposed convolution: a convolution, its kernel turned round, of the
    input with zeros in between."""
    count = len(kernel)
    options = (stride, padding, output_padding, dilation)
    steps, pads, more, gaps = (each_axis(option, count) for option in options)
    sizes = [(n - 1) * step + 1 for n, step in zip(operand.shape[2:], steps, strict=True)]
    wide = operand.new_zeros(*operand.shape[:2], *sizes)
    places: Any = (..., *(slice(None, None, step) for step in steps))
    wide[places] = operand
    around = [
        (gap * (k - 1) - pad, gap * (k - 1) - pad + extra)
        for k, gap, pad, extra in zip(kernel, gaps, pads, more, strict=True)
    ]
    wide = F.pad(wide, [side for pair in reversed(around) for side in pair])
    rows = patches(wide, kernel, dilation=dilation, groups=groups, taken=taken)
    rows = rows.unflatten(-1, (-1, *kernel)).flip(*range(3, 3 + count))
    return rows.flatten(2)


def each_axis(value: Any, count: int) -> tuple[int, ...]:
    """An option of a convolution, given once or for each axis."""
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


def bag_shares(
    operand: Tensor,
    offsets: Tensor | None,
    *,
    mode: str,
    per_sample_weights: Tensor | None,
    padding_idx: int | None,
    taken: Callable[[Tensor], Tensor],
) -> Tensor:
    """How much the square of an error in what each index of bags looks up weighs, (indices,).

    taken: number of the bag of each index → the share of the values that the largest ones are of.
    """
    indices = operand.flatten()
    places = torch.arange(len(indices), device=indices.device)
    if offsets is None:
        bags = places // max(operand.shape[-1], 1)
    else:
        bags = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
    counted = torch.ones_like(indices, dtype=torch.float64)
    if padding_idx is not None:
        counted[indices == padding_idx] = 0.0
    if mode == "max":
        return counted * taken(bags)
    if mode == "mean":
        sizes = torch.zeros(int(bags.max()) + 1 if len(bags) else 0).to(counted)
        return counted / sizes.index_add_(0, bags, counted).clamp(min=1)[bags].square()
    if per_sample_weights is None:
        return counted
    return counted * per_sample_weights.flatten().double().square()
