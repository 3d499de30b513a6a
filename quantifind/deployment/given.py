"""What a network is to be taken along as: what a search found, codes, or a strategy."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from quantifind.mixed_precision.found import Found
from quantifind.quantize import quantize
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Forward

Given = Found | Quantized | Strategy


def codes_of(
    model: nn.Module,
    given: Given,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> Quantized:
    """The codes, checked to be those of a network.

    calibration, forward: as for `quantifind.quantize.quantize`, where a strategy asks for them.
    Raises: ValueError as `quantize`, and for what is none of these.
    """
    if isinstance(given, Found):
        given = given.quantized
    if not isinstance(given, Quantized | Strategy):
        raise ValueError(
            f"a {type(given).__name__} is given: what find_strategy or quantize returns, or a "
            "Strategy, is needed"
        )
    return quantize(model, given, calibration, forward=forward)
