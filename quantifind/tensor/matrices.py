"""Which elements of a weight are multiplied with the same input, and which belong to the same
output: the weight seen as matrices (outputs, inputs), however it lies in memory."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# (size, step) of each axis, outer to inner
Axes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Matrices:
    """Elements of a tensor as matrices (groups, outputs, inputs).

    Steps and the offset count the tensor's elements in row-major order. Two that are equal are the
    same elements in the same order: a table's rows, and the columns of its transpose.
    """

    offset: int
    groups: Axes
    outputs: Axes
    inputs: Axes

    def __post_init__(self) -> None:
        for kind in ("groups", "outputs", "inputs"):
            object.__setattr__(self, kind, _merged(getattr(self, kind)))

    @classmethod
    def rows(cls, shape: Sequence[int], first: int = 0, last: int | None = None) -> "Matrices":
        """Rows of a tensor of a shape, flattened.

        >>> Matrices.rows((4, 3), 1, 3).of(torch.arange(12).reshape(4, 3)).tolist()
        [[[3, 4, 5], [6, 7, 8]]]
        """
        length, last = math.prod(shape[1:]), shape[0] if last is None else last
        return cls(first * length, (), ((last - first, length),), ((length, 1),))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, outputs, inputs."""
        groups, outputs, inputs = (
            math.prod(size for size, _ in axes) for axes in (self.groups, self.outputs, self.inputs)
        )
        return groups, outputs, inputs

    def of(self, tensor: Tensor) -> Tensor:
        """The matrices (groups, outputs, inputs) of a tensor."""
        return self._view(tensor.contiguous()).reshape(self.shape)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Give a contiguous tensor's elements values, which broadcast to `shape`, in place."""
        view = self._view(tensor)
        view.copy_(values.expand(self.shape).reshape(view.shape))

    def each(self) -> Iterator["Matrices"]:
        """The matrix of each group."""
        for steps in itertools.product(*(range(0, n * step, step) for n, step in self.groups)):
            yield replace(self, offset=self.offset + sum(steps), groups=())

    def blocks(self, most: int) -> Iterator["Matrices"]:
        """The same outputs of inputs that follow each other, in parts of about the same size and of
        at most so many inputs.

        >>> [block.shape for block in Matrices.rows((4, 7)).blocks(3)]
        [(1, 4, 3), (1, 4, 2), (1, 4, 2)]
        """
        if self.shape[2] <= most:
            yield self
            return
        (size, step), *rest = self.inputs
        each = math.prod(n for n, _ in rest)
        count = min(size, -(-size // max(1, most // each)))
        first = 0
        for part in range(count):
            last = first + size // count + (part < size % count)
            axes = ((last - first, step), *rest)
            yield from replace(self, offset=self.offset + first * step, inputs=axes).blocks(most)
            first = last

    def places(self, axis: int, shape: Sequence[int]) -> Tensor:
        """Where along an axis of a tensor of a shape each output of one matrix begins, (outputs,).

        >>> Matrices.rows((4, 3), 1, 3).places(0, (4, 3)).tolist()
        [1, 2]
        """
        starts = torch.tensor([self.offset])
        for size, step in self.outputs:
            starts = (starts.unsqueeze(1) + step * torch.arange(size)).flatten()
        return starts // math.prod(shape[axis % len(shape) :][1:]) % shape[axis]

    def _view(self, tensor: Tensor) -> Tensor:
        axes = (*self.groups, *self.outputs, *self.inputs)
        sizes, steps = [size for size, _ in axes], [step for _, step in axes]
        return tensor.as_strided(sizes, steps, tensor.storage_offset() + self.offset)


def _merged(axes: Axes) -> Axes:
    """Without axes of one element; those that are one run of elements as one."""
    found: list[tuple[int, int]] = []
    for size, step in axes:
        if size == 1:
            continue
        if found and found[-1][1] == size * step:
            found[-1] = (found[-1][0] * size, step)
        else:
            found.append((size, step))
    return tuple(found)


def compatible(uses: Iterable[Matrices], count: int) -> bool:
    """Whether those that differ have no element in common, of a tensor of so many."""
    marks = torch.zeros(count, dtype=torch.bool)
    each = dict.fromkeys(matrix for use in uses for matrix in use.each())
    for matrix in each:
        if bool(matrix.of(marks).any()):
            return False
        matrix.put(marks, torch.tensor(True))
    return True


def output_axis(matrices: Matrices, shape: Sequence[int]) -> int:
    """The axis of a weight whose channels are its outputs; 0 where there is none.

    It is the longest axis along which the inputs of an output don't lie, the first of several.
    Of a grouped transposed convolution, (inputs, outputs of a group, kernel …), a channel of axis 1
    is the same output of every group, unless each group has one input: then axis 0 is the group.

    >>> output_axis(Matrices(0, (), ((4, 1),), ((3, 4),)), (3, 4))  # x @ w
    1
    """
    free = [axis for axis in range(len(shape)) if not moves(matrices.inputs, axis, shape)]
    return max(free, key=lambda axis: shape[axis], default=0)


def moves(axes: Axes, axis: int, shape: Sequence[int]) -> bool:
    """Whether going along ``axes`` changes the place along an axis of a tensor of a shape."""
    step = math.prod(shape[axis % len(shape) :][1:])
    return shape[axis] > 1 and any(
        step <= (size - 1) * own and own % (step * shape[axis]) for size, own in axes
    )
