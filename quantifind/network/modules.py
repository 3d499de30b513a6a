"""A network's tensors by name, a plain copy of it, and one pass."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils.batches import BatchError, as_batch

# what a pass raises where the network's own code does
PASS_FAILS = (RuntimeError, LookupError, AssertionError, TypeError, AttributeError, ValueError)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are used in several places once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy without parametrizations, in which parameters that share memory are one.

    Parametrized tensors become the parameters that they stand for in eval mode.
    """
    replica = copy.deepcopy(model)
    first: dict[Any, nn.Parameter] = {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for name in names:
        # a copied Parameter has memory of its own: test_parameters_over_the_same_memory_are_one
        where, _, own = name.rpartition(".")
        memory = _memory(model.get_parameter(name))
        shared = first.setdefault(memory, replica.get_parameter(name))
        replica.get_submodule(where)._parameters[own] = shared
    modes = {module: module.training for module in replica.modules()}
    replica.eval()  # spectral_norm moves with each look at its weight in training
    for module in modes:
        if parametrize.is_parametrized(module):
            # a deep copy shares the class, from which removing takes the original's weight away
            # too: test_any_module_is_quantized
            kind = type(module)
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        for name, parts in list(getattr(module, "parametrizations", {}).items()):
            trained = [part.requires_grad for part in parts.parameters(recurse=False)]
            parametrize.remove_parametrizations(module, name)
            if trained:  # without gradients torch makes a buffer of a parameter of several parts
                value = module._buffers.pop(name, None)
                value = getattr(module, name) if value is None else value
                setattr(module, name, nn.Parameter(value.detach(), any(trained)))
    for module, mode in modes.items():
        module.training = mode
    return replica


def _memory(tensor: Tensor) -> Any:
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def is_parametrized(model: nn.Module) -> bool:
    """Whether any of its modules is."""
    return any(map(parametrize.is_parametrized, model.modules()))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, memory that is shared once, parametrized ones as they are used."""
    if is_parametrized(model):
        model = plain_copy(model)
    tensors: dict[Any, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        tensors.setdefault(_memory(parameter), (name, parameter.detach()))
    return dict(tensors.values())


def put_values(model: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Give a network's own tensors the values of quantized ones, in place."""
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor.dequantize())


def run(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    """One pass of a batch, which stays as it is: what the criterion gets of it.

    batch: a `quantifind.utils.batches.Batch`, or what its `DefaultForward` takes.
    Raises: ValueError for a batch that the network does not take.
    """
    batch = as_batch(batch, model)
    try:
        # a copy, since a network may work on its inputs in place
        return batch.clone().run(model)
    except (torch.OutOfMemoryError, BatchError):
        raise
    except PASS_FAILS as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the network does not take {batch}: {reason}") from error
