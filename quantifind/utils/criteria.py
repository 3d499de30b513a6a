"""A criterion of single examples: their losses, and what each counts in a mean."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.utils.batches import rows_of, tensors_of, with_tensors

# of one example or several: (outputs, targets, …) → a number, or one for each example
Criterion = Callable[..., Tensor]
# whose mean is over the weights of the classes, less what is ignored
BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss)
# whose outputs are logits of two classes each
BY_LOGIT = (nn.BCEWithLogitsLoss,)
# which compare each output with its target
ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, *BY_LOGIT)
# as torch's cross entropy has it, also where a criterion doesn't say
IGNORED = -100


class CriterionError(ValueError):
    """What a criterion is given, or the criterion, can't be."""


def aligned(criterion: Any, outputs: Any, targets: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Outputs and targets as one of torch's own criteria wants them: classes in the second axis,
    and labels of 0 and 1 as numbers, of the outputs' shape."""
    if len(targets) != 1 or not isinstance(outputs, Tensor) or not isinstance(targets[0], Tensor):
        return outputs, tuple(targets)
    labels: Tensor = targets[0]
    same = labels.numel() == outputs.numel() and len(labels) == len(outputs)
    if same and isinstance(criterion, nn.BCEWithLogitsLoss | nn.BCELoss):
        return outputs, (labels.reshape(outputs.shape).to(outputs.dtype),)
    if isinstance(criterion, BY_CLASS) and outputs.dim() > 2 and not labels.is_floating_point():
        wanted = outputs.shape[:1] + outputs.shape[2:]
        if labels.shape == outputs.shape[:-1] and labels.shape != wanted:
            return outputs.movedim(-1, 1), tuple(targets)
    return outputs, tuple(targets)


def losses(criterion: Criterion | None, outputs: Any, *targets: Any) -> Tensor:
    """The loss of each example, (examples,): a criterion's mean, or sum, within the example.

    A criterion with a ``reduction`` of 'mean' or 'sum' is asked for its unreduced values (weights
    it has for classes weigh an example's loss). One that gives a value for each example is taken at
    its word; any other is called on one example at a time.
    """
    outputs, targets = aligned(criterion, outputs, targets)
    count = _count(criterion, outputs)
    if criterion is None:
        return torch.full((count,), math.nan, device=tensors_of(outputs)[0].device)
    _check_shapes(criterion, outputs, targets)
    reduction = getattr(criterion, "reduction", None)
    if reduction in ("mean", "sum"):
        unreduced = copy.copy(criterion)
        unreduced.reduction = "none"  # type: ignore[attr-defined]
        values = unreduced(outputs, *targets)
        if isinstance(criterion, nn.CTCLoss) and reduction == "mean":
            values = values / targets[-1].to(values).clamp(min=1)
    else:
        values = criterion(outputs, *targets)
    if values.dim() and len(values) == count:
        values = values.reshape(count, -1)
        return values.sum(1) if reduction == "sum" else values.mean(1)
    everything = (outputs, *targets)
    ones = [
        with_tensors(lambda t, i=i: t[i : i + 1] if rows_of(t) == count else t, everything)
        for i in range(count)
    ]
    found = torch.stack([criterion(*one).reshape(()) for one in ones])
    share = by_example(weights(criterion, outputs, *targets)).to(found)
    return torch.where(share > 0, found * share, 0.0)


def _check_shapes(criterion: Any, outputs: Any, targets: Sequence[Any]) -> None:
    """Raise CriterionError where torch would compare each output with each target."""
    if isinstance(criterion, ELEMENTWISE) and isinstance(outputs, Tensor) and len(targets) == 1:
        given, wanted = list(outputs.shape), list(targets[0].shape)
        if given != wanted:
            raise CriterionError(
                f"{name_of(criterion)} takes outputs and targets of one shape, not {given} and "
                f"{wanted}: make them so by forward=lambda model, batch: (outputs, targets)"
            )


def weights(criterion: Criterion | None, outputs: Any, *targets: Any) -> Tensor:
    """What an example, (examples,), or each of its positions, (examples, ...), counts in a mean.

    It is 0 for labels that are ignored, and a label's weight where classes have weights and a mean
    is over them, as torch's are; else 1.

    Raises: ValueError for labels that outputs have no class for.
    """
    outputs, targets = aligned(criterion, outputs, targets)
    labels, count = targets[0] if targets else None, _count(criterion, outputs)
    device = tensors_of(outputs)[0].device
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() == 0:
        return torch.ones(count, device=device)
    if len(labels) != count:
        return torch.ones(count, device=device)
    kept = labels != getattr(criterion, "ignore_index", IGNORED)
    if not isinstance(criterion, BY_CLASS):
        return kept.float()
    classes = outputs.shape[1] if outputs.dim() == labels.dim() + 1 else 0
    wrong = labels[kept & ((labels < 0) | (labels >= classes))] if classes else labels[:0]
    if len(wrong):
        raise CriterionError(
            f"{len(wrong)} labels are out of range, such as {wrong[0].item()}: "
            f"the network has outputs for 0 to {classes - 1}"
        )
    found = kept.float()
    if criterion.reduction == "sum":
        return (found.reshape(count, -1).sum(1) > 0).float()
    if criterion.weight is not None:
        found = found * criterion.weight[labels.clamp(min=0)]
    return found


def check_criterion(criterion: Criterion | None, outputs: Any, *targets: Any) -> None:
    """Raise ValueError unless a criterion of a batch is the mean, or the sum, of its examples'."""
    count = _count(criterion, outputs)
    if criterion is None or count < 2:
        return
    outputs, targets = aligned(criterion, outputs, targets)
    single = losses(criterion, outputs, *targets).double()
    whole = criterion(outputs, *targets)
    if whole.dim():
        return
    share = by_example(weights(criterion, outputs, *targets)).to(single)
    found = [(single.sum() / share.sum()).item(), single.sum().item()]
    apart = [not math.isclose(whole.item(), f, rel_tol=1e-3, abs_tol=1e-6) for f in found]
    if all(apart) and math.isfinite(whole.item()):
        raise CriterionError(
            f"{name_of(criterion)} is {whole.item():.6g} for a batch, and {found[0]:.6g} in the "
            "mean of its examples: it exists for a whole batch only; one that gives a loss "
            "for each example, of shape (examples,), would do"
        )


def name_of(criterion: Any) -> str:
    """A criterion in an error."""
    return f"the criterion {getattr(criterion, '__name__', criterion)}"


def _count(criterion: Any, outputs: Any) -> int:
    tensors = tensors_of(outputs)
    if not tensors:
        raise CriterionError(
            f"the network gives a {type(outputs).__name__}, which has no tensor: "
            "say what the criterion gets by forward=lambda model, batch: (outputs, targets)"
        )
    return tensors[0].shape[1] if isinstance(criterion, nn.CTCLoss) else len(tensors[0])


def values_of(criterion: Any, outputs: Any) -> Tensor:
    """Outputs as (examples, ...)."""
    count, tensors = _count(criterion, outputs), tensors_of(outputs)
    if isinstance(criterion, nn.CTCLoss):  # (times, examples, classes)
        return tensors[0].movedim(1, 0)
    alike = [t for t in tensors if t.is_floating_point() and rows_of(t) == count]
    if not alike:
        kinds = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors)
        raise CriterionError(
            f"the network gives {kinds}: floats with a row for each example are needed"
        )
    if isinstance(outputs, Tensor):
        return outputs
    return torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in alike], 1)


def by_example(weight: Tensor) -> Tensor:
    """What each example counts, (examples,), of `weights`."""
    return weight.double().flatten(1).mean(1) if weight.dim() > 1 else weight.double()
