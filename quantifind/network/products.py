"""The products of a forward pass, shown before they are computed: linear maps, convolutions,
look-ups of embeddings, matrix products, and those inside attention.

Not seen are what a recurrent layer computes inside, `nn.Bilinear`, `nn.EmbeddingBag`, and `einsum`
of three operands or more.
"""

import math
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from quantifind.network.modules import own_tensors

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
MATRIX_PRODUCTS = {
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.inner, torch.tensordot),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot, Tensor.inner),
    *(Tensor.__matmul__, Tensor.__rmatmul__, torch.linalg.matmul),
}
PRODUCTS_WITH_SUMMAND = {
    *(torch.addmm, torch.addmv, torch.addbmm, torch.baddbmm),
    *(Tensor.addmm, Tensor.addmv, Tensor.addbmm, Tensor.baddbmm),
}


ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "convolution": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "transposed_convolution": (
        *("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
    "embedding": ("input", "weight"),
}
WHOLE = slice(None)


@dataclass
class Product:
    """One product about to be computed.

    kind: linear, convolution, transposed_convolution, embedding or matrix_product, which any other
        is: one of what was computed, or with a weight turned or reshaped.
    operands: what meets in it, less a weight that is one of the network's tensors.
    activations: a name for each operand: that of the weight, or of the module that computes the
        product, the number of the product in it, and left or right.
    weight: the name of the weight, None for a product of what was computed.
    rows: which of the weight's rows, where it is a part of a packed weight; None for all.
    bias, bias_name: what is added, or None, and which of the network's tensors it is.
    spatial: how many axes a convolution runs along, else 0.
    options: of a convolution: stride, padding, dilation and groups.
    compute: operands → result.
    """

    kind: str
    operands: tuple[Tensor, ...]
    activations: tuple[str, ...]
    compute: Callable[..., Tensor]
    weight: str | None = None
    rows: slice | None = None
    bias: Tensor | None = None
    bias_name: str | None = None
    spatial: int = 0
    options: dict[str, Any] = field(default_factory=dict)


Visit = Callable[[Product], Tensor]


@contextmanager
def visiting(model: nn.Module, visit: Visit) -> Iterator[None]:
    """Within it, each product of a pass through ``model`` is what ``visit`` returns for it.

    visit: Product → result, as ``product.compute(*product.operands)`` gives it.
    """
    named = own_tensors(model)
    # modules entered and not yet left, by name
    path: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        if not path:  # a pass begins: test_each_pass_counts_its_products_from_0
            mode.counts.clear()
        path.append(names.get(module, path[-1] if path else ""))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        path.pop()

    mode = _Visiting(visit, named, path)
    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Visiting(TorchFunctionMode):
    def __init__(self, visit: Visit, tensors: Mapping[str, Tensor], path: list[str]) -> None:
        super().__init__()
        self.visit = visit
        self.path = path
        self.counts: Counter[str] = Counter()
        # by memory, so that a slice of a packed weight is known too
        self.owners: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, tensor in tensors.items():
            if tensor.numel():
                self.owners[tensor.untyped_storage().data_ptr()].append((name, tensor))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _TRANSPARENT_ATTENTION(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with self:
                return _attention(*args, **kwargs)
        if func is F.linear:
            return self._weighted("linear", func, *args, **kwargs)
        if func in CONVOLUTIONS:
            return self._weighted("convolution", func, *args, **kwargs)
        if func in TRANSPOSED:
            return self._weighted("transposed_convolution", func, *args, **kwargs)
        if func is F.embedding:
            return self._weighted("embedding", func, *args, **kwargs)
        if func in MATRIX_PRODUCTS or func in PRODUCTS_WITH_SUMMAND:
            return self._matrix_product(func, args, kwargs)
        if func is torch.einsum:
            equation, *operands = args
            if len(operands) == 1 and not isinstance(operands[0], Tensor):
                operands = list(operands[0])
            if len(operands) == 2:
                return self._product(lambda a, b: func(equation, a, b), *operands)
        return func(*args, **kwargs)

    def _matrix_product(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if func is Tensor.__rmatmul__:
            args, func = args[::-1], torch.matmul
        # its tensors, given by position or by name
        places = [*range(len(args)), *(key for key in kwargs if key != "out")]
        given = dict(enumerate(args)) | kwargs
        places = [place for place in places if isinstance(given[place], Tensor)]
        left, right = places[1:3] if func in PRODUCTS_WITH_SUMMAND else places[:2]

        def compute(a: Tensor, b: Tensor) -> Tensor:
            now = given | {left: a, right: b}
            return func(*[now.pop(i) for i in range(len(args))], **now)

        return self._product(compute, given[left], given[right])

    def _weighted(self, kind: str, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(ARGUMENTS[kind], args, strict=False)) | kwargs
        rest = args[len(ARGUMENTS[kind]) :]
        operand, weight = given.pop("input"), given.pop("weight")
        bias = given.get("bias")
        owner = self._owner(weight)
        if kind == "embedding" and (owner is None or owner[1] is None):
            return func(*args, **kwargs)
        if owner is None:
            return self._product(lambda a, b: func(a, b, *rest, **given), operand, weight)
        name, rows = owner
        if rows is None:
            kind = "matrix_product"

        def compute(operand: Tensor) -> Tensor:
            return func(operand, weight, *rest, **given)

        bias_owner = None if bias is None else self._owner(bias)
        return self.visit(
            Product(
                kind,
                (operand,),
                (name,),
                compute,
                name,
                None if rows == WHOLE else rows,
                bias,
                bias_owner[0] if bias_owner else None,
                spatial=weight.dim() - 2 if "convolution" in kind else 0,
                options={key: value for key, value in given.items() if key != "bias"},
            )
        )

    def _product(self, compute: Callable[..., Tensor], left: Tensor, right: Tensor) -> Tensor:
        where = self.path[-1] if self.path else ""
        number = self.counts[where]
        prefix = f"{where}." * bool(where) + f"product.{number}"
        owners = self._owner(left), self._owner(right)
        if owners == (None, None):
            self.counts[where] += 1
            activations = f"{prefix}.left", f"{prefix}.right"
            return self.visit(Product("matrix_product", (left, right), activations, compute))
        if None not in owners:
            return compute(left, right)
        if owners[0] is None:
            return self._one_operand(owners[1], lambda a: compute(a, right), left)
        return self._one_operand(owners[0], lambda b: compute(left, b), right)

    def _one_operand(self, owner: Any, compute: Callable[..., Tensor], operand: Tensor) -> Tensor:
        name, _ = owner
        return self.visit(Product("matrix_product", (operand,), (name,), compute, name))

    def _owner(self, weight: Tensor) -> tuple[str, slice | None] | None:
        """The name of the tensor that ``weight`` is or is a part of, and which of its rows, None
        where it is not whole rows in their order."""
        start = weight.storage_offset()
        for name, whole in self.owners.get(weight.untyped_storage().data_ptr(), ()):
            first = start - whole.storage_offset()
            if not 0 <= first < _extent(whole):
                continue
            if weight.shape == whole.shape and weight.stride() == whole.stride():
                return name, WHOLE
            alike = weight.shape[1:] == whole.shape[1:] and weight.stride() == whole.stride()
            if not alike or whole.stride(0) == 0:
                return name, None
            row = first // whole.stride(0)
            return name, slice(row, row + len(weight))
        return None


def _extent(tensor: Tensor) -> int:
    """Elements of the memory from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


# The same code, seeing no override: so that its projections and products are visited one by one
# instead of the whole as one function (test_attention).
_TRANSPARENT_ATTENTION = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_TRANSPARENT_ATTENTION.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as its two products."""
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
