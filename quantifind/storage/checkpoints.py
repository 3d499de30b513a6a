"""Numbered checkpoints in a folder, and the random state to go on with."""

import re
from pathlib import Path
from typing import Any

import torch

from quantifind.storage.states import load_plain
from quantifind.utils.naming import first_line
from quantifind.utils.whole_files import written_whole

NAME = re.compile(r"checkpoint-(\d+)\.pt")


def save_checkpoint(directory: Path | str, state: dict[str, Any]) -> Path:
    """Write ``state`` after the checkpoints already in ``directory``, making the folder if needed.

    The file gets its name when it is whole, so a kill leaves no half checkpoint.
    state: tensors, numbers, strings, lists and dicts.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    earlier = latest_checkpoint(directory)
    number = 1 if earlier is None else _number(earlier) + 1
    path = directory / f"checkpoint-{number:04d}.pt"
    for left in directory.glob(f".{path.name}.*"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)
    with written_whole(path) as partial:
        torch.save(state, partial)
    return path


def replace_checkpoint(directory: Path | str, state: dict[str, Any]) -> None:
    """`save_checkpoint`, then remove the checkpoint that was the latest before."""
    earlier = latest_checkpoint(Path(directory))
    save_checkpoint(directory, state)
    if earlier is not None:
        earlier.unlink()


def load_checkpoint(path: Path, keys: tuple[str, ...]) -> list[Any]:
    """What a checkpoint holds under ``keys``; nothing in it is executed (``weights_only``).

    Raises: ValueError naming the file that can't be read or lacks a key.
    """
    try:
        state = load_plain(path)
        return [state[key] for key in keys]
    except Exception as error:
        reason = first_line(error)
        raise ValueError(f"{path}: not a whole checkpoint ({reason})") from error


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the highest number, None where there is none."""
    numbered = [p for p in directory.glob("checkpoint-*.pt") if _number(p) >= 0]
    return max(numbered, key=_number, default=None)


def random_state(loader: Any) -> dict[str, Any]:
    """Of torch, of each CUDA device, and of a loader's own generator."""
    generator = getattr(loader, "generator", None)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": generator.get_state() if isinstance(generator, torch.Generator) else None,
    }


def set_random_state(state: dict[str, Any], loader: Any) -> None:
    """Go on from `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    generator = getattr(loader, "generator", None)
    if state["loader"] is not None and isinstance(generator, torch.Generator):
        generator.set_state(state["loader"])


def _number(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
