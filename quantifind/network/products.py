"""The products of a forward pass, shown before they are computed: linear maps, convolutions,
look-ups of embeddings, matrix products, and those inside attention and recurrent layers.

Not seen are `nn.Bilinear`, `einsum` of three operands or more, and what `torch.vmap` runs.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from quantifind.network import functions, meetings, recurrent
from quantifind.network.meetings import Labels, Meeting, View
from quantifind.network.modules import own_tensors
from quantifind.tensor.matrices import Matrices
from quantifind.utils.batches import tensors_of


@dataclass
class Product:
    """One product about to be computed.

    kind: linear, convolution, transposed_convolution, embedding or matrix_product, which any other
        is.
    operands: what meets in it, less a weight that is one of the network's tensors.
    activations: a name for each operand: that of the weight, or of the module that computes the
        product, the number of the product in it, and left or right.
    compute: operands → result.
    weight: the name of the weight, None for a product of what was computed.
    meet: the weight and its operand as matrices, None where they are none.
    bias, bias_name: what is added, or None, and which of the network's tensors it is.
    spatial: how many axes a convolution runs along, else 0.
    shares: of an embedding of bags, how much an error of each look-up counts.
    """

    kind: str
    operands: tuple[Tensor, ...]
    activations: tuple[str, ...]
    compute: Callable[..., Tensor]
    weight: str | None = None
    meet: Callable[[], Meeting | None] = lambda: None
    bias: Tensor | None = None
    bias_name: str | None = None
    spatial: int = 0
    shares: Callable[[], Tensor] | None = None
    table: Matrices | None = None

    @property
    def matrices(self) -> Matrices | None:
        """The weight's elements by output, those of an embedding by entry; None if they are not."""
        if self.kind == "embedding":
            return self.table
        meeting = self.meet()
        return None if meeting is None else meeting.matrices

    @property
    def used(self) -> bool:
        """Whether anything meets the weight: an expert may be called with no token."""
        operand = self.operands[0]
        return self.weight is None or operand.numel() > 0 or 0 in operand.shape[-1:]


Visit = Callable[[Product], Tensor]
Note = Callable[[Tensor], None]
Named = Mapping[str, Tensor]


@contextmanager
def visiting(
    model: nn.Module, visit: Visit, note: Note | None = None, tensors: Named | None = None
) -> Iterator[None]:
    """Within it, each product of a pass through ``model`` is what ``visit`` returns for it.

    visit: Product → result, as ``product.compute(*product.operands)`` gives it.
    note: is given the whole numbers and masks by which values are chosen and moved.
    tensors: those of the network by name, where they are known; by default what `own_tensors` says.
    """
    named = own_tensors(model) if tensors is None else tensors
    # modules entered and not yet left, by name
    path: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        if not path:  # a pass begins: test_each_pass_counts_its_products_from_0
            mode.counts.clear()
        path.append(names.get(module, path[-1] if path else ""))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        path.pop()
        mode.forget()

    mode = _Visiting(visit, named, path, note)
    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    _ACTIVE.append(mode)
    try:
        with mode:
            yield
    finally:
        _ACTIVE.remove(mode)
        for handle in handles:
            handle.remove()


# within which passes run
_ACTIVE: list["_Visiting"] = []


def made_of_codes(name: str, values: Tensor) -> Tensor:
    """Values just made of codes, which are the weight of that name until the module is left."""
    for mode in _ACTIVE:
        mode.owners[functions.memory(values) or 0].append((name, values))
        mode.made.append((len(mode.path), values))
    return values


class _Visiting(TorchFunctionMode):
    def __init__(
        self, visit: Visit, tensors: Mapping[str, Tensor], path: list[str], note: Note | None
    ) -> None:
        super().__init__()
        self.visit = visit
        self.path = path
        self.note = note
        self.counts: Counter[str] = Counter()
        self.made: list[tuple[int, Tensor]] = []  # of codes, and how deep in modules
        # by memory, so that a slice of a packed weight is known too
        self.owners: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, tensor in tensors.items():
            memory = functions.memory(tensor)
            if tensor.numel() and memory is not None:
                self.owners[memory].append((name, tensor))

    def forget(self) -> None:
        """Let go of tensors that were made of codes in modules that the pass has left."""
        while self.made and self.made[-1][0] > len(self.path):
            self.owners.pop(functions.memory(self.made.pop()[1]) or 0, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.note is not None and functions.chooses(func, args):
            for tensor in tensors_of((args, kwargs)):
                if not tensor.is_floating_point() and functions.memory(tensor) is not None:
                    self.note(tensor)
        seen = _SEEN.get(func)
        if seen is None or not functions.lie_in_memory((args, kwargs)):
            return func(*args, **kwargs)
        return seen(self, func, args, kwargs)

    def _attention(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        inside = functions.scaled_dot_product_attention
        with self:
            if func is F.multi_head_attention_forward:
                return functions.attention(*args, **kwargs)
            return inside(*args, **kwargs)

    def _recurrent(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        cell = recurrent.CELLS.get(func)
        weights = args[2:] if cell else () if kwargs else recurrent.weights_of(args)
        if kwargs or any(w is not None and self._owner(w) is None for w in weights):
            return func(*args, **kwargs)

        def linear(*args: Any) -> Tensor:
            return self._weighted("linear", F.linear, *args)

        if cell is not None:
            return recurrent.single(cell, linear, *args)
        return recurrent.layer(recurrent.LAYERS[func], linear, *args)

    def _matrix_product(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if func is Tensor.__rmatmul__:
            args, func = args[::-1], torch.matmul
        # its tensors, given by position or by name
        places = [*range(len(args)), *(key for key in kwargs if key != "out")]
        given = dict(enumerate(args)) | kwargs
        places = [place for place in places if isinstance(given[place], Tensor)]
        added = func in functions.PRODUCTS_WITH_SUMMAND
        left, right = places[1:3] if added else places[:2]

        def compute(a: Tensor, b: Tensor) -> Tensor:
            now = given | {left: a, right: b}
            return func(*[now.pop(i) for i in range(len(args))], **now)

        bias = given[places[0]] if added else None
        labels = functions.labels(func, given[left], given[right], given)
        return self._product(compute, given[left], given[right], labels, bias)

    def _einsum(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        equation, *operands = args
        if len(operands) == 1 and not isinstance(operands[0], Tensor):
            operands = list(operands[0])
        if len(operands) != 2 or not isinstance(equation, str):
            return func(*args, **kwargs)
        left, right = operands
        labels = meetings.einsum(equation, left, right)
        return self._product(lambda a, b: func(equation, a, b), left, right, labels)

    def _layer(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return self._weighted(_KINDS[func], func, *args, **kwargs)

    def _weighted(self, kind: str, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(functions.ARGUMENTS[kind], args, strict=False)) | kwargs
        rest = args[len(functions.ARGUMENTS[kind]) :]
        operand, weight = given.pop("input"), given.pop("weight")
        bias = given.get("bias")
        owner = self._owner(weight)
        if owner is None:
            return self._product(lambda a, b: func(a, b, *rest, **given), operand, weight, None)
        name, view, _ = owner
        options = {key: value for key, value in given.items() if key != "bias"}
        spatial = weight.dim() - 2 if "convolution" in kind else 0

        def meet() -> Meeting | None:
            if view is None:
                return None
            if kind == "linear":
                return meetings.linear(view, operand)
            return getattr(meetings, kind)(view, spatial, options)

        bias_owner = None if bias is None else self._owner(bias)
        return self.visit(
            Product(
                kind,
                (operand,),
                (name,),
                lambda operand: func(operand, weight, *rest, **given),
                name,
                meet,
                bias,
                bias_owner[0] if bias_owner else None,
                spatial,
            )
        )

    def _embedding(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        operand, weight = given.pop("input"), given.pop("weight")
        owner = None if operand.is_floating_point() else self._owner(weight)
        name, view, _ = owner or ("", None, None)
        if view is None:
            return func(*args, **kwargs)

        def compute(operand: Tensor) -> Tensor:
            return func(operand, weight, **given)

        def shares() -> Tensor:
            names = ("offsets", "mode", "per_sample_weights", "padding_idx")
            options = {key: given[key] for key in names}
            result = compute(operand)

            def taken(bags: Tensor) -> Tensor:
                return (weight[operand.flatten()] == result[bags]).double().mean(1)

            return meetings.bag_shares(operand, taken=taken, **options)

        outputs, inputs = view.axis(0), view.axis(1)
        return self.visit(
            Product(
                "embedding",
                (operand,),
                (name,),
                compute,
                name,
                table=Matrices(view.offset, (), outputs, inputs),
                shares=shares if func is F.embedding_bag else None,
            )
        )

    def _product(
        self,
        compute: Callable[..., Tensor],
        left: Tensor,
        right: Tensor,
        labels: tuple[Labels, Labels, Labels] | None,
        bias: Tensor | None = None,
    ) -> Tensor:
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
        second = owners[0] is None
        name, view, _ = owners[second]  # type: ignore[misc]

        def meet() -> Meeting | None:
            if view is None or labels is None:
                return None
            return meetings.by_labels(view, labels[second], labels[not second], labels[2])

        def one(operand: Tensor) -> Tensor:
            return compute(operand, right) if second else compute(left, operand)

        bias_owner = None if bias is None else self._owner(bias)
        operands = (left if second else right,)
        bias_name = bias_owner[0] if bias_owner else None
        return self.visit(
            Product("matrix_product", operands, (name,), one, name, meet, bias, bias_name)
        )

    def _owner(self, weight: Tensor) -> tuple[str, View | None, Tensor] | None:
        """The name of the tensor that ``weight`` is or is a part of, what part, and the tensor."""
        memory = functions.memory(weight)
        if memory is None:
            return None
        start = weight.storage_offset()
        for name, whole in self.owners.get(memory, ()):
            if 0 <= start - whole.storage_offset() < meetings.extent(whole):
                return name, meetings.view_of(weight, whole), whole
        return None


_KINDS: dict[Any, str] = {
    F.linear: "linear",
    **dict.fromkeys(functions.CONVOLUTIONS, "convolution"),
    **dict.fromkeys(functions.TRANSPOSED, "transposed_convolution"),
}
_Seen = Callable[[_Visiting, Any, tuple, dict[str, Any]], Any]
_SEEN: dict[Any, _Seen] = {
    F.multi_head_attention_forward: _Visiting._attention,
    F.scaled_dot_product_attention: _Visiting._attention,
    **dict.fromkeys((*recurrent.LAYERS, *recurrent.CELLS), _Visiting._recurrent),
    **dict.fromkeys(_KINDS, _Visiting._layer),
    **dict.fromkeys((F.embedding, F.embedding_bag), _Visiting._embedding),
    **dict.fromkeys(
        functions.MATRIX_PRODUCTS | functions.PRODUCTS_WITH_SUMMAND, _Visiting._matrix_product
    ),
    torch.einsum: _Visiting._einsum,
}
