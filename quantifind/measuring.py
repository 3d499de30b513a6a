"""What candidates lose on the examples of a split, each beside the float network on the same ones;
kept, so that nothing is measured twice."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quantifind.activations import QuantizedActivations
from quantifind.calibration import calibration_batches, run
from quantifind.loaders import sample
from quantifind.metrics import Criterion, outcome, paired
from quantifind.quantized import QuantizedTensor
from quantifind.store import Store, fingerprint
from quantifind.strategy import Quantized, plain_copy, put_values
from quantifind.utils import device_of

BATCH = 250
# examples of training data
CALIBRATION = 4_096
Columns = dict[str, np.ndarray]


class Measurements:
    """The losses of a network's quantized versions on validation data, in a seeded order of the
    examples; and the training data that calibrate them.

    folder: keeps what is measured of this network on these data, in a folder of its own there; data
    that are drawn or augmented at random are other data each time.
    Errors: ValueError for a split without examples, labels that the network has no outputs for, a
    criterion that gives no loss per example, and a float loss that is 0 or not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: DataLoader,
        val_loader: Iterable[Any],
        criterion: Criterion,
        *,
        folder: Path | str | None = None,
        seed: int = 0,
    ) -> None:
        inputs, targets = _whole(val_loader)
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        self.inputs, self.targets = inputs[order], targets[order]
        self.model, self.train_loader, self.criterion = model, train_loader, criterion
        self.seed = seed
        self.calibration = calibration_batches(sample(train_loader, CALIBRATION, seed=seed))
        self.work = plain_copy(model).eval()
        self.values = {name: tensor.clone() for name, tensor in _own(self.work).items()}
        self.changed: set[str] = set()
        self.original = self._original()
        # outputs and losses tell of a network's code and a criterion's options what their names
        # don't: test_other_options_have_a_folder_of_their_own
        made = [self.original["outputs"], self.original["loss"]]
        data = [tensor for batch in self.calibration for tensor in batch]
        key = fingerprint(model, str(model), seed, inputs, targets, *made, *data)
        self.store = Store(None if folder is None else Path(folder) / key[:16])

    @property
    def examples(self) -> int:
        return len(self.inputs)

    def _original(self) -> dict[str, Tensor]:
        run(self.work, self.inputs[:2])
        _check_labels(self.work, self.inputs[:2], self.targets)
        try:
            original = outcome(self.work, self.batches(), self.criterion)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the criterion {self.criterion} gives no loss per example ({reason}): pass one "
                "that takes (outputs, targets) of one example and returns a number, or that has "
                "reduction='mean' or 'sum' as torch's own have"
            ) from None
        loss = original["loss"].mean().item()
        if not math.isfinite(loss) or loss <= 0:
            raise ValueError(
                f"the float network's loss on validation data is {loss}: "
                "a ratio to it needs one that is finite and above 0"
            )
        return original

    def batches(self, first: int = 0, last: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Batches (inputs, targets) of a span of the examples, by default all."""
        last = self.examples if last is None else last
        ends = [(i, min(i + BATCH, last)) for i in range(first, last, BATCH)]
        return [(self.inputs[i:j], self.targets[i:j]) for i, j in ends]

    def columns(self, key: str, quantized: Quantized, examples: int | None = None) -> Columns:
        """By example, what `quantifind.metrics.paired` has, of the first so many examples (default
        all).

        key: names this candidate for ever. Those examples that were measured before are not again.
        """
        examples = self.examples if examples is None else min(examples, self.examples)
        entry = self.store.get(key)
        kept: Columns = {} if entry is None else {n: t.numpy() for n, t in entry[0].items()}
        done = len(kept["loss"]) if kept else 0
        if done < examples:
            fresh = self._measure(quantized, done, examples)
            kept = {n: np.concatenate([kept[n], c]) if kept else c for n, c in fresh.items()}
            self.store.put(key, {name: torch.from_numpy(c) for name, c in kept.items()})
        return {name: column[:examples] for name, column in kept.items()}

    def _measure(self, quantized: Quantized, first: int, last: int) -> Columns:
        self._put(quantized.tensors)
        net: nn.Module = self.work
        if quantized.activations:
            net = QuantizedActivations(self.work, quantized.activations)
        measured = outcome(net, self.batches(first, last), self.criterion)
        return paired(measured, {name: part[first:last] for name, part in self.original.items()})

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, QuantizedTensor]) -> None:
        """The working copy's tensors on their levels; those not named have their float values."""
        own = _own(self.work)
        for name in self.changed - tensors.keys():
            own[name].copy_(self.values[name])
        put_values(self.work, tensors)
        self.changed = set(tensors)


def _own(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers()) | {n: p.detach() for n, p in model.named_parameters()}


def _whole(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    batches = list(loader)
    if not batches:
        raise ValueError("the validation loader has no examples")
    lengths = {batch[0].shape[1:] for batch in batches}
    if len(lengths) > 1:
        raise ValueError(
            f"validation inputs have shapes {sorted(map(list, lengths))}: all alike are needed"
        )
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


def _check_labels(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    if targets.is_floating_point():
        return
    with torch.no_grad():
        outputs = model(inputs.to(device_of(model)))
    # (examples, classes), or with further axes, of positions
    classes = outputs.shape[1] if outputs.dim() == targets.dim() + 1 else 0
    wrong = targets[(targets < 0) | (targets >= classes)]
    if classes and len(wrong):
        raise ValueError(
            f"{len(wrong)} validation labels are out of range, such as {wrong[0].item()}: "
            f"the network has outputs for 0 to {classes - 1}"
        )
