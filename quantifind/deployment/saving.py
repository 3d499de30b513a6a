"""A quantized network as a file of the bytes that were promised, and back."""

import contextlib
import math
import numbers
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantifind.costs import model_bytes
from quantifind.deployment.architecture import (
    check_activations,
    check_modules,
    module_facts,
)
from quantifind.deployment.given import Given, codes_of
from quantifind.network.activations import QuantizedActivations
from quantifind.network.folding import prepared
from quantifind.network.modules import unwrapped
from quantifind.network.sharing import all_tensors, stored_and_shared
from quantifind.storage.network_reader import NetworkFile
from quantifind.storage.network_writer import checksum, write_network
from quantifind.storage.states import check_plain, load_plain
from quantifind.strategy import Strategy
from quantifind.tensor.parts import is_strided
from quantifind.tensor.quantized import Quantized
from quantifind.utils.arguments import check, path_of
from quantifind.utils.batches import Forward
from quantifind.utils.naming import naming

if TYPE_CHECKING:
    from quantifind.mixed_precision.found import Found

# endings of files of other formats, whose readers would take it for theirs
OTHER_ENDINGS = (".onnx", ".pt2", ".pt", ".pth")
# how a module's own state, that is no tensor, is named
EXTRA = "_extra_state"


def save(
    model: nn.Module,
    quantized: Given,
    path: Path | str,
    *,
    strategy: Strategy | None = None,
    judged: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> int:
    """Write a quantized network as one file in the safetensors format (docs/format.md).

    It holds codes as packed bytes, scales, zero points and codebooks, what stays in float, buffers,
    and beside them the strategy and how it was judged. A file of that name stays whole until the
    new one is.

    quantized: what a search found, what `quantize` gave, or a strategy.
    strategy: of codes, which don't tell it.
    judged: plain values that say how it was judged, such as a row of `certify`; by default, of what
        a search found, on validation data.
    calibration, forward: as for `quantifind.quantize.quantize`, where a strategy asks for them.
    Returns: bytes of the file: the promised ``model_bytes``, single counters among the buffers, and
        a header.
    Raises: ValueError as `quantize`, and naming what can't be written, or the path.
    """
    path = path_of(path)
    if path.suffix.lower() in OTHER_ENDINGS:
        raise ValueError(
            f"{path}: its ending is {path.suffix!r}: a file in the safetensors format is written; "
            "quantifind.export writes .onnx and .pt2"
        )
    check(
        strategy is None or isinstance(strategy, Strategy),
        "strategy",
        strategy,
        "a Strategy is needed",
    )
    check(
        judged is None or hasattr(judged, "keys"),
        "judged",
        judged,
        "a dict of plain values is needed",
    )
    codes = codes_of(model, quantized, calibration, forward)
    if isinstance(quantized, Strategy):
        strategy = quantized
    elif not isinstance(quantized, Quantized):
        strategy = quantized.strategy
        judged = _judged(quantized) if judged is None else judged
    replica = prepared(model, codes.folded)
    stored, same, views = stored_and_shared(replica)
    others = {name: tensor for name, tensor in stored.items() if name not in codes.tensors}
    about = {
        "versions": _versions(),
        "model_bytes": int(sum(model_bytes.measure(model, codes, []).values())),
        "strategy": strategy and strategy.choices,
        "judged": None if judged is None else dict(judged),
        "notes": codes.notes,
        "same": same,
        "views": views,
        "made": _made_anew(replica),
        "modules": module_facts(replica),
    }
    try:
        about = {key: _plain(value) for key, value in about.items() if value}
    except RecursionError as error:
        raise ValueError("judged contains itself: plain values are needed") from error
    return write_network(path, codes, others | _extra_states(replica), about)


def load(path: Path | str, model: nn.Module) -> nn.Module:
    """The quantized network of a file, in eval mode; nothing in the file is executed.

    path: of a file that `save` wrote.
    model: of the same architecture, with any weights; it stays as it is.
    Returns: a copy of ``model`` that gives bit for bit what `quantifind.quantize.quantize_model`
    gives.
    Raises: ValueError naming the file, and what in it is not whole or does not fit the network.
    """
    with NetworkFile(path_of(path)) as file:
        unwrapped(model)
        with naming(f"{path}: a file of another architecture"):
            replica = prepared(model, file.folded)
            _check_fits(file, replica)
            check_activations(file.activations, replica)
            check_modules(file.index.get("modules", {}), replica)
        with naming(str(path)):
            _check_made(file.index.get("made", {}), _made_anew(replica))
        with torch.no_grad():
            _fill(replica, file)
        activations = {name: file.activation(name) for name in file.activations}
    replica.eval()
    return QuantizedActivations(replica, activations) if activations else replica


def _fill(replica: nn.Module, file: NetworkFile) -> None:
    """Give a network the tensors of a file that fits it."""
    tensors, same = all_tensors(replica), file.index.get("same", {})
    for name in (*file.tensors, *file.others):
        if name.rpartition(".")[2] == EXTRA:
            _set_extra_state(replica, name, file.values(name))
            continue
        first = tensors[name]
        if first.layout != torch.strided:
            _put(replica, name, file.values(name))
            continue
        if first.is_contiguous():
            file.put(name, first)
        else:
            # expanded, it has each value once: test_expanded_tensors_are_loaded
            once = tuple(slice(0, 1) if not step else slice(None) for step in first.stride())
            first[once].copy_(file.values(name)[once])
        # what is tied in the file may not be here: test_weights_are_tied_or_not
        for other in (other for other in same if same[other] == name):
            tensors[other].copy_(first)


def _check_fits(file: NetworkFile, replica: nn.Module) -> None:
    """Raise ValueError, naming up to three tensors, unless a file has those of a network."""
    same, views = file.index.get("same", {}), file.index.get("views", {})
    there = {
        name: _kind(*file.described(name), file.layout(name))
        for name in (*file.tensors, *file.others)
    }
    stored, *shared = stored_and_shared(replica)
    here = {name: _kind(t.dtype, t.shape, str(t.layout)) for name, t in stored.items()}
    # of a module's own state only that it is there: its bytes depend on what it holds
    here |= {name: there.get(name, EXTRA) for name in _extra_states(replica)}
    different = [
        f"{name} is {there_is} in the file, {here_is} in the network"
        for name, there_is, here_is in _pairs(_with(there, same, views), _with(here, *shared))
        if there_is != here_is and here_is != there.get(same.get(name))
    ]
    if different:
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError("; ".join(different[:3]) + more)


def _made_anew(model: nn.Module) -> dict[str, int]:
    """Of the buffers that a network's own code makes, which no file has, by name, dtype and shape a
    checksum; single whole numbers count passes."""
    stored, *shared = stored_and_shared(model)
    known = {*stored, *shared[0], *shared[1]}
    return {
        f"{name} ({_kind(buffer.dtype, buffer.shape, 'strided')})": checksum(buffer)
        for name, buffer in model.named_buffers()
        if name not in known and is_strided(buffer) and not _is_counter(buffer)
    }


def _is_counter(buffer: Tensor) -> bool:
    return buffer.numel() == 1 and not buffer.is_floating_point() and not buffer.is_complex()


def _check_made(there: Mapping[str, int], here: Mapping[str, int]) -> None:
    """Raise ValueError, naming one, where buffers of the same shape have other values here."""
    if different := sorted(n for n in there.keys() & here.keys() if there[n] != here[n]):
        raise ValueError(
            f"{different[0]} has other values in the network, and no file has them, since it is "
            "not persistent: register it with persistent=True, or make it the same"
        )


def _pairs(one: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = sorted(one.keys() | other.keys())
    return [(name, one.get(name, "missing"), other.get(name, "missing")) for name in names]


def _with(
    stored: Mapping[str, str], same: Mapping[str, str], views: Mapping[str, str]
) -> dict[str, str]:
    """What each tensor is, in words, of those that share memory too."""
    return {
        **stored,
        **{name: f"the same as {owner}" for name, owner in same.items()},
        **{name: f"a part of {owner}" for name, owner in views.items()},
    }


def _kind(dtype: torch.dtype, shape: Iterable[int], layout: str) -> str:
    words = f"{dtype} {list(shape)}", layout
    kind, layout = (word.removeprefix("torch.") for word in words)
    return kind if layout == "strided" else f"{layout} {kind}"


def _extra_states(model: nn.Module) -> dict[str, Tensor]:
    """What modules keep beside tensors, as the bytes of `torch.save`."""
    found = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            key = f"{name}.{EXTRA}".lstrip(".")
            state = module.get_extra_state()
            check_plain({key: state} if not isinstance(state, Tensor) else {})
            torch.save(state, written := BytesIO())
            found[key] = torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
    return found


def _set_extra_state(model: nn.Module, key: str, values: Tensor) -> None:
    module = model.get_submodule(key.removesuffix(EXTRA).rstrip("."))
    module.set_extra_state(load_plain(BytesIO(values.numpy().tobytes())))


def _put(model: nn.Module, name: str, values: Tensor) -> None:
    """Give a network a tensor of a layout that torch copies no other number of values into."""
    where, _, own = name.rpartition(".")
    module = model.get_submodule(where)
    old = getattr(module, own)
    values = values.to(old.device)
    if own in module._parameters:
        values = nn.Parameter(values, old.requires_grad)
    setattr(module, own, values)


def _versions() -> dict[str, str]:
    """Of what wrote the file; this package's own where it is installed."""
    versions = {"torch": str(torch.__version__)}
    with contextlib.suppress(PackageNotFoundError):
        versions["quantifind"] = version("quantifind")
    return versions


def _judged(found: "Found") -> dict[str, Any]:
    """How a search judged what it found."""
    goal, row = found.goal, found.chosen
    return {
        "on": "validation data",
        "limits": dict(goal.limits),
        "confidence": found.confidence,
        "examples": row["examples"],
        "mean_bits": row["mean_bits"],
        goal.measure: row[goal.measure],
        f"{goal.measure}_bound": row[f"{goal.measure}_bound"],
    }


def _plain(values: Any) -> Any:
    """Values that JSON has: numbers that are none are null."""
    if isinstance(values, Mapping):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    if isinstance(values, bool | str | None):
        return values
    if isinstance(values, numbers.Integral):
        return int(values)
    if isinstance(values, numbers.Real):
        return float(values) if math.isfinite(values) else None
    return _plain(values.tolist()) if type(values).__module__ == "numpy" else str(values)
