"""A strategy says on which grid each tensor of a network is put; it is data only."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantifind import plugins
from quantifind.quantized import QuantizedTensor


@dataclass(frozen=True)
class Strategy:
    """For each tensor its scheme, bits and options.

    tensors: by parameter name, ``{"scheme": "uniform", "bits": 4}`` with the scheme's further
        options beside these; a parameter that is not named stays in float.
    """

    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def bit_depth(self) -> int | None:
        """The one width of all tensors named, or None."""
        widths = {choice["bits"] for choice in self.tensors.values()}
        return widths.pop() if len(widths) == 1 else None


def uniform_strategy(model: nn.Module, bits: int, *, scheme: str = "uniform") -> Strategy:
    """Every parameter, biases included, on the same grid at the same width.

    >>> uniform_strategy(nn.Linear(2, 1), 4).tensors["weight"]
    {'scheme': 'uniform', 'bits': 4}
    """
    choice = {"scheme": scheme, "bits": bits}
    return Strategy({name: dict(choice) for name, _ in model.named_parameters()})


def quantize_tensors(model: nn.Module, strategy: Strategy) -> dict[str, QuantizedTensor]:
    """The parameters that ``strategy`` names, quantized; parameters shared by modules count once.

    Errors: ValueError naming the parameter that ``model`` doesn't have or that can't be quantized.
    """
    parameters = dict(model.named_parameters())
    if unknown := strategy.tensors.keys() - parameters.keys():
        raise ValueError(
            f"the strategy names {', '.join(sorted(unknown))}: "
            f"the network has {', '.join(parameters)}"
        )
    quantized = {}
    for name, choice in strategy.tensors.items():
        options = dict(choice)
        quantize = plugins.load("schemes", options.pop("scheme"), "quantize")
        try:
            quantized[name] = quantize(parameters[name].detach(), **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return quantized


def quantize_model(model: nn.Module, strategy: Strategy) -> nn.Module:
    """A deep copy of ``model`` whose parameters have the strategy's values; the original is intact.

    Errors: ValueError as for `quantize_tensors`.
    """
    return with_tensors(model, quantize_tensors(model, strategy))


def with_tensors(model: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> nn.Module:
    """A deep copy of ``model`` with the values of quantized ``tensors``, by parameter name."""
    replica = copy.deepcopy(model)
    parameters = dict(replica.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor.dequantize())
    return replica


def mean_bits(model: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> float:
    """Bits per parameter, everything counted: packed codes, scales, parameters left in float."""
    stored = [
        tensors[name].stored_bits if name in tensors else 8 * p.numel() * p.element_size()
        for name, p in model.named_parameters()
    ]
    return sum(stored) / sum(parameter.numel() for parameter in model.parameters())
