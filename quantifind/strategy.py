"""A strategy says on which grid each tensor of a network is put; it is data only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quantifind.network.activations import (
    activation_sites,
)
from quantifind.network.calibration import COMPENSABLE, calibration_batches
from quantifind.network.modules import named_tensors
from quantifind.tensor.quantized import Quantized

Choice = Mapping[str, Any]
ROUNDINGS = ("nearest", "compensated", "corrected", "learned")
_OR = " or ".join(COMPENSABLE)
# what a tensor of one axis, a bias or a norm, takes instead of a choice about channels or inputs
INSTEAD = {
    "scale": {"output_error": "squared_error", "weighted_squared_error": "squared_error"},
    "rounding": {"compensated": "nearest"},
    "centres": {"weighted_k_means": "k_means"},
}


@dataclass(frozen=True)
class Strategy:
    """For each tensor its scheme, bits and options; and for each activation.

    tensors: by name of a parameter, or a buffer, ``{"scheme": "uniform", "bits": 4}`` with the
        scheme's further options beside these, and None for one that stays in float. All parameters
        are named; buffers need not be. "rounding" is, for weights, "nearest" (the default) or
        "compensated"; for biases, "nearest" or "corrected". With compensated rounding, "scale" may
        be "output_error": that of each channel with the least error of the layer's outputs.
        "learned" says that the codes have been trained, and stand in ``fitted``.
    activations: by site, as `quantifind.network.activations.fit_activations` takes them; empty for none.
    fitted: what the choices have come to for one network, where that took calibration data or
        learning; `quantize` then takes it as it is.
    """

    tensors: Mapping[str, Choice | None] = field(default_factory=dict)
    activations: Mapping[str, Choice | None] = field(default_factory=dict)
    fitted: Quantized | None = field(default=None, repr=False, compare=False)

    @property
    def choices(self) -> dict[str, dict[str, Choice | None]]:
        """What is chosen, as plain values."""
        return {"tensors": dict(self.tensors), "activations": dict(self.activations)}

    @property
    def bit_depth(self) -> int | None:
        """The one width of all tensors put on a grid, or None."""
        widths = {choice.get("bits") for choice in self.tensors.values() if choice is not None}
        return widths.pop() if len(widths) == 1 else None


def uniform_strategy(
    model: nn.Module, bits: int | None = None, *, scheme: str = "uniform", **options: Any
) -> Strategy:
    """Every floating point parameter, biases included, on the same grid at the same width.

    options: of the scheme, such as ``levels`` instead of bits, and ``rounding``. Those about
    channels and inputs are for tensors of two axes and more: others have one scale, with the least
    squared error where a weighted one is asked for, and are rounded to nearest.

    >>> uniform_strategy(nn.Linear(2, 1), 4).tensors["weight"]
    {'scheme': 'uniform', 'bits': 4}
    """
    choice = {"scheme": scheme} | ({} if bits is None else {"bits": bits}) | options
    single = {
        key: INSTEAD.get(key, {}).get(value, value)
        for key, value in choice.items()
        if key not in ("axis", "group")
    }
    return Strategy(
        {
            name: dict(choice if tensor.dim() > 1 and tensor.numel() else single)
            if tensor.is_floating_point()
            else None
            for name, tensor in named_tensors(model).items()
        }
    )


def uniform_activations(
    model: nn.Module, calibration: Iterable[Any], bits: int, **options: Any
) -> dict[str, Choice]:
    """Every site of a pass on evenly spaced levels of the same width, with a zero point.

    options: of `quantifind.network.activations.fit_activations`: ``scale`` and ``percentile``.
    """
    choice = {"scheme": "uniform", "bits": bits, "zero_point": True} | options
    sites = activation_sites(model, calibration_batches(calibration))
    return {site: dict(choice) for site in sites}
