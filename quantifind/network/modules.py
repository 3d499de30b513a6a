"""A network's tensors by name, a plain copy of it, and one pass."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from quantifind.network.closures import rebind
from quantifind.network.memory import Copies, blocks, own_bytes, owners
from quantifind.tensor.parts import is_dense
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils.batches import as_batch
from quantifind.utils.forwards import BatchError, DefaultForward
from quantifind.utils.naming import described, first_line

# what a pass raises where the network's own code does
PASS_FAILS = (RuntimeError, LookupError, AssertionError, TypeError, AttributeError, ValueError)

# where torch's modules live whose weights are packed integers
PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that `torch.compile` or data parallelism wraps; any other as it is.

    Raises: ValueError of one line for what is no network of torch, or can be no copy of one:
        scripted, traced or packed modules, and tensors without values.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the network is a {type(model).__name__}: an nn.Module is needed, of an exported "
            "program the one that it was made from"
        )
    while (inner := _wrapped(model)) is not None:
        model = inner
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{_called(name)} is scripted or traced, which hides what it computes: give the "
                "nn.Module that it was made from"
            )
        if any(kind.__module__.startswith(PACKED) for kind in type(module).__mro__):
            raise ValueError(
                f"{_called(name)} is quantized already ({type(module).__module__}): give the float "
                "network that it was made from"
            )
        for own, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                _check_values(f"{name}.{own}".lstrip("."), tensor)
    return model


def _check_values(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(
            f"{name} has no shape yet: pass one batch through the network first, which makes its "
            "lazy modules"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device, without values: give the network memory by `to_empty`, "
            "and load its state dict"
        )


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a module of torch wraps, or None."""
    if "_orig_mod" in module._modules and type(module).__module__.startswith("torch._dynamo"):
        return module._modules["_orig_mod"]
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    return None


def _called(name: str) -> str:
    return name or "the network"


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a plain copy by name, memory that is shared once.

    Sparse ones, and others whose values don't lie in memory by strides, are left out: they are
    constants (`quantifind.tensor.parts.is_dense`).
    """
    own = _parameters(model) | _buffers(model)
    return {name: tensor for name, tensor in own.items() if is_dense(tensor)}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those whose memory is no other's."""
    parameters = dict(model.named_parameters())
    views = owners(parameters)
    return {name: p for name, p in parameters.items() if name not in views}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that share no memory with a parameter, or with a buffer before them."""
    buffers = dict(model.named_buffers())
    if not buffers:
        return {}
    tensors = dict(model.named_parameters()) | buffers
    shared = {name for block in blocks(tensors) if len(block) > 1 for name in block}
    sizes = own_bytes(tensors) if shared else {}
    return {
        name: buffer
        for name, buffer in buffers.items()
        if name not in shared or sizes[name] == own_bytes({name: buffer})[name]
    }


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the network itself, without what torch wraps around it, as `unwrapped` says.

    Its parametrized tensors are the parameters that they stand for in eval mode. What shares memory
    shares it in the copy, too; parameters that are the same view of it are one.

    Raises: ValueError as `unwrapped`, and for what can't be copied, or shares a part of its memory.
    """
    model = unwrapped(model)
    owners(dict(model.named_parameters()))
    replica = _copied(model)
    modes = {module: module.training for module in replica.modules()}
    try:
        replica.eval()  # spectral_norm moves with each look at its weight in training
    except NotImplementedError as error:
        raise ValueError(
            f"the network can't be put in eval mode ({described(error)}): give the nn.Module that "
            "it was exported from"
        ) from error
    for module in modes:
        if parametrize.is_parametrized(module):
            _remove_parametrizations(module)
    for module, mode in modes.items():
        module.training = mode
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # which cudnn warns of otherwise
    return replica


def _copied(model: nn.Module) -> nn.Module:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.inference_mode(False), torch.no_grad():
        copies = Copies(tensors)
        memo = copies.memo
        with copies:
            try:
                # inner ones first, since what wraps them is copied as what it wraps
                for module in reversed(list(model.modules())):
                    if (inner := _wrapped(module)) is not None:
                        memo[id(module)] = copy.deepcopy(inner, memo)
                replica = copy.deepcopy(model, memo)
            except Exception as error:
                raise ValueError(_obstacle(model, error)) from error
            rebind(replica, memo)
    return replica


def _obstacle(model: nn.Module, error: Exception) -> str:
    """What of a network can't be copied, in a line."""
    for name, module in reversed(list(model.named_modules())):
        own = vars(module) | module._parameters | module._buffers
        for attribute, value in own.items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except Exception as reason:
                where = ".".join(part for part in (name, attribute) if part)
                return (
                    f"{where}, a {type(value).__name__}, can't be copied ({described(reason)}): "
                    f"keep it out of the network, or give {type(module).__name__} a __deepcopy__"
                )
    return f"{type(model).__name__} can't be copied ({described(error)}): give it a __deepcopy__"


def _remove_parametrizations(module: nn.Module) -> None:
    # a deep copy shares the class, from which removing takes the original's weight away too:
    # test_any_module_is_quantized
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrizations: Any = module.parametrizations
    for name, parts in list(parametrizations.items()):
        trained = [part.requires_grad for part in parts.parameters(recurse=False)]
        parametrize.remove_parametrizations(module, name)
        if trained:  # without gradients torch makes a buffer of a parameter of several parts
            value = module._buffers.pop(name, None)
            value = getattr(module, name) if value is None else value
            setattr(module, name, nn.Parameter(value.detach(), any(trained)))


def is_plain(model: nn.Module) -> bool:
    """Whether no module of it is parametrized, or wraps another."""
    return not any(parametrize.is_parametrized(m) or _wrapped(m) for m in model.modules())


def _plain(model: nn.Module) -> nn.Module:
    """A network to look at: itself, where it is plain."""
    model = unwrapped(model)
    return model if is_plain(model) else plain_copy(model)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, memory that is shared once, parametrized ones as they are used.

    Raises: ValueError as `plain_copy`.
    """
    return {name: p.detach() for name, p in _parameters(_plain(model)).items()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers by name that share no memory with a parameter, or with a buffer before them."""
    return _buffers(_plain(model))


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of all that inference needs, by name of a parameter or buffer.

    Each byte counts once, where memory is shared. Of buffers count those of floating point or
    complex numbers; and whole numbers and masks that the state dict has, such as positions, but for
    single ones, which are counters of training, such as a norm's ``num_batches_tracked``. Others a
    network's code makes anew.

    >>> stored_bytes(nn.BatchNorm1d(3))
    {'weight': 12, 'bias': 12, 'running_mean': 12, 'running_var': 12}
    """
    found = own_bytes(stored := stored_tensors(model))
    return {
        name: size for name, size in found.items() if size or isinstance(stored[name], nn.Parameter)
    }


def stored_tensors(model: nn.Module, *, counters: bool = False) -> dict[str, Tensor]:
    """Parameters, those that share memory once, and the buffers that `stored_bytes` counts.

    counters: also single whole numbers of the state dict.
    """
    model = _plain(model)
    parameters, kept = _parameters(model), _persistent_buffers(model)
    return parameters | {
        name: buffer
        for name, buffer in model.named_buffers()
        if (name in kept and (counters or buffer.dim() > 0))
        or (buffer.is_floating_point() or buffer.is_complex() or buffer.is_quantized)
    }


def _persistent_buffers(model: nn.Module) -> set[str]:
    return {
        f"{where}.{name}".lstrip(".")
        for where, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }


def put_values(model: nn.Module, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Give a network's own tensors the values of quantized ones, in place."""
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor.dequantize())


def unpad(model: nn.Module) -> None:
    """Let the rows of embeddings that stand for padding have gradients, in place: quantization
    changes them, too (test_an_embedding_of_padding_counts)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


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
        reason = first_line(error)
        if isinstance(batch.forward, DefaultForward):
            reason += "; forward=lambda model, batch: (outputs, targets) says how it does"
        raise ValueError(f"the network does not take {batch}: {reason}") from error
