"""HQQ: half-quadratic quantization (Badri and Shaji 2023), 8 to 1 bits in groups along a row.

It has no search of its own: uniform widths, and a greedy descent over the layers.
"""

import math
from collections.abc import Iterator

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from benchmarks.peers.exchange import Candidate, Failure, OnGrid, Question, answer, stored
from benchmarks.peers.greedy import descend, uniform

# its widths, of which 1.58 stands for three levels, and where the descent begins
WIDTHS = (8, 6, 5, 4, 3, 2, 1.58, 1)
DESCENT = WIDTHS[2:]
GROUPS = (64, 128)


def search(question: Question) -> Iterator[Candidate | Failure]:
    weights = {f"{name}.weight": module.weight for name, module in question.layers().items()}
    for group in GROUPS:
        ladders = {n: [quantized(w, width, group) for width in WIDTHS] for n, w in weights.items()}
        yield from uniform(ladders, f"groups of {group}")
    ladders = {
        name: [quantized(weight, width, group) for width in DESCENT for group in GROUPS]
        for name, weight in weights.items()
    }
    yield from descend(question, ladders, "groups of 64 or 128")


def quantized(weight: Tensor, width: float, group: int) -> OnGrid:
    """A weight on HQQ's grid; groups are consecutive elements, a scale and a zero point each.

    A weight whose size the group does not divide (here one of 288) has the largest below it that
    does, where HQQ itself refuses.
    """
    group = max(size for size in range(1, group + 1) if weight.numel() % size == 0)
    codes, meta = Quantizer.quantize(
        weight.detach().flatten(1),
        nbits=width,
        group_size=group,
        axis=1,
        bitpack=False,
        device="cpu",
        compute_dtype=torch.float16,
    )
    codes, meta = Quantizer.cpu(codes, meta)  # scales and zero points in half precision
    values = Quantizer.dequantize(codes, meta).float().reshape(weight.shape)
    blocks = [values.reshape(-1, group)]
    bits = math.log2(3) if width == 1.58 else width
    return OnGrid(values, bits, blocks, stored(meta["scale"]), stored(meta["zero"]))


if __name__ == "__main__":
    answer(search)
