"""The answer for other runtimes, those that params.yaml asks for, in one folder."""

import inspect
import shutil
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import pandas as pd
import torch
from torch import nn

from quantifind.deployment.exporting import export
from quantifind.tensor.quantized import Quantized
from quantifind.utils.batches import Batch
from quantifind.utils.naming import first_line
from stages import files


def check_packages(kinds: Iterable[str]) -> None:
    """Raise ValueError where a package is missing that writes a kind of file.

    Before anything is judged: what a stage leaves is kept, whatever is installed afterwards.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if "onnx" in kinds and missing:
        raise ValueError(
            f"export has onnx, and {' and '.join(missing)} can't be imported: "
            "pip install quantifind[onnx]"
        )


def write_exports(
    kinds: Iterable[str], net: nn.Module, quantized: Quantized, batch: Batch
) -> dict[str, dict[str, Any]]:
    """Write a quantized network for runtimes, and a table of the bytes of each tensor in each.

    The table is there whatever is asked for, since an output of a stage has to be
    (test_what_is_asked_for_is_exported_and_the_rest_survives).

    kinds: the endings of the files.
    batch: of examples, two or more.
    Returns: by kind the path and bytes of a file, or the reason why there is none.
    """
    shutil.rmtree(files.EXPORTS, ignore_errors=True)
    files.EXPORTS.mkdir(parents=True)
    found: dict[str, dict[str, Any]] = {}
    ours = [(name, tensor.stored_bits // 8) for name, tensor in quantized.tensors.items()]
    table = pd.DataFrame(ours, columns=["tensor", "model_bytes"])
    for kind in kinds:
        path = files.EXPORTS / f"network.{kind}"
        try:
            made = export(net, quantized, path, example_of(net, batch))
        except ValueError as error:
            found[kind] = {"reason": first_line(error)}
            continue
        found[kind] = {"path": str(path), "bytes": path.stat().st_size}
        made = made[["tensor", "becomes", "bytes"]]
        names = {"becomes": f"becomes_{kind}", "bytes": f"{kind}_bytes"}
        table = table.merge(made.rename(columns=names), "left", "tensor")
    files.write_table(files.EXPORTED, table)
    return found


def example_of(net: nn.Module, batch: Batch) -> tuple[Any, ...] | Mapping[str, Any]:
    """What a network is called with in a pass of a batch.

    Raises: ValueError where the pass doesn't call the network itself, but parts of it.
    """
    calls: list[Any] = []
    handle = net.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            batch.run(net)
    finally:
        handle.remove()
    if not calls:
        raise ValueError("forward(model, batch) doesn't call the network, only parts of it")
    args, kwargs = calls[0]
    # what is given by its place has a name, too
    names = inspect.signature(net.forward).parameters
    return dict(zip(names, args, strict=False)) | kwargs if kwargs else args
