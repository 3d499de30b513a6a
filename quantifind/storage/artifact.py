"""A quantized network as packed bytes and their description, out and back."""

from typing import Any

import torch
from torch import Tensor

from quantifind.tensor.qparams import Grid, QParams
from quantifind.tensor.quantized import Quantized, QuantizedTensor
from quantifind.tensor.rotation import Rotation
from quantifind.utils.naming import naming


def pack(quantized: Quantized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Packed codes, scales, zero points and tables by name, and a description of them.

    Returns: tensors on the CPU; and plain values, with which `unpack` gives the same back.
    """
    tensors: dict[str, Tensor] = {}
    description: dict[str, Any] = {}
    if quantized.folded:
        description["folded"] = [list(pair) for pair in quantized.folded]

    if quantized.notes:
        description["notes"] = dict(quantized.notes)

    def put(key: str, qparams: QParams, codes: Tensor | None = None) -> dict[str, Any]:
        values = {
            "codes": codes,
            "scale": qparams.scale,
            "zero_point": qparams.zero_point,
            "table": qparams.grid.table,
        }
        for part, value in values.items():
            if value is not None:
                tensors[f"{key}/{part}"] = value.detach().cpu()
        grid = qparams.grid
        return {
            "axis": qparams.axis,
            "group": qparams.group,
            "levels": grid.levels,
            "offset": grid.offset,
            "stored": grid.stored,
        }

    for name, tensor in quantized.tensors.items():
        key = f"tensors/{name}"
        description[key] = put(key, tensor.qparams, tensor.pack()) | {
            "shape": list(tensor.codes.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "storage": tensor.storage,
        }
        if (rotation := tensor.rotation) is not None:
            description[key]["rotation"] = [rotation.axis, rotation.seed]
    for name, qparams in quantized.activations.items():
        description[f"activations/{name}"] = put(f"activations/{name}", qparams)
    return tensors, description


def unpack(tensors: dict[str, Tensor], description: dict[str, Any]) -> Quantized:
    """What `pack` was given."""
    folded = tuple((module, norm) for module, norm in description.get("folded", ()))
    quantized = Quantized({}, {}, folded, description.get("notes", {}))
    for key, facts in description.items():
        if key in ("folded", "notes"):
            continue
        kind, name = key.split("/", 1)
        qparams = QParams(
            Grid(facts["levels"], facts["offset"], tensors.get(f"{key}/table"), facts["stored"]),
            tensors.get(f"{key}/scale"),
            tensors.get(f"{key}/zero_point"),
            facts["axis"],
            facts["group"],
        )
        if kind == "activations":
            quantized.activations[name] = qparams
        else:
            shape, dtype = torch.Size(facts["shape"]), getattr(torch, facts["dtype"])
            storage = facts.get("storage", "packed")
            with naming(name):
                turned = facts.get("rotation")
                rotation = None if turned is None else Rotation(*turned)
                quantized.tensors[name] = QuantizedTensor.unpack(
                    tensors[f"{key}/codes"], shape, qparams, dtype, storage, rotation
                )
    return quantized
