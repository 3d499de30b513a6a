"""A criterion of single examples: their losses, and what each counts in a mean."""

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.utils.batches import rows_of, tensors_of, with_tensors
from quantifind.utils.forwards import is_torchs
from quantifind.utils.torch_losses import as_module

# of one example or several: (outputs, targets, …) → a number, or one for each example
Criterion = Callable[..., Tensor]
# whose mean is over the weights of the classes, less what is ignored
BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss)
# whose outputs are logits of two classes each
BY_LOGIT = (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)
# which compare each output with its target
ELEMENTWISE = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, *BY_LOGIT),
    *(nn.PoissonNLLLoss, nn.KLDivLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
)
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
    if not outputs.dim() and labels.numel() == 1 and labels.dim():
        # of one example, by `squeeze()`: test_a_last_batch_of_one_that_is_squeezed
        outputs = outputs.reshape(labels.shape)
    same = labels.numel() == outputs.numel() and rows_of([labels, outputs]) is not None
    if same and isinstance(criterion, (*BY_LOGIT, nn.BCELoss)):
        return outputs, (labels.reshape(outputs.shape).to(outputs.dtype),)
    if isinstance(criterion, BY_CLASS):
        axes = class_axes(outputs, targets)
        if axes == {-1} or (-1 in axes and getattr(criterion, "classes_last", False)):
            return outputs.movedim(-1, 1), tuple(targets)
    return outputs, tuple(targets)


def class_axes(outputs: Any, targets: Sequence[Any]) -> set[int]:
    """Which axis of outputs at several positions, 1 or -1, may have the classes of the labels: both
    where there are as many positions as classes; none where targets are no such labels."""
    if len(targets) != 1 or not isinstance(outputs, Tensor) or not isinstance(targets[0], Tensor):
        return set()
    labels: Tensor = targets[0]
    if outputs.dim() < 3 or labels.is_floating_point():
        return set()
    places = {1: outputs.shape[:1] + outputs.shape[2:], -1: outputs.shape[:-1]}
    return {axis for axis, shape in places.items() if labels.shape == shape}


def settled(
    criterion: Any, given: Iterable[Any], look: Callable[[Any], Sequence[Any]], *, literal: bool
) -> tuple[Any, Iterator[Any]]:
    """A criterion, a function of torch's as its module; one of classes knows which axis has them
    where a batch doesn't tell: as in the first batch that does (test_as_many_positions_as_classes).

    given: batches, of which no more are taken than it needs.
    look: batch → outputs and targets.
    literal: whether the criterion is given what it is to judge as it is, if none tells.
    Returns: the criterion, and all of ``given``.
    Raises: CriterionError if none tells.
    """
    criterion, given, seen = as_module(criterion), iter(given), []
    if isinstance(criterion, BY_CLASS) and not hasattr(criterion, "classes_last"):
        for batch in given:
            seen.append(batch)
            outputs, *targets = look(batch)
            axes = class_axes(outputs, targets)
            criterion = told(criterion, axes)
            if len(axes) < 2:
                break
        else:
            if seen and literal:
                criterion = told(criterion, {1})
            elif seen:
                raise CriterionError(
                    f"outputs of {list(outputs.shape)} and labels of {list(targets[0].shape)} have "
                    "their classes in the second axis or in the last: say so by forward=lambda "
                    "model, batch: (outputs with the classes second, labels)"
                )
    return criterion, itertools.chain(seen, given)


def told(criterion: Any, axes: set[int]) -> Any:
    """A criterion of classes that knows their axis, where this is the only one."""
    if len(axes) != 1:
        return criterion
    criterion = copy.copy(criterion)
    criterion.classes_last = axes == {-1}
    return criterion


def losses(criterion: Criterion | None, outputs: Any, *targets: Any) -> Tensor:
    """The loss of each example, (examples,), as `weighted` has it."""
    outputs, targets = aligned(criterion, outputs, targets)
    return weighted(criterion, outputs, *targets)[0]


def weighted(
    criterion: Criterion | None, outputs: Any, *targets: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each example, (examples,), and what it, or each of its positions, (examples, …),
    counts: the mean is the sum of the losses over the sum of all that counts. And the share that
    an example, or each of its positions, has in its loss, which is what counts but for a sum.

    Where a criterion is the mean over labels, each counts by its weight, and not at all if it is
    ignored, so that padding adds nothing (test_padding_further_changes_nothing). A criterion with a
    ``reduction`` of 'mean' or 'sum' is asked for its unreduced values; one that gives a value for
    each example is taken at its word; any other is called on one example at a time.

    outputs, targets: as `aligned` gives them.
    Raises: CriterionError for labels that outputs have no class for, for shapes that torch would
        broadcast, and for a criterion that is neither the mean nor the sum of its examples'.
    """
    count = _count(criterion, outputs)
    ones = torch.ones(count, device=tensors_of(outputs)[0].device)
    if criterion is None:
        return torch.full_like(ones, math.nan), ones, ones
    _check_shapes(criterion, outputs, targets)
    labels = targets[0] if targets else None
    if (
        isinstance(criterion, BY_CLASS)
        and isinstance(outputs, Tensor)
        and isinstance(labels, Tensor)
    ):
        return _by_class(criterion, outputs, labels)
    values = _values(criterion, outputs, targets)
    if not values.dim() or len(values) != count:
        loss, counts = _one_at_a_time(criterion, outputs, targets, values)
        return loss, counts, counts
    loss, counts, shares = _by_example(criterion, values, targets)
    if hasattr(criterion, "reduction") and not is_torchs(criterion):
        _check_whole(criterion, outputs, targets, loss, counts)
    return loss, counts, shares


def _values(criterion: Any, outputs: Any, targets: Sequence[Any]) -> Tensor:
    """What a criterion gives, unreduced where it knows how."""
    if getattr(criterion, "reduction", None) not in ("mean", "sum"):
        return criterion(outputs, *targets)
    unreduced = copy.copy(criterion)
    unreduced.reduction = "none"
    values = unreduced(outputs, *targets)
    if isinstance(criterion, nn.CTCLoss) and criterion.reduction == "mean":
        values = values / targets[-1].to(values).clamp(min=1)
    return values


def _by_example(
    criterion: Any, values: Tensor, targets: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of values of examples or of their positions; labels are ignored only by what says so."""
    kept = None if ignored_label(criterion) is None else _kept(criterion, targets, len(values))
    summed = getattr(criterion, "reduction", None) == "sum"
    if kept is not None and kept.dim() > 1 and values.shape == kept.shape:
        loss = torch.where(kept, values, 0.0).flatten(1).sum(1)
        return loss, _some(kept) if summed else kept.float(), kept.float()
    counts = torch.ones(len(values), device=values.device)
    if kept is not None:
        counts = _some(kept)
    values = values.reshape(len(values), -1)
    loss = values.sum(1) if summed else values.mean(1)
    shares = counts * values.shape[1] if summed else counts
    return torch.where(counts > 0, loss, 0.0), counts, shares


def _some(kept: Tensor) -> Tensor:
    """1 for each example, (examples,), of which something is kept."""
    return kept.reshape(len(kept), -1).any(1).float()


def _by_class(criterion: Any, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one of `BY_CLASS`."""
    shares = torch.ones(len(outputs), *outputs.shape[2:], device=outputs.device)
    if not labels.is_floating_point():  # else they are shares of classes
        kept = labels != criterion.ignore_index
        classes = outputs.shape[1] if outputs.dim() == labels.dim() + 1 else 0
        wrong = labels[kept & ((labels < 0) | (labels >= classes))] if classes else labels[:0]
        if len(wrong):
            raise CriterionError(
                f"{len(wrong)} labels are out of range, such as {wrong[0].item()}: "
                f"the network has outputs for 0 to {classes - 1}"
            )
        shares = kept.float()
        if criterion.weight is not None:
            # what is ignored is no class: test_any_label_may_be_the_ignored_one
            shares = shares * criterion.weight[labels.where(kept, 0)]
    loss = _values(criterion, outputs, [labels]).reshape(len(outputs), -1).sum(1)
    return loss, _some(shares > 0) if criterion.reduction == "sum" else shares, shares


def _one_at_a_time(
    criterion: Any, outputs: Any, targets: Sequence[Any], whole: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a criterion that gives one number, ``whole`` of all of them."""
    count, everything = _count(criterion, outputs), (outputs, *targets)
    ones = [
        with_tensors(lambda t, i=i: t[i : i + 1] if rows_of(t) == count else t, everything)
        for i in range(count)
    ]
    found = torch.stack([criterion(*one).reshape(()) for one in ones])
    kept = _kept(criterion, targets, count)
    counts = torch.ones_like(found) if kept is None else kept.to(found)
    share = by_example(counts).to(found)
    loss = torch.where(share > 0, found * share, 0.0)
    if whole.dim() or not whole.isfinite() or _is_mean(whole, loss, share):
        return loss, counts
    if kept is None or kept.dim() == 1:
        # numbers, of which one happens to be -100: test_whole_numbers_are_not_ignored
        if _is_mean(whole, found, torch.ones_like(found)):
            return found, torch.ones_like(found)
        if _is_mean(whole, loss, loss.new_ones(1)):
            return loss, counts
    raise _of_a_batch(criterion, whole, loss, share)


def ignored_label(criterion: Any) -> int | None:
    """The label that a criterion, or the one inside it, ignores; None where it says none."""
    if isinstance(criterion, functools.partial):
        return criterion.keywords.get("ignore_index", ignored_label(criterion.func))
    modules = criterion.modules() if isinstance(criterion, nn.Module) else [criterion]
    said = {getattr(module, "ignore_index", None) for module in modules}
    found = [label for label in said if isinstance(label, int)]
    return found[0] if len(found) == 1 else None


def _kept(criterion: Any, targets: Sequence[Any], count: int) -> Tensor | None:
    """Which of an example's labels are not ignored, (examples, …); None where it has none."""
    labels, ignored = targets[0] if targets else None, ignored_label(criterion)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or rows_of(labels) != count:
        return None
    return labels != (IGNORED if ignored is None else ignored)


def _is_mean(whole: Tensor, loss: Tensor, share: Tensor) -> bool:
    """Whether a criterion of a batch is the mean of its examples' losses."""
    loss, total = loss.detach().double(), share.double().sum()
    if not total:
        return True
    # of what is added up, in the type that it was added up in
    most = max(1e-3, 4 * torch.finfo(whole.dtype).eps) * loss.abs().sum() / total + 1e-6
    return bool((whole.detach() - loss.sum() / total).abs() <= most)


def _of_a_batch(criterion: Any, whole: Tensor, loss: Tensor, share: Tensor) -> CriterionError:
    found = loss.double().sum() / share.double().sum()
    return CriterionError(
        f"{name_of(criterion)} is {whole.item():.6g} for a batch, and {found.item():.6g} in the "
        "mean of its examples: it exists for a whole batch only; one that gives a loss "
        "for each example, of shape (examples,), would do"
    )


def _check_shapes(criterion: Any, outputs: Any, targets: Sequence[Any]) -> None:
    """Raise CriterionError where torch would compare each output with each target."""
    if isinstance(criterion, ELEMENTWISE) and isinstance(outputs, Tensor) and len(targets) == 1:
        given, wanted = list(outputs.shape), list(targets[0].shape)
        if given != wanted:
            raise CriterionError(
                f"{name_of(criterion)} takes outputs and targets of one shape, not {given} and "
                f"{wanted}: make them so by forward=lambda model, batch: (outputs, targets)"
            )


def check_criterion(criterion: Criterion | None, outputs: Any, *targets: Any) -> None:
    """Raise CriterionError unless a criterion of a batch is the mean, or the sum, of its
    examples'."""
    outputs, targets = aligned(criterion, outputs, targets)
    if criterion is not None and _count(criterion, outputs) > 1:
        loss, counts, _ = weighted(criterion, outputs, *targets)
        _check_whole(criterion, outputs, targets, loss, counts)


def _check_whole(
    criterion: Any, outputs: Any, targets: Sequence[Any], loss: Tensor, counts: Tensor
) -> None:
    whole, share = criterion(outputs, *targets), by_example(counts)
    if whole.dim() or not whole.isfinite():
        return
    if not _is_mean(whole, loss, share) and not _is_mean(whole, loss, share.new_ones(1)):
        raise _of_a_batch(criterion, whole, loss, share)


def name_of(criterion: Any) -> str:
    """A criterion in an error, in one line."""
    while isinstance(criterion, functools.partial):
        criterion = criterion.func
    name = getattr(criterion, "__name__", type(criterion).__name__)
    options = name
    if is_torchs(criterion) and isinstance(criterion, nn.Module):
        options = " ".join(str(criterion).split())
    return f"the criterion {options}"


def _count(criterion: Any, outputs: Any) -> int:
    tensors = tensors_of(outputs)
    if not tensors:
        raise CriterionError(
            f"the network gives a {type(outputs).__name__}, which has no tensor: "
            "say what the criterion gets by forward=lambda model, batch: (outputs, targets)"
        )
    if not tensors[0].dim():
        raise CriterionError(
            "the network gives a single number: outputs with a row for each example are needed; "
            "forward=lambda model, batch: (outputs, targets) says what they are"
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
    """What each example counts, (examples,), of what its positions do."""
    return weight.double().flatten(1).sum(1) if weight.dim() > 1 else weight.double()
