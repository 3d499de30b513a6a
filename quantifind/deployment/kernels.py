"""Weights of linear maps as tensors of torchao, whose kernels multiply codes
(https://github.com/pytorch/ao)."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils.naming import first_line

# which share a scale in its kernels; those of a channel have the same one
GROUPS = (128, 64, 32)


def check_installed() -> None:
    """Raise ValueError unless torchao can be imported."""
    _imported("torchao")


def kernel_weight(module: nn.Module, tensor: QuantizedTensor) -> nn.Parameter | None:
    """A weight of whole numbers of 8 bits, or of 4 on the CPU, with one scale per tensor or output.

    Returns: None for another one, or one of sizes that the kernels don't take.
    """
    qparams, codes = tensor.qparams, tensor.codes
    grid, scale = qparams.grid, qparams.scale
    plain = grid.table is None and not grid.offset and qparams.zero_point is None
    plain = plain and tensor.rotation is None  # test_torchaos_kernels_multiply_codes
    per_output = scale is not None and qparams.group is None and qparams.axis in (None, 0, -2)
    if type(module) is not nn.Linear or not (plain and per_output) or not codes.numel():
        return None
    assert scale is not None
    device = module.weight.device
    scales = scale.to(device, tensor.dtype).reshape(-1, 1).expand(len(codes), 1).contiguous()
    if 2**7 < grid.levels <= 2**8:
        return _of(_int8(codes.to(device), scales))
    if 2**3 < grid.levels <= 2**4 and device.type == "cpu" and tensor.dtype != torch.float64:
        groups = [size for size in GROUPS if codes.shape[1] % size == 0]
        if groups and len(codes) % 16 == 0:
            return _of(_int4(codes, scales, groups[0]))
    return None


def _int8(codes: Tensor, scales: Tensor) -> Tensor:
    kind = _imported("torchao.quantization").Int8Tensor
    return kind(codes.to(torch.int8), scales, [1, codes.shape[1]], scales.dtype)


def _int4(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    # on the CPU it has these alone, which it may move
    kind = _imported("torchao.prototype.quantization.int4.int4_opaque_tensor").Int4OpaqueTensor
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32), 1)
    scales = scales.expand(len(codes), codes.shape[1] // group)
    # (groups, outputs, 2), of value = (code from 0 − 8) · scale + zero
    both = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    return kind(packed, both, [1, group], codes.shape)


def _of(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"kernels is 'torchao' ({first_line(error)}): pip install quantifind[kernels]"
        ) from error
