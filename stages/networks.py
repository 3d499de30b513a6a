"""Networks made by their names; prepared data as loaders, and trained networks, as files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from quantifind.storage.states import load_plain, load_state, pack_state, unpack_state
from quantifind.utils import plugins
from stages import files
from stages.splits import read_split


class Context(NamedTuple):
    """What a network's module makes.

    net: the model.
    criterion: what its outputs are judged by.
    optimizer: of its parameters; None where the module gives none.
    forward: the module's own function ``forward(model, batch)``; None where it has none.
    options: what it was made with.
    """

    net: nn.Module
    criterion: nn.Module
    optimizer: Optimizer | None
    forward: Callable[..., Any] | None
    options: dict[str, Any]


def read_loader(split: str, *, batch_size: int, seed: int = 0) -> DataLoader:
    """A prepared split.

    split: one of `stages.files.SPLITS`; "train" is shuffled.
    batch_size: in examples.
    seed: of the shuffling.
    Raises: ValueError naming a file that is not whole; OSError where it can't be read.
    """
    path = files.DATA / f"{split}.safetensors"
    return read_split(path, batch_size=batch_size, shuffle=split == "train", seed=seed)


def write_network(net: nn.Module, network: str, options: Mapping[str, Any]) -> None:
    """Write a network's state, and what makes the network that it belongs to.

    net: the trained network.
    network: the module that made it.
    options: what that was given.
    Raises: ValueError naming a module whose extra state is not of plain values.
    """
    tensors, sparse, others = pack_state(net.state_dict())
    files.write_tensors(files.WEIGHTS, tensors)
    files.EXTRA.unlink(missing_ok=True)
    if others:
        files.write(files.EXTRA, lambda path: torch.save(others, path))
    made_by = {"network": network, "options": dict(options), "sparse": sparse}
    files.write_json(files.NETWORK, made_by)


def read_network() -> Context:
    """The trained network, in eval mode, with what its module makes beside it.

    Raises: ValueError naming the file that is not whole, or the tensors that another architecture
    has; OSError where a file can't be read.
    """
    made_by = files.read_json(files.NETWORK)
    made = create_network(made_by["network"], made_by["options"], {})
    others = _read_others(files.EXTRA) if files.EXTRA.exists() else {}
    tensors = files.read_tensors(files.WEIGHTS)
    state = unpack_state(tensors, made_by["sparse"], others)
    load_state(made.net, state, files.WEIGHTS)
    made.net.eval()
    return made


def _read_others(path: Path) -> dict[str, Any]:
    try:
        return load_plain(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: truncated or altered; run dvc repro --force") from error


def create_network(network: str, options: Mapping[str, Any], offered: Mapping[str, Any]) -> Context:
    """A network's model, criterion and optimizer, and the options they were made with.

    network: a module of `quantifind.models`, anyone's by its dotted path, or the path of a file.
    options: what the user set.
    offered: what is known of the data; the network takes of it what it has a parameter for.
    Raises: ValueError for an unknown network or option, and for options it can't be made with.
    """
    create_model_context = plugins.load("models", network, "create_model_context")
    arguments = plugins.arguments(create_model_context, options, offered)
    try:
        made = create_model_context(**arguments)
    except Exception as error:
        reason = plugins.reason(error)
        raise ValueError(f"{network} can't be made with options {arguments}: {reason}") from error
    if (
        not (isinstance(made, tuple) and len(made) in (2, 3))
        or not isinstance(made[0], nn.Module)
        or not callable(made[1])
        or not (len(made) == 2 or made[2] is None or isinstance(made[2], Optimizer))
    ):
        kinds = [type(part).__name__ for part in (made if isinstance(made, tuple) else [made])]
        raise ValueError(
            f"{network}: create_model_context() gives {', '.join(kinds)}: model, criterion and "
            "optimizer are needed, or the first two where weights are given"
        )
    forward = plugins.find("models", network, "forward")
    optimizer = made[2] if len(made) == 3 else None
    return Context(made[0], made[1], optimizer, forward, arguments)
