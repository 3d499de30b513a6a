"""Networks made by their names; prepared data as loaders, and trained networks, as files."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from quantifind.metrics import outcome
from quantifind.storage.checkpoints import check_same_architecture
from quantifind.utils import plugins
from quantifind.utils.loaders import Tensors, batch_loader
from stages import files


def read_loader(split: str, *, batch_size: int, seed: int = 0) -> DataLoader:
    """A prepared split.

    split: one of `stages.files.SPLITS`; "train" is shuffled.
    batch_size: in examples.
    seed: of the shuffling.
    Raises: ValueError naming a file that is not whole; OSError where it can't be read.
    """
    tensors = files.read_tensors(files.DATA / f"{split}.safetensors")
    dataset = Tensors(tensors["inputs"], tensors["targets"])
    return batch_loader(dataset, batch_size=batch_size, shuffle=split == "train", seed=seed)


def write_network(net: nn.Module, network: str, options: Mapping[str, Any]) -> None:
    """Write the weights, and what makes the network they belong to.

    net: the trained network.
    network: the module that made it.
    options: what that was given.
    """
    weights = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    files.write_tensors(files.WEIGHTS, weights)
    files.write_json(files.NETWORK, {"network": network, "options": dict(options)})


def read_network() -> tuple[nn.Module, nn.Module]:
    """The trained network, in eval mode, and its criterion.

    Raises: ValueError naming the file that is not whole, or the tensors that another architecture
    has; OSError where a file can't be read.
    """
    made_by = files.read_json(files.NETWORK)
    net, criterion, *_ = create_network(made_by["network"], made_by["options"], {})
    weights = files.read_tensors(files.WEIGHTS)
    check_same_architecture(net, weights, files.WEIGHTS)
    net.load_state_dict(weights)
    return net.eval(), criterion


def create_network(
    network: str, options: Mapping[str, Any], offered: Mapping[str, Any]
) -> tuple[nn.Module, nn.Module, Optimizer, dict[str, Any]]:
    """A network's model, criterion and optimizer, and the options they were made with.

    network: a module of `quantifind.models`, or anyone's by its dotted path.
    options: what the user set.
    offered: what is known of the data; the network takes of it what it has a parameter for.
    Raises: ValueError for an unknown network or option, and for options it can't be made with.
    """
    create_model_context = plugins.load("models", network, "create_model_context")
    arguments = plugins.arguments(create_model_context, options, offered)
    try:
        return *create_model_context(**arguments), arguments
    except Exception as error:
        raise ValueError(f"{network} can't be made with options {arguments}: {error}") from error


def check_fit(net: nn.Module, criterion: nn.Module, loader: Iterable[Any], *, fault: str) -> None:
    """Run one batch through a network and its criterion.

    net: the network.
    criterion: what its outputs are judged by.
    loader: whose first batch is taken.
    fault: what an error says before its reason.
    Raises: ValueError where the network or its criterion does not take the batch.
    """
    try:
        outcome(net, [next(iter(loader))], criterion)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{fault}: {reason}") from error
