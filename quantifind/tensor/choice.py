"""What a tensor or an activation becomes: a scheme, its width, and the scheme's own options."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Self

from torch import Tensor

from quantifind.tensor.quantized import QuantizedTensor
from quantifind.tensor.rotation import SEEDS
from quantifind.tensor.scales import quantize_to_grid
from quantifind.utils import plugins

ROUNDINGS = ("nearest", "gptq", "learned")
STORAGES = ("packed", "coded")
# scales with the least error of a layer's outputs begin with those of weighted errors of the weight
BEGINS_WITH = {"output_mse": "weighted_mse"}
# by option the values that take the inputs of calibration examples
FROM_INPUTS = {"scale": ("weighted_mse", "output_mse"), "centres": ("weighted_k_means",)}


@dataclass(frozen=True, repr=False)
class Choice:
    """How a tensor is quantized; checked when it is made.

    scheme: a module of `quantifind.schemes`, or the dotted path of anyone's.
    bits, levels: the width, or instead of it how many levels.
    axis, group: what shares a scale, as in `quantifind.tensor.qparams.to_rows`.
    rounding: "nearest"; "gptq", for weights, which compensates errors in turn; or "learned", which
        says that the codes have been trained.
    storage: of its codes: "packed", at a fixed width, or "coded", by how frequent each is.
    rate: what a bit of a coded code weighs where GPTQ rounds, in squared steps of an average
        input; 0 for nothing.
    effects: whether errors of outputs are weighed, where there is a rate, by what they do together
        to the network's answers (`quantifind.network.effects`), not all alike.
    rotation: what the signs are drawn by where GPTQ rounds a weight with its inputs mixed
        (`quantifind.tensor.rotation`); None for no mixing.
    options: further arguments of the scheme, by name.
    Raises: ValueError naming the scheme that is not there, or the option that it doesn't take.
    """

    scheme: str
    bits: int | None = None
    levels: int | None = None
    axis: int | None = None
    group: int | None = None
    rounding: str = "nearest"
    storage: str = "packed"
    rate: float = 0.0
    effects: bool = False
    rotation: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    # those of the scheme's arguments that have a field here
    SHARED: ClassVar = ("bits", "levels", "axis", "group")

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))
        if twice := self.options.keys() & {f.name for f in fields(self)}:
            raise ValueError(f"{min(twice)} stands among the options: it is a field of its own")
        for name, known in (("rounding", ROUNDINGS), ("storage", STORAGES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}: {', '.join(known)} are allowed")
        if not isinstance(self.scheme, str):
            allowed = ", ".join(plugins.names("schemes"))
            raise ValueError(f"scheme is {self.scheme!r}: {allowed}, or a dotted path, are allowed")
        taken = _arguments(plugins.load("schemes", self.scheme, "quantize"))
        if unknown := self._scheme_options().keys() - set(taken):
            raise ValueError(
                f"unknown option {', '.join(sorted(unknown))}: {self.scheme} takes "
                f"{', '.join(taken)}"
            )
        for option in ("axis", "group"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise ValueError(f"{option} is {value!r}: whole numbers and None are allowed")
        rate = self.rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise ValueError(f"rate is {rate!r}: a number from 0 up is needed")
        if rate and (self.rounding == "nearest" or self.options.get("scale") == "output_mse"):
            raise ValueError(
                f"rate is {rate:g}: it needs rounding 'gptq', and a scale that is not 'output_mse'"
            )
        if not isinstance(self.effects, bool) or (self.effects and not rate):
            raise ValueError(
                f"effects is {self.effects!r}: False, or True where rate is above 0, is needed"
            )
        if self.rotation is not None:
            _check_rotation(self.rotation, self.rounding)

    @classmethod
    def of(cls, given: "Choice | Mapping[str, Any]") -> Self:
        """A choice from plain values, as `plain` gives them: options beside the fields.

        >>> Choice.of({"scheme": "uniform", "bits": 4, "scale": "mse"}).options
        {'scale': 'mse'}
        """
        values = given.plain() if isinstance(given, Choice) else given
        if not isinstance(values, Mapping) or "scheme" not in values:
            raise ValueError(f"a choice needs a scheme: {', '.join(plugins.names('schemes'))}")
        own = {f.name for f in fields(cls)} - {"options"}
        return cls(
            **{name: value for name, value in values.items() if name in own},
            options={name: value for name, value in values.items() if name not in own},
        )

    def plain(self) -> dict[str, Any]:
        """The choice as plain values, which JSON holds; what is left at its default is left out."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "options"}
        defaults = {f.name: f.default for f in fields(self)}
        given = {n: value for n, value in named.items() if value != defaults[n]}
        return given | dict(self.options)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.plain().items())
        return f"{type(self).__name__}({given})"

    @property
    def width(self) -> int:
        """Whole bits that tell its levels apart: 2 for three of them."""
        return ((self.levels or 2) - 1).bit_length() if self.bits is None else self.bits

    @property
    def count(self) -> int:
        """How many levels its codes tell apart."""
        return self.levels or 2**self.width

    @property
    def needs(self) -> str | None:
        """What in it asks for calibration examples, in words; None where nothing does."""
        if self.rounding == "gptq":
            return "rounding 'gptq'"
        if self.weighted:
            option = next(o for o, asking in FROM_INPUTS.items() if self.options.get(o) in asking)
            return f"{option} {self.options[option]!r}"
        return None

    @property
    def weighted(self) -> bool:
        """Whether errors are weighted by inputs that the options don't give."""
        if "importance" in self.options:
            return False
        return any(
            isinstance(value := self.options.get(option), str) and value in asking
            for option, asking in FROM_INPUTS.items()
        )

    def quantize(self, values: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Values rounded to nearest on the scheme's grid.

        values: floating point, finite, any shape.
        importance: of each value, for a scheme and options that take it.
        Raises: ValueError naming the option that can't be.
        """
        put = plugins.load("schemes", self.scheme, "quantize")
        options = self._scheme_options()
        if options.get("scale") in BEGINS_WITH and isinstance(options["scale"], str):
            options["scale"] = BEGINS_WITH[options["scale"]]
        if importance is not None and "importance" in _arguments(put):
            options.setdefault("importance", importance)
        try:
            return replace(put(values.detach(), **options), storage=self.storage)
        except TypeError as error:
            raise ValueError(f"{self.plain()} can't be: {error}") from error

    def _scheme_options(self) -> dict[str, Any]:
        shared = {name: getattr(self, name) for name in self.SHARED}
        return {n: value for n, value in shared.items() if value is not None} | dict(self.options)


@dataclass(frozen=True, repr=False)
class ActivationChoice(Choice):
    """How an activation is quantized: one scale for all of it.

    percentile: 50 to 100: leaves out as many percent above it, and below 100 − it, of the values.
    """

    percentile: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.percentile, int | float) and not isinstance(self.percentile, bool)
        if not number or not 50 <= self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile!r}: 50 to 100 are allowed")
        if self.axis is not None or self.group is not None:
            option = "axis" if self.axis is not None else "group"
            raise ValueError(f"{option}: activations have one scale each")
        if self.rounding != "nearest":
            raise ValueError(f"rounding is {self.rounding!r}: activations are rounded to nearest")
        if self.storage != "packed":
            raise ValueError(f"storage is {self.storage!r}: activations are not stored")


def _check_rotation(seed: Any, rounding: str) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise ValueError(
            f"rotation is {seed!r}: a seed, a whole number 0 to {SEEDS - 1}, is needed"
        )
    if rounding == "nearest":
        raise ValueError(f"rotation is {seed}: it needs rounding 'gptq'")


# what a tensor of one axis, a bias or a norm, takes instead of a choice about channels or inputs
_PER_TENSOR = {
    "scale": {"output_mse": "mse", "weighted_mse": "mse"},
    "centres": {"weighted_k_means": "k_means"},
}


def per_tensor(choice: Choice) -> Choice:
    """The choice for a tensor of one axis: one scale, no inputs asked for, rounded to nearest."""
    options = {
        option: _PER_TENSOR.get(option, {}).get(value, value) if isinstance(value, str) else value
        for option, value in choice.options.items()
    }
    rounding = "nearest" if choice.rounding == "gptq" else choice.rounding
    rate = 0.0 if rounding == "nearest" else choice.rate
    choice = replace(choice, axis=None, group=None, rotation=None)
    effects = choice.effects and rate > 0
    return replace(choice, rounding=rounding, rate=rate, effects=effects, options=options)


@cache
def _arguments(put: Callable[..., Any]) -> tuple[str, ...]:
    """What a scheme's quantize() takes besides the values."""
    _, *parameters = inspect.signature(put).parameters.values()
    taken = [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
    if len(taken) < len(parameters):  # it hands what it doesn't know to quantize_to_grid
        _, _, *others = inspect.signature(quantize_to_grid).parameters
        taken += [option for option in others if option not in taken]
    return tuple(taken)
