"""How far outputs are from those of another network, with gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantifind.utils.criteria import BY_CLASS, BY_LOGIT


def classes_of(criterion: Any, outputs: Tensor, labels: Tensor) -> str | None:
    """ "softmax" where outputs (examples, classes, ...) are logits of classes, "sigmoid" where each
    is one of its own, else None.

    outputs, labels: as `quantifind.utils.criteria.aligned` gives them.
    """
    if isinstance(criterion, BY_LOGIT):
        return "sigmoid"
    if isinstance(criterion, nn.CrossEntropyLoss):
        return "softmax"
    whole = not labels.is_floating_point() and outputs.dim() == labels.dim() + 1
    first = whole and labels.shape == outputs.shape[:1] + outputs.shape[2:]
    last = whole and labels.shape == outputs.shape[:-1]
    # a criterion of one's own may have classes in either place: test_classes_in_doubt_are_none
    sure = isinstance(criterion, BY_CLASS) or outputs.dim() == 2 or not last
    return "softmax" if first and sure and outputs.shape[1] > 1 else None


def divergences(
    outputs: Tensor, wanted: Tensor, shares: Tensor, classes: str | None, gain: float = 1.0
) -> Tensor:
    """How much the loss of each example would increase if the original's outputs were the truth.

    That is the Kullback-Leibler divergence of the classes' probabilities from the original's
    (nats), by weight in the sum over positions; or without classes the mean squared error of the
    outputs.

    outputs, wanted: (examples, ...), the original's are wanted.
    shares: (examples, ...), of an example, or each of its positions, in its loss, as
        `quantifind.utils.criteria.weighted` has them.
    classes: as of `quantifind.metrics.Outcome`.
    gain: what logits are multiplied with.
    Returns: (examples,) float64.
    """
    outputs, wanted, shares = outputs.double(), wanted.double(), shares.double()
    if outputs.dim() == 1:
        outputs, wanted = outputs[:, None], wanted[:, None]
    if classes == "softmax":
        apart = _kl((gain * wanted).log_softmax(1), (gain * outputs).log_softmax(1)).sum(1)
    elif classes == "sigmoid":
        signs = (gain, -gain)
        yes, no = (_kl(F.logsigmoid(s * wanted), F.logsigmoid(s * outputs)) for s in signs)
        apart = yes + no
    else:
        apart = squares(outputs, wanted)
    if shares.dim() > 1:
        # positions that count by themselves are added up, as their losses are
        if apart.shape == (len(apart), *apart.shape[1:2], *shares.shape[1:]):
            apart = apart.movedim(1, -1)
        if apart.shape[: shares.dim()] != shares.shape:
            shares = shares.flatten(1).sum(1)
    apart = apart[..., None].flatten(shares.dim()).mean(-1)
    # what is ignored may be anything: test_what_is_ignored_is_not_in_a_divergence
    return torch.where(shares > 0, shares * apart, 0.0)[..., None].flatten(1).sum(1)


def squares(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The squared difference of each output."""
    # equal infinities, such as of masked classes, are no change
    return torch.where(outputs == wanted, 0.0, outputs - wanted).square()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0)
