"""What quantization costs: loss per example, criterion ratio, accuracy and flips, weight error."""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantifind.utils.batches import Forward, batches_of
from quantifind.utils.criteria import (
    Criterion,
    aligned,
    by_example,
    settled,
    values_of,
    weighted,
)
from quantifind.utils.devices import evaluating
from quantifind.utils.divergences import classes_of, divergences, squares
from quantifind.utils.gains import OF_LOGITS, OF_SQUARES, Gains, gains_of

# bytes of outputs that wait on a device before they are fetched
WAITING = 2**28
# outputs that are compared at a time, in float64
COMPARED = 2**21
# outputs of a batch that are judged at all gains in one call, whose overhead else takes longer
SMALL = 2**14
# whose outputs are logits of classes, or are held to numbers, which a gain suits
LOGITS = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
SQUARES = (nn.MSELoss,)


@dataclass(frozen=True)
class Outcome:
    """What a network makes of examples, on the CPU.

    parts: of examples that are alike in shape: ``outputs`` (examples, ...); ``loss`` (examples,)
        float64; ``weight`` (examples, ...), what an example, or each of its positions, counts;
        where that is another, the ``share`` (examples, ...) it has in its loss; and, where targets
        are class labels, ``answer`` (examples,) and ``correct`` (examples,) bool. An
        example of outputs in several tensors is all of them in a row. Where outputs are left out,
        ``nans`` (examples,) is how many of them are NaN. Where a gain suits them, ``scaled_loss``
        (examples, gains) float64 is the loss at each of `quantifind.utils.gains`.
    classes: "softmax" where outputs (examples, classes, ...) are logits of classes, "sigmoid" where
        each is one of its own, else None.
    gain: what suits the outputs, where that has been fitted.
    """

    parts: list[dict[str, Tensor]]
    classes: str | None = None
    gain: float | None = None

    def __getitem__(self, name: str) -> Tensor:
        """All examples' values."""
        if len(self.parts) == 1:
            return self.parts[0][name]
        return torch.cat([part[name] for part in self.parts])

    def __contains__(self, name: str) -> bool:
        return all(name in part for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part["loss"]) for part in self.parts)

    @cached_property
    def _ends(self) -> list[int]:
        """Of each part, how many examples there are up to its end."""
        return list(itertools.accumulate(len(part["loss"]) for part in self.parts))

    def span(self, first: int, last: int) -> "Outcome":
        """That of some of the examples."""
        parts = []
        for number in range(bisect_right(self._ends, first), len(self.parts)):
            part = self.parts[number]
            start = self._ends[number] - len(part["loss"])
            if start >= last:
                break
            low, high = max(first - start, 0), min(last - start, len(part["loss"]))
            parts.append({name: values[low:high] for name, values in part.items()})
        return replace(self, parts=parts)

    def calibrated(self) -> "Outcome":
        """That with the gain with which the mean loss is least, where one suits the outputs."""
        if "scaled_loss" not in self:
            return self
        losses = self["scaled_loss"].numpy()
        return replace(self, gain=gains_of(losses).suiting(losses))

    @property
    def nans(self) -> int:
        """How many of the outputs are NaN."""
        return sum(
            int((part["outputs"].isnan() if "outputs" in part else part["nans"]).sum())
            for part in self.parts
        )

    @property
    def criterion(self) -> float:
        """The mean loss, by weight."""
        weight = torch.cat([by_example(part["weight"]) for part in self.parts])
        return (self["loss"].sum() / weight.sum()).item()

    @property
    def calibrated_criterion(self) -> float:
        """The mean loss with the gain that suits the outputs, or without, where there is none."""
        if self.gain is None:
            return self.criterion
        losses = self["scaled_loss"].numpy()
        weight = torch.cat([by_example(part["weight"]) for part in self.parts])
        return float(gains_of(losses).at(losses, self.gain).sum() / weight.sum().item())

    @property
    def accuracy(self) -> float:
        """The share of right answers, less what is ignored."""
        judged = torch.cat([by_example(part["weight"]) for part in self.parts]) > 0
        return self["correct"][judged].double().mean().item()


def outcome(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: Criterion | None,
    forward: Forward | None = None,
    *,
    most: float = math.inf,
) -> Outcome:
    """What ``model`` makes of a loader's examples, in eval mode, on the model's device.

    forward: as `quantifind.utils.batches.batches_of` takes it.
    most: bytes of outputs in all; where they are more, they are left out.
    Raises: ValueError for a loader without examples, and as `quantifind.utils.criteria.settled`.
    """
    with evaluating(model):
        batches = batches_of(loader, model, criterion, forward)
        made: Iterable[Any] = (batch.run(model) for batch in batches)
        criterion, made = settled(criterion, made, lambda one: one, literal=forward is not None)
        return gathered((judged(criterion, *one) for one in made), most)


def gathered(batches: Iterable[Outcome], most: float = math.inf) -> Outcome:
    """The outcome of several batches' examples.

    most: bytes of outputs in all; where they are more, they are left out.
    """
    alike: list[list[dict[str, Tensor]]] = []
    kinds: set[str | None] = set()
    held = waiting = 0
    for batch in batches:
        kinds.add(batch.classes)
        size = sum(part["outputs"].nbytes for part in batch.parts if "outputs" in part)
        if held <= most < held + size:
            for part in itertools.chain.from_iterable(alike):
                _leave_out(part)
        held, waiting = held + size, waiting + size
        for part in batch.parts:
            if held > most:
                _leave_out(part)
            if not alike or _shapes(alike[-1][0]) != _shapes(part):
                alike.append([])
            alike[-1].append(part)
        if waiting > WAITING:
            alike, waiting = [_fetched(same) for same in alike], 0
    if not alike:
        raise ValueError("the loader has no examples")
    # the copies wait once, in the end: test_no_batch_waits_for_the_device
    parts = [_whole(_fetched(same)) for same in alike]
    return Outcome(parts, kinds.pop() if len(kinds) == 1 else None)


def _leave_out(part: dict[str, Tensor]) -> None:
    outputs = part.pop("outputs", None)
    if outputs is not None:
        part["nans"] = outputs.isnan().reshape(len(outputs), -1).sum(1)


def _fetched(same: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The parts on the CPU, which come first, and those on a device as one more of them."""
    here = [part for part in same if part["loss"].device.type == "cpu"]
    there = same[len(here) :]
    return [*here, _whole(there)] if there else here


def _whole(same: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in same]).cpu() for name in same[0]}


def _shapes(part: Mapping[str, Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name, values.shape[1:]) for name, values in part.items()]


def judged(criterion: Criterion | None, outputs: Any, *given: Any) -> Outcome:
    """The outcome of a batch that has these outputs.

    criterion: None where there is nothing but the outputs: their loss is NaN.
    """
    outputs, targets = aligned(criterion, outputs, given)
    loss, weight, shares = weighted(criterion, outputs, *targets)
    values = values_of(criterion, outputs)
    part = {"outputs": values, "loss": loss.double(), "weight": weight}
    part |= {} if shares is weight else {"share": shares}
    gains = _gains(criterion)
    if gains is not None and isinstance(outputs, Tensor):
        # in float64, in which squares of nearly equal numbers differ
        exact = outputs.double() if isinstance(criterion, SQUARES) else outputs
        part["scaled_loss"] = _scaled(criterion, exact, targets, gains.tried).double()
    classes, labels = None, targets[0] if len(targets) == 1 else None
    if isinstance(labels, Tensor) and isinstance(outputs, Tensor):
        classes = classes_of(criterion, outputs, labels)
        if classes == "softmax" and labels.dim() == 1 and not labels.is_floating_point():
            # NaN is no answer: test_an_output_that_is_no_number_is_a_wrong_answer
            part["answer"] = values.argmax(1).where(~values.isnan().any(1), -1)
            part["correct"] = part["answer"] == labels
        cut = {nn.BCEWithLogitsLoss: 0.0, nn.BCELoss: 0.5}.get(type(criterion))
        single = cut is not None and values.numel() == len(values)
        # as classes, not as shares: test_one_logit_has_two_classes
        if cut is not None and single and ((labels == 0) | (labels == 1)).all():
            part["answer"] = (values > cut).long().where(~values.isnan(), -1).flatten()
            part["correct"] = part["answer"] == (labels > 0.5).flatten()
    return Outcome([part], classes)


def _scaled(criterion: Any, outputs: Tensor, targets: Any, gains: Sequence[float]) -> Tensor:
    """The losses, (examples, gains), of outputs multiplied by each gain."""
    if type(criterion) is nn.CrossEntropyLoss and outputs.numel() <= SMALL:
        many = torch.cat([outputs * gain for gain in gains])
        labels = torch.cat([targets[0]] * len(gains))
        return weighted(criterion, many, labels)[0].reshape(len(gains), -1).T.contiguous()
    tried = [weighted(criterion, outputs * gain, *targets)[0] for gain in gains]
    return torch.stack(tried, 1)


def _gains(criterion: Any) -> Gains | None:
    if isinstance(criterion, LOGITS):
        return OF_LOGITS
    return OF_SQUARES if isinstance(criterion, SQUARES) else None


def is_classification(measured: Outcome) -> bool:
    """Whether an outcome has right and wrong answers."""
    return "correct" in measured


def paired(quantized: Outcome, original: Outcome) -> dict[str, np.ndarray]:
    """Two outcomes on the same examples as columns, (examples,) each.

    Returns: ``loss`` and ``original_loss``; ``weight``; ``squared_error`` ‖f_b − f‖² and
    ``squared_norm`` ‖f‖² of an example's outputs; for a classifier ``correct``,
    ``original_correct`` and ``flipped``, whether its answer is another one; where the original has
    a gain, ``scaled_loss`` (examples, gains) and ``original_calibrated_loss``.
    """
    columns = columns_of(compared(quantized, original))
    del columns["divergence"]
    return columns


def compared(quantized: Outcome, original: Outcome) -> Outcome:
    """An outcome beside the original's on the same examples, without outputs: the columns of
    `paired`, and ``divergence`` (`quantifind.utils.divergences.divergences`), where the quantized
    network's outcome is."""
    parts = []
    for part, other in zip(quantized.parts, original.parts, strict=True):
        there = part["loss"].device
        wanted = {name: values.to(there, non_blocking=True) for name, values in other.items()}
        found = {
            "loss": part["loss"],
            "original_loss": wanted["loss"],
            "weight": by_example(wanted["weight"]),
        }
        if original.gain is not None and "scaled_loss" in part:
            weights = gains_of(wanted["scaled_loss"]).weights(original.gain)
            calibrated = wanted["scaled_loss"] @ torch.from_numpy(weights).to(there)
            found |= {"scaled_loss": part["scaled_loss"], "original_calibrated_loss": calibrated}
        row = math.prod(part["outputs"].shape[1:])
        step = max(1, COMPARED // max(1, row))
        pieces = [
            _apart(
                part["outputs"][first : first + step],
                wanted["outputs"][first : first + step],
                wanted.get("share", wanted["weight"])[first : first + step],
                original,
            )
            for first in range(0, max(1, len(part["outputs"])), step)
        ]
        names = ("squared_error", "squared_norm", "divergence")
        found |= dict(zip(names, map(torch.cat, zip(*pieces, strict=True)), strict=True))
        if "correct" in part and "correct" in wanted:
            found |= {"correct": part["correct"], "original_correct": wanted["correct"]}
            found["flipped"] = (part["answer"] != wanted["answer"]) | (part["answer"] < 0)
        parts.append(found)
    return Outcome(parts, original.classes)


def columns_of(reduced: Outcome) -> dict[str, np.ndarray]:
    """The columns, (examples,) each, of what is `compared`."""
    names = [name for name in reduced.parts[0] if all(name in part for part in reduced.parts)]
    return {name: reduced[name].cpu().numpy() for name in names}


def _apart(
    outputs: Tensor, wanted: Tensor, shares: Tensor, original: Outcome
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors, squared norms and divergences of examples, (examples,) float64 each."""
    apart = divergences(outputs, wanted, shares, original.classes, original.gain or 1.0)
    outputs, wanted = outputs.double(), wanted.double()
    norms = torch.where(wanted.isinf(), 0.0, wanted).reshape(len(wanted), -1).square().sum(1)
    return squares(outputs, wanted).reshape(len(outputs), -1).sum(1), norms, apart


def weight_error(values: Tensor, quantized: Tensor) -> dict[str, float]:
    """``sqnr_db`` 10·log10(Σx² / Σ(x − q)²), infinite without noise; ``mean_squared_error``;
    ``largest_error``."""
    noise = values.double() - quantized.double()
    signal_power, noise_power = values.double().square().sum(), noise.square().sum()
    sqnr_db = 10 * torch.log10(signal_power / noise_power) if noise_power else math.inf
    return {
        "sqnr_db": float(sqnr_db),
        "mean_squared_error": noise.square().mean().item(),
        "largest_error": noise.abs().max().item(),
    }
