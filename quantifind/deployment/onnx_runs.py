"""Whether onnxruntime runs an ONNX file as the network runs here."""

import importlib
from typing import Any

import torch
from torch import Tensor

from quantifind.utils.naming import first_line

# how far values may be from the network's, beside the largest, where it isn't 1e-4
TOLERANCE = {torch.float16: 1e-2}
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
        raise ValueError(
            f"onnxruntime doesn't run what ONNX has for it ({first_line(error)}): {INSTEAD}"
        ) from error
    tensors = [value.detach().cpu() for value in wanted or () if isinstance(value, Tensor)]
    for one, other in zip(tensors, map(torch.from_numpy, found), strict=False):
        if one.is_floating_point() and one.numel():
            one, other = one.nan_to_num(), other.nan_to_num()
            largest = max(1.0, float(one.abs().max()))
            away = float((one.double() - other.double()).abs().max())
            if away > TOLERANCE.get(one.dtype, 1e-4) * largest:
                raise ValueError(
                    f"onnxruntime gives other values than the network, by up to {away:.2g} beside "
                    f"{largest:.3g}: {INSTEAD}"
                )
