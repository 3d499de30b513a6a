"""Which functions of torch are products; and functions that contain products, written so that
these are visited one by one."""

import math
import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantifind.network import meetings
from quantifind.network.meetings import Labels
from quantifind.utils.batches import tensors_of

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
PLAIN_PRODUCTS = {
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.linalg.matmul),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot),
    *(Tensor.__matmul__, Tensor.__rmatmul__),
}
INNER_PRODUCTS = {torch.inner, Tensor.inner}
MATRIX_PRODUCTS = PLAIN_PRODUCTS | INNER_PRODUCTS | {torch.tensordot}
SUMS_OF_PRODUCTS = {torch.addbmm, Tensor.addbmm}
PRODUCTS_WITH_SUMMAND = SUMS_OF_PRODUCTS | {
    *(torch.addmm, torch.addmv, torch.baddbmm, Tensor.addmm, Tensor.addmv, Tensor.baddbmm),
}
ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "convolution": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "transposed_convolution": (
        *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
    "embedding": ("input", "weight"),
}
# names of functions whose whole numbers and masks say which values go where
_INDEXING = (
    *("embedding", "embedding_bag", "nonzero", "argwhere", "where", "one_hot", "gather", "take"),
    *("index_select", "take_along_dim", "masked_select", "masked_scatter", "repeat_interleave"),
    *("index_add", "index_copy", "index_put", "index_reduce"),
    *("scatter", "scatter_add", "scatter_reduce", "item", "tolist", "numpy"),
)
INDEXING = {
    *(name + end for name in _INDEXING for end in ("", "_")),
    *("__getitem__", "__setitem__", "__bool__", "__int__", "__index__"),
}


def chooses(function: Any, args: tuple) -> bool:
    """Whether a function moves values to where whole numbers or masks among its arguments say;
    putting one value in the place of some moves none."""
    name = getattr(function, "__name__", "")
    if name == "where":
        return len(args) == 1
    if name == "__setitem__" and not (isinstance(args[2], Tensor) and args[2].dim()):
        return False
    return name in INDEXING


def labels(
    func: Any, left: Tensor, right: Tensor, given: Mapping[Any, Any]
) -> tuple[Labels, Labels, Labels] | None:
    """Of the axes of both operands and the result."""
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return None
    if func in INNER_PRODUCTS:
        first, second = range(left.dim() - 1), [-axis for axis in range(1, right.dim())]
        return [*first, "in"], [*second, "in"], [*first, *second]
    if func is torch.tensordot:
        return meetings.tensordot(left, right, given.get("dims", given.get(2, 2)))
    one, other, result = meetings.matmul(left, right)
    return one, other, result[1:] if func in SUMS_OF_PRODUCTS else result


def lie_in_memory(given: Any) -> bool:
    """Whether all tensors lie in memory: none is sparse, nested, or inside `torch.vmap`."""
    return all(memory(tensor) is not None for tensor in tensors_of(given))


def memory(tensor: Tensor) -> int | None:
    """Where a tensor lies; None for one that doesn't lie anywhere as it is."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    try:
        if torch.compiler.is_exporting():
            # what is traced lies nowhere, but each memory is an object of its own:
            # test_activations_are_rounded_in_programs
            return tensor.untyped_storage()._cdata
        place = tensor.untyped_storage().data_ptr()
        return place if place or not tensor.numel() else None
    except (NotImplementedError, RuntimeError):
        # a wrapper of functorch's: test_what_vmap_runs_is_not_seen
        return None


# The same code, seeing no override: so that its projections and products are visited one by one
# instead of the whole as one function (test_attention).
attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's own as its two products."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    scores = torch.matmul(query, key.transpose(-2, -1))
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
    # what may attend to nothing gets 0: test_scaled_dot_product_attention
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    shares = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return torch.matmul(F.dropout(shares, dropout_p), value)
