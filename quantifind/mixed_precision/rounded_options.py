"""What the choices of a search space come to: rounded when they are asked for, and kept packed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from quantifind.mixed_precision.measurements import Measurements
from quantifind.mixed_precision.search_space import SearchSpace, choice_key
from quantifind.network.activations import fit_activations
from quantifind.network.effects import examples_taken
from quantifind.network.modules import named_tensors, plain_copy
from quantifind.network.trace import activation_names
from quantifind.quantize import note_of, quantize_each
from quantifind.storage import artifact
from quantifind.tensor.choice import ActivationChoice, Choice
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.console import progress

Made = QuantizedTensor | QParams
# a kind, and by name the choices to round
Task = tuple[str, Mapping[str, Sequence[Choice]]]
Place = tuple[str, str, Choice]


class RoundedOptions(Mapping[str, Made]):
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
        self._asked: set[str] = set()
        # weights that GPTQ was asked for
        self._met: set[str] = set()
        # whether what errors of outputs do was asked for
        self._weighed = False
        # by key, what was done less well for want of memory
        self.notes: dict[str, str] = {}
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
            kept = artifact.unpack(*self._kept(key))
            (found,) = (kept.tensors | kept.activations).values()
            if isinstance(found, QuantizedTensor):
                found = found.narrowed()
            for note in kept.notes.values():
                self.notes[key] = note
            self._held[key] = found
        return found

    def choice(self, key: str) -> tuple[str, str, Choice]:
        """The kind, the name and the choice of a key, or of a stand-in's."""
        return self.choices.get(key) or self._others[key]

    def has_made(self, key: str) -> bool:
        """Whether this search has asked for it, whatever others left in the store
        (test_a_killed_search_goes_on)."""
        return key in self._asked

    def stand_in(self, key: str) -> str:
        """The key of what costs the same, and is rounded at once: for GPTQ, the nearest levels."""
        kind, name, choice = self.choices[key]
        if choice.rounding != "gptq":
            return key
        scale = choice.options.get("scale")
        plain = {"rounding": "nearest", "rate": 0.0, "effects": False, "rotation": None}
        options = choice.plain() | plain
        if scale == "output_mse":
            options["scale"] = "mse"
        nearest = Choice.of(options)
        found = choice_key(kind, name, nearest)
        self._others[found] = kind, name, nearest
        return found

    def make(self, keys: Iterable[str]) -> None:
        """Round what is not there yet; the choices of a tensor together, which share its inputs."""
        new = [key for key in dict.fromkeys(keys) if key not in self._asked]
        self._count([self.choice(key) for key in new])
        missing: dict[tuple[str, str], list[Choice]] = {}
        for key in new:
            if self._kept(key) is None:
                kind, name, choice = self.choice(key)
                missing.setdefault((kind, name), []).append(choice)
        tasks = self._tasks(missing)
        with progress("rounding", total=len(missing)) as step:
            for (kind, name, choice), one in self._rounded(tasks):
                key = f"quantized {choice_key(kind, name, choice)}"
                self.measurements.store.put(key, *artifact.pack(one))
                if choice == missing[kind, name][-1]:
                    step(name)
                    self.measurements.passes.check_time()
        self._asked.update(new)

    def _count(self, new: Sequence[Place]) -> None:
        """Count the pass for the moments of what weights meet, unless they are kept, and those for
        what errors of their outputs do."""
        measurements, before = self.measurements, self._met
        weights = {name for _, name, choice in new if choice.rounding == "gptq"}
        if not self._weighed and any(choice.effects for _, _, choice in new):
            self._weighed = True
            measurements.passes.add(examples_taken(measurements.calibration))
        self._met = before | weights
        # whoever works: test_a_search_finds_the_same
        if weights and not (weights <= before and measurements.network.fits(self._met)):
            measurements.passes.add(sum(map(len, measurements.calibration)))

    def _rounded(self, tasks: Sequence[Task]) -> Iterator[tuple[Place, Quantized]]:
        """As they are done, so that what is done is kept."""
        if self.measurements.workers.places == 1:
            for task in tasks:
                yield from _quantize(self.measurements, task)
        else:
            workers = self.measurements.workers
            for made in workers.map(_quantize_all, self.measurements, tasks):
                yield from made

    def _tasks(self, missing: Mapping[tuple[str, str], Sequence[Choice]]) -> list[Task]:
        """All tensors together, which share passes; of several workers, each with tensors of about
        as many values in all (test_workers_round_as_much). Activations one by one."""
        own = [name for kind, name in missing if kind == "tensors"]
        own.sort(key=lambda name: -self.sizes[name])
        places = self.measurements.workers.places
        shared = [own[i::places] for i in range(min(places, len(own)))]
        tasks: list[Task] = [
            ("tensors", {n: missing["tensors", n] for n in names}) for names in shared
        ]
        others = (place for place in missing if place[0] != "tensors")
        return tasks + [(kind, {name: missing[kind, name]}) for kind, name in others]

    def _kept(self, key: str) -> Any:
        return self.measurements.store.get(f"quantized {key}")


def network_of(name: str, quantized: Made) -> Quantized:
    """A network of which one tensor, or one activation, is quantized."""
    if isinstance(quantized, QParams):
        return Quantized({}, {name: quantized})
    return Quantized({name: quantized})


def _quantize_all(measurements: Measurements, task: Task) -> list[tuple[Place, Quantized]]:
    made = list(_quantize(measurements, task))
    # a worker goes on for as long as its process does
    measurements.network.forget()
    return made


def _quantize(measurements: Measurements, task: Task) -> Iterator[tuple[Place, Quantized]]:
    kind, choices = task
    if kind == "tensors":
        network = measurements.network
        for name, made in quantize_each(network, choices):
            for choice, one in zip(choices[name], made, strict=True):
                said = note_of(network, name, choice, one) if choice.rounding == "gptq" else None
                notes = {} if said is None else {name: said}
                yield (kind, name, choice), replace(network_of(name, one), notes=notes)
        return
    model = plain_copy(measurements.model)
    for name, some in choices.items():
        for choice in some:
            assert isinstance(choice, ActivationChoice)
            (levels,) = fit_activations(model, {name: choice}, measurements.calibration).values()
            yield (kind, name, choice), network_of(name, levels)
