"""Make a network by the name of its module, and see whether it takes its data."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from quantifind.metrics import outcome
from quantifind.utils import plugins


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
