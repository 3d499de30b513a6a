"""Batch norm folded into the convolution or linear map before it (Jacob et al. 2018,
arXiv:1712.05877), where in eval mode this is exact."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quantifind.network.modules import is_plain, named_tensors, plain_copy, unwrapped
from quantifind.tensor.parts import value_count
from quantifind.utils.naming import naming

Pairs = tuple[tuple[str, str], ...]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCTS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Folded(nn.Identity):
    """What stands where a norm was.

    removed: how many parameters fewer the network has: the norm's, less those of the bias that the
        product before it was given instead.
    """

    def __init__(self, removed: int) -> None:
        super().__init__()
        self.removed = removed


def prepared(model: nn.Module, folded: Pairs = ()) -> nn.Module:
    """A plain copy (`quantifind.network.modules.plain_copy`), with norms folded.

    folded: pairs of names (module, norm); those that ``model`` has folded already stay so.
    Raises: ValueError as `plain_copy`, and naming a pair that can't be folded.
    """
    replica = plain_copy(model)
    fold(replica, folded)
    return replica


def prepared_tensors(model: nn.Module, folded: Pairs = ()) -> nn.Module:
    """The network whose tensors are those of `prepared`: itself, where it is plain and has folded
    them all, since to copy it takes longer than to look at it."""
    model = unwrapped(model)
    done = is_plain(model) and all(_is_folded(model, pair) for pair in folded)
    return model if done else prepared(model, folded)


def parameter_count(model: nn.Module) -> int:
    """Parameters of the network as it was given, before norms were folded: those that share memory
    once, parametrized ones as they are used."""
    removed = sum(m.removed for m in unwrapped(model).modules() if isinstance(m, Folded))
    return removed + sum(map(value_count, named_tensors(model).values()))


def checked_pairs(given: Any) -> Pairs:
    """Pairs of names from plain values, such as lists.

    Raises: ValueError for anything else.
    """
    pairs = []
    for pair in given if isinstance(given, Iterable) else [given]:
        names = tuple(pair) if isinstance(pair, list | tuple) else ()
        if len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise ValueError(f"folded has {pair!r}: pairs of names (module, norm) are needed")
        pairs.append(names)
    return tuple(pairs)


def fold(model: nn.Module, pairs: Pairs) -> None:
    """Fold norms, in place: weights and biases are multiplied, in float64, by what the norm does in
    eval mode; a module without a bias gets one; and `Folded` stands for the norm.

    pairs: of names (module, norm); what is folded already stays.
    Raises: ValueError naming a module that is not there, or of another kind.
    """
    for name, norm_name in pairs:
        if _is_folded(model, (name, norm_name)):
            continue
        with naming(f"folded {name}, {norm_name}"):
            product, norm = _module(model, name), _module(model, norm_name)
            _check_pair(product, norm)
            added = 0 if product.bias is not None else norm.num_features
            removed = sum(parameter.numel() for parameter in norm.parameters()) - added
            fold_pair(product, norm)
            stand_in = Folded(removed)
            stand_in.training = norm.training
            where, _, own = norm_name.rpartition(".")
            model.get_submodule(where)._modules[own] = stand_in


def _is_folded(model: nn.Module, pair: tuple[str, str]) -> bool:
    with naming(f"folded {', '.join(pair)}"):
        _, norm = (_module(model, name) for name in pair)
    return isinstance(norm, Folded)


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the network has no module {name}") from error


def _check_pair(product: Any, norm: Any) -> None:
    if not isinstance(product, PRODUCTS):
        kinds = "a convolution or linear map"
        raise ValueError(f"the first is a {type(product).__name__}: {kinds} is needed")
    if not isinstance(norm, NORMS) or norm.running_mean is None:
        raise ValueError(
            f"the second is a {type(norm).__name__}: a BatchNorm with running statistics is needed"
        )
    if norm.num_features != outputs(product):
        raise ValueError(f"{outputs(product)} outputs beside {norm.num_features} channels")


def outputs(product: Any) -> int:
    """Channels, or features, that a module of `PRODUCTS` gives."""
    return product.out_features if isinstance(product, nn.Linear) else product.out_channels


@torch.no_grad()
def fold_pair(product: Any, norm: Any) -> None:
    """Give a product of `PRODUCTS` the weight and bias of both, in place."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    weight = product.weight
    if isinstance(product, TRANSPOSED):
        # (inputs, outputs of a group, kernel …)
        per_group = weight.double().unflatten(0, (product.groups, -1))
        scales = scale.reshape(product.groups, 1, -1, *(1,) * (weight.dim() - 2))
        weight.copy_((per_group * scales).flatten(0, 1))
    else:
        weight.copy_(weight.double() * scale.reshape(-1, *(1,) * (weight.dim() - 1)))
    if product.bias is None:
        product.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    else:
        product.bias.copy_(product.bias.double() * scale + shift)
