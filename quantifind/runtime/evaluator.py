"""Losses of a network's quantized versions on one split: one working copy whose tensors are swapped
in place."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.metrics import Outcome, gathered, judged, outcome
from quantifind.network.activations import QuantizedActivations
from quantifind.network.modules import PASS_FAILS, own_tensors, plain_copy, put_values, run
from quantifind.runtime.layouts import CONTIGUOUS, in_layout, layout_and_batch, to_layout
from quantifind.runtime.pooling import pool_first
from quantifind.runtime.replay import NotReplayable, Replay
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.batches import (
    Batch,
    Forward,
    batches_of,
    joined,
    kept,
    moved,
    rows_of,
    tensors_of,
    with_tensors,
)
from quantifind.utils.console import console
from quantifind.utils.criteria import Criterion, CriterionError, check_criterion, name_of
from quantifind.utils.devices import device_of, evaluating

# between a replayed pass and a whole one, of the largest output
TOLERANCE = 1e-5
# examples of which it is seen whether the others of a batch count
FEW = 4


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
        self.criterion = criterion
        self.work = plain_copy(model).eval()
        self.given = kept(batches_of(loader, model, criterion, forward))
        if not self.given:
            raise ValueError("the loader has no examples")
        with evaluating(self.work):
            check_batch(self.work, _first(self.given[0]), criterion)
        # the copy whose first pass that was may keep a table of it
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
        self.stateful, self.edits_inputs = self._side_effects()
        self.layout, self.batch = CONTIGUOUS, 0
        # by batch that stays, its examples, once they are known
        self.sizes: list[int] = []
        self.whole = joined(self.given) if self._independent() else None
        order = torch.Generator().manual_seed(seed) if seed is not None else None
        if self.whole is not None:
            self.given = []
            if order is not None:
                self.whole = self.whole[torch.randperm(len(self.whole), generator=order)]
            self._lay_out(*layout_and_batch(self.work, self.whole))
        elif order is not None:
            permutation = torch.randperm(len(self.given), generator=order).tolist()
            self.given = [self.given[i] for i in permutation]

    def _side_effects(self) -> tuple[set[str], bool]:
        """The tensors that a pass changes, such as running means, and whether it changes its inputs
        (test_what_a_pass_changes_is_put_back)."""
        given = _first(self.given[0])
        some = given.clone()
        with evaluating(self.work):
            some.run(self.work)
        own = _own(self.work)
        stateful = {n for n, value in self.values.items() if not _equal(own[n], value)}
        pairs = zip(tensors_of(some.data), tensors_of(given.data), strict=True)
        return stateful, not all(_equal(a, b) for a, b in pairs)

    def _independent(self) -> bool:
        """Whether an example's outputs are the same in another batch
        (test_a_batch_that_counts_as_one_stays)."""
        some = _first(self.given[0])
        if joined(self.given) is None:
            return False
        if len(some) < 2:
            return True
        try:
            with evaluating(self.work):
                together = tensors_of(some.clone().run(self.work)[0])
                alone = [tensors_of(some[i : i + 1].clone().run(self.work)[0]) for i in (0, 1)]
        except PASS_FAILS:
            return False
        self._put({})
        return all(
            rows_of(whole) == len(some) and _close(torch.cat(parts), whole[:2])
            for whole, *parts in zip(together, *alone, strict=True)
        )

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
        """All examples, as few batches as may be, whatever the layout of a pass."""
        if self.whole is None:
            return self.given
        plain = torch.contiguous_format
        data = with_tensors(
            lambda t: t.clone(memory_format=plain) if isinstance(t, Tensor) else t, self.whole.data
        )
        return [Batch(data, self.whole.forward)]

    def _lay_out(self, layout: str, batch: int) -> None:
        assert self.whole is not None
        self.layout, self.batch = layout, batch
        # where a pass failed, it may get further
        self.replayable = True
        to_layout(self.work, layout)
        laid = with_tensors(
            lambda t: in_layout(t, layout) if isinstance(t, Tensor) else t, self.whole.data
        )
        self.whole = Batch(_on(self.device, laid), self.whole.forward)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The batches of a span of the examples, by default all; of batches that stay, those that
        begin in it."""
        last = self.examples if last is None else last
        if self.whole is None:
            starts = itertools.accumulate(self._sizes(), initial=0)
            found = [
                b for b, start in zip(self.given, starts, strict=False) if first <= start < last
            ]
        else:
            spans = [(i, min(i + self.batch, last)) for i in range(first, last, self.batch)]
            found = [self.whole[i:j] for i, j in spans]
        for batch in found:
            yield batch.clone() if self.edits_inputs else batch

    def outcome(
        self, quantized: Quantized | None = None, first: int = 0, last: int | None = None
    ) -> Outcome:
        """The `quantifind.metrics.outcome` of a span of the examples, with tensors and activations
        on levels, and what is not named in float."""
        quantized = quantized or Quantized({})
        self._put(quantized.tensors)
        net: nn.Module = self.work
        if quantized.activations:
            net = QuantizedActivations(self.work, quantized.activations)
        self.taken += (self.examples if last is None else last) - first
        return self._guarded(lambda: outcome(net, self.batches(first, last), self.criterion))

    def one_tensor(
        self, name: str, values: Sequence[QuantizedTensor], first: int = 0, last: int | None = None
    ) -> list[Outcome]:
        """The outcome for each of a tensor's quantized values, with the rest in float.

        What a pass computes before it meets the tensor is computed once for all of them.
        """
        if self.replayable:
            try:
                return self._guarded(lambda: self._replayed(name, values, first, last))
            except NotReplayable as error:
                self.replayable = False
                console.print(f"Each pass is a whole one: {_reason(error)}", markup=False)
        return [self.outcome(Quantized({name: value}), first, last) for value in values]

    def _replayed(
        self, name: str, values: Sequence[QuantizedTensor], first: int, last: int | None
    ) -> list[Outcome]:
        self._put({})
        own = _own(self.work)[name]
        dense = [torch.empty_like(own).copy_(value.dequantize()) for value in values]
        outcomes: list[list[Outcome]] = [[] for _ in values]
        with evaluating(self.work):
            try:
                for batch in self.batches(first, last):
                    replay = Replay(self.work, batch, name)
                    self.taken += len(batch) * (1 + len(dense) * replay.share)
                    if name not in self.compared:
                        self._compare(replay, batch, name, values[0])
                    for value, collected in zip(dense, outcomes, strict=True):
                        given = replay.outputs(value), *replay.targets
                        collected.append(judged(self.criterion, *given))
                    del replay  # before the next is recorded
            except RuntimeError as error:
                if _is_out_of_memory(error):
                    raise
                # a whole pass may well do: test_a_failed_replay_leaves_the_layout
                raise NotReplayable(_reason(error)) from error
            return [gathered(one) for one in outcomes]

    def _compare(self, replay: Replay, batch: Batch, name: str, value: QuantizedTensor) -> None:
        found = replay.outputs(torch.empty_like(self.values[name]).copy_(value.dequantize()))
        self._put({name: value})
        whole = batch.run(self.work)[0]
        self._put({})
        for one, other in zip(tensors_of(found), tensors_of(whole), strict=True):
            error = torch.where(one == other, 0.0, (one - other).abs()).max().item()
            largest = torch.where(other.isinf(), 0.0, other).abs().max().item()
            if not error <= TOLERANCE * largest and not (one.isnan() & other.isnan()).all():
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
            if not _is_out_of_memory(failed):
                break
            if self.whole is None or self.batch == 1:
                raise failed
            self.batch //= 2
            console.print(f"Out of memory: going on with batches of {self.batch}", markup=False)
        if self.whole is None or self.layout == CONTIGUOUS:
            raise failed
        said = f"Layout {self.layout} failed ({_reason(failed)}): going on with {CONTIGUOUS}"
        self._lay_out(CONTIGUOUS, self.batch)
        result = run()
        console.print(said, markup=False)
        return result


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in own_tensors(model).items()}


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a plain RuntimeError on the CPU
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "not enough memory" in str(error) or "out of memory" in str(error)
    )


def _on(device: torch.device, data: Any) -> Any:
    """On the device, where a quarter of its free memory holds it; else it goes batch by batch."""
    size = sum(tensor.nbytes for tensor in tensors_of(data))
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 4:
        return data
    return moved(data, device)


def _first(batch: Batch) -> Batch:
    """A few of its examples, where they can be told apart."""
    return batch if rows_of(batch.data) is None else batch[:FEW]


def _equal(one: Tensor, other: Tensor) -> bool:
    """NaN is what it was, where it was."""
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = torch.where(other.isfinite(), other, 0.0).abs().max().item()
    return torch.allclose(one.float(), other.float(), rtol=0, atol=1e-3 * scale, equal_nan=True)


def check_batch(model: nn.Module, batch: Batch, criterion: Criterion | None) -> None:
    """Raise ValueError, of one line, unless a network takes a batch, and its criterion what it
    gives."""
    outputs, *targets = run(model, batch)
    if criterion is not None and not targets:
        raise ValueError(f"{batch} has no targets for {name_of(criterion)}: give criterion=None")
    try:
        judged(criterion, outputs, *targets)
        check_criterion(criterion, outputs, *targets)
    except CriterionError:
        raise
    except PASS_FAILS as error:
        reason = str(error).partition("\n")[0]
        given = ", ".join(str(list(tensor.shape)) for tensor in tensors_of([outputs, *targets]))
        raise ValueError(
            f"{name_of(criterion)} does not take what it is given, of shapes {given}: {reason}; "
            "forward=lambda model, batch: (outputs, targets) says what it gets"
        ) from error
