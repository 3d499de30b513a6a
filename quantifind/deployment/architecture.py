"""What torch's own modules compute beside their tensors, by which a file knows another network."""

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quantifind.network.sharing import all_tensors

# of modules that compute nothing here; and classes that compute the same
KINDS = (".dropout", ".container", ".loss")
ALIKE = {"SyncBatchNorm": "BatchNorm", "NonDynamicallyQuantizableLinear": "Linear"}
ALIKE |= {f"BatchNorm{dims}d": "BatchNorm" for dims in (1, 2, 3)}
# what concerns training alone, or the tensors' shapes tell, which surgery leaves as it was:
# test_what_changes_no_output_is_not_compared
UNSEEN = {
    *("training", "inplace", "momentum", "dropout", "affine", "track_running_stats", "sparse"),
    *("scale_grad_by_freq", "enable_nested_tensor", "use_nested_tensor", "mask_check"),
    *("in_features", "out_features", "in_channels", "out_channels", "num_features"),
    *("num_embeddings", "embedding_dim", "embed_dim", "kdim", "vdim", "input_size", "hidden_size"),
    *("padding_idx", "device", "dtype"),
}
# of products of what was computed (`quantifind.network.products`)
COMPUTED = re.compile(r"(?:(?P<module>.+)\.)?product\.\d+\.(?:left|right)")


def module_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By name of each module of torch.nn its class, and the plain values that it was made with,
    such as its stride, eps or number of heads; dropouts, containers and losses compute nothing."""
    return {
        name: {"class": ALIKE.get(type(module).__name__, type(module).__name__), **_values(module)}
        for name, module in model.named_modules()
        if type(module).__module__.startswith("torch.nn.modules.")
        and not type(module).__module__.endswith(KINDS)
    }


def _values(module: nn.Module) -> dict[str, Any]:
    """Of what a module was made with, no more: what else hangs on it is its owner's."""
    found = {}
    # recurrent modules name theirs in a class above
    kinds = [kind for kind in type(module).__mro__ if "__init__" in vars(kind)]
    made_with = (inspect.signature(vars(kind)["__init__"]).parameters for kind in kinds)
    for name in set[str]().union(*made_with) - UNSEEN:
        value = vars(module).get(name)
        each = list(value) if isinstance(value, tuple | list) else [value]
        if name == "padding" and isinstance(value, str):
            continue  # "same" is as many as it takes
        if each and all(isinstance(one, bool | int | str | float | None) for one in each):
            plain = [one if _is_finite(one) else str(one) for one in each]
            # (2, 2) and 2 are the same
            found[name] = plain[0] if all(one == plain[0] for one in plain) else plain
    return dict(sorted(found.items()))


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def check_modules(there: Mapping[str, Mapping[str, Any]], model: nn.Module) -> None:
    """Raise ValueError, naming the first that differs, where modules of the same name that both
    have differ in what both tell.

    there: of a file; one of before has none.
    """
    for name, here in module_facts(model).items():
        facts = there.get(name, {})
        for fact in (key for key in here if key in facts):
            if facts[fact] != here[fact]:
                what = "" if fact == "class" else f"'s {fact}"
                raise ValueError(
                    f"{name or 'the network'}{what} is {facts[fact]} in the file, {here[fact]} in "
                    "the network"
                )


def check_activations(names: Iterable[str], model: nn.Module) -> None:
    """Raise ValueError for an activation whose module, or weight, a network doesn't have."""
    modules, tensors = dict(model.named_modules()), all_tensors(model)
    for name in names:
        computed = COMPUTED.fullmatch(name)
        if computed is None and name not in tensors:
            raise ValueError(f"activations of {name}: the network has no such tensor")
        if computed is not None and (computed["module"] or "") not in modules:
            raise ValueError(
                f"activations of {name}: the network has no module {computed['module']}"
            )
