"""How far outputs are from those of another network, with gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor


def divergences(
    outputs: Tensor, wanted: Tensor, weight: Tensor, classes: str | None, gain: float = 1.0
) -> Tensor:
    """How much the loss of each example would increase if the original's outputs were the truth.

    That is the Kullback-Leibler divergence of the classes' probabilities from the original's
    (nats), by weight in the sum over positions; or without classes the mean squared error of the
    outputs.

    outputs, wanted: (examples, ...), the original's are wanted.
    weight: (examples, ...), what an example, or each of its positions, counts.
    classes: as of `quantifind.metrics.Outcome`.
    gain: what logits are multiplied with.
    Returns: (examples,) float64.
    """
    outputs, wanted, weight = outputs.double(), wanted.double(), weight.double()
    if outputs.dim() == 1:
        outputs, wanted = outputs[:, None], wanted[:, None]
    if classes == "softmax":
        apart = _kl((gain * wanted).log_softmax(1), (gain * outputs).log_softmax(1)).sum(1)
        apart = weight.reshape(*weight.shape, *(1,) * (apart.dim() - weight.dim())) * apart
    elif classes == "sigmoid":
        signs = (gain, -gain)
        yes, no = (_kl(F.logsigmoid(s * wanted), F.logsigmoid(s * outputs)) for s in signs)
        apart = yes + no
    else:
        apart = squares(outputs, wanted)
    if apart.dim() > 1:
        # of positions that count by themselves, as their losses are
        summed = classes == "softmax" and weight.dim() > 1
        apart = apart.flatten(1).sum(1) if summed else apart.flatten(1).mean(1)
    return apart


def squares(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The squared difference of each output."""
    # equal infinities, such as of masked classes, are no change
    return torch.where(outputs == wanted, 0.0, outputs - wanted).square()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0)
