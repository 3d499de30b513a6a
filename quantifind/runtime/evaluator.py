"""Losses of a network's quantized versions on one split: one working copy whose tensors are swapped
in place, in the layout and batch size that this machine runs fastest."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.metrics import Criterion, outcome, outcome_of
from quantifind.network.activations import QuantizedActivations
from quantifind.network.modules import own_tensors, plain_copy, put_values
from quantifind.runtime.layouts import CONTIGUOUS, DEFAULT, fastest, in_layout, to_layout
from quantifind.runtime.onednn import laying_out_once
from quantifind.runtime.pooling import pool_by_slices, pool_first
from quantifind.runtime.replay import NotRepeatable, Tape
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.console import console
from quantifind.utils.devices import device_of, evaluating, keep_freed_memory

# between a pass that goes on from where a tensor changed and a whole one, of the largest output
TOLERANCE = 1e-5
Batch = tuple[Tensor, Tensor]
Batches = list[Batch]
Outcome = dict[str, Tensor]


class Evaluator:
    """A network's outputs and losses on one split, with any of its tensors on few levels.

    loader: batches (inputs, targets), read once, in one order. Inputs all of one shape are put into
        batches of another size; others stay in the loader's own.
    The network that is given, and the inputs, stay as they are. Float32 results are those of a
    plain loop within 1e-5, unless what the network makes of an example depends on those beside it;
    which layout and batch size are the fastest is timed once per machine, network and shape of an
    example, and remembered in the user's cache folder. From the first one on, glibc keeps the
    memory that this process frees.
    Errors: ValueError for a loader without examples.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Any], criterion: Criterion) -> None:
        keep_freed_memory()
        self.given: Batches = [(inputs, targets) for inputs, targets in loader]
        if not self.given:
            raise ValueError("the loader has no examples")
        self.criterion = criterion
        self.work = plain_copy(model).eval()
        pool_first(self.work)
        pool_by_slices(self.work)
        self.device = device_of(self.work)
        self.values = {name: tensor.clone() for name, tensor in _own(self.work).items()}
        # names of tensors that aren't as they were given: after a put, and whatever a pass changes
        self.changed: set[str] = set()
        self.stateful, self.edits_inputs = self._side_effects()
        # tensors of which a pass that goes on from them was compared with a whole one
        self.compared: set[str] = set()
        # by tensor, as `Tape` has them: found once, from its first tape
        self.layers: dict[str, Mapping[str, nn.Module | None]] = {}
        self.repeatable = True
        self.layout, self.batch = CONTIGUOUS, 0
        self.inputs = self.targets = torch.empty(0)
        if len({(inputs.shape[1:], targets.shape[1:]) for inputs, targets in self.given}) == 1:
            self.inputs, self.targets = (torch.cat(part) for part in zip(*self.given, strict=True))
            self.given = []
            self._lay_out(*fastest(self.work, self.inputs))

    def __setstate__(self, state: dict[str, Any]) -> None:
        keep_freed_memory()  # of the worker too that it is sent to
        self.__dict__ = state

    def _side_effects(self) -> tuple[set[str], bool]:
        """The tensors that a pass changes, such as running means, and whether it changes its inputs
        (test_what_a_pass_changes_is_put_back)."""
        some = self.given[0][0][:2].to(self.device)
        inputs = some.clone()
        try:
            with evaluating(self.work):
                self.work(inputs)
        except RuntimeError:  # what it can't take is said by the pass that is asked for
            return set(), False
        own = _own(self.work)
        stateful = {n for n, value in self.values.items() if not torch.equal(own[n], value)}
        return stateful, not torch.equal(inputs, some)

    @property
    def examples(self) -> int:
        return len(self.inputs) or sum(len(inputs) for inputs, _ in self.given)

    def _lay_out(self, layout: str, batch: int) -> None:
        self.layout, self.batch = layout, batch
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
        self,
        quantized: Quantized | None = None,
        first: int = 0,
        last: int | None = None,
        *,
        change_inputs: Callable[[Tensor], Tensor] | None = None,
    ) -> Outcome:
        """The `quantifind.metrics.outcome` of a span of the examples, with tensors and activations
        on levels, and what is not named in float.

        change_inputs: takes each batch's inputs, and returns what the network is given instead.
        """
        quantized = quantized or Quantized({})
        self._put(quantized.tensors)

        def run() -> Outcome:
            batches: Iterable[Batch] = self.batches(first, last)
            if change_inputs is not None:
                batches = ((change_inputs(inputs), targets) for inputs, targets in batches)
            net: nn.Module = self.work
            if quantized.activations:
                net = QuantizedActivations(self.work, quantized.activations)
            # activations are seen where they meet torch's own products, and a pass may change its
            # weights unseen: test_what_a_pass_changes_is_put_back
            plain = quantized.activations or self.stateful or self.device.type != "cpu"
            with nullcontext() if plain else laying_out_once(self.work):
                return outcome(net, batches, self.criterion)

        return self._guarded(run)

    def alone(
        self, name: str, parts: Sequence[QuantizedTensor], first: int = 0, last: int | None = None
    ) -> list[Outcome]:
        """The outcome with one tensor on the levels of each of the parts, the rest in float. What a
        pass computes before it meets the tensor is computed once for all of them."""
        if self.repeatable:
            try:
                return self._guarded(lambda: self._going_on(name, parts, first, last))
            except NotRepeatable as error:
                self.repeatable = False
                console.print(f"Each pass is a whole one: {_reason(error)}", markup=False)
        return [self.outcome(Quantized({name: part}), first, last) for part in parts]

    def _going_on(
        self, name: str, parts: Sequence[QuantizedTensor], first: int, last: int | None
    ) -> list[Outcome]:
        self._put({})
        own = _own(self.work)[name]
        values = [torch.empty_like(own).copy_(p.dequantize()) for p in parts]
        outputs: list[list[Tensor]] = [[] for _ in parts]
        targets: list[Tensor] = []
        with evaluating(self.work):
            try:
                for inputs, wanted in self.batches(first, last):
                    inputs = inputs.to(self.device)
                    tape = Tape(self.work, inputs, [name], self.layers.get(name))
                    self.layers[name] = tape.layers
                    if name not in self.compared:
                        self._compare(tape, inputs, name, parts[0])
                    targets.append(wanted)
                    for value, collected in zip(values, outputs, strict=True):
                        collected.append(tape.outputs(name, value))
                    del tape  # before the next is recorded
            except RuntimeError as error:
                if _is_out_of_memory(error):
                    raise
                # a whole pass may well do: test_a_pass_that_cannot_go_on_leaves_the_layout
                raise NotRepeatable(_reason(error)) from error
            wanted = torch.cat(targets).to(self.device)
            return [outcome_of(torch.cat(one), wanted, self.criterion) for one in outputs]

    def _compare(self, tape: Tape, inputs: Tensor, name: str, part: QuantizedTensor) -> None:
        found = tape.outputs(name, torch.empty_like(self.values[name]).copy_(part.dequantize()))
        self._put({name: part})
        whole = self.work(inputs)
        self._put({})
        error = (found - whole).abs().max().item()
        if not error <= TOLERANCE * whole.abs().max().item():
            raise NotRepeatable(f"going on from {name} gives other outputs, by up to {error:g}")
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
        layout where the remembered one fails."""
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
        if self.given or (self.layout, self.batch) == (CONTIGUOUS, DEFAULT):
            raise failed
        was = f"{self.layout}, batches of {self.batch}"
        self._lay_out(CONTIGUOUS, DEFAULT)
        result = run()
        console.print(
            f"{was} failed ({_reason(failed)}): going on with {CONTIGUOUS}, batches of {DEFAULT}",
            markup=False,
        )
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
