"""A network that keeps its codes packed in memory, and makes values of them as it runs."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantifind.deployment.given import Given, codes_of
from quantifind.deployment.kernels import check_installed, kernel_weight
from quantifind.network.activations import QuantizedActivations
from quantifind.network.folding import prepared
from quantifind.network.modules import put_values
from quantifind.network.products import made_of_codes
from quantifind.network.sharing import all_tensors, stored_and_shared
from quantifind.tensor import packing
from quantifind.tensor.qparams import Grid, QParams
from quantifind.tensor.quantized import QuantizedTensor
from quantifind.utils.arguments import check
from quantifind.utils.batches import Forward


def compressed(
    model: nn.Module,
    quantized: Given,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    kernels: str | None = None,
) -> nn.Module:
    """A copy of a network whose tensors are packed codes, and values only where they are used.

    Its outputs are bit for bit those of `quantifind.quantize.quantize_model`'s copy, in about the
    memory of the file; codes that are stored coded are packed in memory. In the place of a
    parameter ``weight`` are the buffers ``weight_codes``, ``weight_scale``, ``weight_zero_point``
    and ``weight_table``, so that ``state_dict()`` gives codes; ``module.weight`` makes its values
    anew each time. What other tensors are a part of keeps its values. It is for inference: what is
    quantized isn't among its ``parameters()``. Cast the network before; keep it by its
    ``state_dict()``, or by `quantifind.save`.

    quantized: what a search found, what `quantize` gave, or a strategy.
    calibration, forward: as for `quantifind.quantize.quantize`.
    kernels: "torchao", where it is installed: its kernels multiply by the weights of linear maps
        that are whole numbers of 8 bits, or of 4 on the CPU, with a scale per tensor or output.
        These round otherwise, so outputs are near the copy's, not the same.
    Raises: ValueError as `quantize`, and for kernels that aren't there, or would meet activations
        that are rounded.
    """
    codes = codes_of(model, quantized, calibration, forward)
    if kernels is not None:
        check(kernels == "torchao", "kernels", kernels, "None or 'torchao' is needed")
        check(not codes.activations, "kernels", kernels, "activations are rounded: None is needed")
        check_installed()
    replica = prepared(model, codes.folded)
    _, same, views = stored_and_shared(replica)
    whole = set(views.values())
    put_values(replica, {name: t for name, t in codes.tensors.items() if name in whole})
    for name, tensor in codes.tensors.items():
        names = (name, *(other for other in same if same[other] == name))
        if name not in whole and not (kernels and _put_kernel(replica, names, tensor)):
            _pack(replica, names, tensor)
    return QuantizedActivations(replica, codes.activations) if codes.activations else replica


def _put_kernel(model: nn.Module, names: tuple[str, ...], tensor: QuantizedTensor) -> bool:
    """Put a tensor of torchao's in the place of a weight, if it has one for all its names."""
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    if any(name.rpartition(".")[2] != "weight" for name in names):
        return False
    made = [kernel_weight(module, tensor) for module in modules]
    if any(weight is None for weight in made):
        return False
    for module in modules:
        module.register_parameter("weight", made[0])
    return True


def _pack(model: nn.Module, names: Iterable[str], tensor: QuantizedTensor) -> None:
    """Put codes in the place of a tensor, under each of its names, the first of which it has."""
    own, (first, *_) = all_tensors(model), names
    # what is coded would be decoded in each pass
    tensor = replace(tensor, storage="packed")
    qparams = tensor.qparams
    parts = {
        # at a fixed width, which is decoded fast, however they are stored in a file
        "codes": packing.pack(tensor.codes.long() - qparams.grid.lowest_code, qparams.grid.levels),
        "scale": qparams.scale,
        "zero_point": qparams.zero_point,
        "table": qparams.grid.table,
    }
    # packed codes may be a part of more memory: test_compressed_networks_give_the_same
    device = own[first].device
    parts = {part: t.to(device, copy=True) for part, t in parts.items() if t is not None}
    done: set[tuple[int, str]] = set()
    for name in names:
        where, _, attribute = name.rpartition(".")
        module = model.get_submodule(where)
        # a module may have two names: test_a_module_of_two_names_is_compressed
        if (id(module), attribute) in done:
            continue
        done.add((id(module), attribute))
        for part, values in parts.items():
            kept, buffer = part != "table" or qparams.grid.stored, f"{attribute}_{part}"
            if hasattr(module, buffer):
                raise ValueError(f"{name}: {where or 'the network'} has a {buffer} of its own")
            module.register_buffer(buffer, values, persistent=kept)
        like = own[first]
        home = module._parameters if attribute in module._parameters else module._buffers
        del home[attribute]
        members: dict[str, Any] = {attribute: property(_values_of(attribute, first, tensor, like))}
        if isinstance(module, nn.RNNBase):
            module.__dict__.pop("_flat_weights", None)
            # torch's recurrent layers keep a list of their weights, and put it back when they move
            members["_flat_weights"] = property(_flat_weights, lambda self, _: None)
            # and look in each pass whether they are the same:
            # test_recurrent_weights_are_made_few_times_in_a_pass
            members["_update_flat_weights"] = lambda self: None
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), members)


def _values_of(attribute: str, name: str, tensor: QuantizedTensor, like: Tensor) -> Any:
    """What makes, of a module's buffers, the values of a tensor as the copy has them."""
    stride, trained = like.stride(), like.requires_grad
    grid, axis, group = tensor.qparams.grid, tensor.qparams.axis, tensor.qparams.group
    levels, offset, stored = grid.levels, grid.offset, grid.stored
    shape, dtype, rotation = tensor.codes.shape, tensor.dtype, tensor.rotation

    def values(module: nn.Module) -> Tensor:
        codes, scale, zero_point, table = (
            module._buffers.get(f"{attribute}_{part}")
            for part in ("codes", "scale", "zero_point", "table")
        )
        assert codes is not None
        qparams = QParams(Grid(levels, offset, table, stored), scale, zero_point, axis, group)
        kept = QuantizedTensor.unpack(codes, shape, qparams, dtype, rotation=rotation)
        made = kept.dequantize()
        if made.stride() != stride:
            # other strides may round otherwise: test_compressed_networks_give_the_same
            made = torch.empty_strided(shape, stride, dtype=dtype, device=made.device).copy_(made)
        return made

    def as_in_the_copy(module: nn.Module) -> Tensor:
        if torch.compiler.is_exporting():
            return made_of_codes(name, values(module))
        if torch.compiler.is_compiling():
            return values(module)
        # torch.gru rounds otherwise for views, and for what needs no gradients:
        # test_compressed_networks_give_the_same
        with torch.inference_mode(False), torch.no_grad():
            made = values(module).detach().requires_grad_(trained)
        return made_of_codes(name, made)

    return as_in_the_copy


def _flat_weights(module: Any) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]
