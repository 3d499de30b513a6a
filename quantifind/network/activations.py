"""Activations on few levels: ranges from calibration data, and a network that rounds what goes into
each linear map, convolution and matrix product."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.calibration import Batches
from quantifind.network.modules import run
from quantifind.network.products import Product, visiting
from quantifind.tensor.choice import ActivationChoice
from quantifind.tensor.qparams import QParams
from quantifind.tensor.ste import in_float32, round_through
from quantifind.utils.devices import evaluating
from quantifind.utils.naming import naming

# values of an activation that are kept of all batches together, beside the extremes of each
SAMPLE = 2**20


def fit_activations(
    model: nn.Module,
    choices: Mapping[str, ActivationChoice],
    batches: Batches,
) -> dict[str, QParams]:
    """Quantization parameters of activations, fitted to a sample of what is seen there.

    model: without parametrizations.
    choices: by activation (`quantifind.network.trace.activation_names`).
    batches: calibration data.
    Raises: ValueError naming the activation that takes values that are not finite, or can't be
        quantized so.
    """
    samples, fitted = _sample(model, batches, set(choices)), {}
    if unseen := choices.keys() - samples.keys():
        raise ValueError(f"activations {', '.join(sorted(unseen))}: a pass has no values there")
    for name, sample in samples.items():
        percentile = choices[name].percentile
        ends = torch.tensor([1 - percentile / 100, percentile / 100], dtype=torch.float64)
        low, high = sample.double().quantile(ends).to(sample.dtype)
        with naming(f"activations of {name}"):
            fitted[name] = choices[name].quantize(sample.clamp(low, high)).qparams
    return fitted


def _sample(model: nn.Module, batches: Batches, names: set[str]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    share = -(-SAMPLE // len(batches))

    def visit(product: Product) -> Tensor:
        # what looks up an embedding is whole numbers
        operands = () if product.kind == "embedding" else product.operands
        for name, operand in zip(product.activations, operands, strict=False):
            if name not in names or not operand.numel():
                continue
            # what follows may work in place: test_ranges_are_of_values_before_they_change
            values = operand.detach().to("cpu", torch.float32, copy=True).flatten()
            if bad := int((~values.isfinite()).sum()):
                raise ValueError(f"activations of {name}: {bad} values are NaN or infinite")
            if len(values) > share:
                extremes = torch.stack(values.aminmax())
                values = values[torch.randint(len(values), (share,), generator=generator)]
                values = torch.cat([values, extremes])
            seen.setdefault(name, []).append(values)
        return product.compute(*product.operands)

    with evaluating(model), visiting(model, visit):
        for batch in batches:
            run(model, batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


class QuantizedActivations(nn.Module):
    """A network that rounds the operands of its products to the levels of their activations.

    Gradients pass through the rounding to what lies within the levels.
    """

    scales: Tensor
    zero_points: Tensor

    def __init__(self, model: nn.Module, activations: Mapping[str, QParams]) -> None:
        super().__init__()
        self.model = model
        device = torch.device("cpu")
        self.grids = {
            name: (index, in_float32(fit.grid, device))
            for index, (name, fit) in enumerate(activations.items())
        }
        fits = activations.values()
        scales = [1.0 if fit.scale is None else float(fit.scale) for fit in fits]
        zeros = [0.0 if fit.zero_point is None else float(fit.zero_point) for fit in fits]
        self.register_buffer("scales", torch.tensor(scales))
        self.register_buffer("zero_points", torch.tensor(zeros))
        # each module of the network keeps its own mode: test_modes_stay
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with visiting(self.model, self.visit):
            return self.model(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {"scales": self.scales, "zero_points": self.zero_points}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            # moved, and else as they were: test_scales_of_activations_are_never_cast
            if (now := getattr(self, name)).dtype != kept.dtype:
                setattr(self, name, kept.to(now.device))
        return self

    def visit(self, product: Product) -> Tensor:
        """The result of a product of rounded operands."""
        return product.compute(*self.rounded(product).operands)

    def rounded(self, product: Product) -> Product:
        """The product of the operands' nearest levels."""
        operands = tuple(
            self._round(name, operand)
            for name, operand in zip(product.activations, product.operands, strict=True)
        )
        return replace(product, operands=operands)

    def _round(self, name: str, values: Tensor) -> Tensor:
        if name not in self.grids or not values.is_floating_point():
            return values
        index, grid = self.grids[name]
        if grid.table is not None:
            grid = replace(grid, table=grid.table.to(values.device))
        qparams = QParams(grid, self.scales[index], self.zero_points[index])
        largest = min(torch.finfo(dtype).max for dtype in (values.dtype, torch.float32))
        return round_through(values.float(), qparams).clamp(-largest, largest).to(values.dtype)
