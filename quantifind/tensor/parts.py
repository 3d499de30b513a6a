"""The dense tensors that a tensor of any layout is kept as."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# the parts of a sparse tensor, in the order in which torch's constructors take them
_BY_ROWS = ("crow_indices", "col_indices", "values")
_BY_COLUMNS = ("ccol_indices", "row_indices", "values")
SPARSE = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}


def is_strided(tensor: Tensor) -> bool:
    """Whether its values lie in memory by its strides.

    Not those of sparse, nested and torch's quantized tensors, nor of tensors that wrap others.
    """
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and (type(tensor) in (Tensor, nn.Parameter) or not is_traceable_wrapper_subclass(tensor))
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether it is strided, and torch computes with its values, as not with floats of 8 bits."""
    return is_strided(tensor) and not (tensor.is_floating_point() and tensor.element_size() < 2)


def quantizable(tensor: Tensor) -> bool:
    """Whether it is of real floating point numbers that can be put on few levels."""
    return tensor.is_floating_point() and is_dense(tensor)


def parts(tensor: Tensor) -> list[Tensor]:
    """Dense tensors that hold all of it: of a sparse one its indices and values.

    >>> [part.tolist() for part in parts(torch.tensor([0.0, 7.0]).to_sparse())]
    [[[1]], [7.0]]
    """
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [part for one in inner if isinstance(one, Tensor) for part in parts(one)]
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in SPARSE:
        return [getattr(tensor, part)() for part in SPARSE[tensor.layout]]
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_quantized:
        return [tensor.int_repr(), *_scales(tensor)]
    return [tensor.to_dense() if tensor.layout != torch.strided else tensor]


def _scales(tensor: Tensor) -> list[Tensor]:
    if tensor.qscheme() == torch.per_tensor_affine:
        return [torch.tensor(tensor.q_scale()), torch.tensor(tensor.q_zero_point())]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def value_count(tensor: Tensor) -> int:
    """How many values it has; of a sparse one those that are kept."""
    return parts(tensor)[-1].numel() if tensor.layout in SPARSE else tensor.numel()


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of all its parts."""
    if is_strided(tensor):
        return tensor.numel() * tensor.element_size()
    return sum(part.numel() * part.element_size() for part in parts(tensor))
