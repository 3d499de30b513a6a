"""NNCF: its weight compression, with each of its metrics of which layers keep 8 bits.

Other layers get 4 bits per output channel or in groups, symmetric or not, as they are or with its
estimation of scales. Its PyTorch side goes no lower, and leaves convolutions at 8 bits.
"""

import copy
from collections.abc import Iterator
from itertools import product

import nncf
import torch
from nncf import AdvancedCompressionParameters, CompressWeightsMode, SensitivityMetric
from nncf.quantization.advanced_parameters import GroupSizeFallbackMode
from torch import Tensor, nn

from benchmarks.peers.exchange import Candidate, Failure, OnGrid, Question, answer, rows, stored

EIGHT = (CompressWeightsMode.INT8_SYM, CompressWeightsMode.INT8_ASYM)
FOUR = (CompressWeightsMode.INT4_SYM, CompressWeightsMode.INT4_ASYM)
LOWER = (CompressWeightsMode.INT3_SYM, CompressWeightsMode.INT2_SYM)
GROUPS = (-1, 128)  # -1: a channel
RATIOS = (0.3, 0.6, 0.9)  # the part of the weights to get fewer bits
# a group that does not divide a channel becomes the next smaller power of two that does
ADJUST = AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST)


class Whole(nn.Module):
    """A network that NNCF can put its hooks into: a bare nn.Sequential would run them as layers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def search(question: Question) -> Iterator[Candidate | Failure]:
    data = nncf.Dataset(question.calibration, lambda batch: batch[0])
    subset = {"dataset": data, "subset_size": len(question.calibration)}
    channels = {"all_layers": True, "ratio": 1.0, "group_size": -1}
    for mode in EIGHT:
        yield Candidate(str(mode), compressed(question, mode=mode, dataset=data))
    for mode in LOWER:
        try:
            yield Candidate(str(mode), compressed(question, mode=mode, **channels, **subset))
        except Exception as error:
            yield Failure(str(mode), f"{type(error).__name__}: {error}")
    for mode, group, estimated in product(FOUR, GROUPS, (False, True)):
        options = {"mode": mode, "group_size": group, "scale_estimation": estimated, **subset}
        options["advanced_parameters"] = ADJUST
        whole = {"all_layers": True, "ratio": 1.0}
        mixed = [
            {"all_layers": True, "ratio": ratio, "sensitivity_metric": metric}
            for ratio in RATIOS
            for metric in SensitivityMetric
        ]
        seen = set()
        for choice in (whole, *mixed):
            found = compressed(question, **options, **choice)
            widths = ", ".join(str(found[f"{layer}.weight"].bits) for layer in question.layers())
            # all at 8 bits are among the candidates above
            if "4" in widths and widths not in seen:
                seen.add(widths)
                name = f"{mode}, groups of {group}, {'estimated' if estimated else 'plain'} scales"
                yield Candidate(f"{name}: {widths}", found)


def compressed(question: Question, **options: object) -> dict[str, OnGrid]:
    """The weights after `nncf.compress_weights`, as its own decompressors decode them."""
    network = nncf.compress_weights(Whole(copy.deepcopy(question.network)), **options)
    found = {}
    for place, decompressor in network.named_modules():
        if not hasattr(decompressor, "pack_weight"):
            continue
        # such as __nncf_hooks.post_hooks.network:1:weight__0.0
        name = place.split(".")[2].removesuffix("__0").replace(":", ".")
        with torch.no_grad():
            values = decompressor(network.get_parameter(name)).float()
        scale = decompressor._scale
        bits = 4 if "INT4" in type(decompressor).__name__ else 8
        groups = scale.numel() // len(values)
        blocks = rows(values, values[0].numel() // groups)
        # 4-bit zero points are two to a byte
        shifted = "Asymmetric" in type(decompressor).__name__
        zero_points = stored(decompressor._zero_point) if shifted else (0, 0)
        name = name.removeprefix("network.")
        found[name] = OnGrid(values, bits, blocks, stored(scale), zero_points)
    assert found
    return found


if __name__ == "__main__":
    answer(search)
