"""A network beside calibration batches, and what they tell of it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from quantifind.network.calibration import Batches, calibration_batches, second_moments
from quantifind.network.effects import Effects, output_effects
from quantifind.network.folding import Pairs, prepared, prepared_tensors
from quantifind.network.modules import named_buffers, named_tensors
from quantifind.network.moments import Found, layer_moments
from quantifind.network.parts import NUMBER, all_parts, enough, note, passes, waves
from quantifind.network.trace import GPTQ_KINDS, ProductFacts, trace, weight_uses
from quantifind.tensor.gptq import Moments
from quantifind.tensor.matrices import Matrices
from quantifind.utils.batches import Forward
from quantifind.utils.devices import allowed_bytes, device_of


class Calibration:
    """A network, with norms folded, and batches of its inputs; what is asked of them is computed
    once.

    max_memory: bytes that moments of inputs may take (`quantifind.network.moments.layer_moments`).
    criterion: by which the network is judged, where that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        forward: Forward | None = None,
        folded: Pairs = (),
        max_memory: float | None = None,
        criterion: Any = None,
    ) -> None:
        self._criterion = criterion
        self._given, self._batches = model, batches
        self._forward, self._folded = forward, folded
        self._max_memory = max_memory
        # by weight what was done less well than it could be for want of memory, and what has no say
        self.notes: dict[str, str] = {}
        self._kept: dict[str, dict[Matrices, Moments]] = {}
        self._effects_kept = False
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
        return calibration_batches(self._batches, self._given, self._forward, self._criterion)

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

    @cached_property
    def effects(self) -> Effects:
        """What errors of the weights' outputs do."""
        given = self.model, self.batches, self.facts, self._criterion
        # beside moments of inputs, half as much again
        return output_effects(*given, max_memory=self.max_memory / 2)

    def weighs(self, name: str) -> bool:
        """Whether it is known what errors of a weight's outputs do, wherever there are several.

        It is not where the weight is an embedding, too.
        """
        used = [p for p in self.facts if p.weight == name]
        several = [p for p in used if p.matrices and p.matrices.shape[1] > 1]
        met = [p for p in several if p.kind != "embedding"]
        # an embedding's outputs are its entries, too, whose errors do something else
        if met and len(met) < len(several):
            return False
        return all((name, p.matrices) in self.effects for p in met)

    def importance(self, name: str) -> Tensor:
        """The second moments of the inputs that each element of a weight meets."""
        if name not in self._importance:
            raise ValueError(_unused())
        return self._importance[name]

    @cached_property
    def max_memory(self) -> float:
        given = self._max_memory
        return allowed_bytes(device_of(self.model)) if given is None else given

    def examples(self, names: Iterable[str], *, beside: bool = False) -> float:
        """How many go through the network for the moments of weights, those that go through a part
        of it, by multiply-adds, as that part of one.

        beside: the float network, whose outputs are wanted.
        """
        asked = list(names)
        parts = all_parts(asked, self.facts, self.max_memory)
        fitting = {name: own for name, own in parts.items() if all(part.blocks for part in own)}
        counts = [len(batch) for batch in self.batches]
        taken = 0.0
        for some in passes(fitting, self.max_memory):
            own = {name: fitting[name] for name in some}
            taken += sum(counts[i] for i in enough(own, counts)) * self._share(some)
        return 2 * taken if beside else taken

    def waves(self, names: Iterable[str], most: int) -> list[list[str]]:
        """Weights of a pass in so many groups at most (`quantifind.network.parts.waves`)."""
        asked = set(names)
        used = [name for name in self.uses if name in asked]
        return waves(used, all_parts(used, self.facts, self.max_memory), most)

    def _share(self, names: Sequence[str]) -> float:
        """Of a pass, up to the last use of weights; all of it where it comes back to one."""
        done, reached = 0.0, 0.0
        for product in self.facts:
            done += 0.0 if math.isnan(product.macs) else product.macs
            if product.weight in names:
                reached = math.inf if max(product.uses) > 1 else max(reached, done)
        return min(reached / done, 1.0) if done else 1.0

    def fits(self, names: Iterable[str]) -> bool:
        """Whether moments of weights, of inputs and outputs, fit into memory together, each with
        inputs of its own."""
        parts = all_parts([*names], self.facts, self.max_memory)
        size = sum(part.bytes for own in parts.values() for part in own)
        return size + sum(NUMBER * self.tensors[name].numel() for name in parts) <= self.max_memory

    def forget(self) -> None:
        """Let go of the moments that are kept."""
        self._kept.clear()
        self._effects_kept = False

    def check_used(self, names: Iterable[str]) -> None:
        """Raise ValueError, naming it, for a weight that no pass uses, which GPTQ can't round."""
        for name in names:
            if name not in self.uses:
                raise ValueError(f"{name}: rounding 'gptq': {_unused()}; round it to 'nearest'")

    def moments(
        self, names: Iterable[str], *, effects: bool = False, **options: Any
    ) -> Iterator[Found]:
        """Those of weights; none where there is no memory for them.

        Of the network as it is they are kept, and come first, as long as all that were asked for
        `fits` into memory together, until they are to `forget`.

        effects: whether with those of errors of outputs.
        options: of `quantifind.network.moments.layer_moments`.
        Raises: ValueError as it, and for a weight that no pass uses.
        """
        asked = list(names)
        if not asked:
            return
        self.check_used(asked)
        keep = not options and self.fits({*self._kept, *asked})
        if not keep or (effects and not self._effects_kept):
            self.forget()
            self._effects_kept = effects
        # what is kept serves both: test_effects_are_there_whenever_they_are_asked_for
        effects = effects or self._effects_kept
        yield from ((name, self._kept[name]) for name in asked if name in self._kept)
        asked = [name for name in asked if name not in self._kept]
        if not asked:
            return
        parts = all_parts(asked, self.facts, self.max_memory)
        limit = self.max_memory
        found = layer_moments(
            self.model,
            asked,
            self.batches,
            self.facts,
            effects=self.effects if effects else None,
            max_memory=limit,
            **options,
        )
        for name, moments in found:
            # those of another strategy: test_inputs_that_are_never_met_are_said
            self.notes.pop(name, None)
            if said := [each for each in (note(parts[name]), zeros(moments.values())) if each]:
                self.notes[name] = "; ".join(said)
            if keep:
                self._kept[name] = moments
            yield name, moments


def zeros(moments: Iterable[Moments]) -> str | None:
    """How many inputs no example has, in words; None where none."""
    # of what is only looked up, nothing is known
    met = [each.inputs.diagonal() > 0 for each in moments if each.counts is None]
    count, dead = sum(m.numel() for m in met), sum(int((~m).sum()) for m in met)
    if not dead:
        return None
    return (
        f"{dead:,} of its {count:,} inputs are 0 in all calibration examples that were looked at: "
        "their weights are 0, or the nearest to it, which coded takes next to nothing"
    )


def _unused() -> str:
    """Of a weight that no pass multiplies with anything, in words."""
    return f"no {' or '.join(GPTQ_KINDS)} of a pass uses it"
