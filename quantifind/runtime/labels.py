"""Labels, or shares, of classes, where the targets of a batch are such."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from quantifind.utils.criteria import BY_CLASS, IGNORED, aligned, class_axes, ignored_label

# as a criterion of classes has them
CLASSES = nn.CrossEntropyLoss()
# by which targets are learned
LABELLED = (nn.CrossEntropyLoss, nn.MSELoss)


def class_labels(
    outputs: Any, targets: Sequence[Any], criterion: Any = CLASSES
) -> tuple[Tensor, Tensor] | None:
    """Outputs with classes in the second axis, and the labels; None where targets are others, and
    for as many positions as classes where the criterion doesn't know (`told`)."""
    if len(class_axes(outputs, targets)) > 1 and not hasattr(criterion, "classes_last"):
        return None
    outputs, targets = aligned(criterion, outputs, targets)
    if len(targets) != 1 or not isinstance(targets[0], Tensor) or not isinstance(outputs, Tensor):
        return None
    (labels,) = targets
    if labels.is_floating_point() or outputs.dim() != labels.dim() + 1 or outputs.shape[1] < 2:
        return None
    if labels.shape != outputs.shape[:1] + outputs.shape[2:]:
        return None
    return outputs, labels


def with_ignored(labels: Tensor, classes: int) -> Tensor:
    """The labels, `IGNORED` where there is no such class."""
    return labels.where((labels >= 0) & (labels < classes), IGNORED)


def are_shares(criterion: Any, outputs: Any, targets: Sequence[Any]) -> bool:
    """Whether targets are shares of the classes, as cross entropy takes them."""
    if not isinstance(criterion, nn.CrossEntropyLoss) or len(targets) != 1:
        return False
    (shares,) = targets
    tensors = isinstance(outputs, Tensor) and isinstance(shares, Tensor)
    return tensors and shares.is_floating_point() and shares.shape == outputs.shape


def to_learn(criterion: Any, targets: Tensor, classes: int) -> Tensor:
    """Shares as they are; labels `IGNORED` also where the criterion ignores them."""
    if targets.is_floating_point():
        return targets
    ignored = ignored_label(criterion)
    # its own class, if it is one, is not learned: test_any_label_may_be_ignored_in_learning
    targets = targets if ignored is None else targets.masked_fill(targets == ignored, IGNORED)
    return with_ignored(targets, classes)


def cross_entropies(criterion: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """That of each position, (examples, …), by the criterion's smoothing, and times the weight of
    its class: by no sum of weights, so that parts of a batch add up to it.

    targets: of `to_learn`.
    """
    weight = getattr(criterion, "weight", None) if isinstance(criterion, BY_CLASS) else None
    weight = None if weight is None else weight.to(outputs)
    smoothing = getattr(criterion, "label_smoothing", 0.0)
    return F.cross_entropy(
        outputs, targets, weight, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
    )


def facts_of(criterion: Any, *, labels: bool) -> dict[str, Any]:
    """What of a criterion has a say in what is learned; nothing of a plain one
    (test_what_a_plain_criterion_learned_is_found_again).

    labels: whether targets are followed, too.
    """
    found: dict[str, Any] = {}
    ignored = ignored_label(criterion)
    if ignored is not None and ignored >= 0:  # others are of no class
        found["ignored"] = ignored
    if labels and isinstance(criterion, nn.CrossEntropyLoss):
        if criterion.label_smoothing:
            found["smoothing"] = criterion.label_smoothing
        if criterion.weight is not None:
            found["weight"] = criterion.weight.tolist()
    return found
