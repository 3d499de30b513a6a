"""What the choices of a search space come to: rounded when they are asked for, and kept packed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.search_space import SearchSpace, choice_key
from quantifind.network.activations import fit_activations
from quantifind.network.modules import named_tensors, plain_copy
from quantifind.network.trace import activation_names
from quantifind.quantize import quantize_alone
from quantifind.storage import artifact
from quantifind.tensor.choice import ActivationChoice, Choice
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.console import progress

Made = QuantizedTensor | QParams


class Menu(Mapping[str, Made]):
    """By `choice_key`, each tensor and activation by each of its choices, the rest in float.

    space: the choices.
    choices: by key, the kind, the name and the choice.
    Raises: ValueError naming a tensor or an activation that the network hasn't; when one is made,
        one whose choice can't be.
    """

    def __init__(self, measurements: Measurements, space: SearchSpace) -> None:
        self.measurements, self.space = measurements, space
        self.sizes = {n: t.numel() for n, t in named_tensors(measurements.model).items()}
        met = activation_names(measurements.facts) if space.activations else []
        for kind, known in (("tensors", list(self.sizes)), ("activations", met)):
            if unknown := getattr(space, kind).keys() - set(known):
                one = kind.removesuffix("s")
                raise ValueError(
                    f"unknown {one} {min(unknown)}: the network has {', '.join(known)}"
                )
        self.choices = {
            choice_key(kind, name, choice): (kind, name, choice)
            for kind, name, choices in space.items()
            for choice in choices
        }
        # stand-ins that are no choice themselves
        self._others: dict[str, tuple[str, str, Choice]] = {}
        self._held: WeakValueDictionary[str, Made] = WeakValueDictionary()

    def __iter__(self) -> Iterator[str]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)

    def __getitem__(self, key: str) -> Made:
        found = self._held.get(key)
        if found is None:
            if not self.has_made(key):
                self.make([key])
            kept = artifact.unpack(*_entry(self.measurements, key))
            (found,) = (kept.tensors | kept.activations).values()
            if isinstance(found, QuantizedTensor):
                found = found.narrowed()
            self._held[key] = found
        return found

    def choice(self, key: str) -> tuple[str, str, Choice]:
        """The kind, the name and the choice of a key, or of a stand-in's."""
        return self.choices.get(key) or self._others[key]

    def has_made(self, key: str) -> bool:
        """Whether it is there without rounding."""
        return self.measurements.store.get(f"quantized {key}") is not None

    def stand_in(self, key: str) -> str:
        """The key of what costs the same, and is rounded at once: for GPTQ, the nearest levels."""
        kind, name, choice = self.choices[key]
        if choice.rounding != "gptq":
            return key
        scale = choice.options.get("scale")
        options = {**choice.plain(), "rounding": "nearest"}
        if scale == "output_mse":
            options["scale"] = "mse"
        nearest = Choice.of(options)
        found = choice_key(kind, name, nearest)
        self._others[found] = kind, name, nearest
        return found

    def make(self, keys: Iterable[str]) -> None:
        """Round what is not there yet; the choices of a tensor together, which share its inputs."""
        missing: dict[tuple[str, str], list[Choice]] = {}
        for key in dict.fromkeys(keys):
            if not self.has_made(key):
                kind, name, choice = self.choice(key)
                missing.setdefault((kind, name), []).append(choice)
        # so that no worker is left with a large tensor in the end:
        # test_large_tensors_are_rounded_first
        tasks = sorted(
            ((kind, name, choices) for (kind, name), choices in missing.items()),
            key=lambda task: (task[0] != "tensors", -self.sizes.get(task[1], 0)),
        )
        with progress("rounding", total=len(tasks)) as step:
            fitted = self.measurements.workers.map(_quantize_alone, self.measurements, tasks)
            for (kind, name, choices), made in zip(tasks, fitted, strict=True):
                for choice, one in zip(choices, made, strict=True):
                    key = f"quantized {choice_key(kind, name, choice)}"
                    self.measurements.store.put(key, *artifact.pack(network_of(name, one)))
                step(name)


def network_of(name: str, quantized: Made) -> Quantized:
    """A network of which one tensor, or one activation, is quantized."""
    if isinstance(quantized, QParams):
        return Quantized({}, {name: quantized})
    return Quantized({name: quantized})


def _entry(measurements: Measurements, key: str) -> Any:
    entry = measurements.store.get(f"quantized {key}")
    assert entry is not None
    return entry


def _quantize_alone(
    measurements: Measurements, task: tuple[str, str, Sequence[Choice]]
) -> Sequence[Made]:
    kind, name, choices = task
    model, calibration = measurements.model, measurements.calibration
    if kind == "tensors":
        return quantize_alone(model, name, choices, calibration)
    model, found = plain_copy(model), []
    for choice in choices:
        assert isinstance(choice, ActivationChoice)
        found.append(fit_activations(model, {name: choice}, calibration)[name])
    return found
