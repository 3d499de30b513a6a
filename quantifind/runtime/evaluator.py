"""Losses of a network's quantized versions on one split: a copy's tensors, swapped in place."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.metrics import Outcome, compared, gathered, judged, outcome
from quantifind.network.activations import QuantizedActivations
from quantifind.network.modules import own_tensors, plain_copy, put_values
from quantifind.runtime.checks import checked, excess, in_one_line, side_effects
from quantifind.runtime.layouts import (
    CONTIGUOUS,
    CPU_BATCH,
    in_layout,
    layout_and_batch,
    on_device,
    to_layout,
)
from quantifind.runtime.pooling import pool_first
from quantifind.runtime.replay import NotReplayable, Replay
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.batches import (
    Batch,
    Forward,
    batches_of,
    kept,
    regrouped,
    with_tensors,
)
from quantifind.utils.console import console
from quantifind.utils.criteria import Criterion
from quantifind.utils.devices import device_of, evaluating, is_out_of_memory
from quantifind.utils.naming import first_line

# between a replayed pass and a whole one, of the largest output
TOLERANCE = 1e-5
# bytes of the float network's outputs on a split that are kept, and of those that are computed at a
# time where there are more
KEPT, AGAIN = 2**30, 2**28


class Evaluator:
    """A network's outputs and losses on one split, with any of its tensors on few levels.

    Results equal a plain loop's within 1e-5 in float32. The network that is given, and the batches,
    stay as they are.

    loader: batches, read once. Where they are alike in shape, and an example's outputs don't depend
        on the rest of its batch, batches of another size are made of them
        (`quantifind.runtime.layouts`); others stay the loader's own.
    criterion: None where the outputs are all there is to judge.
    forward: as `quantifind.utils.batches.batches_of` takes it.
    seed: of a random order of the examples, or of batches that stay; by default the loader's order.
    Raises: ValueError for a loader without examples, and where the network does not take the first
        batch, or the criterion what it gives.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        criterion: Criterion | None,
        *,
        forward: Forward | None = None,
        seed: int | None = None,
    ) -> None:
        self.given = kept(batches_of(loader, model, criterion, forward))
        if not self.given:
            raise ValueError("the loader has no examples")
        # another copy, since it may keep a table of its first pass
        tried = plain_copy(model).eval()
        with evaluating(tried):
            first, self.whole, self.criterion = checked(tried, self.given, criterion)
        self.work = plain_copy(model).eval()
        pool_first(self.work)
        self.device = device_of(self.work)
        self.values = {name: tensor.clone() for name, tensor in _own(self.work).items()}
        # names of tensors that aren't as they were given, after a put
        self.changed: set[str] = set()
        self.replayable = True
        # examples that went through the network so far; through half of it, half as many
        self.taken = 0.0
        # tensors of which a replayed pass was compared with a whole one
        self.compared: set[str] = set()
        # before what is put there counts as changed: test_a_layout_that_fails_is_left
        self.stateful, self.edits_inputs = side_effects(self.work, self.values, first)
        self.layout, self.batch = CONTIGUOUS, 0
        # by batch that stays, its examples, once they are known
        self.sizes: list[int] = []
        order = torch.Generator().manual_seed(seed) if seed is not None else None
        if self.whole is not None:
            self.given = []
            if order is not None:
                self.whole = self.whole[torch.randperm(len(self.whole), generator=order)]
            self._lay_out(*layout_and_batch(self.work, self.whole))
        elif order is not None:
            self.given = [self.given[i] for i in torch.randperm(len(self.given), generator=order)]

    @property
    def examples(self) -> int:
        return len(self.whole) if self.whole is not None else sum(self._sizes())

    def _sizes(self) -> list[int]:
        if not self.sizes:
            with evaluating(self.work):
                made = [
                    judged(self.criterion, *batch.clone().run(self.work)) for batch in self.given
                ]
            self.sizes = [len(one) for one in made]
        return self.sizes

    def aligned(self, examples: int) -> int:
        """The fewest examples, at least so many, after which a batch may end."""
        if self.whole is not None:
            return min(examples, len(self.whole))
        ends = itertools.accumulate(self._sizes())
        return next((end for end in ends if end >= examples), self.examples)

    def given_batches(self) -> list[Batch]:
        """All examples, in batches that may go through a network, whatever the layout of a pass."""
        if self.whole is None:
            return self.given
        plain = torch.contiguous_format
        data = with_tensors(
            lambda t: t.clone(memory_format=plain) if isinstance(t, Tensor) else t, self.whole.data
        )
        return regrouped([Batch(data, self.whole.forward)], CPU_BATCH)

    def _lay_out(self, layout: str, batch: int) -> None:
        assert self.whole is not None
        self.layout, self.batch = layout, batch
        # where a pass failed, it may get further
        self.replayable = True
        to_layout(self.work, layout)
        laid = with_tensors(
            lambda t: in_layout(t, layout) if isinstance(t, Tensor) else t, self.whole.data
        )
        self.whole = Batch(on_device(self.device, laid), self.whole.forward)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The batches of a span of the examples, by default all; of batches that stay, those that
        begin in it."""
        last = self.examples if last is None else last
        if self.whole is None:
            starts = itertools.accumulate(self._sizes(), initial=0)
            pairs = zip(self.given, starts, strict=False)
            found = [batch for batch, start in pairs if first <= start < last]
        else:
            step = self.batch
            found = [self.whole[i : min(i + step, last)] for i in range(first, last, step)]
        for batch in found:
            yield batch.clone() if self.edits_inputs else batch

    def original(self) -> Outcome:
        """The float network's outcome on all examples; without outputs where they are more than
        `KEPT` bytes, which is said: they are then computed again beside each candidate."""
        self._put({})
        # what a pass changes, the next one goes on from: test_what_a_pass_changes_is_put_back
        most = math.inf if self.stateful else KEPT
        with in_one_line():
            found = self._guarded(
                lambda: outcome(self.work, self.batches(), self.criterion, most=most)
            )
        if "outputs" not in found:
            said = (
                f"The float network's outputs are over {KEPT / 2**30:g} GiB: made again each time"
            )
            console.print(said, markup=False)
        return found

    def outcome(
        self,
        quantized: Quantized | None = None,
        first: int = 0,
        last: int | None = None,
        *,
        beside: Outcome | None = None,
    ) -> Outcome:
        """The `quantifind.metrics.outcome` of a span of the examples, with tensors and activations
        on levels, and what is not named in float.

        beside: what `original` has given: each batch is then `quantifind.metrics.compared` with it
            as it comes, so that the outputs of one batch are kept at a time.
        """
        quantized = quantized or Quantized({})
        self._put(quantized.tensors)
        net: nn.Module = self.work
        if quantized.activations:
            net = QuantizedActivations(self.work, quantized.activations)
        self.taken += (self.examples if last is None else last) - first
        if beside is None:
            return self._guarded(lambda: outcome(net, self.batches(first, last), self.criterion))
        made = self._beside if "outputs" in beside else self._beside_again
        return self._guarded(lambda: made(beside, quantized, net, first, last))

    def _beside(
        self, original: Outcome, _: Quantized, net: nn.Module, first: int, last: int | None
    ) -> Outcome:
        reduced: list[Outcome] = []
        with evaluating(net):
            for batch in self.batches(first, last):
                one = judged(self.criterion, *batch.run(net))
                one = compared(one, original.span(first, first + len(one)))
                first += len(one)
                reduced.append(one)
        return gathered(reduced)

    def _beside_again(
        self, original: Outcome, quantized: Quantized, net: nn.Module, first: int, last: int | None
    ) -> Outcome:
        """The float network's outputs on some batches, then the quantized one's on the same."""
        batches, reduced = self.batches(first, last), list[Outcome]()
        with evaluating(net):
            while True:
                self._put({})
                some, held = list[tuple[Batch, Outcome]](), 0
                for batch in batches:
                    some.append((batch, self._again(batch, original)))
                    held += some[-1][1].parts[0]["outputs"].nbytes
                    if held >= AGAIN:
                        break
                if not some:
                    return gathered(reduced)
                self._put(quantized.tensors)
                reduced += [compared(judged(self.criterion, *b.run(net)), f) for b, f in some]

    def _again(self, batch: Batch, original: Outcome) -> Outcome:
        self.taken += len(batch)
        given = batch.clone() if self.edits_inputs else batch
        return replace(judged(self.criterion, *given.run(self.work)), classes=original.classes)

    def one_tensor(
        self,
        name: str,
        values: Sequence[QuantizedTensor],
        first: int = 0,
        last: int | None = None,
        *,
        beside: Outcome | None = None,
    ) -> list[Outcome]:
        """The `outcome` for each of a tensor's quantized values, with the rest in float.

        What a pass computes before it meets the tensor is computed once for all of them.
        """
        if self.replayable:
            try:
                return self._guarded(lambda: self._replayed(name, values, first, last, beside))
            except NotReplayable as error:
                self.replayable = False
                console.print(f"Each pass is a whole one: {first_line(error)}", markup=False)
        each = (Quantized({name: value}) for value in values)
        return [self.outcome(one, first, last, beside=beside) for one in each]

    def _replayed(
        self,
        name: str,
        values: Sequence[QuantizedTensor],
        first: int,
        last: int | None,
        beside: Outcome | None,
    ) -> list[Outcome]:
        self._put({})
        own = _own(self.work)[name]
        dense = [torch.empty_like(own).copy_(value.dequantize()) for value in values]
        outcomes: list[list[Outcome]] = [[] for _ in values]
        with evaluating(self.work):
            try:
                for batch in self.batches(first, last):
                    float_ = None
                    if beside is not None and "outputs" not in beside:
                        float_ = self._again(batch, beside)
                    replay = Replay(self.work, batch, name)
                    self.taken += len(batch) * (1 + len(dense) * replay.share)
                    if name not in self.compared:
                        self._compare(replay, batch, name, values[0])
                    for value, collected in zip(dense, outcomes, strict=True):
                        one = judged(self.criterion, replay.outputs(value), *replay.targets)
                        if beside is not None:
                            one = compared(one, float_ or beside.span(first, first + len(one)))
                        collected.append(one)
                    first += len(one)
                    del replay  # before the next is recorded
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # a whole pass may well do: test_a_failed_replay_leaves_the_layout
                raise NotReplayable(first_line(error)) from error
            return [gathered(one) for one in outcomes]

    def _compare(self, replay: Replay, batch: Batch, name: str, value: QuantizedTensor) -> None:
        found = replay.outputs(torch.empty_like(self.values[name]).copy_(value.dequantize()))
        self._put({name: value})
        whole = batch.run(self.work)[0]
        self._put({})
        error = excess(TOLERANCE, found, whole)
        if error is not None:
            raise NotReplayable(f"a replay from {name} gives other outputs, by up to {error:g}")
        self.compared.add(name)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, QuantizedTensor]) -> None:
        """The working copy's tensors on their levels; those not named have their float values."""
        own = _own(self.work)
        for name in (self.changed | self.stateful) - tensors.keys():
            own[name].copy_(self.values[name])
        # first, so that a put that fails is undone: test_what_fails_leaves_nothing_behind
        self.changed = tensors.keys() & own.keys()
        put_values(self.work, tensors)

    def _guarded(self, run: Callable[[], Any]) -> Any:
        """What ``run`` returns; in half the batch size where memory runs out, and in the default
        layout where another one fails."""
        failed: Exception
        while True:
            try:
                return run()
            except (MemoryError, RuntimeError) as error:
                failed = error
            if not is_out_of_memory(failed):
                break
            if self.whole is None or self.batch == 1:
                raise failed
            del failed  # which holds what the pass has made
            self.batch //= 2
            console.print(f"Out of memory: going on with batches of {self.batch}", markup=False)
        if self.whole is None or self.layout == CONTIGUOUS:
            raise failed
        said = f"Layout {self.layout} failed ({first_line(failed)}): going on with {CONTIGUOUS}"
        self._lay_out(CONTIGUOUS, self.batch)
        result = run()
        console.print(said, markup=False)
        return result


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in own_tensors(model).items()}
