"""Sums over the positions of batches: second moments of what parts of weights meet."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantifind.network.parts import Part
from quantifind.tensor.gptq import Moments
from quantifind.tensor.matrices import Matrices
from quantifind.utils.naming import NotFinite

# positions that are multiplied together, since a product of few takes less time than its sum with
# the total: of so many elements at least, and so many (4.5 times as fast with 4,608 inputs)
WAITING, POSITIONS = 2**18, 2**9


class Sum:
    """Σ aᵀ b, (groups, n, m) float64, over positions that come in parts."""

    def __init__(self, groups: int, n: int, m: int, device: torch.device) -> None:
        self.total = torch.zeros(groups, n, m, dtype=torch.float64, device=device)
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.held = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """(groups, positions, n) and (groups, positions, m)."""
        self.held += b.shape[1]
        if self.held < max(POSITIONS, WAITING // max(b.shape[0] * b.shape[2], 1)):
            # what follows may work in place on both: test_what_changes_in_place_is_taken_before
            kept = a.clone()
            self.waiting.append((kept, kept if b is a else b.clone()))
            return
        if self.waiting:
            a, b = (torch.cat(each, 1) for each in zip(*self.waiting, (a, b), strict=True))
        self.waiting, self.held = [], 0
        self.total += a.mT @ b

    def done(self) -> list[Tensor]:
        """That of each group."""
        if self.waiting:
            a, b = (torch.cat(each, 1) for each in zip(*self.waiting, strict=True))
            self.waiting, self.held = [], 0
            self.total += a.mT @ b
        return list(self.total.unbind())


class Met:
    """Σ x xᵀ of what parts of weights meet, block by block: the first of them adds."""

    def __init__(self, part: Part, device: torch.device) -> None:
        groups, _, _ = part.matrices.shape
        self.counts = part.counts
        self.sums = [Sum(groups, n, n, device) for n in self.counts]
        # (number of an input, of the use) of this batch
        self.seen: list[tuple[int, int]] = []
        self._done: list[list[Tensor]] | None = None

    def add(self, rows: Tensor) -> None:
        for total, part in zip(self.sums, rows.split(self.counts, -1), strict=True):
            total.add(part, part)

    def done(self) -> list[list[Tensor]]:
        """By block and group, the same tensors each time."""
        if self._done is None:
            self._done = [total.done() for total in self.sums]
        return self._done


@dataclass
class PartSums:
    """Sums of a part of a weight.

    met: None for an embedding's.
    outputs: Σ y xᵀ, None where y is what the weight makes of x.
    counts: how often each row is looked up.
    uses: of the batch so far.
    effects: of errors of outputs, (groups, outputs, outputs), where they are known.
    """

    part: Part
    met: Met | None
    outputs: Sum | None
    counts: Tensor | None = None
    positions: int = 0
    uses: int = 0
    effects: Tensor | None = None

    def start(self) -> None:
        """Before a batch."""
        self.uses = 0
        if self.met is not None:
            self.met.seen = []

    def meets(self, number: int, use: int) -> bool | None:
        """Whether an input is to be added, as another part has not done so yet; None where the
        other met another.

        number: of the input.
        use: in the float network, of the part in the batch.
        """
        assert self.met is not None
        known = self.met.seen[self.uses : self.uses + 1]
        self.uses += 1
        if not known:
            self.met.seen.append((number, use))
        return not known if known in ([], [(number, use)]) else None


def drawn_positions(
    count: int, share: float, index: int, number: int, device: torch.device
) -> Tensor | None:
    """Some of so many positions, one drawn of each of as many equal stretches; None for all."""
    kept = max(1, math.ceil(count * share))
    if kept >= count:
        return None
    generator = torch.Generator().manual_seed(index * 1_000_003 + number)
    places = torch.rand(kept, generator=generator, dtype=torch.float64) + torch.arange(kept)
    return (places * (count / kept)).long().clamp(max=count - 1).to(device)


def moments_of(parts: Iterable[PartSums], weight: Tensor) -> dict[Matrices, Moments]:
    """Those of a weight's parts, by the matrix of each block and group.

    Raises: ValueError for inputs that are not finite.
    """
    found: dict[Matrices, Moments] = {}
    for sums in parts:
        for index, block in enumerate(sums.part.blocks):
            groups, outputs, inputs = block.shape
            if sums.met is None:
                none = torch.zeros((), dtype=torch.float64, device=weight.device)
                squares = [none.expand(inputs, inputs)] * groups
                made = [none.expand(outputs, inputs)] * groups
            else:
                squares = sums.met.done()[index]
                total = sums.met.sums[index].total
                if not total.isfinite().all():
                    raise NotFinite("its inputs on calibration data are NaN or infinite")
                # what the weight makes of its inputs, if nothing else is wanted
                if sums.outputs is None:
                    made = list(block.of(weight.detach()).double() @ total)
                else:
                    made = sums.outputs.done()
            for group, matrices in enumerate(block.each()):
                effects = None if sums.effects is None else sums.effects[group]
                more = Moments(squares[group], made[group], sums.positions, sums.counts, effects)
                known = found.get(matrices)
                found[matrices] = more if known is None else _both(known, more)
    return found


def _both(one: Moments, other: Moments) -> Moments:
    """Of the uses of the same elements in products of several kinds."""
    counts = [m.counts for m in (one, other) if m.counts is not None]
    return Moments(
        one.inputs + other.inputs,
        one.outputs + other.outputs,
        one.positions + other.positions,
        sum(counts[1:], counts[0]) if counts else None,
        None if one.effects is None or other.effects is None else one.effects + other.effects,
    )
