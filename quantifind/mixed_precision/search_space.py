"""What each tensor and activation may become."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from quantifind.network.modules import named_tensors
from quantifind.network.trace import (
    ProductFacts,
    activation_names,
    gptq_weights,
    output_axes,
    rotatable,
)
from quantifind.tensor.choice import ActivationChoice, Choice
from quantifind.tensor.parts import quantizable
from quantifind.utils.arguments import check
from quantifind.utils.naming import naming

# bits tried first; and those tried where none of these keeps the limit
WIDTHS, WIDER = range(1, 17), range(1, 33)
PER_TENSOR = Choice("uniform", options={"scale_dtype": "float16", "scale": "mse"})
NEAREST = Choice("uniform", axis=0, options={"scale_dtype": "float16", "scale": "mse"})
GPTQ = Choice(
    "uniform", axis=0, rounding="gptq", options={"scale_dtype": "float16", "scale": "output_mse"}
)
# one step for all of a weight, its codes stored by how frequent they are, with which a bit of them
# weighs so much, errors of outputs by what they do
CODED = Choice(
    "uniform",
    rounding="gptq",
    storage="coded",
    rate=0.06,
    effects=True,
    options={"scale_dtype": "float16"},
)
# steps of those, of the weight's standard deviation; and how far beyond its largest value the
# levels reach, since what one input loses others make up for
STEPS = tuple(2.0 ** (k / 2) for k in range(-6, 8))
BEYOND = 1.5
ACTIVATION = ActivationChoice("uniform", options={"zero_point": True, "scale": "mse"})
# the most bits with float16 scales
FLOAT16_BITS = 8
# widths at which GPTQ is tried; above, rounding to nearest is as good
GPTQ_WIDTHS = (1, 2, 3, 4)
# the largest value of a tensor whose float16 scales are precise, and finite
LEAST, MOST = 2.0**-12, 30_000.0


@dataclass(frozen=True)
class SearchSpace:
    """The choices of each tensor and activation.

    tensors, activations: by name, each a `Choice` or `ActivationChoice`, or plain values for one.
        What is not named stays in float; an activation may do so besides.
    Raises: ValueError naming the tensor whose choice can't be, or that has none.
    """

    tensors: Mapping[str, Sequence[Choice]]
    activations: Mapping[str, Sequence[ActivationChoice]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, given in (("tensors", self.tensors), ("activations", self.activations)):
            check(isinstance(given, Mapping), kind, given, "a dict of choices by name is needed")
        if not self.tensors:
            raise ValueError("no tensor of the network has a choice: the search space needs some")
        for kind, make in (("tensors", Choice), ("activations", ActivationChoice)):
            typed = {}
            for name, choices in getattr(self, kind).items():
                if not choices:
                    raise ValueError(f"{name}: the search space has no choice for it")
                with naming(name):
                    typed[name] = [c if isinstance(c, make) else make.of(c) for c in choices]
                    if any("importance" in choice.options for choice in typed[name]):
                        raise ValueError("importance: a search takes it from training data")
            object.__setattr__(self, kind, typed)

    def items(self) -> Iterator[tuple[str, str, Sequence[Choice]]]:
        """("tensors" or "activations", name, choices) of each."""
        for kind in ("tensors", "activations"):
            for name, choices in getattr(self, kind).items():
                yield kind, name, choices


def choice_key(kind: str, name: str, choice: Choice) -> str:
    """A stable key of a choice for a tensor or an activation."""
    return f"{kind}/{name} {json.dumps(choice.plain(), sort_keys=True)}"


def nearest_in_bits(choices: Sequence[Choice], bits: int) -> Choice:
    """The choice whose width is nearest to so many bits."""
    return min(choices, key=lambda choice: abs(choice.width - bits))


def default_search_space(
    model: nn.Module,
    facts: Sequence[ProductFacts],
    widths: Iterable[int] = WIDTHS,
    activation_bits: Iterable[int] = (),
    storage: str = "packed",
    grids: Iterable[Choice | Mapping[str, Any]] = (),
) -> SearchSpace:
    """Uniform grids: weights with a scale per output channel, other tensors with one scale.

    Weights are rounded to nearest at each width, and by GPTQ at the low ones, ternary among them.
    Scales are float16 where that holds them.

    facts: of a pass (`quantifind.network.trace.trace`).
    widths: bits, 1 to 32.
    activation_bits: widths that every activation may have besides float; none by default.
    storage: of weights, one of `quantifind.tensor.choice.STORAGES`.
    grids: choices that every weight has besides; those of an axis take that of its outputs, groups
        are at most a row; where GPTQ can't be, they are rounded to nearest, and where inputs can't
        be rotated, they are not.
    """
    others = [choice if isinstance(choice, Choice) else Choice.of(choice) for choice in grids]
    widths, able = list(widths), gptq_weights(facts)
    nearest = [_at(NEAREST, bits) for bits in widths]
    gptq = [_at(GPTQ, bits) for bits in widths if bits in GPTQ_WIDTHS]
    if 2 in widths:
        gptq.append(Choice.of({**GPTQ.plain(), "levels": 3}))
    single = [_at(PER_TENSOR, bits) for bits in widths]
    axes = output_axes(facts)

    def choices(name: str, tensor: Tensor) -> list[Choice]:
        axis = axes.get(name, 0)
        if tensor.dim() < 2:
            found = single
        else:
            found = nearest if name not in able or storage == "coded" else nearest + gptq
            found = [replace(choice, axis=axis) for choice in found]
            if storage == "coded":
                found = [*coded(tensor, gptq=name in able), *found]
        if not LEAST <= tensor.abs().max() <= MOST:
            found = [Choice.of({**choice.plain(), "scale_dtype": "float32"}) for choice in found]
        if tensor.dim() < 2:
            return found
        can = {"gptq": name in able, "turn": rotatable(name, tensor.shape, facts)}
        return found + [_besides(choice, tensor, axis, **can) for choice in others]

    tensors = {
        name: choices(name, tensor)
        for name, tensor in named_tensors(model).items()
        if quantizable(tensor) and tensor.numel()
    }
    bits = list(activation_bits)
    names = activation_names(facts) if bits else []
    levels = [ActivationChoice.of({**ACTIVATION.plain(), "bits": b}) for b in bits]
    return SearchSpace(tensors, dict.fromkeys(names, levels))


def coded(tensor: Tensor, *, gptq: bool = True) -> list[Choice]:
    """One step for all of a weight, of a range of them, its codes entropy coded."""
    largest = tensor.abs().max().item()
    # a single value, and values that are all the same, have no spread
    spread = (tensor.double().std().item() if tensor.numel() > 1 else 0.0) or largest
    half = np.finfo(np.float16)
    # test_the_default_space_is_the_same_at_any_power_of_two
    held = float(half.tiny) <= STEPS[0] * spread and STEPS[-1] * spread <= float(half.max)
    dtype = np.float16 if held else np.float32
    found = []
    for step in STEPS:
        step = float(dtype(step * spread))
        if not 0 < step < np.inf:
            continue
        levels = 2 * math.ceil(BEYOND * largest / step) + 3
        values = CODED.plain() | {"levels": levels, "scale": step, "scale_dtype": dtype.__name__}
        if not gptq:
            values |= {"rounding": "nearest", "rate": 0.0, "effects": False}
        found.append(Choice.of(values))
    return found


def _besides(choice: Choice, weight: Tensor, axis: int, *, gptq: bool, turn: bool) -> Choice:
    """A choice for weights in general as one for a weight of an axis of outputs."""
    row = weight.numel() // (1 if choice.axis is None else weight.shape[axis])
    if choice.group is not None and choice.group >= row:
        choice = replace(choice, group=None)
    if not turn:
        choice = replace(choice, rotation=None)
    if choice.rounding == "gptq" and not gptq:
        scale = {"scale": "mse"} if choice.options.get("scale") == "output_mse" else {}
        plain = {"rounding": "nearest", "rate": 0.0, "effects": False, "rotation": None}
        choice = Choice.of({**choice.plain(), **scale, **plain})
    return choice if choice.axis is None else replace(choice, axis=axis)


def _at(choice: Choice, bits: int) -> Choice:
    values: dict[str, Any] = choice.plain() | {"bits": bits}
    if bits > FLOAT16_BITS:  # whose step is too small: test_wide_choices_have_wide_scales
        values["scale_dtype"] = "float32"
    return Choice.of(values)
