"""A strategy says what each tensor and activation of a network becomes; it is data only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantifind.network.calibration import calibration_batches
from quantifind.network.folding import Pairs, checked_pairs
from quantifind.network.modules import named_tensors, plain_copy
from quantifind.network.trace import activation_names, trace
from quantifind.tensor.choice import ActivationChoice, Choice, per_tensor
from quantifind.tensor.parts import quantizable
from quantifind.utils.arguments import check
from quantifind.utils.batches import Forward
from quantifind.utils.naming import naming


@dataclass(frozen=True)
class Strategy:
    """For each tensor, and each activation, its choice.

    tensors: by name of a parameter, or a buffer, a `Choice`, or plain values for one, such as
        ``{"scheme": "uniform", "bits": 4}`` with further options beside these; None for one that
        stays in float. All parameters are named; buffers need not be.
    activations: by name (`quantifind.network.trace.activation_names`), likewise; empty for none.
    folded: pairs of names (module, norm): each batch norm that is folded into the convolution or
        linear map before it, first of all; the tensors named are those of the network folded.
    Raises: ValueError naming the tensor whose choice can't be.
    """

    tensors: Mapping[str, Choice | None] = field(default_factory=dict)
    activations: Mapping[str, ActivationChoice | None] = field(default_factory=dict)
    folded: Pairs = ()

    def __post_init__(self) -> None:
        for kind, given in (("tensors", self.tensors), ("activations", self.activations)):
            check(isinstance(given, Mapping), kind, given, "a dict of choices by name is needed")
        tensors, activations = dict(self.tensors), dict(self.activations)
        for name, choice in tensors.items():
            if choice is not None and not isinstance(choice, Choice):
                with naming(name):
                    tensors[name] = Choice.of(choice)
        for name, choice in activations.items():
            if choice is not None and not isinstance(choice, ActivationChoice):
                with naming(f"activations of {name}"):
                    activations[name] = ActivationChoice.of(choice)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "activations", activations)
        object.__setattr__(self, "folded", checked_pairs(self.folded))

    def __str__(self) -> str:
        """In one line, as a cell of a table has it."""
        widths = [c.width for c in self.tensors.values() if c is not None]
        ends = " to ".join(dict.fromkeys((str(min(widths)), str(max(widths))))) if widths else ""
        bits = f" of {ends} bit{'' if ends == '1' else 's'}" if widths else " in float"
        inputs = f", {len(self.activations)} activations" if self.activations else ""
        many = "" if len(self.tensors) == 1 else "s"
        return f"{len(self.tensors)} tensor{many}{bits}{inputs}"

    def __repr__(self) -> str:
        """A line for each tensor, each activation and each folded pair."""
        named = [*self.tensors.items()]
        named += [(f"input of {name}", choice) for name, choice in self.activations.items()]
        wide = max((len(name) for name, _ in named), default=0)
        lines = [f"  {name:<{wide}}  {choice or 'float'}" for name, choice in named]
        lines += [f"  {norm} is folded into {module}" for module, norm in self.folded]
        return "\n".join([f"Strategy: {self}", *lines])

    @property
    def choices(self) -> dict[str, Any]:
        """The strategy as plain values, from which ``Strategy(**choices)`` makes it again."""
        plain: dict[str, Any] = {
            kind: {name: None if c is None else c.plain() for name, c in named.items()}
            for kind, named in (("tensors", self.tensors), ("activations", self.activations))
        }
        return plain | ({"folded": [list(pair) for pair in self.folded]} if self.folded else {})

    @property
    def bit_depth(self) -> int | None:
        """The one width of all tensors put on a grid, or None."""
        widths = {choice.bits for choice in self.tensors.values() if choice is not None}
        return widths.pop() if len(widths) == 1 else None


def uniform_strategy(
    model: nn.Module, bits: int | None = None, *, scheme: str = "uniform", **options: Any
) -> Strategy:
    """Every floating point parameter, biases included, on the same grid at the same width.

    bits: of all of them; or ``levels``, among the options.
    scheme: a module of `quantifind.schemes`.
    options: of `Choice`, and of the scheme. Those about channels and inputs are for tensors of two
        axes and more: others have one scale, with the least squared error where a weighted one is
        asked for, and are rounded to nearest.
    Raises: ValueError for a width that the scheme doesn't have, and for options as `Choice`.

    >>> uniform_strategy(nn.Linear(2, 1), 4).choices["tensors"]["weight"]
    {'scheme': 'uniform', 'bits': 4}
    """
    choice = Choice.of({"scheme": scheme, "bits": bits, **options})
    _check_width(choice)
    single = per_tensor(choice)
    return Strategy(
        {
            name: (choice if tensor.dim() > 1 and tensor.numel() else single)
            if quantizable(tensor)
            else None
            for name, tensor in named_tensors(model).items()
        }
    )


def _check_width(choice: Choice) -> None:
    """Raise ValueError unless its scheme, which says itself which it has, has such a width."""
    Choice(choice.scheme, choice.bits, choice.levels).quantize(torch.ones(1))


def uniform_activations(
    model: nn.Module,
    calibration: Iterable[Any],
    bits: int,
    *,
    forward: Forward | None = None,
    **options: Any,
) -> dict[str, ActivationChoice]:
    """Every activation of a pass on evenly spaced levels of the same width, with a zero point.

    calibration: batches of training data.
    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    options: of `ActivationChoice` and the scheme, such as ``scale`` and ``percentile``.
    """
    given = {"scheme": "uniform", "bits": bits, "zero_point": True, **options}
    _check_width(ActivationChoice.of(given))
    batches = calibration_batches(calibration, model, forward)
    names = activation_names(trace(plain_copy(model), batches))
    return {name: ActivationChoice.of(given) for name in names}
