"""Train: the selected network on the prepared data; goes on where a killed run stopped."""

import torch

from quantifind.workflow.train_workflow import train_network
from stages import files, networks
from stages.networks import check_fit, create_network
from stages.params import Params


def main(params: Params) -> None:
    """Run the stage.

    params: all of params.yaml.
    Raises: ValueError for a user's mistake; OSError for a file that can't be read or written.
    """
    entry = params.entry
    train = networks.read_loader("train", batch_size=entry.batch_size, seed=params.seed)
    val = networks.read_loader("val", batch_size=entry.batch_size)
    torch.manual_seed(params.seed)
    net, criterion, optimizer, options = create_network(
        entry.network, entry.options, files.read_json(files.DESCRIPTION)
    )
    named = f"params.yaml: models.{params.model}: network {entry.network}"
    check_fit(net, criterion, val, fault=f"{named} does not fit data {entry.data}")
    with files.resumable(params) as checkpoints:
        history = train_network(
            net,
            criterion,
            optimizer,
            train,
            val,
            epochs=entry.epochs,
            decay=entry.decay,
            checkpoints=checkpoints,
        )
        networks.write_network(net, entry.network, options)
        files.write_table(files.PLOTS / "history.csv", history)
        last = history.filter(like="val_").to_dict("records")[-1]
        files.write_json(files.METRICS / "training.json", last)


if __name__ == "__main__":
    files.run(main)
