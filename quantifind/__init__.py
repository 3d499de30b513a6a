"""Quantifind: the fewest bits of a trained network, and where, with a confidence to be checked.

Search
    find_strategy        the cheapest strategy within a limit, or the best one within a budget
    Found                its answer: strategy, codes, candidates, sensitivity
    SearchSpace          what each tensor and activation may become
Strategies
    Strategy             for each tensor and activation its choice; data only
    Choice               a scheme, its width and options
    uniform_strategy     the same choice for every parameter
Quantize
    quantize_model       a copy of a network with the values of a strategy
    mean_bits            bits per parameter, everything counted
    learn                train the codes of a strategy
Judge
    certify              what a search found, on test data
    evaluate_strategies  strategies beside the float network on a loader's examples
Take it with you
    save                 a quantized network as one small file
    load                 the network of such a file
    compressed           a network that computes with packed codes
    export               a quantized network as ONNX, or as a program of torch.export

Names are imported when first used: `import quantifind` imports no torch. Data sets, models,
schemes and costs are modules of the folders of these names; `quantifind.workflow` has the verbs of
the pipeline.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Choice": "tensor.choice",
    "Found": "mixed_precision.found",
    "SearchSpace": "mixed_precision.search_space",
    "Strategy": "strategy",
    "certify": "workflow.certification_workflow",
    "compressed": "deployment.compressed",
    "evaluate_strategies": "workflow.evaluation_workflow",
    "export": "deployment.exporting",
    "find_strategy": "search",
    "learn": "learning",
    "load": "deployment.saving",
    "mean_bits": "quantize",
    "quantize_model": "quantize",
    "save": "deployment.saving",
    "uniform_strategy": "strategy",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
