"""A network quantized by a strategy: grids fitted, codes rounded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.network.activations import QuantizedActivations, fit_activations
from quantifind.network.calibrated import Calibration
from quantifind.network.folding import parameter_count, prepared, prepared_tensors
from quantifind.network.modules import (
    plain_copy,
    put_values,
    stored_bytes,
)
from quantifind.network.trace import (
    activation_names,
    check_rotation,
    output_axes,
)
from quantifind.strategy import Strategy
from quantifind.tensor.choice import Choice
from quantifind.tensor.gptq import Moments, gptq_layer
from quantifind.tensor.matrices import Matrices
from quantifind.tensor.parts import quantizable
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.tensor.scales import check_values
from quantifind.utils.arguments import check
from quantifind.utils.batches import Forward
from quantifind.utils.naming import naming

# groups of weights that GPTQ rounds one after another, each making up for what those before it lost
WAVES = 16


def quantize(
    model: nn.Module,
    strategy: Strategy | Quantized,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    criterion: Any = None,
    max_memory: float | None = None,
) -> Quantized:
    """The tensors, and the parameters of activations, that a strategy names.

    Weights that GPTQ rounds make up for what those before them lost: one after another, or in
    `WAVES` groups where there are more of them.

    strategy: what is already quantized is checked, and returned as it is.
    calibration: batches of training data, where a choice asks for them: GPTQ, weighted scales or
        centres, and activations.
    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    criterion: what the network is judged by, for choices with ``effects``, whose answers are then
        its classes; by default classes where targets are class labels, else numbers.
    max_memory: bytes that moments of calibration inputs may take at a time, by default a quarter of
        what is free; a weight with more is rounded by GPTQ in blocks of inputs, or to nearest, as
        the notes say.
    Raises: ValueError naming the tensor that ``model`` doesn't have, that is left unnamed or can't
        be quantized so, with the option and what is allowed.
    """
    check(
        isinstance(strategy, Strategy | Quantized),
        "strategy",
        strategy,
        "a Strategy, or what quantize returns, such as found.quantized, is needed",
    )
    check(
        forward is None or callable(forward),
        "forward",
        forward,
        "a function (model, batch) is needed",
    )
    network = Calibration(model, calibration, forward, strategy.folded, max_memory, criterion)
    if isinstance(strategy, Quantized):
        _check_fits(strategy, network.tensors)
        return strategy
    return quantize_within(network, strategy)


@torch.no_grad()
def quantize_within(network: Calibration, strategy: Strategy, waves: int = WAVES) -> Quantized:
    """As `quantize`, of a network whose norms are folded as the strategy says.

    waves: groups of weights that make up for what those before them lost, at most.
    """
    choices = _checked(strategy, network)
    activations: dict[str, QParams] = {}
    if strategy.activations:
        rounded = {n: choice for n, choice in strategy.activations.items() if choice is not None}
        activations = fit_activations(network.model, rounded, network.batches)
    tensors = {
        name: _nearest(name, choice, network)
        for name, choice in choices.items()
        if choice.rounding == "nearest"
    }
    if len(tensors) < len(choices):
        tensors |= _gptq_sequentially(network, choices, tensors, activations, waves)
    tensors = {name: tensors[name] for name in choices}
    by_gptq = [name for name, choice in choices.items() if choice.rounding == "gptq"]
    said = {name: note_of(network, name, choices[name], tensors[name]) for name in by_gptq}
    notes = {name: note for name, note in said.items() if note is not None}
    return Quantized(tensors, activations, strategy.folded, notes)


def _gptq_sequentially(
    network: Calibration,
    choices: Mapping[str, Choice],
    done: Mapping[str, QuantizedTensor],
    activations: Mapping[str, QParams],
    count: int,
) -> dict[str, QuantizedTensor]:
    """Weights in so many waves, each making up for what those before it lost."""
    left = [name for name in choices if name not in done]
    tensors: dict[str, QuantizedTensor] = {}
    network.check_used(left)
    work, rounded = None, None
    if done or activations or len(left) > 1:
        work = plain_copy(network.model)
        put_values(work, done)
        rounded = QuantizedActivations(work, activations).rounded if activations else None
    for wave in network.waves(left, count):
        # before anything is rounded, there is nothing to make up for
        own: dict[str, Any] = {}
        if done or activations or tensors:
            own = {"work": work, "rounded": rounded}
        weighed = any(choices[name].effects for name in wave)
        new = {
            name: _by_moments(name, [choices[name]], moments, network)[0]
            for name, moments in network.moments(wave, effects=weighed, **own)
        }
        if work is not None:
            put_values(work, new)
        tensors |= new
    return tensors


def sequential_examples(network: Calibration, strategy: Strategy, count: int) -> float:
    """How many examples go through the network for the moments of a strategy's weights, in so many
    waves (`quantifind.network.calibrated.Calibration.examples`)."""
    choices = {name: choice for name, choice in strategy.tensors.items() if choice is not None}
    left = [name for name, choice in choices.items() if choice.rounding != "nearest"]
    alone = len(left) == len(choices) and not any(strategy.activations.values())
    return sum(
        network.examples(wave, beside=not (alone and index == 0))
        for index, wave in enumerate(network.waves(left, count))
    )


@torch.no_grad()
def quantize_each(
    network: Calibration, choices: Mapping[str, Sequence[Choice]]
) -> Iterator[tuple[str, list[QuantizedTensor]]]:
    """Tensors by each of several choices, the rest of the network in float.

    Yields each with its name as it is done: first those that need no moments, then the others in
    the order of a pass, with as few passes as memory allows.

    choices: by name of a parameter or a buffer.
    Raises: ValueError as `quantize`.
    """
    for name, some in choices.items():
        if name not in network.tensors:
            raise ValueError(f"unknown tensor {name}: the network has {', '.join(network.tensors)}")
        for choice in some:
            _check_choice(name, choice, network)
    asking = [name for name, some in choices.items() if any(c.rounding == "gptq" for c in some)]
    for name, some in choices.items():
        if name not in asking:
            yield name, [_nearest(name, choice, network) for choice in some]
    weighed = any(choice.effects for name in asking for choice in choices[name])
    for name, moments in network.moments(asking, effects=weighed):
        by_gptq = [choice for choice in choices[name] if choice.rounding == "gptq"]
        rounded = iter(_by_moments(name, by_gptq, moments, network))
        yield (
            name,
            [
                next(rounded) if choice.rounding == "gptq" else _nearest(name, choice, network)
                for choice in choices[name]
            ],
        )


def _by_moments(
    name: str,
    choices: Sequence[Choice],
    moments: Mapping[Matrices, Moments],
    network: Calibration,
) -> list[QuantizedTensor]:
    """A weight by choices of GPTQ; to nearest, where there was no memory for its moments."""
    values = network.tensors[name]
    with naming(name):
        if moments:
            return gptq_layer(values, moments, choices)
        return [choice.quantize(values, network.importance(name)) for choice in choices]


def note_of(network: Calibration, name: str, choice: Choice, made: QuantizedTensor) -> str | None:
    """What GPTQ did less well than it could with a choice, in words; None where nothing."""
    said = [network.notes[name]] if name in network.notes else []
    if choice.rotation is not None and made.rotation is None:
        said.append("its inputs not rotated")
    if choice.effects and not network.weighs(name):
        said.append("errors of its outputs weighed alike, since what each does is not known")
    return "; ".join(said) or None


def _nearest(name: str, choice: Choice, network: Calibration) -> QuantizedTensor:
    values = network.tensors[name]
    with naming(name):
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
    criterion: Any = None,
) -> nn.Module:
    """A copy of ``model`` with the values of a strategy, which rounds its activations, if any.

    The original is intact. Arguments and errors are those of `quantize`.
    """
    how: Any = {"forward": forward, "criterion": criterion}
    quantized = quantize(model, strategy, calibration, **how)
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
    check(
        isinstance(quantized, Quantized), "quantized", quantized, "what quantize returns is needed"
    )
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
        if choice.rotation is not None:
            with naming("rotation"):
                check_rotation(name, values.shape, network.facts)
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
