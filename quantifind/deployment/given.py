"""What a network is to be taken along as: what a search found, codes, or a strategy."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Union

from torch import nn

from quantifind.quantize import quantize
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Forward

if TYPE_CHECKING:
    # a pipeline's file would depend on the code of the search:
    # test_a_change_runs_what_depends_on_it_and_no_more
    from quantifind.mixed_precision.found import Found

Given = Union["Found", Quantized, Strategy]


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
    codes = getattr(given, "quantized", given)
    if not isinstance(codes, Quantized | Strategy):
        raise ValueError(
            f"a {type(given).__name__} is given: what find_strategy or quantize returns, or a "
            "Strategy, is needed"
        )
    return quantize(model, codes, calibration, forward=forward)
