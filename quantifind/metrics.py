"""What quantization costs: loss per example, criterion ratio, accuracy and flips, weight error."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from quantifind.utils.devices import device_of, evaluating

# examples whose losses are computed at a time
SPAN = 1024
Criterion = Callable[[Tensor, Tensor], Tensor]


def outcome(model: nn.Module, loader: Iterable, criterion: Criterion) -> dict[str, Tensor]:
    """What ``model`` makes of a loader's examples, in eval mode, on the model's device.

    Returns, on the CPU: ``outputs`` (examples, ...), ``loss`` (examples,) float64 and, where
    targets are class labels, ``correct`` (examples,) bool.
    Raises: ValueError for a loader without examples.
    """
    device = device_of(model)
    parts: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for inputs, targets in loader:
            # the copies don't wait for the device: test_no_batch_waits_for_the_device
            targets = targets.to(device, non_blocking=True)
            parts.append((model(inputs.to(device, non_blocking=True)), targets))
        if not parts:
            raise ValueError("the loader has no examples")
        outputs, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        parts.clear()
        return outcome_of(outputs, targets, criterion)


def outcome_of(outputs: Tensor, targets: Tensor, criterion: Criterion) -> dict[str, Tensor]:
    """The `outcome` that has these outputs."""
    # in spans, whose unreduced values take less memory than the outputs
    spans = zip(outputs.split(SPAN), targets.split(SPAN), strict=True)
    loss = torch.cat([losses(criterion, *span).double() for span in spans]).cpu()
    outputs, targets = outputs.cpu(), targets.cpu()
    measured = {"outputs": outputs, "loss": loss}
    if targets.dim() == 1 and outputs.dim() == 2 and not targets.is_floating_point():
        measured["correct"] = outputs.argmax(1) == targets
    return measured


def is_classification(measured: Mapping[str, Tensor]) -> bool:
    """Whether an outcome has right and wrong answers."""
    return "correct" in measured


def losses(criterion: Criterion, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example, (examples,): a criterion's mean, or sum, within the example.

    A criterion with a ``reduction`` of 'mean' or 'sum' is asked for its unreduced values (weights
    it has for classes weigh an example's loss); any other is called on one example at a time.
    """
    reduction = getattr(criterion, "reduction", None)
    if reduction not in ("mean", "sum"):
        pairs = zip(outputs.split(1), targets.split(1), strict=True)
        return torch.stack([criterion(*pair).reshape(()) for pair in pairs])
    unreduced = copy.copy(criterion)
    unreduced.reduction = "none"  # type: ignore[attr-defined]
    values = unreduced(outputs, targets).reshape(len(targets), -1)  # (examples, elements)
    return values.mean(1) if reduction == "mean" else values.sum(1)


def paired(
    quantized: Mapping[str, Tensor], original: Mapping[str, Tensor]
) -> dict[str, np.ndarray]:
    """Two outcomes on the same examples as columns, (examples,) each.

    Returns: ``loss`` and ``original_loss``; ``squared_error`` ‖f_b − f‖² and ``squared_norm`` ‖f‖²
    of an example's outputs; for a classifier ``correct`` and ``original_correct``.
    """
    outputs, wanted = (o["outputs"].flatten(1).double() for o in (quantized, original))
    columns = {
        "loss": quantized["loss"],
        "original_loss": original["loss"],
        "squared_error": (outputs - wanted).square().sum(1),
        "squared_norm": wanted.square().sum(1),
    }
    if is_classification(quantized) and is_classification(original):
        columns["correct"] = quantized["correct"]
        columns["original_correct"] = original["correct"]
    return {name: column.numpy() for name, column in columns.items()}


def divergence(quantized: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> np.ndarray:
    """How much the loss of each example would increase if the original's outputs were the truth.

    Two outcomes, as `paired` takes them. Returns: (examples,) float64, the Kullback-Leibler
    divergence of the classes' probabilities from the original's (nats), or without classes the mean
    squared error of the outputs.
    """
    outputs, wanted = (o["outputs"].flatten(1).double() for o in (quantized, original))
    if is_classification(quantized) and is_classification(original):
        log_p, log_q = wanted.log_softmax(1), outputs.log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1).numpy()
    return (outputs - wanted).square().mean(1).numpy()


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
