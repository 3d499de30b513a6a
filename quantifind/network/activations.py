"""Activations on few levels: ranges from calibration data, and a network that rounds what goes into
each linear map, convolution and matrix product."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.calibration import Batches
from quantifind.network.modules import run
from quantifind.network.products import Product, visiting
from quantifind.tensor.quantized import Grid, QuantizedTensor
from quantifind.tensor.scales import quantize_on
from quantifind.utils import plugins
from quantifind.utils.devices import evaluating

# values of a site that are kept of all batches together, beside the extremes of each
SAMPLE = 2**20


def activation_sites(model: nn.Module, batches: Batches) -> list[str]:
    """The sites at which operands meet, in the order of a pass of the first batch.

    A site has the name of the weight that the operand meets; in a product of two operands, the name
    of the module that computes it, the number of the product in the module, and left or right.
    """
    seen: dict[str, None] = {}

    def visit(product: Product) -> Tensor:
        seen.update(dict.fromkeys(_sites(product)))
        return product.compute(*product.operands)

    with evaluating(model), visiting(model, visit):
        run(model, batches[0][0])
    return list(seen)


def fit_activations(
    model: nn.Module,
    choices: Mapping[str, Mapping[str, Any] | None],
    batches: Batches,
    *,
    seed: int = 0,
) -> dict[str, QuantizedTensor]:
    """The levels of each site, fitted to a sample of what is seen there.

    choices: by site its scheme, bits and options, as for a tensor; "scale": "largest" for the
        range of all values, "squared_error" for that with the least error, and
        "percentile": p, 50 to 100, to leave out as many percent above p, and below 100 − p. None
        leaves a site in float.
    Returns: by site, a sample of it quantized.
    Errors: ValueError naming the site that the network hasn't, that is not named, or that takes
    values that are not finite.
    """
    names = activation_sites(model, batches)
    check_names("activations", choices, names)
    samples = _sample(model, batches, {name for name in names if choices[name] is not None}, seed)
    levels = {}
    for name, sample in samples.items():
        options, what = dict(choices[name] or {}), f"activations of {name}"
        percentile = options.pop("percentile", 100.0)
        number = isinstance(percentile, int | float) and not isinstance(percentile, bool)
        if not number or not 50 <= percentile <= 100:
            raise ValueError(f"{what}: percentile is {percentile!r}: 50 to 100 are allowed")
        if shared := options.keys() & {"axis", "group"}:
            raise ValueError(f"{what}: {min(shared)}: activations have one scale a site")
        ends = torch.tensor([1 - percentile / 100, percentile / 100], dtype=torch.float64)
        low, high = sample.double().quantile(ends).to(sample.dtype)
        levels[name] = put_on_grid(what, options, sample.clamp(low, high))
    return levels


def put_on_grid(
    what: str, choice: Mapping[str, Any], values: Tensor, importance: Tensor | None = None
) -> QuantizedTensor:
    """Values on the grid of a choice, a scheme with its options.

    importance: for a scheme that takes it.
    Errors: ValueError that begins with ``what`` and names the option.
    """
    put, taken = check_options(what, choice)
    options = {option: value for option, value in choice.items() if option != "scheme"}
    if importance is not None and "importance" in taken:
        options.setdefault("importance", importance)
    try:
        return put(values, **options)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    except TypeError as error:
        raise ValueError(f"{what}: {options} has a value of another type: {error}") from None


def check_options(what: str, choice: Mapping[str, Any]) -> tuple[Callable[..., Any], Sequence[str]]:
    """The function of a choice's scheme and the options it takes.

    Errors: ValueError that begins with ``what``, for a scheme that is not there or an option that
    it doesn't have.
    """
    if "scheme" not in choice:
        schemes = ", ".join(plugins.names("schemes"))
        raise ValueError(f"{what}: a choice needs a scheme: {schemes}")
    try:
        put = plugins.load("schemes", choice["scheme"], "quantize")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    taken = _options(put)
    if unknown := choice.keys() - {"scheme", *taken}:
        raise ValueError(
            f"{what}: unknown option {', '.join(sorted(unknown))}: {choice['scheme']} takes "
            f"{', '.join(taken)}"
        )
    for option in ("axis", "group"):
        value = choice.get(option)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ValueError(f"{what}: {option} is {value!r}: whole numbers and None are allowed")
    return put, taken


@cache
def _options(put: Callable[..., Any]) -> Sequence[str]:
    _, *parameters = inspect.signature(put).parameters.values()
    taken = [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
    if len(taken) < len(parameters):  # a scheme hands what it doesn't know to quantize_on
        _, _, *others = inspect.signature(quantize_on).parameters
        taken += [option for option in others if option not in taken]
    return tuple(taken)


def check_names(
    kind: str, choices: Mapping[str, Any], names: list[str], optional: set[str] | None = None
) -> None:
    """Raise ValueError unless ``choices`` names all of ``names``, and else only ``optional``."""
    if unknown := choices.keys() - set(names) - (optional or set()):
        raise ValueError(
            f"the strategy names {kind} {', '.join(sorted(unknown))}: "
            f"the network has {', '.join(names)}"
        )
    if missing := [name for name in names if name not in choices]:
        raise ValueError(
            f"the strategy leaves {kind} {', '.join(missing)} unnamed: "
            "None says that one stays in float"
        )


def _sites(product: Product) -> tuple[str, ...]:
    # what looks up an embedding is whole numbers
    return () if product.kind == "embedding" else product.sites


def _sample(model: nn.Module, batches: Batches, sites: set[str], seed: int) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    share = -(-SAMPLE // len(batches))

    def visit(product: Product) -> Tensor:
        for site, operand in zip(_sites(product), product.operands, strict=False):
            if site not in sites or not operand.numel():
                continue
            values = operand.detach().flatten().float().cpu()
            if bad := int((~values.isfinite()).sum()):
                raise ValueError(f"activations of {site}: {bad} values are NaN or infinite")
            if len(values) > share:
                extremes = torch.stack(values.aminmax())
                values = values[torch.randint(len(values), (share,), generator=generator)]
                values = torch.cat([values, extremes])
            seen.setdefault(site, []).append(values)
        return product.compute(*product.operands)

    with evaluating(model), visiting(model, visit):
        for inputs, *_ in batches:
            run(model, inputs)
    return {site: torch.cat(parts) for site, parts in seen.items()}


class QuantizedActivations(nn.Module):
    """A network that rounds the operands of its products to the levels of their sites.

    Gradients pass through the rounding to what lies within the levels (Bengio et al. 2013,
    arXiv:1308.3432).
    """

    scales: Tensor
    zero_points: Tensor

    def __init__(self, model: nn.Module, levels: Mapping[str, QuantizedTensor]) -> None:
        super().__init__()
        self.model = model
        for fit in levels.values():
            in_float32(fit.grid, fit.codes.device)
        self.grids = {name: (index, fit.grid) for index, (name, fit) in enumerate(levels.items())}
        fits = levels.values()
        scales = [1.0 if fit.scale is None else float(fit.scale) for fit in fits]
        zeros = [0.0 if fit.zero_point is None else float(fit.zero_point) for fit in fits]
        self.register_buffer("scales", torch.tensor(scales))
        self.register_buffer("zero_points", torch.tensor(zeros))
        # each module of the network keeps its own mode: test_modes_stay
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with visiting(self.model, self._visit):
            return self.model(*args, **kwargs)

    def _visit(self, product: Product) -> Tensor:
        return product.compute(*self.rounded(product).operands)

    def rounded(self, product: Product) -> Product:
        """The product of the operands' nearest levels."""
        operands = tuple(
            self._round(site, operand)
            for site, operand in zip(product.sites, product.operands, strict=True)
        )
        return replace(product, operands=operands)

    def _round(self, site: str, values: Tensor) -> Tensor:
        if site not in self.grids or not values.is_floating_point():
            return values
        index, grid = self.grids[site]
        scale, zero = self.scales[index], self.zero_points[index]
        grid = in_float32(grid, values.device)
        largest = min(torch.finfo(dtype).max for dtype in (values.dtype, torch.float32))
        rounded = round_through(values.float(), grid, scale, zero)
        return rounded.clamp(-largest, largest).to(values.dtype)


def in_float32(grid: Grid, device: torch.device) -> Grid:
    """The grid with its table, if any, in float32 on a device.

    Errors: ValueError for levels beyond float32, as a minifloat of 8 exponent bits may have.
    """
    if grid.table is None:
        return grid
    if grid.reach > torch.finfo(torch.float32).max:
        raise ValueError(f"levels up to {grid.reach:.3g} are beyond float32")
    return replace(grid, table=grid.table.to(device, torch.float32))


def round_through(values: Tensor, grid: Grid, scale: Tensor, zero: Tensor | float) -> Tensor:
    """Each value's nearest (level − zero) · scale; the gradient is that of clipping to the levels,
    for the scale that of the rounding error too (LSQ, arXiv:1902.08153).

    values: float32, (rows, length) where the grid has tables by row, or the scale is (rows, 1).
    """
    scaled = values / torch.where(scale > 0, scale, 1.0) + zero
    levels = grid.values(grid.codes(scaled.detach()))
    if grid.table is not None:
        levels = torch.where(scaled.isnan(), scaled, levels)  # NaN is near no entry of a table
    if torch.is_grad_enabled() and (values.requires_grad or scale.requires_grad):
        low, high = grid.ends
        within = scaled.clamp(low, high)
        levels = levels + (within - within.detach())
    return (levels - zero) * scale
