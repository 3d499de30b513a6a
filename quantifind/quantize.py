"""Quantize a network by a strategy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.activations import (
    QuantizedActivations,
    check_names,
    check_options,
    fit_activations,
    put_on_grid,
)
from quantifind.network.calibration import (
    COMPENSABLE,
    Batches,
    calibration_batches,
    layer_moments,
    mean_shift,
    second_moments,
    weight_uses,
)
from quantifind.network.modules import _is_parametrized, named_tensors, plain_copy, put_values
from quantifind.network.products import Product
from quantifind.strategy import Strategy
from quantifind.tensor.gptq import Moments, compensate_layer
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.tensor.scales import check_values

Choice = Mapping[str, Any]
ROUNDINGS = ("nearest", "compensated", "corrected", "learned")
_OR = " or ".join(COMPENSABLE)
# what a tensor of one axis, a bias or a norm, takes instead of a choice about channels or inputs
INSTEAD = {
    "scale": {"output_error": "squared_error", "weighted_squared_error": "squared_error"},
    "rounding": {"compensated": "nearest"},
    "centres": {"weighted_k_means": "k_means"},
}


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


def with_tensors(model: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> nn.Module:
    """A copy of ``model`` with the values of quantized ``tensors``, by name."""
    replica = plain_copy(model)
    put_values(replica, tensors)
    return replica


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
