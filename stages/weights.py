"""Weights that a user gives instead of a training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantifind.storage.states import check_same_architecture, load_plain, load_state
from quantifind.utils.naming import first_line
from stages import files

# where a file that holds more than a state dict may have it
KEYS = ("state_dict", "model")


def read_weights(path: Path) -> dict[str, Any]:
    """The state dict in a file; nothing in it is executed.

    path: of safetensors, or what torch.save() wrote: a state dict, or one under a key of `KEYS`.
    Raises: ValueError naming the file, and what it is instead; OSError where it can't be read.
    """
    if path.suffix == ".safetensors":
        return dict(files.read_tensors(path, advice="write it anew"))
    try:
        held = load_plain(path)
    except OSError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise ValueError(
            f"{path}: not a file of weights alone ({reason}); write it by "
            "torch.save(net.state_dict(), …) or as .safetensors"
        ) from error
    state = held
    for key in KEYS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            state = held[key]
            break
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        keys = f" of {', '.join(map(str, state))[:100]}" if isinstance(state, Mapping) else ""
        what = f"a {type(state).__name__}{keys}"
        raise ValueError(f"{path}: {what}, not a state dict, nor one under {' or '.join(KEYS)}")
    return dict(state)


def load_weights(net: nn.Module, path: str) -> None:
    """Give a network the weights in a file, all of them and no others.

    net: the network.
    path: of the file.
    Raises: ValueError naming the file and up to three tensors that are missing, too many, or of
    another shape; OSError where it can't be read.
    """
    load_state(net, read_weights(Path(path)), path)


def check_weights(net: nn.Module, path: str) -> None:
    """Raise what `load_weights` does where a file does not fit.

    net: stays as it is.
    path: of the file.
    """
    check_same_architecture(net, read_weights(Path(path)), path)
