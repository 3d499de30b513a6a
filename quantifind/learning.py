"""Quantization-aware training by distillation: codes, scales and tables learn to follow the float
network's outputs (arXiv:1308.3432; LSQ, arXiv:1902.08153; distillation, arXiv:1503.02531)."""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor, nn
from torch.optim import Optimizer

from quantifind.quantize import quantize
from quantifind.runtime.student import Student, class_labels
from quantifind.storage import artifact
from quantifind.storage.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    random_state,
    replace_checkpoint,
    set_random_state,
)
from quantifind.storage.store import fingerprint
from quantifind.strategy import Strategy
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch, Forward, batches_of, copied
from quantifind.utils.console import progress
from quantifind.utils.devices import evaluating
from quantifind.utils.loaders import length_of

LEARNING_RATE = 2e-4
CALIBRATION_BATCHES = 64
CHECK_EVERY = 50


def learn(
    model: nn.Module,
    strategy: Strategy | Quantized,
    loader: Iterable[Any],
    *,
    epochs: float,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
    temperature: float = 1.0,
    label_weight: float = 0.0,
    learning_rate: float | None = None,
    checkpoints: Path | str | None = None,
    seed: int = 0,
) -> Quantized:
    """Train the codes, scales and codebooks that a strategy begins with; ``model`` is intact.

    The outputs of the quantized network are held to those of ``model``: where targets are class
    labels, by the Kullback-Leibler divergence, else by the squared error. Where batches are
    (inputs, targets) with floating point inputs, half of each are blends of two examples (mixup,
    arXiv:1710.09412). Dropout is off,
    norms keep their statistics, activations their parameters, and what stays in float its values.

    strategy: to begin with; or what is already quantized.
    loader: training data, gone through again and again.
    epochs: the budget, over which the learning rate falls to zero along a cosine.
    calibration: as `quantifind.quantize.quantize` takes it; by default the loader's first batches.
    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    temperature: divides a classifier's float logits; above 1 it makes an overconfident network less
        so (Guo et al. 2017, arXiv:1706.04599).
    label_weight: the weight, beside the outputs' 1, of the loss to the targets themselves (cross
        entropy, or squared error), blended as the inputs are.
    learning_rate: of the codes at the start, by default `LEARNING_RATE`.
    checkpoints: a folder; the state after the last whole epoch is kept there, and a call that finds
        one goes on from it, to the same result. Data are not compared.
    seed: of the blends, and of the order of the examples unless the loader has a generator.
    Raises: ValueError for an option out of range, a loader without batches, checkpoints of other
        work, outputs that are not finite, and as `quantifind.quantize.quantize`.
    """
    learning_rate = LEARNING_RATE if learning_rate is None else learning_rate
    _check_number("label_weight", label_weight, zero=True)
    _check_number("epochs", epochs)
    _check_number("temperature", temperature)
    _check_number("learning_rate", learning_rate)
    batches = length_of(loader)
    if batches == 0:
        raise ValueError("the loader has no batches")
    given = artifact.pack(strategy) if isinstance(strategy, Quantized) else [strategy.choices]
    work = fingerprint(model, [epochs, temperature, label_weight, learning_rate, seed], *given)
    kept = _kept(checkpoints, work)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        began_with = random_state(loader) if kept is None else kept["began_with"]
        # the loader's first batches are drawn as they were: test_resuming_gives_the_same_codes
        set_random_state(began_with, loader)
        if calibration is None:
            calibration = [copied(batch) for batch in islice(loader, CALIBRATION_BATCHES)]
        start = quantize(model, strategy, calibration, forward=forward)
        student = Student(model, start, temperature, label_weight)
        optimizer = student.optimizer(learning_rate)
        done = 0  # batches
        if kept is not None:
            student.load(kept["student"])
            optimizer.load_state_dict(kept["optimizer"])
            done = kept["done"]
            set_random_state(kept["random_state"], loader)
        with progress("learning", total=math.ceil(epochs * batches)) as step:
            step(steps=done)
            while done / batches / epochs < 1:
                epoch = batches_of(loader, model, forward=forward)
                done = _epoch(student, optimizer, epoch, epochs * batches, done, step)
                if checkpoints is not None:
                    state = {
                        "work": work,
                        "student": student.state(),
                        "optimizer": optimizer.state_dict(),
                        "done": done,
                        "began_with": began_with,
                        "random_state": random_state(loader),
                    }
                    replace_checkpoint(checkpoints, state)
        return student.quantized()


def fit_temperature(
    model: nn.Module, loader: Iterable[Any], forward: Forward | None = None
) -> float:
    """The temperature of the logits with which their cross entropy on a loader's examples is least.

    It is above 1 where a classifier is overconfident (Guo et al. 2017, arXiv:1706.04599).

    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    Returns: 0.1 to 10; 1 where targets are not class labels.
    """
    logits, labels = [], []
    with evaluating(model):
        for batch in batches_of(loader, model, forward=forward):
            outputs, *targets = batch.run(model)
            known = class_labels(outputs, targets)
            if known is None:
                return 1.0
            logits.append(known[0].movedim(1, -1).flatten(0, -2).double().cpu())
            labels.append(known[1].flatten().cpu())
    everything, truth = torch.cat(logits), torch.cat(labels)

    def loss(logarithm: float) -> float:
        return F.cross_entropy(everything / math.exp(logarithm), truth).item()

    ends = (math.log(0.1), math.log(10))
    return math.exp(optimize.minimize_scalar(loss, bounds=ends, method="bounded").x)


def _check_number(name: str, value: Any, *, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf or (zero and value == 0)):
        least = "of 0 or more" if zero else "above 0"
        raise ValueError(f"{name} is {value!r}: a number {least} is needed")


def _kept(checkpoints: Path | str | None, work: str) -> dict[str, Any] | None:
    """The state of a learning that was killed, None where there is none."""
    path = None if checkpoints is None else latest_checkpoint(Path(checkpoints))
    if path is None:
        return None
    keys = ("work", "student", "optimizer", "done", "began_with", "random_state")
    state = dict(zip(keys, load_checkpoint(path, keys), strict=True))
    if state["work"] != work:
        raise ValueError(f"{path}: of another network, strategy or budget")
    return state


def _epoch(
    student: Student,
    optimizer: Optimizer,
    epoch: Iterable[Batch],
    total: float,
    done: int,
    step: Callable[..., None],
) -> int:
    """Train through the loader once, or until so many batches in all: how many are done."""
    loss, shown = torch.zeros(()), done
    for batch in epoch:
        share = done / total
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * (1 + math.cos(math.pi * share)) / 2
        loss = student.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        if done % CHECK_EVERY == 0:  # reading a loss waits for the device
            _check_finite(loss, done)
            step(f"distance {loss.item():.4g}", steps=done - shown)
            shown = done
    _check_finite(loss, done)
    return done


def _check_finite(loss: Tensor, batches: int) -> None:
    if not loss.isfinite():
        raise ValueError(f"the loss became {loss.item()} by batch {batches}")
