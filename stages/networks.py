"""Prepared data as loaders, and trained networks, as files between the stages."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from quantifind.storage.checkpoints import check_same_architecture
from quantifind.utils.loaders import Tensors, batch_loader
from quantifind.workflow.network_workflow import create_network
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
