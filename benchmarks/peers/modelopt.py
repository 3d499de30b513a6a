"""NVIDIA Model Optimizer: its auto_quantize at a series of effective bits, weights only.

Its formats here are 2 to 8 bits per output channel with ranges of least squared error, and for
linear layers 2 to 4 bits in blocks along a row; the networks are its linear programs' solutions.
"""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from torch import nn

from benchmarks.peers.exchange import Candidate, Failure, OnGrid, Question, answer, rows, stored

WIDTHS = (2, 3, 4, 5, 6, 8)
BLOCK = 128  # of its own INT4 preset
BLOCK_WIDTHS = (2, 3, 4)
TARGETS = np.arange(2.1, 6.4, 0.1)
SCALE_BITS = 32  # ranges are kept in float32, as the weights are


def search(question: Question) -> Iterator[Candidate | Failure]:
    formats = [per_channel(bits) for bits in WIDTHS]
    if all(isinstance(module, nn.Linear) for module in question.layers().values()):
        formats += [in_blocks(bits) for bits in BLOCK_WIDTHS]
    # its gradients are taken by hooks, which nothing may work in place behind
    for module in question.network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            network, state = mtq.auto_quantize(
                copy.deepcopy(question.network),
                constraints={"effective_bits": float(target)},
                quantization_formats=formats,
                data_loader=question.calibration,
                forward_step=lambda network, batch: network(batch[0]),
                loss_func=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
                num_calib_steps=len(question.calibration),
                num_score_steps=len(question.calibration),
                checkpoint=str(Path(folder) / "scores"),  # the same for every target
            )
            name = str(sorted((layer, str(of)) for layer, of in state["best"]["recipe"].items()))
            if not state["best"]["is_satisfied"]:
                yield Failure(f"{target:.1f} effective bits", "no solution")
            elif name not in seen:
                seen.add(name)
                yield Candidate(f"{target:.1f} effective bits: {name}", weights(network))


def per_channel(bits: int) -> dict[str, Any]:
    return weight_only({"num_bits": bits, "axis": 0}, bits)


def in_blocks(bits: int) -> dict[str, Any]:
    # the search counts scales only where it is told to; those of channels are few
    blocks = {-1: BLOCK, "type": "static"}
    return weight_only({"num_bits": bits, "block_sizes": blocks}, bits + SCALE_BITS / BLOCK)


def weight_only(grid: dict[str, Any], effective_bits: float) -> dict[str, Any]:
    return {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": grid},
            {"quantizer_name": "*input_quantizer", "enable": False},
        ],
        "algorithm": "mse",
        "effective_bits": effective_bits,
    }


def weights(network: nn.Module) -> dict[str, OnGrid]:
    """Each weight whose quantizer the search left on."""
    found = {}
    for name, module in network.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        with torch.no_grad():
            values = quantizer(module.weight)
        blocks = rows(values, (quantizer.block_sizes or {}).get(-1))
        scales = stored(quantizer.amax)
        found[f"{name}.weight"] = OnGrid(values, quantizer.num_bits, blocks, scales)
    return found


if __name__ == "__main__":
    answer(search)
