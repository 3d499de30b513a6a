"""Class labels, where the targets of a batch are such."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from quantifind.utils.criteria import IGNORED, aligned, class_axes

# as a criterion of classes has them
CLASSES = nn.CrossEntropyLoss()


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
