"""A network that keeps its codes packed in memory, and makes values of them as it runs."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from quantifind.tensor.rotation import Rotation
from quantifind.utils.arguments import check
from quantifind.utils.batches import Forward

# what stands in the place of a tensor: the buffers attribute_codes, …
PARTS = ("codes", "scale", "zero_point", "table", "grid")


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
    and ``weight_table``, so that ``state_dict()`` gives codes, and ``weight_grid``, by which codes
    of another grid are refused; ``module.weight`` makes its values anew each time. What other
    tensors are a part of keeps its values. It is for inference: what is
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
    # what else refers to a tensor finds its values: test_however_a_network_finds_its_weights
    put_values(replica, codes.tensors)
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
    qparams, like = tensor.qparams, own[first]
    parts = {
        # at a fixed width, which is decoded fast, however they are stored in a file
        "codes": packing.pack(tensor.codes.long() - qparams.grid.lowest_code, qparams.grid.levels),
        "scale": qparams.scale,
        "zero_point": qparams.zero_point,
        "table": qparams.grid.table,
        "grid": torch.tensor(_grid_checksum(tensor)),
    }
    # packed codes may be a part of more memory: test_compressed_networks_give_the_same
    parts = {p: t.to(like.device, copy=True) for p, t in parts.items() if t is not None}
    made = _Values.of(first, tensor, like)
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
        home = module._parameters if attribute in module._parameters else module._buffers
        del home[attribute]
        if isinstance(module, nn.RNNBase):
            module.__dict__.pop("_flat_weights", None)
        kind, others = module.packed_as if isinstance(module, _Packed) else (type(module), {})
        module.__class__ = _packed(kind, others | {attribute: made})


def _grid_checksum(tensor: QuantizedTensor) -> int:
    """Of what its codes stand for, beside the buffers that a state dict has."""
    qparams, grid = tensor.qparams, tensor.qparams.grid
    table = grid.table.tolist() if grid.table is not None and not grid.stored else None
    axis = None if qparams.axis is None else qparams.axis % tensor.codes.dim()
    facts = (grid.levels, grid.offset, table, axis, qparams.group, tensor.rotation)
    return zlib.crc32(repr((*facts, list(tensor.codes.shape))).encode())


@dataclass(frozen=True)
class _Values:
    """What makes, of a module's buffers, the values of a tensor as the copy has them.

    name: of the tensor in the network.
    grid: without its table, which is a buffer.
    stride, trained: of the tensor.
    """

    name: str
    grid: Grid
    axis: int | None
    group: int | None
    shape: torch.Size
    dtype: torch.dtype
    rotation: Rotation | None
    stride: tuple[int, ...]
    trained: bool

    @classmethod
    def of(cls, name: str, tensor: QuantizedTensor, like: Tensor) -> "_Values":
        """like: the tensor in the copy."""
        qparams = tensor.qparams
        facts = replace(qparams.grid, table=None), qparams.axis, qparams.group, tensor.codes.shape
        kept = tensor.dtype, tensor.rotation, like.stride(), like.requires_grad
        return cls(name, *facts, *kept)

    def plain(self, module: nn.Module, attribute: str) -> Tensor:
        """The values, from the buffers that stand for an attribute."""
        codes, scale, zero_point, table = (
            module._buffers.get(f"{attribute}_{part}")
            for part in ("codes", "scale", "zero_point", "table")
        )
        assert codes is not None
        grid = Grid(self.grid.levels, self.grid.offset, table, self.grid.stored)
        qparams = QParams(grid, scale, zero_point, self.axis, self.group)
        kept = QuantizedTensor.unpack(
            codes, self.shape, qparams, self.dtype, rotation=self.rotation
        )
        made = kept.dequantize()
        if made.stride() != self.stride:
            # other strides may round otherwise: test_compressed_networks_give_the_same
            empty = torch.empty_strided(
                self.shape, self.stride, dtype=self.dtype, device=made.device
            )
            made = empty.copy_(made)
        return made

    def as_in_the_copy(self, module: nn.Module, attribute: str) -> Tensor:
        """The same, as the parameter that the copy has there."""
        if torch.compiler.is_compiling():
            return made_of_codes(self.name, self.plain(module, attribute))
        # torch.gru rounds otherwise for views, and for what needs no gradients:
        # test_compressed_networks_give_the_same
        with torch.inference_mode(False), torch.no_grad():
            made = nn.Parameter(self.plain(module, attribute), self.trained)
        return made_of_codes(self.name, made)


class _Packed(nn.Module):
    """A module some of whose tensors are codes: the mixin of the class that `_packed` gives it.

    packed_as: the class that it had; and by attribute, what makes its values.
    """

    __slots__ = ()
    packed_as: tuple[type[nn.Module], dict[str, _Values]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is in no module, so is made again: test_a_compressed_network_is_pickled
        reduced: Any = super().__reduce_ex__(2)
        return _again, self.packed_as, *reduced[2:]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _, made = self.packed_as
        for values in made.values():
            if (cast := fn(torch.empty(0, dtype=values.dtype)).dtype) != values.dtype:
                raise ValueError(
                    f"{values.name}: its codes are of {values.dtype}, and can't be cast to {cast}: "
                    "cast the network before it is compressed"
                )
        names = [f"{attribute}_{part}" for attribute in made for part in PARTS]
        before = {name: self._buffers[name] for name in names if name in self._buffers}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            now = self._buffers[name]
            if kept is not None and now is not None and now.dtype != kept.dtype:
                # scales may be wider than values: test_scales_are_never_cast
                self._buffers[name] = kept.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        errors = rest[-1]
        for attribute, values in self.packed_as[1].items():
            own: Any = self._buffers[f"{attribute}_grid"]
            # a state dict of before has none: test_codes_go_from_one_to_another
            given = state_dict.setdefault(f"{prefix}{attribute}_grid", own)
            if not torch.equal(given.cpu(), own.cpu()):
                errors.append(f"{values.name}: the codes are of another grid, or of another shape")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _packed(kind: type[nn.Module], made: dict[str, _Values]) -> type[nn.Module]:
    """The class of a module of a kind that makes some of its tensors of codes."""
    members: dict[str, Any] = {attribute: property(_getter(attribute)) for attribute in made}
    if issubclass(kind, nn.RNNBase):
        # torch's recurrent layers keep a list of their weights, and put it back when they move
        members["_flat_weights"] = property(_flat_weights, lambda self, _: None)
        # and look in each pass whether they are the same:
        # test_recurrent_weights_are_made_few_times_in_a_pass
        members["_update_flat_weights"] = lambda self: None
    # by their module torch.fx knows torch's own: test_compressed_networks_are_traced_by_fx
    members |= {"packed_as": (kind, made), "__module__": kind.__module__}
    return type(kind.__name__, (_Packed, kind), members)


def _again(kind: type[nn.Module], made: dict[str, _Values]) -> nn.Module:
    """A module of such a class, that is given its state next."""
    packed = _packed(kind, made)
    return packed.__new__(packed)


def _getter(attribute: str) -> Any:
    return lambda module: module.packed_as[1][attribute].as_in_the_copy(module, attribute)


def _flat_weights(module: Any) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]
