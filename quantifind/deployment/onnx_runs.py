"""Whether onnxruntime runs an ONNX file as the network runs here."""

import importlib
from typing import Any

import torch
from torch import Tensor

from quantifind.utils.console import console
from quantifind.utils.naming import first_line

# how far values may be from the network's, beside the largest, where it isn't 1e-4
TOLERANCE = {torch.float16: 1e-2}
# what onnxruntime says where it is what lacks something
LACKS = ("NOT_IMPLEMENTED", "Unsupported model IR version", "guarantees")
INSTEAD = "export to .pt2, or use quantifind.compressed"


def check_runs(whole: bytes, inputs: list[Tensor], wanted: list[Any] | None) -> None:
    """Raise ValueError where onnxruntime is installed, and doesn't give what the network gives.

    whole: the file.
    inputs: the tensors of the example, in order.
    wanted: what the network gives of it; None where it need only run.
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # else it rounds what meets codes of linear maps to 8 bits, too
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        session = onnxruntime.InferenceSession(whole, options, ["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        given = {n: v.detach().cpu().numpy() for n, v in zip(names, inputs, strict=True)}
        found = session.run(None, given)
    except Exception as error:  # of another library
        if any(word in str(error) for word in LACKS):
            said = "The onnxruntime of this machine can't run the file, which is not checked: "
            console.print(f"{said}{first_line(error)}", markup=False)
            return
        raise ValueError(
            f"onnxruntime doesn't run what ONNX has for it ({first_line(error)}): {INSTEAD}"
        ) from error
    tensors = [value.detach().cpu() for value in wanted or () if isinstance(value, Tensor)]
    for one, other in zip(tensors, map(torch.from_numpy, found), strict=False):
        if one.is_floating_point() and one.numel():
            # infinities, such as of masks, are the same: test_a_wrong_value_beside_an_infinity
            finite = one.isfinite()
            largest = max([1.0, *one[finite].abs().max()[None].tolist()] if finite.any() else [1.0])
            apart = torch.where(finite, one.double() - other.double(), 0.0).abs()
            away = float(apart.nan_to_num(torch.inf, torch.inf).max())
            same = torch.allclose(one[~finite], other[~finite], equal_nan=True)
            if not same or away > TOLERANCE.get(one.dtype, 1e-4) * largest:
                raise ValueError(
                    f"onnxruntime gives other values than the network, by up to {away:.2g} beside "
                    f"{largest:.3g}: {INSTEAD}"
                )
