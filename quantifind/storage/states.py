"""A state dict as tensors that safetensors takes, and what is none; and whether one fits."""

import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.tensor.parts import SPARSE


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """The strided tensors that a tensor is made of: itself, under ``""``, or by its sparse layout.

    Raises: ValueError for a layout that is not known.
    """
    tensor = tensor.detach()
    if tensor.layout == torch.strided:
        return {"": tensor}
    if tensor.layout not in SPARSE:
        raise ValueError(f"a tensor of layout {tensor.layout} can't be written")
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
    return {part: getattr(tensor, part)() for part in SPARSE[tensor.layout]}


def sparse_facts(value: Tensor) -> dict[str, Any]:
    """What its parts don't tell of a sparse tensor, as plain values."""
    return {"layout": str(value.layout).removeprefix("torch."), "shape": list(value.shape)}


def load_plain(source: Any) -> Any:
    """What torch.save() wrote, on the CPU; nothing in it is executed.

    source: a path, or an open file.
    Raises: what torch.load() raises.
    """
    with warnings.catch_warnings():
        # of sparse tensors, that they are checked, which they are to be
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC|BSR|BSC) tensor support is in beta")
        return torch.load(source, map_location="cpu", weights_only=True)


def pack_state(
    state: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """A state dict in three: strided tensors on the CPU, plain values that describe the sparse
    ones, and what is no tensor.

    Raises: ValueError as `check_plain` says.
    """
    check_plain(state)
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            others[name] = value
            continue
        for part, tensor in parts_of(value).items():
            tensors[f"{name}/{part}" if part else name] = tensor.cpu()
        if value.layout != torch.strided:
            sparse[name] = sparse_facts(value)
    return tensors, sparse, others


def unpack_state(
    tensors: Mapping[str, Tensor], sparse: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Any]:
    """What `pack_state` was given, on the CPU.

    Raises: ValueError naming the sparse tensor whose parts are missing or don't belong together.
    """
    state = {**tensors, **others}
    for name, facts in sparse.items():
        layout = getattr(torch, facts["layout"])
        try:
            first, *more = (state.pop(f"{name}/{part}") for part in SPARSE[layout])
            shape = facts["shape"]
            if layout == torch.sparse_coo:
                # its indices are in order and differ, as they were written
                state[name] = torch.sparse_coo_tensor(
                    first, more[0], shape, is_coalesced=True, check_invariants=True
                )
            else:
                state[name] = torch.sparse_compressed_tensor(
                    first, more[0], more[1], shape, layout=layout, check_invariants=True
                )
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{name}: its sparse parts are not whole ({error})") from error
    return state


def check_plain(state: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the module, unless what is no tensor in a state dict is read back
    without executing anything."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            continue
        where, _, own = name.rpartition(".")
        what = "extra state" if own == "_extra_state" else f"entry {own!r} of the state"
        try:
            torch.save(value, packed := io.BytesIO())
            packed.seek(0)
            load_plain(packed)
        except Exception as error:
            raise ValueError(
                f"module {where or 'at the top'!r} ({what}): a {type(value).__name__} of values "
                "that are not plain can't be saved; let its get_extra_state() give tensors, "
                "numbers, texts, lists and dicts"
            ) from error


def check_same_architecture(net: nn.Module, state: Mapping[str, Any], path: Any) -> None:
    """Raise ValueError, naming up to three entries, unless a state dict fits a network.

    A name that is missing is no fault where its tensor is that of another one, which is there.

    net: the network.
    state: tensors and other values, by name.
    path: the file that they come from.
    """
    own = net.state_dict(keep_vars=True)
    shared = {id(own[name]) for name in state.keys() & own.keys()}
    different = [
        f"{name} is {_shape(state, name)}, not {_shape(own, name)}"
        for name in sorted(state.keys() | own.keys())
        if _shape(state, name) != _shape(own, name)
        and not (name not in state and id(own[name]) in shared)
    ]
    if different:
        raise ValueError(
            f"{path}: a checkpoint of another architecture: {'; '.join(different[:3])}"
            + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
        )


def load_state(net: nn.Module, state: Mapping[str, Any], path: Any) -> None:
    """Give a network the values of a state dict.

    net: gets them, or stays as it was.
    state: as for `check_same_architecture`.
    path: the file that they come from.
    Raises: ValueError as `check_same_architecture`, and where the network refuses a value.
    """
    check_same_architecture(net, state, path)
    own = net.state_dict()
    # torch copies no other number of values into these
    compressed = {
        name: value.to(own[name].device)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.layout not in (torch.strided, torch.sparse_coo)
    }
    rest = {name: value for name, value in state.items() if name not in compressed}
    try:
        if compressed:
            net.load_state_dict(compressed, strict=False, assign=True)
        net.load_state_dict(rest, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: does not fit the network: {reason}") from error


def _shape(state: Mapping[str, Any], name: str) -> str:
    if name not in state:
        return "missing"
    value = state[name]
    return str(list(value.shape)) if isinstance(value, Tensor) else "no tensor"
