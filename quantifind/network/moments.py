"""The second moments of what meets weights, and what the float network makes of it: those of many
weights in one pass over calibration batches."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quantifind.network.calibration import Batches, look_ups
from quantifind.network.effects import Effects
from quantifind.network.inputs import Inputs
from quantifind.network.meetings import Meeting
from quantifind.network.modules import own_tensors, run
from quantifind.network.parts import Part, all_parts, enough, passes
from quantifind.network.products import Product, visiting
from quantifind.network.sums import Met, PartSums, Sum, drawn_positions, moments_of
from quantifind.network.trace import ProductFacts, weight_uses
from quantifind.tensor.gptq import Moments
from quantifind.tensor.matrices import Matrices
from quantifind.utils.batches import Batch
from quantifind.utils.devices import allowed_bytes, device_of, evaluating
from quantifind.utils.naming import naming

Round = Callable[[Product], Product]
Found = tuple[str, dict[Matrices, Moments]]


@torch.no_grad()
def layer_moments(
    model: nn.Module,
    names: Sequence[str],
    batches: Batches,
    facts: Sequence[ProductFacts],
    *,
    work: nn.Module | None = None,
    rounded: Round | None = None,
    effects: Effects | None = None,
    max_memory: float | None = None,
) -> Iterator[Found]:
    """By weight and by matrix of it, the moments of the inputs that it meets; of weights that meet
    the same inputs, the same tensors.

    They are sums over all positions, or estimates of them from evenly spread ones of some batches
    (`quantifind.network.parts.POSITIONS`, `EXAMPLES`). Weights come in the order of a pass, those
    for which there is no memory first; moments are let go of when the next weight's are asked for.

    model: the float network, whose outputs are wanted.
    names: of the weights, each used by a pass.
    batches: as `calibration_batches` gives them.
    facts: of a pass of each of them (`quantifind.network.trace.trace`).
    work: the same network, in part quantized, whose inputs the weights meet; the float network by
        default, and for a use before which the two choose other values, as where tokens go to other
        experts: there is nothing to pair.
    rounded: a product of ``work`` → the same with its operands on their levels.
    effects: of errors of outputs (`quantifind.network.effects.output_effects`), where wanted.
    max_memory: bytes of the moments that are in memory at a time, as long as one weight's do; by
        default `quantifind.utils.devices.allowed_bytes`. Weights with more have blocks of inputs;
        none where not even these fit (`quantifind.network.parts.parts_of`).
    Raises: ValueError as `parts_of`, and for inputs that are not finite, naming the weight.
    """
    limit = allowed_bytes(device_of(model)) if max_memory is None else max_memory
    parts = all_parts(names, facts, limit)
    fitting = {name: own for name, own in parts.items() if all(part.blocks for part in own)}
    yield from ((name, {}) for name in parts if name not in fitting)
    uses, apart, examples = weight_uses(facts), set[int](), [len(batch) for batch in batches]
    for some in passes(fitting, limit):
        own = {name: fitting[name] for name in some}
        chosen = enough(own, examples)
        own = _of_fewer(own, sum(examples[i] for i in chosen) / max(sum(examples), 1))
        while True:
            sums = _Pass(model, work, rounded, own, uses, apart)
            sums.know(effects or {})
            try:
                for index in chosen:
                    sums.add(batches[index], index)
                break
            except _Apart as error:  # test_what_is_met_together_in_float_alone_is_summed_apart
                apart.add(error.meets)
        yield from sums.found()


def _of_fewer(parts: dict[str, list[Part]], share: float) -> dict[str, list[Part]]:
    """Parts of which so large a share of the examples is met, and as many positions taken."""
    if share == 1:
        return parts
    return {
        name: [replace(part, share=min(1.0, part.share / share)) for part in own]
        for name, own in parts.items()
    }


class _LastUse(Exception):
    """Ends a pass: what follows is not needed."""


class _Apart(Exception):
    """Weights that meet the same inputs in the float network have met different ones."""

    def __init__(self, meets: int) -> None:
        super().__init__()
        self.meets = meets


@dataclass
class _Use:
    """A use of a weight in the float network.

    number: of the uses as these matrices in the batch.
    count: its positions.
    taken: those that are taken; None for all of them.
    outputs: the result there, (groups, positions, outputs), where it is wanted.
    shape: of the result.
    operands: their shapes.
    before: how many values by which others were chosen came before.
    """

    number: int
    count: int
    taken: Tensor | None
    outputs: Tensor | None
    shape: torch.Size
    operands: list[torch.Size]
    before: int


@dataclass
class _Choices:
    """The values by which a pass chose and moved others, and whether they are another's."""

    other: "_Choices | None" = None
    values: list[Tensor] = field(default_factory=list)
    count: int = 0
    same: bool = True

    def note(self, chosen: Tensor) -> None:
        self.count += 1
        if self.other is None:
            self.values.append(chosen.clone())
            return
        known = self.other.values[self.count - 1 : self.count]
        self.same = self.same and bool(known) and _same(known[0], chosen)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


class _Pass:
    """Sums over batches for some weights."""

    def __init__(
        self,
        model: nn.Module,
        work: nn.Module | None,
        rounded: Round | None,
        parts: Mapping[str, Sequence[Part]],
        uses: Mapping[str, Sequence[int]],
        apart: set[int],
    ) -> None:
        self.model, self.work, self.rounded = model, work, rounded
        self.uses = {name: uses[name] for name in parts}
        tensors = own_tensors(model)
        self.weights = {name: tensors[name] for name in parts}
        self.inputs = Inputs()
        self.parts: dict[tuple[str, Matrices], PartSums] = {}
        shared: dict[tuple[int, tuple[int, ...]], Met] = {}
        for part in (part for own in parts.values() for part in own):
            groups, outputs, inputs = part.matrices.shape
            device = self.weights[part.weight].device
            met = products = counts = None
            if part.met:
                key = part.meets, part.counts
                met = shared.get(key) or Met(part, device)
                if part.meets not in apart:
                    shared[key] = met
                if work is not None and part.whole:
                    products = Sum(groups, outputs, inputs, device)
            if part.looked_up:
                counts = torch.zeros(outputs, dtype=torch.float64, device=device)
            self.parts[part.weight, part.matrices] = PartSums(part, met, products, counts)

    def know(self, effects: Effects) -> None:
        """What errors of outputs do."""
        for key, sums in self.parts.items():
            sums.effects = effects.get(key)

    def add(self, batch: Batch, index: int) -> None:
        """What the weights meet in a batch, which is one of so many."""
        count = sum(uses[index] for uses in self.uses.values())
        if not count:
            return
        self.inputs.forget()
        for sums in self.parts.values():
            sums.start()
        if self.work is None:

            def meet(product: Product, number: int) -> Tensor:
                result = product.compute(*product.operands)
                self._add(product, self._use(product, result, index, 0))
                return result

            self._run(self.model, batch, count, meet)
            return
        chosen = _Choices()
        left: dict[tuple[str | None, int], _Use] = {}

        def want(product: Product, number: int) -> Tensor:
            result = product.compute(*product.operands)
            left[product.weight, number] = self._use(product, result, index, chosen.count)
            return result

        self._run(self.model, batch, count, want, chosen.note)
        self._meet_wanted(batch, count, left, chosen)
        if left:  # its own inputs: test_tokens_that_go_elsewhere_are_not_paired

            def meet_own(product: Product, number: int) -> Tensor:
                if use := left.get((product.weight, number)):
                    rounded = product if self.rounded is None else self.rounded(product)
                    self._add(rounded, use)
                return product.compute(*product.operands)

            self._run(self.model, batch, count, meet_own)

    def _meet_wanted(
        self,
        batch: Batch,
        count: int,
        left: dict[tuple[str | None, int], _Use],
        chosen: _Choices,
    ) -> None:
        """Add the inputs in ``work`` of what is wanted, which is no longer left then."""
        assert self.work is not None
        now = _Choices(chosen)

        def meet(product: Product, number: int) -> Tensor:
            use = left.get((product.weight, number))
            operands = [operand.shape for operand in product.operands]
            if use and now.same and (now.count, operands) == (use.before, use.operands):
                self._add(product, left.pop((product.weight, number)))
            return product.compute(*product.operands)

        self._run(self.work, batch, count, meet, now.note, self.rounded)

    def _run(
        self,
        model: nn.Module,
        batch: Batch,
        count: int,
        act: Callable[[Product, int], Tensor],
        note: Callable[[Tensor], None] | None = None,
        rounded: Round | None = None,
    ) -> None:
        """A pass up to so many uses of the weights, for each of which ``act`` is given the product
        and how many uses of the weight were before."""
        numbers, self._numbers = Counter[str | None](), Counter[tuple[str, Matrices]]()
        seen = 0

        def visit(product: Product) -> Tensor:
            nonlocal seen
            product = product if rounded is None else rounded(product)
            if product.weight not in self.uses or not product.used:
                return product.compute(*product.operands)
            number, seen = numbers[product.weight], seen + 1
            numbers[product.weight] += 1
            result = act(product, number)
            if seen == count:
                raise _LastUse
            return result

        try:
            with evaluating(model), visiting(model, visit, note):
                run(model, batch)
        except _LastUse:
            pass

    def _sums(self, product: Product) -> PartSums:
        assert product.weight is not None
        assert product.matrices is not None
        return self.parts[product.weight, product.matrices]

    def _use(self, product: Product, result: Tensor, index: int, before: int) -> _Use:
        """The use of a weight that a product of the float network is."""
        sums, meeting = self._sums(product), product.meet()
        groups, outputs, _ = sums.part.matrices.shape
        count, some, wanted = 0, None, None
        key = sums.part.weight, sums.part.matrices
        number = self._numbers[key]
        if meeting is not None:
            self._numbers[key] += 1
            count = result.numel() // (groups * outputs)
            some = drawn_positions(count, sums.part.share, index, number, result.device)
            if sums.outputs is not None:
                rows = meeting.outputs(result)
                rows = rows.clone() if some is None else rows[some]
                wanted = rows.unflatten(1, (groups, outputs)).movedim(1, 0)
        shapes = [operand.shape for operand in product.operands]
        return _Use(number, count, some, wanted, result.shape, shapes, before)

    def _add(self, product: Product, use: _Use) -> None:
        sums, meeting = self._sums(product), product.meet()
        if meeting is None:
            assert sums.counts is not None
            sums.counts += look_ups(product, len(sums.counts)).to(sums.counts)
            return
        (operand,) = product.operands
        first = sums.meets(self.inputs.number(operand, meeting.how), use.number)
        if first is None:
            raise _Apart(sums.part.meets)
        sums.positions += use.count
        if not first and sums.outputs is None:
            return
        # each position stands for as many
        each = 1.0 if use.taken is None else math.sqrt(use.count / len(use.taken))
        wanted, done = use.outputs, 0
        if wanted is not None and product.bias is not None:
            wanted = wanted - _bias(product, product.bias, meeting, use)
        for rows in meeting.rows(operand, use.taken):
            # sums of half precision would lose what they add: test_half_precision_is_summed_in_full
            x = rows.to(torch.promote_types(rows.dtype, torch.float32))
            x = x if each == 1 else x * each
            if first and sums.met is not None:
                sums.met.add(x)
            if sums.outputs is not None and wanted is not None:
                y = wanted[:, done : done + x.shape[1]].to(x)
                sums.outputs.add(y if each == 1 else y * each, x)
            done += x.shape[1]

    def found(self) -> Iterator[Found]:
        """By weight the moments; each is let go of before the next."""
        for name in self.uses:
            own = [self.parts.pop(key) for key in list(self.parts) if key[0] == name]
            with naming(name):
                moments = moments_of(own, self.weights[name])
            del own
            yield name, moments


def _bias(product: Product, bias: Tensor, meeting: Meeting, use: _Use) -> Tensor:
    """What is added where a use is taken, as its outputs are."""
    groups, outputs, _ = meeting.matrices.shape
    if product.kind != "matrix_product" and bias.numel() == groups * outputs:
        return bias.reshape(groups, 1, outputs)
    bias = bias.reshape(-1, *(1,) * product.spatial) if product.spatial else bias
    rows = meeting.outputs(bias.expand(use.shape))
    rows = rows if use.taken is None else rows[use.taken]
    return rows.unflatten(1, (groups, outputs)).movedim(1, 0)
