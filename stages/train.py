"""Train: the selected network on the prepared data; goes on where a killed run stopped."""

import torch

from quantifind.workflow.train_workflow import train_network
from stages import files
from stages.params import Params


def main(params: Params) -> None:
    entry = params.entry
    train = files.read_loader("train", batch_size=entry.batch_size, seed=params.seed)
    val = files.read_loader("val", batch_size=entry.batch_size)
    torch.manual_seed(params.seed)
    net, criterion, optimizer, options = files.create_context(
        entry.network, entry.options, files.read_json(files.DESCRIPTION)
    )
    files.check_fit(net, criterion, val, params)
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
        files.write_network(net, entry.network, options)
        files.write_table(files.PLOTS / "history.csv", history)
        last = history.filter(like="val_").to_dict("records")[-1]
        files.write_json(files.METRICS / "training.json", last)


if __name__ == "__main__":
    files.run(main)
