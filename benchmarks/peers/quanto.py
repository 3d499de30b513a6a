"""optimum-quanto: its 8, 4 and 2 bits, with both of its optimizers for the ranges.

It has no search of its own: uniform widths, and a greedy descent over its layers. Networks are in
half precision, as that is what its scales are then stored in.
"""

from collections.abc import Iterator

from optimum.quanto import HqqOptimizer, MaxOptimizer, qint2, qint4, qint8
from optimum.quanto.nn import quantize_module
from torch import nn

from benchmarks.peers.exchange import Candidate, Failure, OnGrid, Question, answer, rows, stored
from benchmarks.peers.greedy import descend, uniform


def search(question: Question) -> Iterator[Candidate | Failure]:
    for optimizer in (MaxOptimizer(), HqqOptimizer()):
        name = type(optimizer).__name__
        ladders = {}
        for layer, module in question.layers().items():
            choices = [(qint8, None), (qint4, optimizer), (qint2, optimizer)]
            ladders[f"{layer}.weight"] = [quantized(module, *choice) for choice in choices]
        yield from uniform(ladders, name)
        yield from descend(question, ladders, name)


def quantized(module: nn.Module, qtype, optimizer) -> OnGrid:
    """A layer's weight on one of quanto's grids; an optimizer of None is its own choice."""
    half = module.half()
    frozen = quantize_module(half, weights=qtype, optimizer=optimizer)
    frozen.freeze()
    weight = frozen.weight
    values = weight.dequantize().float()
    if qtype.bits == 8:  # symmetric
        return OnGrid(values, 8, rows(values), stored(weight._scale))
    # HqqOptimizer gives an ungrouped convolution a shift for each row of its kernels
    blocks = [values.reshape(weight._shift.numel(), -1)]
    return OnGrid(values, qtype.bits, blocks, stored(weight._scale), stored(weight._shift))


if __name__ == "__main__":
    # the first unpacking compiles an extension, which is no part of the search
    quantized(nn.Linear(32, 32), qint4, MaxOptimizer())
    answer(search)
