"""How a network takes a batch that is inputs and targets, where nobody says."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

# under which a batch by names has its targets
TARGETS = ("labels", "label", "targets", "target", "y")
_ADVICE = (
    "say what the criterion gets of it by forward=lambda model, batch: (model(batch[0]), batch[1])"
)


def by_name(data: Any) -> dict[str, Any]:
    """The parts of a mapping or dataclass."""
    if isinstance(data, Mapping):
        return dict(data)
    return {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}


class BatchError(ValueError):
    """It isn't known which parts of a batch are what."""


class DefaultForward:
    """How a network takes a batch that is inputs and targets, by what its forward asks for.

    A batch is (inputs, targets), (a, b, …, targets) or ((a, b), targets) for a forward of several
    arguments; a mapping or dataclass with the names of forward's arguments, and its targets under
    one of `TARGETS`; or inputs alone. Of outputs that have ``logits``, torch's own criteria get
    these.

    Raises: BatchError, when called, for a batch of which this does not say what its parts are.
    """

    def __init__(self, model: nn.Module, criterion: Any = None) -> None:
        self.takes_logits = criterion is None or is_torchs(criterion)
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = inspect.Parameter
        positional = [
            p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
        self.least = sum(p.default is p.empty for p in positional)
        some = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        self.most: float = math.inf if some else len(positional)
        named = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        self.names = [p.name for p in parameters if p.kind in named]
        self.any_name = any(p.kind is kinds.VAR_KEYWORD for p in parameters)

    def __call__(self, model: nn.Module, data: Any) -> tuple[Any, ...]:
        args, kwargs, targets = self.split(data)
        outputs = model(*args, **kwargs)
        if self.takes_logits and not isinstance(outputs, Tensor):
            outputs = logits_of(outputs)
        return outputs, *targets

    def split(self, data: Any) -> tuple[Sequence[Any], dict[str, Any], Sequence[Any]]:
        """The network's positional and named arguments, and the targets, of which there may be
        none."""
        if isinstance(data, Tensor | PackedSequence):
            return [data], {}, []
        if isinstance(data, Mapping) or dataclasses.is_dataclass(data):
            return self._named(by_name(data))
        if not isinstance(data, list | tuple) or not data:
            raise BatchError(f"a batch is a {type(data).__name__}: {_ADVICE}")
        *inputs, last = data
        if not inputs:
            return *self._arguments(last), []
        if len(inputs) == 1:
            if self.least == 2 and isinstance(inputs[0], Tensor | PackedSequence):
                return data, {}, []
            return *self._arguments(inputs[0]), [last]
        if self._fits(len(inputs)):
            return inputs, {}, [last]
        if self._fits(len(data)):
            return data, {}, []
        raise BatchError(
            f"a batch has {len(data)} parts, and the network's forward takes {self._count()}: "
            f"{_ADVICE}"
        )

    def _arguments(self, inputs: Any) -> tuple[Sequence[Any], dict[str, Any]]:
        if isinstance(inputs, Mapping) and all(map(self._takes, inputs)):
            return [], dict(inputs)
        several = isinstance(inputs, list | tuple) and not isinstance(inputs, PackedSequence)
        if several and len(inputs) > 1 and self._fits(len(inputs)):
            return inputs, {}
        return [inputs], {}

    def _named(self, data: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any], Sequence[Any]]:
        targets = [name for name in TARGETS if name in data]
        inputs = {name: part for name, part in data.items() if name not in targets}
        if len(targets) > 1 or not inputs:
            raise BatchError(f"a batch has {', '.join(data)}: {_ADVICE}")
        judged = [data[name] for name in targets]
        if all(map(self._takes, inputs)):
            return [], inputs, judged
        if len(inputs) == 1 and self._fits(1):
            return [*inputs.values()], {}, judged
        unknown = [name for name in inputs if not self._takes(name)]
        raise BatchError(
            f"a batch has {', '.join(unknown)}, and the network's forward takes "
            f"{', '.join(self.names)}: {_ADVICE}"
        )

    def _takes(self, name: str) -> bool:
        return self.any_name or name in self.names

    def _fits(self, count: int) -> bool:
        return self.least <= count <= self.most

    def _count(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"


def is_torchs(criterion: Any) -> bool:
    """Whether it is one of torch's losses, a module or a function, perhaps with options."""
    while isinstance(criterion, functools.partial):
        criterion = criterion.func
    return getattr(criterion, "__module__", None) in (nn.L1Loss.__module__, F.__name__)


def logits_of(outputs: Any) -> Any:
    """The logits of outputs that have some by this name; else the outputs."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)
