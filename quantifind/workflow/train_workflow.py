"""Train a network; save and load what training needs to go on."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from quantifind.metrics import is_classification, outcome
from quantifind.runtime.pooling import pooling_first
from quantifind.storage.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    random_state,
    replace_checkpoint,
    save_checkpoint,
    set_random_state,
)
from quantifind.storage.states import check_plain, check_same_architecture, load_state
from quantifind.utils.batches import Batch, Forward, batches_of
from quantifind.utils.console import progress
from quantifind.utils.criteria import aligned, settled
from quantifind.utils.devices import device_of, evaluating
from quantifind.utils.loaders import length_of

CHECK_EVERY = 50


def train_network(
    net: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    train_loader: DataLoader,
    val_loader: DataLoader,
    epochs: int = 8,
    *,
    decay: bool = False,
    checkpoints: Path | str | None = None,
    forward: Forward | None = None,
    told: Callable[[dict[str, float]], None] | None = None,
) -> pd.DataFrame:
    """Train ``net`` in place, on the device it is on, and leave it in eval mode.

    net: the network.
    criterion: gives the loss of a batch from outputs and targets.
    optimizer: of the network's parameters.
    train_loader: batches (inputs, targets) to learn from.
    val_loader: batches (inputs, targets) to judge each epoch on.
    epochs: 1 or more.
    decay: let the learning rate fall linearly, batch by batch, to zero at the end of the epochs;
        the optimizer then gets back the one it had.
    checkpoints: a folder; the state after the last whole epoch is kept there, and a call that
        finds one goes on from it, with the same random numbers, to the same result.
    forward: how the network takes a batch (`quantifind.utils.batches.batches_of`).
    told: gets each row of what is returned, as soon as it is known.
    Returns: a row per epoch: ``epoch``, ``train_loss`` (over the epoch, while the weights change),
    ``val_loss`` and, for a classifier, ``val_accuracy``; losses are means over examples.
    Raises: ValueError for epochs below 1, a loader without batches, checkpoints that are not this
    function's, naming a module whose extra state can't be kept in one, or the epoch and batch by
    which the loss stopped being finite.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, at least 1 is needed")
    length = length_of(train_loader)
    if length == 0:
        raise ValueError("the train loader has no batches")
    if checkpoints is not None:
        check_plain(net.state_dict())  # now, since it is written after a whole epoch
    history: list[dict[str, float]] = []
    if checkpoints is not None and latest_checkpoint(Path(checkpoints)) is not None:
        extra = load_train_context(checkpoints, net, optimizer)
        if "history" not in extra:
            raise ValueError(f"{checkpoints}: its checkpoint is not one of train_network()")
        history = extra["history"]
        set_random_state(extra["random_state"], train_loader)
    schedule, batches = None, epochs * length
    if decay:
        done = len(history) * length
        schedule = LambdaLR(optimizer, lambda batch: 1 - batch / batches, last_epoch=done - 1)
    with progress("training", total=batches) as step:
        step(steps=len(history) * length)
        _tell(told, history)
        for epoch in range(len(history) + 1, epochs + 1):
            row: dict[str, float] = {"epoch": epoch}
            with pooling_first(net):
                row["train_loss"] = _train_epoch(
                    net,
                    criterion,
                    optimizer,
                    schedule,
                    batches_of(train_loader, net, criterion, forward),
                    forward is not None,
                    length,
                    epoch,
                    step,
                )
            row |= validate(net, criterion, val_loader, forward)
            _check_finite(row["val_loss"], f"after epoch {epoch}, on validation data")
            history.append(row)
            _tell(told, [row])
            if checkpoints is not None:
                extra = {"history": history, "random_state": random_state(train_loader)}
                replace_checkpoint(checkpoints, _state(net, optimizer, extra))
    if decay:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
    net.eval()
    return pd.DataFrame(history)


def _tell(told: Callable[[dict[str, float]], None] | None, rows: list[dict[str, float]]) -> None:
    if told is not None:
        for row in rows:
            told(row)


def validate(
    net: nn.Module,
    criterion: nn.Module,
    val_loader: Iterable[Any],
    forward: Forward | None = None,
) -> dict[str, float]:
    """``val_loss``, the mean over examples, and for a classifier ``val_accuracy``.

    net: the network.
    criterion: as for `train_network`.
    val_loader, forward: likewise.
    Raises: ValueError for a loader without examples.
    """
    validation = outcome(net, val_loader, criterion, forward)
    row = {"val_loss": validation.criterion}
    if is_classification(validation):
        row["val_accuracy"] = validation.accuracy
    return row


def _train_epoch(
    net: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    schedule: LambdaLR | None,
    batches: Iterable[Batch],
    literal: bool,
    length: int,
    epoch: int,
    step: Callable[..., None],
) -> float:
    def look(batch: Batch) -> tuple[Any, ...]:
        with evaluating(net):
            return batch.clone().run(net)

    criterion, batches = settled(criterion, batches, look, literal=literal)
    net.train()
    total, examples = torch.zeros((), dtype=torch.float64, device=device_of(net)), 0
    for number, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        outputs, *given = batch.run(net)
        outputs, targets = aligned(criterion, outputs, given)
        loss = criterion(outputs, *targets)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        summed = getattr(criterion, "reduction", "mean") == "sum"
        total += loss.detach().double() * (1 if summed else len(batch))
        examples += len(batch)
        # reading a loss waits for the device, so not at every batch
        if number % CHECK_EVERY == 0 or number == length:
            mean = total.item() / examples
            _check_finite(mean, f"in epoch {epoch} by batch {number}")
            step(f"epoch {epoch} loss {mean:.4f}", steps=number % CHECK_EVERY or CHECK_EVERY)
    return total.item() / examples


def _check_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss became {loss} {where}: training diverged; give the optimizer a lower "
            "learning rate, or look for extreme values in the data"
        )


def save_train_context(
    directory: Path | str,
    net: nn.Module,
    optimizer: Optimizer,
    *,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Save a checkpoint after the ones already in ``directory``, making the folder if needed.

    The file gets its name when it is whole, so a kill leaves no half checkpoint.

    directory: of the checkpoints.
    net: whose weights to save.
    optimizer: whose state to save.
    extra: tensors, numbers, strings, lists and dicts, to come back from `load_train_context`.
    Returns: the path of the checkpoint.
    Raises: ValueError naming a module whose extra state is not of plain values.
    """
    return save_checkpoint(directory, _state(net, optimizer, extra or {}))


def _state(net: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> dict[str, Any]:
    state = net.state_dict()
    check_plain(state)
    return {"net": state, "optimizer": optimizer.state_dict(), "extra": extra}


def load_train_context(
    directory: Path | str, net: nn.Module, optimizer: Optimizer
) -> dict[str, Any]:
    """Load the most recent checkpoint of ``directory`` into ``net`` and ``optimizer``.

    Nothing in the file is executed (``weights_only``), and nothing is loaded unless all of it fits.

    directory: of the checkpoints.
    net: gets the weights.
    optimizer: gets the state.
    Returns: the ``extra`` that was saved with it.
    Raises: ValueError naming the folder without a checkpoint, the file that can't be read, or the
    tensors that another architecture has.
    """
    path = latest_checkpoint(Path(directory))
    if path is None:
        raise ValueError(f"{directory}: no checkpoint-*.pt in it")
    weights, optimizer_state, extra = load_checkpoint(path, ("net", "optimizer", "extra"))
    check_same_architecture(net, weights, path)
    try:
        optimizer.load_state_dict(optimizer_state)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: its optimizer is another one ({error})") from error
    load_state(net, weights, path)
    return extra
