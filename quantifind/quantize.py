"""A network quantized by a strategy: grids fitted, codes rounded."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.activations import QuantizedActivations, fit_activations
from quantifind.network.calibration import (
    Batches,
    calibration_batches,
    layer_moments,
    second_moments,
)
from quantifind.network.folding import Pairs, parameter_count, prepared, prepared_tensors
from quantifind.network.modules import (
    named_buffers,
    named_tensors,
    plain_copy,
    put_values,
    stored_bytes,
)
from quantifind.network.trace import (
    GPTQ_KINDS,
    ProductFacts,
    activation_names,
    output_axes,
    trace,
    weight_uses,
)
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.gptq import Moments, gptq_layer
from quantifind.tensor.matrices import Matrices
from quantifind.tensor.parts import quantizable
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.tensor.scales import check_values
from quantifind.utils.batches import Forward
from quantifind.utils.naming import naming


class Calibration:
    """A network, with norms folded, and batches of its inputs; what is asked of them is computed
    once."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        forward: Forward | None = None,
        folded: Pairs = (),
    ) -> None:
        self._given, self._batches = model, batches
        self._forward, self._folded = forward, folded
        self._moments: dict[str, dict[Matrices, Moments]] = {}
        shown = prepared_tensors(model, folded)
        self.parameters, self.buffers = named_tensors(shown), named_buffers(shown)
        self.tensors = self.buffers | self.parameters

    @cached_property
    def model(self) -> nn.Module:
        """A plain copy, since what no pass goes through need not be copied."""
        return prepared(self._given, self._folded)

    @cached_property
    def batches(self) -> Batches:
        """Raises: ValueError where there are none."""
        return calibration_batches(self._batches, self._given, self._forward)

    @cached_property
    def facts(self) -> list[ProductFacts]:
        """Of a pass of each batch."""
        return trace(self.model, self.batches)

    @cached_property
    def uses(self) -> Mapping[str, tuple[int, ...]]:
        """The weights in the order of a pass, and how often that of each batch uses them."""
        return weight_uses(self.facts)

    @cached_property
    def _importance(self) -> dict[str, Tensor]:
        return second_moments(self.model, self.batches)

    def importance(self, name: str) -> Tensor:
        """The second moments of the inputs that each element of a weight meets."""
        if name not in self._importance:
            raise ValueError(_unused())
        return self._importance[name]

    def moments(self, name: str) -> dict[Matrices, Moments]:
        """Those of a weight in the float network."""
        if name not in self._moments:
            if name not in self.uses:
                raise ValueError(_unused())
            self._moments[name] = layer_moments(self.model, name, self.batches, self.uses[name])
        return self._moments[name]


@torch.no_grad()
def quantize(
    model: nn.Module,
    strategy: Strategy | Quantized,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
) -> Quantized:
    """The tensors, and the parameters of activations, that a strategy names.

    strategy: what is already quantized is checked, and returned as it is.
    calibration: batches of training data, where a choice asks for them: GPTQ, weighted scales or
        centres, and activations.
    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    Raises: ValueError naming the tensor that ``model`` doesn't have, that is left unnamed or can't
        be quantized so, with the option and what is allowed.
    """
    network = Calibration(model, calibration, forward, strategy.folded)
    if isinstance(strategy, Quantized):
        _check_fits(strategy, network.tensors)
        return strategy
    choices = _checked(strategy, network)
    activations: dict[str, QParams] = {}
    if strategy.activations:
        rounded = {n: choice for n, choice in strategy.activations.items() if choice is not None}
        activations = fit_activations(network.model, rounded, network.batches)
    tensors = {
        name: quantize_tensor(name, choice, network)
        for name, choice in choices.items()
        if choice.rounding == "nearest"
    }
    if len(tensors) < len(choices):
        tensors |= _gptq_sequentially(network, choices, tensors, activations)
    return Quantized({name: tensors[name] for name in choices}, activations, strategy.folded)


def _gptq_sequentially(
    network: Calibration,
    choices: Mapping[str, Choice],
    done: Mapping[str, QuantizedTensor],
    activations: Mapping[str, QParams],
) -> dict[str, QuantizedTensor]:
    """Weights layer by layer, each making up for what those before it lost."""
    work = plain_copy(network.model)
    put_values(work, done)
    rounded = QuantizedActivations(work, activations).rounded
    left, tensors = [name for name in choices if name not in done], {}
    for name in left:
        if name not in network.uses:
            raise ValueError(f"{name}: rounding 'gptq': {_unused()}; round it to 'nearest'")
    for name, count in network.uses.items():
        if name in left:
            with naming(name):
                moments = layer_moments(
                    network.model, name, network.batches, count, work=work, rounded=rounded
                )
                (tensors[name],) = gptq_layer(network.tensors[name], moments, [choices[name]])
            put_values(work, {name: tensors[name]})
    return tensors


@torch.no_grad()
def quantize_alone(
    model: nn.Module, name: str, choices: Sequence[Choice], calibration: Iterable[Any] | None = None
) -> list[QuantizedTensor]:
    """One tensor by each of several choices, the rest of the network in float.

    name: of a parameter or a buffer.
    calibration: as for `quantize`; looked at once for all choices.
    Raises: ValueError as `quantize`.
    """
    network = Calibration(model, calibration)
    if name not in network.tensors:
        raise ValueError(f"unknown tensor {name}: the network has {', '.join(network.tensors)}")
    for choice in choices:
        _check_choice(name, choice, network)
    return [quantize_tensor(name, choice, network) for choice in choices]


def quantize_tensor(name: str, choice: Choice, network: Calibration) -> QuantizedTensor:
    """A tensor by a choice, the rest of the network in float."""
    values = network.tensors[name]
    with naming(name):
        if choice.rounding == "gptq":
            with naming("rounding 'gptq'"):
                moments = network.moments(name)
            return gptq_layer(values, moments, [choice])[0]
        if not choice.weighted:
            return choice.quantize(values)
        with naming(str(choice.needs)):
            importance = network.importance(name)
        return choice.quantize(values, importance)


def quantize_model(
    model: nn.Module,
    strategy: Strategy | Quantized,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
) -> nn.Module:
    """A copy of ``model`` with the values of a strategy, which rounds its activations, if any.

    The original is intact. Arguments and errors are those of `quantize`.
    """
    quantized = quantize(model, strategy, calibration, forward=forward)
    replica = prepared(model, quantized.folded)
    put_values(replica, quantized.tensors)
    if not quantized.activations:
        return replica
    return QuantizedActivations(replica, quantized.activations)


def mean_bits(model: nn.Module, quantized: Quantized) -> float:
    """Bits per parameter of the network as it is given, everything counted that inference needs.

    That is packed codes, scales, zero points, codebooks, parameters left in float, buffers
    (`quantifind.network.modules.stored_bytes`), and the scales and zero points of activations.
    Parameters are those before norms are folded, parametrized ones as they are used.

    Raises: ValueError for a network without parameters.
    """
    count = parameter_count(model)
    if not count:
        raise ValueError("the network has no parameters: there are no bits of any")
    stored = stored_bytes(prepared_tensors(model, quantized.folded))
    bits = {name: 8 * size for name, size in stored.items()}
    bits |= {name: tensor.stored_bits for name, tensor in quantized.tensors.items()}
    ranges = [qparams.stored_bits for qparams in quantized.activations.values()]
    return (sum(bits.values()) + sum(ranges)) / count


def _checked(strategy: Strategy, network: Calibration) -> dict[str, Choice]:
    """The choices of the tensors put on a grid; every error of a strategy is raised here."""
    _check_names("tensors", strategy.tensors, list(network.parameters), set(network.buffers))
    choices = {name: choice for name, choice in strategy.tensors.items() if choice is not None}
    for name, choice in choices.items():
        _check_choice(name, choice, network)
    if strategy.activations:
        with naming("activations"):
            _ = network.batches
        _check_names("activations", strategy.activations, activation_names(network.facts))
    return choices


def _check_names(
    kind: str, choices: Mapping[str, Any], names: list[str], optional: set[str] | None = None
) -> None:
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


def _check_choice(name: str, choice: Choice, network: Calibration) -> None:
    values, rounding = network.tensors[name], choice.rounding
    with naming(name):
        if values.is_floating_point() and not quantizable(values):
            raise ValueError(
                f"values are {values.dtype} in layout {values.layout}: only floating point of 16 "
                "bits and more, in no sparse or nested layout, can be quantized; None leaves it"
            )
        check_values(values)
        if rounding == "learned":
            raise ValueError("rounding 'learned' without codes: quantifind.learning.learn has them")
        if rounding == "gptq" and values.dim() < 2:
            raise ValueError(f"rounding 'gptq' is for weights, its shape is {list(values.shape)}")
        if choice.options.get("scale") == "output_mse" and rounding != "gptq":
            raise ValueError(f"scale 'output_mse' needs rounding 'gptq', not {rounding!r}")
        if choice.needs is not None:
            with naming(choice.needs):
                _ = network.batches
        if choice.options.get("scale") == "output_mse":
            axis = output_axes(network.facts).get(name, 0)
            if choice.axis is None or choice.axis % values.dim() != axis:
                raise ValueError(
                    f"scale 'output_mse' needs the axis of its outputs, {axis}, "
                    f"not axis {choice.axis}"
                )


def _check_fits(quantized: Quantized, tensors: Mapping[str, Tensor]) -> None:
    if unknown := quantized.tensors.keys() - tensors.keys():
        raise ValueError(
            f"quantized tensors {', '.join(sorted(unknown))}: the network has {', '.join(tensors)}"
        )
    for name, tensor in quantized.tensors.items():
        if tensor.codes.shape != tensors[name].shape:
            raise ValueError(
                f"{name}: codes of shape {list(tensor.codes.shape)}, "
                f"the network's are {list(tensors[name].shape)}"
            )


def _unused() -> str:
    return f"no {' or '.join(GPTQ_KINDS)} of a pass uses it"
