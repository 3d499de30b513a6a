"""What a network is to be taken along as: what a search found, codes, or a strategy."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Union

from torch import nn

from quantifind.network.modules import named_tensors
from quantifind.quantize import quantize
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.arguments import check
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
    Raises: ValueError as `quantize`, for codes of another dtype, and for what is none of these.
    """
    codes: Any = getattr(given, "quantized", given)
    check(
        isinstance(codes, Quantized | Strategy),
        "quantized",
        given,
        "what find_strategy or quantize returns, or a Strategy, is needed",
    )
    found = quantize(model, codes, calibration, forward=forward)
    own = named_tensors(model)
    for name, tensor in found.tensors.items():
        # a network that was cast after it was quantized: test_codes_of_another_dtype_are_refused
        if name in own and own[name].dtype != tensor.dtype:
            raise ValueError(
                f"{name}: its codes are of {tensor.dtype}, the network has {own[name].dtype}: "
                "quantize the network as it is to run"
            )
    return found
