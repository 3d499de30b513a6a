"""A quantized network for other runtimes: ONNX, and torch.export's programs."""

import copy
import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from functools import partial, wraps
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from quantifind.deployment.compressed import compressed
from quantifind.deployment.example_runs import agree, copied, made_by
from quantifind.deployment.given import Given, codes_of
from quantifind.deployment.onnx_runs import check_runs
from quantifind.deployment.places import where
from quantifind.network.activations import QuantizedActivations
from quantifind.network.folding import prepared
from quantifind.network.modules import own_tensors, put_values
from quantifind.network.products import visiting
from quantifind.network.sharing import all_tensors, stored_and_shared
from quantifind.tensor.qparams import QParams
from quantifind.tensor.quantized import Quantized
from quantifind.utils.arguments import check, path_of
from quantifind.utils.batches import Forward
from quantifind.utils.naming import described, first_line
from quantifind.utils.whole_files import written_whole

OPSET = 21
# what torch.export may ask of two first axes: with others every runtime fails, or broadcasts alike
SAME_LENGTH = re.compile(r"L(\[[^\]]+\])+\.size\(\)\[0\] == L(\[[^\]]+\])+\.size\(\)\[0\]")


def export(
    model: nn.Module,
    quantized: Given,
    path: Path | str,
    example: Any,
    *,
    opset: int = OPSET,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> pd.DataFrame:
    """Write a quantized network for another runtime, by the ending of the path.

    ``.onnx``: weights as whole numbers of 4, 8 or 16 bits, and 2 from opset 25 on, with
    DequantizeLinear per tensor, channel or block; widths between in the next wider one; codebooks
    and minifloats as codes and a look-up, where these are smaller than floats; wider ones in float.
    Tied weights are there once. What activations are rounded to is QuantizeLinear. It needs
    ``pip install quantifind[onnx]``.

    ``.pt2``: the program of `torch.export`, with codes packed as in `compressed`; it runs without
    this package, by ``torch.export.load(path).module()``.

    quantized: what a search found, what `quantize` gave, or a strategy.
    example: what the network takes: a tensor, a tuple of arguments, or a dict of named ones. Where
        it has more than one example, the first axis of its tensors may be of any length, unless
        what the network computes depends on it: it is that of the example then.
    opset: of ONNX, 21 or later.
    calibration, forward: as for `quantifind.quantize.quantize`, where a strategy asks for them.
    Returns: a row per quantized tensor: what it has become, its bytes there, and in our file.
    Raises: ValueError as `quantize`; and in a line what can't be traced or written, and what works
        instead.
    """
    path = path_of(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path}: its ending is {path.suffix!r}: .onnx or .pt2 is needed")
    codes = codes_of(model, quantized, calibration, forward)
    _check_takes(prepared(model).eval(), *_arguments(example))
    try:
        if path.suffix == ".onnx":
            whole, kinds = _onnx(model, codes, example, opset)
        else:
            whole, kinds = _pt2(model, codes, example)
    except ValueError:
        raise
    except Exception as error:  # of what writes the program: no file can be made of it
        raise ValueError(
            f"{path.suffix} can't be written ({_reason(error)}): quantifind.save and "
            "quantifind.compressed work without it"
        ) from error
    with written_whole(path) as partial:
        partial.write_bytes(whole)
    rows = [
        {
            "tensor": name,
            "becomes": kind,
            "bytes": size,
            "model_bytes": codes.tensors[name].stored_bits // 8,
        }
        for name, (kind, size) in kinds.items()
    ]
    return pd.DataFrame(rows, columns=["tensor", "becomes", "bytes", "model_bytes"])


def _pt2(model: nn.Module, codes: Quantized, example: Any) -> tuple[bytes, dict[str, Any]]:
    small = compressed(model, replace(codes, activations={}))
    if codes.activations:
        small = _rounding(small, codes.activations)
    program = _traced(small, example)
    # the example, and the lines of code of each step with their paths, are nobody's to know
    program._example_inputs = None
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            node.meta.pop(key, None)
    with warnings.catch_warnings():
        # of views: test_however_a_network_finds_its_weights
        warnings.simplefilter("ignore")
        torch.export.save(program, written := BytesIO())
    packed = {name: replace(t, storage="packed") for name, t in codes.tensors.items()}
    kinds = {name: ("packed", t.stored_bits // 8) for name, t in packed.items()}
    return written.getvalue(), kinds


def _rounding(model: nn.Module, activations: Mapping[str, QParams]) -> nn.Module:
    """The network as it is traced with its activations rounded."""
    # while it is traced, tensors lie nowhere, and none is seen to be another's part
    replica, own = QuantizedActivations(model, activations), list(own_tensors(model))

    # torch.export looks at the names of arguments
    @wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = all_tensors(model)
        with visiting(model, replica.visit, tensors={name: tensors[name] for name in own}):
            return model(*args, **kwargs)

    replica.__dict__["forward"] = forward
    return replica


def _onnx(
    model: nn.Module, codes: Quantized, example: Any, opset: int
) -> tuple[bytes, dict[str, Any]]:
    check(
        isinstance(opset, int) and not isinstance(opset, bool) and opset >= OPSET,
        "opset",
        opset,
        f"{OPSET} or later is needed, which has whole numbers of 4 bits",
    )
    try:
        onnx_graph = importlib.import_module("quantifind.deployment.onnx_graph")
        optimizer = importlib.import_module("onnxscript.optimizer")
    except ImportError as error:
        raise ValueError(f"{first_line(error)}: pip install quantifind[onnx]") from error
    latest = onnx_graph.opset_of_onnx()
    check(opset <= latest, "opset", opset, f"the onnx that is installed has up to {latest}")
    replica = prepared(model, codes.folded)
    put_values(replica, codes.tensors)
    _, same, _ = stored_and_shared(replica)
    program = _traced(replica, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = torch.onnx.export(
                program, dynamo=True, opset_version=opset, optimize=False, verbose=False
            )
        except Exception as error:
            raise ValueError(
                f"ONNX has no way to say what the network computes ({_reason(error)}): export to "
                ".pt2, or use quantifind.compressed"
            ) from error
    assert made is not None
    assert made.exported_program is not None
    args, kwargs = _arguments(example)
    changed = sorted(made.exported_program.graph_signature.buffers_to_mutate.values())
    _check_state(program, changed, args, kwargs)
    # what is known is computed, since onnxruntime crashes at branches on it
    # (test_a_bag_of_embeddings_runs); nothing else is rewritten, such as norms into weights:
    # test_what_stands_beside_a_branch_stays_as_it_is
    kept = all_tensors(replica).keys()
    with _unsaid("onnxscript"):
        optimizer.inline(made.model)
        optimizer.fold_constants(made.model, should_fold=lambda node: _folds(node, kept))
        _drop_no_bias(made.model.graph)
        optimizer.remove_unused_nodes(made.model)
    proto = made.model_proto
    written = {own.domain: own.version for own in proto.opset_import}[""]
    check(written == opset, "opset", opset, f"torch writes {written} of this network")
    onnx_graph.share(proto.graph, same)
    kinds = onnx_graph.put_codes(proto.graph, codes, opset=opset)
    onnx_graph.put_activations(proto.graph, codes.activations, all_tensors(replica))
    whole = proto.SerializeToString()
    inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    one, other = (made_by(program.module(), args, kwargs, seed) for seed in (0, 1))
    # of what draws at random, and of activations, which may fall to either of two levels, only that
    # it runs
    known = one is not None and agree(one, other, exactly=True) and not codes.activations
    # in which onnxruntime has few operations, and numpy has none
    given = [v for v in one or () if isinstance(v, Tensor)]
    if all(v.dtype != torch.bfloat16 for v in (*all_tensors(replica).values(), *inputs, *given)):
        check_runs(whole, inputs, one if known else None)
    return whole, kinds


def _check_state(program: Any, changed: Collection[str], args: Any, kwargs: Any) -> None:
    """Raise ValueError where a pass computes otherwise for what the one before it has changed; what
    no later pass reads may be left: test_a_counter_that_nothing_reads_is_exported."""
    if not changed:
        return
    again = copy.deepcopy(program).module()
    first, second = (made_by(again, args, kwargs) for _ in range(2))
    if first is None or not agree(first, second, exactly=True):
        raise ValueError(
            f"{', '.join(changed)}: a pass changes it, and ONNX keeps no state: export to .pt2, or "
            "use quantifind.compressed"
        )


@contextmanager
def _unsaid(logger: str) -> Iterator[None]:
    """Within it, a library's warnings about what it does not simplify are not shown."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _drop_no_bias(graph: Any) -> None:
    """Take away what torch writes where a convolution has no bias: zeros, of three axes in a shape
    that onnxruntime doesn't take (test_layers_of_all_kinds_run)."""
    for node in graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None and bias.shape is not None and len(bias.shape) != 1:
            node.resize_inputs(2)


def _folds(node: Any, kept: Collection[str]) -> bool | None:
    """False for what is computed from the network's tensors: codes will replace them, and
    activations are found by them. Else None, the default."""
    if node.op_type in ("Shape", "Size"):
        return None
    names = {value.name for value in node.inputs if value is not None}
    return None if names.isdisjoint(kept) else False


def _traced(model: nn.Module, example: Any) -> Any:
    """The program of one pass of an example, for any length of the first axis of its tensors where
    it computes the same whatever that is; else for its own."""
    args, kwargs = _arguments(example)
    model.eval()
    # where it stops torch prints the program so far:
    # test_where_tracing_stops_is_said_however_forward_is_written
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            # as torch.export has them: test_arguments_of_all_kinds_are_exported
            named = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
            shapes = tree_map(lambda v: {0: torch.export.Dim.AUTO} if _is_long(v) else None, named)
            trace = partial(torch.export.export, model, args, kwargs, strict=False)
            if any(map(_is_long, tree_leaves(named))):
                with suppress(Exception):  # which it raises of its own lengths, too
                    program = trace(dynamic_shapes=shapes)
                    if _is_of_any_length(program, model, args, kwargs):
                        return program
            return trace()
        except Exception as error:
            raise ValueError(
                f"the network can't be traced ({_reason(error)}){where(error, model)}: "
                "quantifind.save and quantifind.compressed work without tracing"
            ) from error


def _is_long(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] > 1


def _is_of_any_length(program: Any, model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a program is the network whatever lengths it is given.

    Other runtimes don't check what it was traced for:
    test_another_length_gives_the_same_or_is_refused
    """
    if any(SAME_LENGTH.fullmatch(guard) is None for guard in program._guards_code):
        return False
    # of a single one torch.export keeps no condition
    args, kwargs = tree_map(lambda v: v[:1] if _is_long(v) else v, (args, kwargs))
    wanted = made_by(copy.deepcopy(model), args, kwargs)
    # of a copy, since it may change its buffers: test_a_pass_here_changes_no_state_that_is_written
    program = copy.deepcopy(program)
    # what the network itself refuses no program has to do
    return wanted is None or agree(wanted, made_by(program.module(), args, kwargs))


@torch.no_grad()
def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a network is called with, copied."""
    if isinstance(example, Mapping):
        return (), copied(dict(example))
    example = copied(example)
    return example if isinstance(example, tuple) else (example,), {}


def _check_takes(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for an example that the network doesn't take.

    Tracing looks at shapes alone: test_what_cannot_be_exported_is_said_in_a_line
    """
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    check(
        any(map(Tensor.numel, tensors)) or not tensors,
        "example",
        ", ".join(str(list(tensor.shape)) for tensor in tensors),
        "at least one example is needed",
    )
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:  # of any code
        raise ValueError(
            f"example: the network doesn't take it ({_reason(error)}): a tensor, a tuple of its "
            "arguments, or a dict of named ones is needed"
        ) from error


def _reason(error: BaseException) -> str:
    """Of an error what was the first cause, where torch.onnx wraps it in advice."""
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    return described(error)
