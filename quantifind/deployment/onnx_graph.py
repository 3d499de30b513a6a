"""Codes in an ONNX graph: DequantizeLinear of whole numbers, a look-up of codebooks, and
QuantizeLinear of activations (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from onnx import TensorProto, defs, helper
from torch import Tensor

from quantifind.tensor import packing
from quantifind.tensor.qparams import QParams, to_rows
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.utils.naming import naming

# signed whole numbers by width, and the opset that has them
WIDTHS = {2: 25, 4: 21, 8: 21, 16: 21}
# by dtype of values, ONNX's
FLOATS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
# what stands between a weight, or a part of it, and its product
MOVES = (
    *("Cast", "Flatten", "Identity", "Reshape", "SequenceAt", "Slice", "Split", "SplitToSequence"),
    *("Squeeze", "Transpose", "Unsqueeze"),
)
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# what uses a weight, or what is said of it, in no product; a look-up by one index is a part of it
NO_PRODUCTS = {"Gather", "GatherND", "Shape", "Size"}
# nor of what computes with each value by itself, or adds values up: the copy rounds nothing there
NO_PRODUCTS |= {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Sqrt",
    "Abs",
    "Neg",
    "Exp",
    "Log",
    "Clip",
    "Max",
}
NO_PRODUCTS |= {"Min", "Sign", "Tanh", "Sigmoid", "Softmax", "Where", "Cast", "Reciprocal", "Erf"}
NO_PRODUCTS |= {"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"}
NO_PRODUCTS |= {"ReduceSumSquare", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"}


def opset_of_onnx() -> int:
    """Of the onnx that is installed."""
    return int(defs.onnx_opset_version())


def share(graph: Any, same: Mapping[str, str]) -> None:
    """Give tied weights one initializer, in place, under the name by which they are stored.

    same: by name of a tied weight, that name.
    """
    for node in _nodes(graph):
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
    once = {same.get(tensor.name, tensor.name): tensor for tensor in graph.initializer}
    for name, tensor in once.items():
        tensor.name = name
    kept = list(once.values())
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes, with those in branches such as If: test_branches_of_tied_weights_run_in_onnx"""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def put_codes(graph: Any, quantized: Quantized, *, opset: int) -> dict[str, tuple[str, int]]:
    """Put codes in the place of a graph's initializers, by their names.

    opset: of the graph.
    Returns: by name of a quantized tensor what it has become, and its bytes; "float" where ONNX
    has no such whole numbers or values, codes would take more bytes, it is empty, or the graph
    doesn't have it by its name.
    """
    floats = {tensor.name: tensor for tensor in graph.initializer}
    kinds, nodes = {}, []
    for name, tensor in quantized.tensors.items():
        kinds[name] = "float", tensor.codes.numel() * tensor.dtype.itemsize
        if name in floats and tensor.codes.numel() and tensor.dtype in FLOATS:
            made = _Made(name)
            kind = made.values(tensor, opset)
            size = sum(len(part.raw_data) for part in made.initializers)
            if kind is None or size >= kinds[name][1]:
                continue
            kinds[name] = kind, size
            graph.initializer.remove(floats[name])
            graph.initializer.extend(made.initializers)
            nodes += made.nodes
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return kinds


def put_activations(
    graph: Any, activations: Mapping[str, QParams], tensors: Mapping[str, Tensor]
) -> None:
    """Round what meets weights, in place.

    tensors: by name, of whose dtype what meets them is.
    Raises: ValueError naming an activation that ONNX can't round, or whose product isn't there.
    """
    for name, qparams in activations.items():
        with naming(f"activations of {name}"):
            if qparams.grid.table is not None or qparams.grid.offset:
                raise ValueError("ONNX rounds to evenly spaced whole numbers alone; leave it None")
            for number, (node, place) in enumerate(_products(graph, name)):
                made = _Made(f"{name}/input{number}")
                made.rounded(node.input[place], qparams, tensors[name].dtype)
                node.input[place] = made.name
                graph.initializer.extend(made.initializers)
                where = next(i for i, other in enumerate(graph.node) if other is node)
                for own in reversed(made.nodes):
                    graph.node.insert(where, own)


def _products(graph: Any, weight: str) -> list[tuple[Any, int]]:
    """The nodes that multiply by a weight, and which of their inputs meets it; but for those of
    branches, in which the copy rounds nothing, either.

    Raises: ValueError where it is used in another way, too, in which what meets it would stay as it
        is: test_onnx_rounds_all_that_meets_a_weight_or_says_that_it_cannot
    """
    names, found, single = {weight}, [], _single(graph)
    for node in graph.node:
        places = [place for place, name in enumerate(node.input) if name in names]
        one = node.op_type == "Gather" and places == [0] and node.input[1] in single
        if places == [0] and (one or node.op_type in MOVES):
            names.update(node.output)
        elif node.op_type in PRODUCTS or (node.op_type == "Einsum" and len(node.input) == 2):
            # of two weights nothing is rounded, nor of what is added
            if len(met := [place for place in places if place < 2]) == 1:
                found.append((node, 1 - met[0]))
        elif places and node.op_type not in NO_PRODUCTS:
            raise ValueError(
                f"in ONNX what meets it in {node.op_type} isn't rounded; leave it None, or use "
                "quantifind.compressed"
            )
    if not found:
        raise ValueError(
            "in ONNX only those are rounded that meet the weight of a linear map or convolution; "
            "leave it None, or use quantifind.compressed"
        )
    return found


def _single(graph: Any) -> set[str]:
    """Names of constants that are one value."""
    found = {tensor.name for tensor in graph.initializer if not tensor.dims}
    return found | {
        node.output[0]
        for node in _nodes(graph)
        if node.op_type == "Constant"
        and all(a.name in ("value_int", "value") and not a.t.dims for a in node.attribute)
    }


def _width(qparams: QParams, opset: int) -> int | None:
    """The narrowest that holds the levels, and the zero points, as whole numbers."""
    grid, zero = qparams.grid, qparams.zero_point
    # halves are counted twice
    ends = [int(2 * end if grid.offset else end) for end in grid.ends]
    if zero is not None and zero.numel():
        ends += [int(zero.min()), int(zero.max())]
    for width, since in WIDTHS.items():
        if opset >= since and -(2 ** (width - 1)) <= min(ends) and max(ends) < 2 ** (width - 1):
            return width
    return None


class _Made:
    """Nodes and initializers that make the values of a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def put(self, part: str, values: Tensor, width: int | None = None, sign: str = "") -> str:
        """An initializer: float32, or int64; or whole numbers of a width, and their sign, "U" for
        none.

        Narrow ones lie in a byte as `quantifind.tensor.packing.pack` has them, the first lowest.
        """
        values = values.detach().cpu()
        if values.is_floating_point():
            raw, kind = values.float(), "FLOAT"
        elif width is None:
            raw, kind = values.long(), "INT64"
        else:
            raw, kind = values.long() % 2**width, f"{sign}INT{width}"
            # the lowest bits are those of a signed number, too
            raw = (
                packing.pack(raw, 2**width) if width < 8 else raw.to(getattr(torch, f"uint{width}"))
            )
        own: Any = raw.contiguous().numpy()
        proto = TensorProto(name=f"{self.name}/{part}", data_type=TensorProto.DataType.Value(kind))
        proto.dims.extend(values.shape)
        proto.raw_data = own.tobytes()
        self.initializers.append(proto)
        return proto.name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The name of what the node gives."""
        name = f"{self.name}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def finish(self) -> None:
        """Call what the last node gives by the name."""
        self.nodes[-1].output[0] = self.name

    def rounded(self, values: str, qparams: QParams, dtype: torch.dtype) -> None:
        """Make values of a dtype rounded to the levels of an activation, in float32."""
        width, scale, zero = _width(qparams, 21), qparams.scale, qparams.zero_point
        width = max(8, width or 32)
        if width > 16:
            raise ValueError(f"{qparams.grid.levels} levels: ONNX rounds to at most {2**16}")
        scale = torch.tensor(1.0) if scale is None else scale.reshape(())
        zero = torch.tensor(0) if zero is None else zero.reshape(())
        beside = self.put("scale", scale), self.put("zero_point", zero, width)
        if dtype != torch.float32:
            values = self.node("Cast", values, to=TensorProto.FLOAT)
        now = self.node("DequantizeLinear", self.node("QuantizeLinear", values, *beside), *beside)
        if qparams.grid.levels < 2**width:
            ends = [(torch.tensor(end) - zero) * scale for end in qparams.grid.ends]
            now = self.node("Clip", now, *map(self.put, ("low", "high"), ends))
        if dtype != torch.float32:
            self.node("Cast", now, to=FLOATS.get(dtype, TensorProto.DOUBLE))
        self.finish()

    def values(self, tensor: QuantizedTensor, opset: int) -> str | None:
        """Make the values of codes.

        Returns: of what, in words; None where ONNX has no such whole numbers, and for what is
            rotated.
        """
        qparams, shape = tensor.qparams, tensor.codes.shape
        axis, group = qparams.axis, qparams.group
        looked_up = qparams.grid.table is not None
        width = 0 if looked_up else _width(qparams, opset)
        rotated = tensor.rotation is not None
        if rotated or width is None or (looked_up and qparams.grid.levels > 2 ** max(WIDTHS)):
            return None
        if width:
            kind = f"int{width}" if group is None else f"int{width} in blocks of {group}"
            now = self._linear(qparams, tensor.codes, width)
        else:
            kind, now = "codebook", self._looked_up(qparams, tensor.codes, opset)
        if group is not None or (not width and axis is not None):
            order = [*range(len(shape))]
            if axis is not None:
                order.insert(0, order.pop(axis))
            sizes = torch.tensor([shape[place] for place in order], dtype=torch.int64)
            now = self.node("Reshape", now, self.put("shape", sizes))
            if order != sorted(order):
                now = self.node("Transpose", now, perm=[order.index(i) for i in range(len(order))])
        if tensor.dtype != torch.float32:
            self.node("Cast", now, to=FLOATS[tensor.dtype])
        self.finish()
        return kind

    def _linear(self, qparams: QParams, codes: Tensor, width: int) -> str:
        axis, group, offset = qparams.axis, qparams.group, qparams.grid.offset
        rows = len(to_rows(codes, axis, group))
        where: dict[str, Any] = {}
        sizes: tuple[int, ...] = ()
        if group is not None:
            codes = to_rows(codes, axis, None)  # (channels, inputs)
            where, sizes = {"axis": 1, "block_size": group}, (len(codes), -1)
        elif axis is not None:
            where, sizes = {"axis": axis % codes.dim()}, (rows,)

        def beside(values: Tensor) -> Tensor:
            return values.reshape(-1).expand(rows).reshape(sizes)

        scale = torch.tensor(1.0) if qparams.scale is None else qparams.scale.double()
        if offset:  # twice as many halves
            codes, scale = codes.long() * 2 + 1, scale / 2
        inputs = [self.put("codes", codes, width), self.put("scale", beside(scale))]
        if qparams.zero_point is not None:
            inputs.append(self.put("zero_point", beside(qparams.zero_point), width))
        return self.node("DequantizeLinear", *inputs, **where)

    def _looked_up(self, qparams: QParams, codes: Tensor, opset: int) -> str:
        axis, group, table = qparams.axis, qparams.group, qparams.grid.table
        assert table is not None
        length = to_rows(codes, axis, None).shape[1]
        if axis is not None or group is not None or table.dim() == 2:
            codes = to_rows(codes, axis, group)
        width = next(w for w in WIDTHS if opset >= WIDTHS[w] and qparams.grid.levels <= 2**w)
        places = self.node("Cast", self.put("codes", codes, width, "U"), to=TensorProto.INT64)
        levels = self.put("table", table)
        now = (
            self.node("Gather", levels, places)
            if table.dim() == 1
            else self.node("GatherElements", levels, places, axis=1)
        )
        if qparams.scale is not None:
            now = self.node("Mul", now, self.put("scale", qparams.scale.double()))
        if group is not None and length % group:
            # the last group of a row is filled up with zeros
            channels = len(codes) // -(-length // group)
            now = self.node("Reshape", now, self.put("rows", torch.tensor([channels, -1])))
            ends = (torch.tensor([end]) for end in (0, length, 1))
            names = [self.put(n, e) for n, e in zip(("first", "last", "axis"), ends, strict=True)]
            now = self.node("Slice", now, *names)
        return now
