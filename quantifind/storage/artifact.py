"""A quantized network as packed bytes and their description, out and back."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantifind.tensor.quantized import Grid, Quantized, QuantizedTensor

PARTS = ("codes", "scale", "zero_point", "table")


def pack(quantized: Quantized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors' packed codes, scales, zero points and tables by name, and a description of them,
    plain values, with which `unpack` gives the same back."""
    tensors: dict[str, Tensor] = {}
    description: dict[str, Any] = {}
    for kind, named in (("tensors", quantized.tensors), ("activations", quantized.activations)):
        if kind == "activations":  # of a sample of values there is nothing to keep but the levels
            named = {name: replace(fit, codes=fit.codes[:0]) for name, fit in named.items()}
        for name, tensor in named.items():
            values = (tensor.pack(), tensor.scale, tensor.zero_point, tensor.grid.table)
            for part, value in zip(PARTS, values, strict=True):
                if value is not None:
                    tensors[f"{kind}/{name}/{part}"] = value.detach().cpu()
            description[f"{kind}/{name}"] = {
                "shape": list(tensor.codes.shape),
                "codes_dtype": _name(tensor.codes.dtype),
                "dtype": _name(tensor.dtype),
                "axis": tensor.axis,
                "group": tensor.group,
                "levels": tensor.grid.levels,
                "offset": tensor.grid.offset,
                "stored": tensor.grid.stored,
            }
    return tensors, description


def unpack(tensors: dict[str, Tensor], description: dict[str, Any]) -> Quantized:
    """What `pack` was given."""
    quantized = Quantized({}, {})
    for key, facts in description.items():
        kind, name = key.split("/", 1)
        codes, scale, zero_point, table = (tensors.get(f"{key}/{part}") for part in PARTS)
        assert codes is not None
        shell = QuantizedTensor(
            codes=torch.zeros(facts["shape"], dtype=getattr(torch, facts["codes_dtype"])),
            grid=Grid(facts["levels"], facts["offset"], table, facts["stored"]),
            scale=scale,
            dtype=getattr(torch, facts["dtype"]),
            axis=facts["axis"],
            group=facts["group"],
            zero_point=zero_point,
        )
        getattr(quantized, kind)[name] = shell.unpack(codes)
    return quantized


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
