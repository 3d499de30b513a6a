"""AIMET: its automatic mixed precision (AMP), and AdaRound at the widths that AMP finds.

Only weights are quantized, symmetrically per output channel, by AIMET's signal to noise criterion.
AdaRound is at 300 iterations a layer: AIMET's default of 15,000 would take hours on one thread.
"""

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.common.amp.utils import AMPSearchAlgo
from aimet_torch.common.defs import CallbackFunc, QuantizationDataType, QuantScheme
from aimet_torch.mixed_precision import choose_mixed_precision
from aimet_torch.quantsim import QuantizationSimModel
from torch import nn

from benchmarks.peers.exchange import (
    Candidate,
    Failure,
    OnGrid,
    Question,
    answer,
    mean_loss,
    rows,
    stored,
)

WIDTHS = (8, 6, 5, 4, 3, 2)
BATCHES = 16  # of validation examples to search with, and of calibration examples to round with
ITERATIONS = 300
FEW_BITS = 4  # in the mean: above, rounding to nearest is as good
RUINED = 1.3  # AMP goes on to the lowest widths, where no limit allows its criterion ratio
SCHEME = QuantScheme.post_training_tf_enhanced

Widths = dict[str, int]


def search(question: Question) -> Iterator[Candidate | Failure]:
    uniform = [dict.fromkeys(question.layers(), width) for width in WIDTHS]
    for widths in uniform:
        yield Candidate(f"nearest {name(widths)}", nearest(question, widths))
    found = [widths for widths in mixed(question) if widths not in uniform]
    for widths in found:
        yield Candidate(f"AMP {name(widths)}", nearest(question, widths))
    sizes = {layer: module.weight.numel() for layer, module in question.layers().items()}
    for widths in [*uniform, *found]:
        codes = sum(width * sizes[layer] for layer, width in widths.items())
        if codes <= FEW_BITS * sum(sizes.values()):
            yield Candidate(f"AdaRound {name(widths)}", rounded(question, widths))


def name(widths: Widths) -> str:
    return ", ".join(map(str, widths.values()))


def mixed(question: Question) -> list[Widths]:
    """The widths on AMP's way from most to fewest bits, as far as the loss is not ruined."""
    batches = question.validation[:BATCHES]
    limit = RUINED * mean_loss(question.network, batches)
    found: list[Widths] = []

    def score(network: nn.Module, _: Any) -> float:
        return -mean_loss(network, batches)

    def score_on_the_way(network: nn.Module, _: Any) -> float:
        scored = score(network, None)
        # read off, as AMP starts from the uniform width of least loss, which may be any
        modules = {layer: network.get_submodule(layer) for layer in question.layers()}
        widths = {layer: of.param_quantizers["weight"].bitwidth for layer, of in modules.items()}
        if -scored <= limit and widths not in found:
            found.append(widths)
        return scored

    def forward(network: nn.Module, _: Any) -> None:
        network(batches[0][0])

    whole = QuantizationDataType.int
    with tempfile.TemporaryDirectory() as folder:
        choose_mixed_precision(
            simulated(question.network, question),
            batches[0][0],
            [((16, whole), (width, whole)) for width in WIDTHS],
            CallbackFunc(score, None),
            CallbackFunc(score_on_the_way, None),
            None,
            folder,
            True,
            CallbackFunc(forward, None),
            amp_search_algo=AMPSearchAlgo.BruteForce,
        )
    return found


def simulated(network: nn.Module, question: Question) -> QuantizationSimModel:
    """AIMET's simulation of a network, its activations left in float."""
    image = question.calibration[0][0][:1]
    sim = QuantizationSimModel(network, image, quant_scheme=SCHEME)
    for _, module in sim.named_qmodules():
        for quantizers in (module.input_quantizers, module.output_quantizers):
            for place in range(len(quantizers)):
                quantizers[place] = None
    return sim


def nearest(question: Question, widths: Widths) -> dict[str, OnGrid]:
    """The weights at these widths, each rounded to its nearest level."""
    sim = simulated(question.network, question)
    for layer, width in widths.items():
        module = sim.model.get_submodule(layer)
        quantizer = module.param_quantizers["weight"]
        quantizer.bitwidth = width
        with quantizer.compute_encodings():
            quantizer(module.weight)
    return decoded(sim, widths)


def rounded(question: Question, widths: Widths) -> dict[str, OnGrid]:
    """The weights at these widths, each rounded by AdaRound.

    What AdaRound returns is not yet on a grid: the simulation puts it there, with its encodings.
    """
    network = copy.deepcopy(question.network)
    images = [batch for batch, _ in question.calibration]
    parameters = AdaroundParameters(images, BATCHES, default_num_iterations=ITERATIONS)
    override = [(network.get_submodule(layer), width) for layer, width in widths.items()]
    with tempfile.TemporaryDirectory() as folder:
        network = Adaround.apply_adaround(
            network,
            images[0][:1],
            parameters,
            folder,
            "adaround",
            param_bw_override_list=override,
            default_quant_scheme=SCHEME,
        )
        sim = simulated(network, question)
        sim.load_encodings(Path(folder) / "adaround.encodings", allow_overwrite=False)
    return decoded(sim, widths)


def decoded(sim: QuantizationSimModel, widths: Widths) -> dict[str, OnGrid]:
    found = {}
    for layer, width in widths.items():
        module = sim.model.get_submodule(layer)
        quantizer = module.param_quantizers["weight"]
        assert quantizer.bitwidth == width
        assert quantizer.symmetric
        with torch.no_grad():
            values = torch.Tensor(quantizer(module.weight).dequantize())
        scales = stored(quantizer.get_scale())
        found[f"{layer}.weight"] = OnGrid(values, width, rows(values), scales)
    return found


if __name__ == "__main__":
    answer(search)
