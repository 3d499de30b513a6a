"""A strategy says on which grid each tensor of a network is put; it is data only."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantifind.activations import (
    QuantizedActivations,
    activation_sites,
    check_names,
    check_options,
    fit_activations,
    put_on_grid,
)
from quantifind.calibration import (
    COMPENSABLE,
    Batches,
    Moments,
    calibration_batches,
    layer_moments,
    mean_shift,
    second_moments,
    weight_uses,
)
from quantifind.products import Product
from quantifind.quantized import QuantizedTensor
from quantifind.rounding import compensate_layer
from quantifind.scales import check_values, stored_scale

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
class Quantized:
    """What `quantize` makes of a network: tensors and activations by name, on their levels."""

    tensors: dict[str, QuantizedTensor]
    activations: dict[str, QuantizedTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Strategy:
    """For each tensor its scheme, bits and options; and for each activation.

    tensors: by name of a parameter, or a buffer, ``{"scheme": "uniform", "bits": 4}`` with the
        scheme's further options beside these, and None for one that stays in float. All parameters
        are named; buffers need not be. "rounding" is, for weights, "nearest" (the default) or
        "compensated"; for biases, "nearest" or "corrected". With compensated rounding, "scale" may
        be "output_error": that of each channel with the least error of the layer's outputs.
        "learned" says that the codes have been trained, and stand in ``fitted``.
    activations: by site, as `quantifind.activations.fit_activations` takes them; empty for none.
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

    options: of `quantifind.activations.fit_activations`: ``scale`` and ``percentile``.
    """
    choice = {"scheme": "uniform", "bits": bits, "zero_point": True} | options
    sites = activation_sites(model, calibration_batches(calibration))
    return {site: dict(choice) for site in sites}


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy in which parametrized tensors have become the parameters they stand for, as they
    are in eval mode, and parameters that share their memory one."""
    replica = copy.deepcopy(model)
    first: dict[Any, nn.Parameter] = {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in names:
        # a copied Parameter has memory of its own: test_parameters_over_the_same_memory_are_one
        where, _, own = name.rpartition(".")
        memory = _memory(model.get_parameter(name))
        shared = first.setdefault(memory, replica.get_parameter(name))
        replica.get_submodule(where)._parameters[own] = shared
    modes = {module: module.training for module in replica.modules()}
    replica.eval()  # spectral_norm moves with each look at its weight in training
    for module in modes:
        if parametrize.is_parametrized(module):
            # a deep copy shares the class, from which removing takes the original's weight away
            # too: test_any_module_is_quantized
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        for name, parts in list(getattr(module, "parametrizations", {}).items()):
            trained = [part.requires_grad for part in parts.parameters(recurse=False)]
            parametrize.remove_parametrizations(module, name)
            if trained:  # without gradients torch makes a buffer of a parameter of several parts
                value = module._buffers.pop(name, None)
                value = getattr(module, name) if value is None else value
                setattr(module, name, nn.Parameter(value.detach(), any(trained)))
    for module, mode in modes.items():
        module.training = mode
    return replica


def _memory(tensor: Tensor) -> Any:
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _is_parametrized(model: nn.Module) -> bool:
    return any(map(parametrize.is_parametrized, model.modules()))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, memory that is shared once, parametrized ones as they are used."""
    if _is_parametrized(model):
        model = plain_copy(model)
    tensors: dict[Any, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        tensors.setdefault(_memory(parameter), (name, parameter.detach()))
    return dict(tensors.values())


@torch.no_grad()
def quantize_alone(
    model: nn.Module, name: str, choices: Sequence[Choice], calibration: Iterable[Any] | None = None
) -> list[QuantizedTensor]:
    """One tensor by each of several choices, the rest of the network in float.

    Calibration data are looked at once for all of them. Errors: as for `quantize`.
    """
    model = plain_copy(model)
    tensors = dict(model.named_buffers()) | named_tensors(model)
    if name not in tensors:
        raise ValueError(f"unknown tensor {name}: the network has {', '.join(tensors)}")
    values = tensors[name]
    batches: Batches = []
    if asks := [choice for choice in choices if _needs_calibration(choice)]:
        try:
            batches = calibration_batches(calibration)
        except ValueError as error:
            raise ValueError(f"{name}: {_needs_calibration(asks[0])}: {error}") from None
    uses = weight_uses(model, batches)[name] if batches else 0
    moments: Mapping[tuple[int, int], Moments] | None = None
    importance: Tensor | None = None
    results = []
    for choice in choices:
        _check_choice(name, choice, values)
        if _rounding(choice) == "corrected":
            raise ValueError(f"{name}: rounding 'corrected' is for a bias beside rounded weights")
        if _rounding(choice) == "compensated":
            if not uses:
                raise ValueError(f"{name}: rounding 'compensated': no {_OR} of a pass uses it")
            if moments is None:
                moments = layer_moments(model, model, name, batches, uses, lambda product: product)
            results.append(_compensated(name, choice, values, moments))
            continue
        if _needs_calibration(choice) and importance is None:
            importance = second_moments(model, batches).get(name)
            if importance is None:
                raise ValueError(
                    f"{name}: {_needs_calibration(choice)}: no {_OR} of a pass uses it"
                )
        results.append(_on_grid(name, choice, values, importance))
    return results


@torch.no_grad()
def quantize(
    model: nn.Module, strategy: Strategy, calibration: Iterable[Any] | None = None
) -> Quantized:
    """The tensors, and the levels of activations, that ``strategy`` names.

    calibration: batches (inputs, …) of training data, where a choice asks for them: compensated
        rounding, corrected biases, weighted scales or centres, and activations.
    Errors: ValueError naming the tensor that ``model`` doesn't have, that is left unnamed or can't
    be quantized so, with the option and what is allowed.
    """
    choices = {name: choice for name, choice in strategy.tensors.items() if choice is not None}
    asks = [name for name, choice in choices.items() if _needs_calibration(choice)]
    # what no pass goes through is not copied
    copied = asks or strategy.activations or _is_parametrized(model)
    work = plain_copy(model) if copied else model
    parameters, buffers = named_tensors(work), dict(work.named_buffers())
    check_names("tensors", strategy.tensors, list(parameters), set(buffers))
    targets = buffers | parameters
    if strategy.fitted is not None:
        _check_fitted(strategy, targets)
        return strategy.fitted
    for name, choice in choices.items():
        _check_choice(name, choice, targets[name])
    batches: Batches = []
    if asks or strategy.activations:
        try:
            batches = calibration_batches(calibration)
        except ValueError as error:
            what = f"{asks[0]}: {_needs_calibration(choices[asks[0]])}" if asks else "activations"
            raise ValueError(f"{what}: {error}") from None
    activations = {}
    if strategy.activations:
        activations = fit_activations(work, strategy.activations, batches)
    weighted = [name for name in asks if _rounding(choices[name]) == "nearest"]
    moments = second_moments(work, batches) if weighted else {}
    for name in weighted:
        if name not in moments:
            raise ValueError(
                f"{name}: {_needs_calibration(choices[name])}: no {_OR} of a pass uses it"
            )
    uses = weight_uses(work, batches) if batches else {}
    tensors = {
        name: _on_grid(name, choice, targets[name], moments.get(name))
        for name, choice in choices.items()
        if _rounding(choice) == "nearest"
    }
    if len(tensors) < len(choices):
        original = plain_copy(model)
        put_values(work, tensors)
        rounded = QuantizedActivations(work, activations).rounded
        tensors |= _in_order(original, work, choices, tensors, batches, uses, rounded)
    return Quantized({name: tensors[name] for name in choices}, activations)


def _in_order(
    model: nn.Module,
    work: nn.Module,
    choices: Mapping[str, Choice],
    done: Mapping[str, QuantizedTensor],
    batches: Batches,
    uses: Mapping[str, int],
    rounded: Callable[[Product], Product],
) -> dict[str, QuantizedTensor]:
    """Compensated weights and corrected biases, layer by layer; ``work`` takes their values."""
    values, left = named_tensors(model), {n for n in choices if n not in done}
    tensors: dict[str, QuantizedTensor] = {}
    for name, count in uses.items():
        arguments = model, work, name, batches, count, rounded
        if name in left and _rounding(choices[name]) == "compensated":
            moments = layer_moments(*arguments)
            tensors[name] = _compensated(name, choices[name], values[name], moments)
            put_values(work, {name: tensors[name]})
        bias, shift = None, torch.zeros(())
        if any(_rounding(choices[other]) == "corrected" for other in left - tensors.keys()):
            bias, shift = mean_shift(*arguments)
        if bias in left and bias not in tensors and _rounding(choices[bias]) == "corrected":
            corrected = (values[bias].double() + shift).to(values[bias].dtype)
            tensors[bias] = _on_grid(bias, choices[bias], corrected, None)
            put_values(work, {bias: tensors[bias]})
    if missing := left - tensors.keys():
        name = min(missing)
        raise ValueError(
            f"{name}: rounding {_rounding(choices[name])!r}: no {_OR} of a pass uses it; "
            "round it to 'nearest'"
        )
    return tensors


def _compensated(
    name: str, choice: Choice, values: Tensor, moments: Mapping[tuple[int, int], Moments]
) -> QuantizedTensor:
    search = choice.get("scale") == "output_error"
    if search:
        choice = {**choice, "scale": "weighted_squared_error"}
    return compensate_layer(
        values,
        moments,
        lambda target, importance: _on_grid(name, choice, target, importance),
        search=search,
    )


def _rounding(choice: Choice) -> str:
    return choice.get("rounding", "nearest")


def _needs_calibration(choice: Choice) -> str | None:
    """The option of a choice that asks for calibration data."""
    for option, asking in (
        ("rounding", ("compensated", "corrected")),
        ("scale", ("weighted_squared_error", "output_error")),
        ("centres", ("weighted_k_means",)),
    ):
        value = choice.get(option)
        given = "importance" in choice and option != "rounding"
        if isinstance(value, str) and value in asking and not given:
            return f"{option} {value!r}"
    return None


def _check_fitted(strategy: Strategy, targets: Mapping[str, Tensor]) -> None:
    fitted = strategy.fitted
    assert fitted is not None
    for kind, named, given in (
        ("tensors", strategy.tensors, fitted.tensors),
        ("activations", strategy.activations, fitted.activations),
    ):
        if given.keys() != {name for name, choice in named.items() if choice is not None}:
            raise ValueError(f"the strategy's fitted {kind} are not those that it puts on a grid")
    for name, tensor in fitted.tensors.items():
        if tensor.codes.shape != targets[name].shape:
            raise ValueError(
                f"{name}: fitted codes of shape {list(tensor.codes.shape)}, "
                f"the network's are {list(targets[name].shape)}"
            )


def _check_choice(name: str, choice: Choice, values: Tensor) -> None:
    check_options(name, _scheme_options(choice))
    try:
        check_values(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    rounding = _rounding(choice)
    if rounding not in ROUNDINGS:
        raise ValueError(f"{name}: rounding is {rounding!r}: {', '.join(ROUNDINGS)} are allowed")
    if rounding == "learned":
        raise ValueError(
            f"{name}: rounding 'learned' without the codes: quantifind.learning.learn gives them"
        )
    if (rounding == "compensated") > (values.dim() > 1) or (rounding == "corrected") > (
        values.dim() == 1
    ):
        raise ValueError(
            f"{name}: rounding {rounding!r} is for {'biases' if values.dim() > 1 else 'weights'}, "
            f"its shape is {list(values.shape)}"
        )
    if choice.get("scale") == "output_error":
        axis = choice.get("axis")
        if rounding != "compensated" or axis is None or axis % values.dim():
            raise ValueError(
                f"{name}: scale 'output_error' needs rounding 'compensated' and axis 0, "
                f"not {rounding!r} and axis {axis}"
            )


def _on_grid(
    name: str, choice: Choice, values: Tensor, importance: Tensor | None
) -> QuantizedTensor:
    return put_on_grid(name, _scheme_options(choice), values.detach(), importance)


def _scheme_options(choice: Choice) -> Choice:
    return {key: value for key, value in choice.items() if key != "rounding"}


def quantize_tensors(
    model: nn.Module, strategy: Strategy, calibration: Iterable[Any] | None = None
) -> dict[str, QuantizedTensor]:
    """The tensors that ``strategy`` names, quantized, as `quantize` has them."""
    return quantize(model, strategy, calibration).tensors


def quantize_model(
    model: nn.Module, strategy: Strategy, calibration: Iterable[Any] | None = None
) -> nn.Module:
    """A copy of ``model`` whose tensors have the strategy's values; the original is intact.

    calibration and errors: as for `quantize`.
    """
    return with_quantized(model, quantize(model, strategy, calibration))


def with_quantized(model: nn.Module, quantized: Quantized) -> nn.Module:
    """A copy of ``model`` with the values of quantized tensors, which rounds its activations."""
    replica = with_tensors(model, quantized.tensors)
    if not quantized.activations:
        return replica
    return QuantizedActivations(replica, quantized.activations)


def scaled(quantized: Quantized, factors: Mapping[str, float]) -> Quantized:
    """With the scales of the tensors named multiplied, and stored as wide as before."""
    tensors = dict(quantized.tensors)
    for name, factor in factors.items():
        scale = tensors[name].scale
        if scale is not None:
            grown = stored_scale(scale.double() * factor, scale.dtype)
            tensors[name] = replace(tensors[name], scale=grown)
    return replace(quantized, tensors=tensors)


def with_tensors(model: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> nn.Module:
    """A copy of ``model`` with the values of quantized ``tensors``, by name."""
    replica = plain_copy(model)
    put_values(replica, tensors)
    return replica


def put_values(model: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Give a network's own tensors the values of quantized ones, in place."""
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor.dequantize())


def mean_bits(model: nn.Module, quantized: Quantized | Mapping[str, QuantizedTensor]) -> float:
    """Bits per parameter, everything counted: packed codes, scales, zero points, codebooks,
    parameters left in float, and the scales and zero points of activations."""
    if not isinstance(quantized, Quantized):
        quantized = Quantized(dict(quantized))
    tensors = quantized.tensors
    parameters = named_tensors(model)
    counted = parameters | {n: t.codes for n, t in tensors.items() if n not in parameters}
    stored = [
        tensors[name].stored_bits if name in tensors else 8 * value.numel() * value.element_size()
        for name, value in counted.items()
    ]
    ranges = [replace(q, codes=q.codes[:0]).stored_bits for q in quantized.activations.values()]
    return (sum(stored) + sum(ranges)) / sum(value.numel() for value in counted.values())
