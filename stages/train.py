"""Train: the selected network on the prepared data; goes on where a killed run stopped.

Where weights are given, they take the place of a training.
"""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch

from quantifind.metrics import outcome
from quantifind.storage.states import check_plain
from quantifind.utils import plugins
from quantifind.workflow.train_workflow import train_network, validate
from stages import files, networks
from stages.live import live
from stages.networks import create_network
from stages.params import Params
from stages.weights import load_weights

CURVES = ["train_loss", "val_loss"]
# the history of weights that were given
NO_EPOCH = pd.DataFrame(columns=["epoch", "train_loss", "val_loss"])


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    entry = params.entry
    train = networks.read_loader("train", batch_size=entry.batch_size, seed=params.seed)
    val = networks.read_loader("val", batch_size=entry.batch_size)
    torch.manual_seed(params.seed)
    made = create_network(entry.network, entry.options, files.read_json(files.DESCRIPTION))
    net, criterion = made.net, made.criterion
    named = f"{files.PARAMS}: models.{params.model}: network {entry.network}"
    check_fit(made, val, fault=f"{named} does not fit data {entry.data}")
    check_plain(net.state_dict())
    if entry.weights is not None:
        load_weights(net, entry.weights)
        measured = validate(net, criterion, val, made.forward)
        if not math.isfinite(measured["val_loss"]):
            what = f"with weights {entry.weights} the loss on validation data is"
            raise ValueError(f"{named}: {what} {measured['val_loss']}")
        with live(files.TRAINING, CURVES, step="epoch") as log:
            log(measured)
        write(made, entry.network, NO_EPOCH, measured)
        return
    if made.optimizer is None or entry.epochs is None:
        raise ValueError(f"{named} has no optimizer: it is trained, since no weights are given")
    with files.resumable(params) as checkpoints, live(files.TRAINING, CURVES, step="epoch") as log:
        history = train_network(
            net,
            criterion,
            made.optimizer,
            train,
            val,
            epochs=entry.epochs,
            decay=entry.decay,
            checkpoints=checkpoints,
            forward=made.forward,
            told=log,
        )
        last = history.filter(like="val_").to_dict("records")[-1]
        write(made, entry.network, history, last)


def write(
    made: networks.Context, network: str, history: pd.DataFrame, last: dict[Any, Any]
) -> None:
    """Write what the stage gives.

    made: whose network is trained.
    network: the module that made it.
    history: of the epochs; may be empty.
    last: what the network does on validation data.
    """
    networks.write_network(made.net, network, made.options)
    files.write_table(files.PLOTS / "history.csv", history)
    files.write_json(files.METRICS / "training.json", last)


def check_fit(made: networks.Context, loader: Iterable[Any], *, fault: str) -> None:
    """Run one batch through a network and its criterion.

    made: both.
    loader: whose first batch is taken.
    fault: what an error says before its reason.
    Raises: ValueError where the network or its criterion does not take the batch.
    """
    try:
        outcome(made.net, [next(iter(loader))], made.criterion, made.forward)
    except Exception as error:
        raise ValueError(f"{fault}: {plugins.reason(error)}") from error


if __name__ == "__main__":
    files.run(main)
