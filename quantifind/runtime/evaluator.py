"""Losses of a network's quantized versions on one split: one working copy whose tensors are swapped
in place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.metrics import Criterion, outcome, outcome_of
from quantifind.network.activations import QuantizedActivations
from quantifind.network.modules import own_tensors, plain_copy, put_values
from quantifind.runtime.layouts import CONTIGUOUS, in_layout, layout_and_batch, to_layout
from quantifind.runtime.pooling import pool_first
from quantifind.runtime.replay import NotReplayable, Replay
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.console import console
from quantifind.utils.devices import device_of, evaluating

# between a replayed pass and a whole one, of the largest output
TOLERANCE = 1e-5
Batch = tuple[Tensor, Tensor]
Batches = list[Batch]
Outcome = dict[str, Tensor]


class Evaluator:
    """A network's outputs and losses on one split, with any of its tensors on few levels.

    Float32 results equal a plain loop's within 1e-5, unless an example's output depends on the rest
    of its batch. The network that is given, and the inputs, stay as they are.

    loader: batches (inputs, targets), read once, in one order. Inputs all of one shape are put into
        batches of another size (`quantifind.runtime.layouts`); others stay in the loader's own.
    Raises: ValueError for a loader without examples.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Any], criterion: Criterion) -> None:
        self.given: Batches = [(inputs, targets) for inputs, targets in loader]
        if not self.given:
            raise ValueError("the loader has no examples")
        self.criterion = criterion
        self.work = plain_copy(model).eval()
        pool_first(self.work)
        self.device = device_of(self.work)
        self.values = {name: tensor.clone() for name, tensor in _own(self.work).items()}
        # names of tensors that aren't as they were given, after a put
        self.changed: set[str] = set()
        self.replayable = True
        # tensors of which a replayed pass was compared with a whole one
        self.compared: set[str] = set()
        # before what is put there counts as changed: test_a_layout_that_fails_is_left
        self.stateful, self.edits_inputs = self._side_effects()
        self.layout, self.batch = CONTIGUOUS, 0
        self.inputs = self.targets = torch.empty(0)
        if len({(inputs.shape[1:], targets.shape[1:]) for inputs, targets in self.given}) == 1:
            self.inputs, self.targets = (torch.cat(part) for part in zip(*self.given, strict=True))
            self.given = []
            self._lay_out(*layout_and_batch(self.work, self.inputs))

    def _side_effects(self) -> tuple[set[str], bool]:
        """The tensors that a pass changes, such as running means, and whether it changes its inputs
        (test_what_a_pass_changes_is_put_back)."""
        some = self.given[0][0][:2].to(self.device)
        inputs = some.clone()
        # what it can't take is said by the pass that is asked for
        with evaluating(self.work), suppress(RuntimeError):
            self.work(inputs)
        own = _own(self.work)
        stateful = {n for n, value in self.values.items() if not torch.equal(own[n], value)}
        return stateful, not torch.equal(inputs, some)

    @property
    def examples(self) -> int:
        return len(self.inputs) or sum(len(inputs) for inputs, _ in self.given)

    def _lay_out(self, layout: str, batch: int) -> None:
        self.layout, self.batch = layout, batch
        # where a pass failed, it may get further
        self.replayable = True
        to_layout(self.work, layout)
        self.inputs = _on(self.device, in_layout(self.inputs, layout))
        self.targets = _on(self.device, self.targets)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """Batches (inputs, targets) of a span of the examples, by default all; a span only of
        examples that are alike in shape."""
        batches: Iterable[Batch] = self.given
        if not self.given:
            last = self.examples if last is None else last
            spans = [(i, min(i + self.batch, last)) for i in range(first, last, self.batch)]
            batches = ((self.inputs[i:j], self.targets[i:j]) for i, j in spans)
        for inputs, targets in batches:
            yield inputs.clone() if self.edits_inputs else inputs, targets

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
        outputs: list[list[Tensor]] = [[] for _ in values]
        targets: list[Tensor] = []
        with evaluating(self.work):
            try:
                for inputs, wanted in self.batches(first, last):
                    inputs = inputs.to(self.device)
                    replay = Replay(self.work, inputs, name)
                    if name not in self.compared:
                        self._compare(replay, inputs, name, values[0])
                    targets.append(wanted)
                    for value, collected in zip(dense, outputs, strict=True):
                        collected.append(replay.outputs(value))
                    del replay  # before the next is recorded
            except RuntimeError as error:
                if _is_out_of_memory(error):
                    raise
                # a whole pass may well do: test_a_failed_replay_leaves_the_layout
                raise NotReplayable(_reason(error)) from error
            wanted = torch.cat(targets).to(self.device)
            return [outcome_of(torch.cat(one), wanted, self.criterion) for one in outputs]

    def _compare(self, replay: Replay, inputs: Tensor, name: str, value: QuantizedTensor) -> None:
        found = replay.outputs(torch.empty_like(self.values[name]).copy_(value.dequantize()))
        self._put({name: value})
        whole = self.work(inputs)
        self._put({})
        error = (found - whole).abs().max().item()
        if not error <= TOLERANCE * whole.abs().max().item():
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
            if self.given or self.batch == 1:
                raise failed
            self.batch //= 2
            console.print(f"Out of memory: going on with batches of {self.batch}", markup=False)
        if self.given or self.layout == CONTIGUOUS:
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


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """On the device, where a quarter of its free memory holds it; else it goes batch by batch."""
    if device.type != "cuda" or tensor.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return tensor
    return tensor.to(device)
