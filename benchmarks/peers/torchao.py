"""torchao: its weight-only integers of 8 to 2 bits, by each of its ways to choose scales.

It has no search of its own: uniform widths, and a greedy descent over the layers, whose channels
may be in groups. A convolution's weight is given to it as the matrix that it is: it would give each
position of a kernel scales of its own, and fails on one of a single input channel.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from benchmarks.peers.exchange import Candidate, Failure, OnGrid, Question, answer, stored
from benchmarks.peers.greedy import descend, uniform

WIDTHS = (8, 6, 5, 4, 3, 2)
DESCENT = WIDTHS[2:]
GROUP = 128
WAYS = {
    "symmetric": (MappingType.SYMMETRIC, IntxChooseQParamsAlgorithm.AFFINE),
    "asymmetric": (MappingType.ASYMMETRIC, IntxChooseQParamsAlgorithm.AFFINE),
    "HQQ": (MappingType.SYMMETRIC, IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY),
}


def search(question: Question) -> Iterator[Candidate | Failure]:
    weights = {
        f"{name}.weight": module.weight.detach() for name, module in question.layers().items()
    }
    for way in WAYS:
        ladders = {
            name: [quantized(weight, way, width, weight[0].numel()) for width in WIDTHS]
            for name, weight in weights.items()
        }
        yield from uniform(ladders, way)
        ladders = {
            name: [
                quantized(weight, way, width, group)
                for width in DESCENT
                for group in groups(weight[0].numel())
            ]
            for name, weight in weights.items()
        }
        for ladder in ladders.values():
            assert all(above.total_bits > below.total_bits for above, below in pairwise(ladder))
        yield from descend(question, ladders, way)


def groups(channel: int) -> list[int]:
    """The largest group of at most 128 that divides a channel, and the channel."""
    return sorted({max(size for size in range(1, GROUP + 1) if channel % size == 0), channel})


def quantized(weight: Tensor, way: str, width: int, group: int) -> OnGrid:
    """A weight on torchao's grid; groups are consecutive elements of a channel."""
    mapping, algorithm = WAYS[way]
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{width}"),
        granularity=PerGroup(group),
        mapping_type=mapping,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=algorithm,
    )
    holder = nn.Module()
    holder.weight = nn.Parameter(weight.flatten(1))
    quantize_(holder, config, filter_fn=lambda module, name: module is holder)
    stands = holder.weight
    values = stands.dequantize().float().reshape(weight.shape)
    blocks = [values.reshape(-1, group)]
    zero_points = stored(stands.zero_point) if mapping is MappingType.ASYMMETRIC else (0, 0)
    return OnGrid(values, width, blocks, stored(stands.scale), zero_points)


if __name__ == "__main__":
    answer(search)
