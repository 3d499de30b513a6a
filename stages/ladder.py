"""The ladder of a search as files: what each strategy chose, its facts, and its packed codes."""

from pathlib import Path
from typing import Any

from quantifind.storage import artifact
from quantifind.strategy import Strategy
from stages import files


def write_ladder(steps: list[tuple[Strategy, dict[str, Any]]]) -> None:
    """Write each strategy's choices and facts, and the packed codes beside them.

    steps: from most bytes to fewest, strategies with their codes, and plain values about them.
    """
    described = []
    for number, (strategy, facts) in enumerate(steps):
        assert strategy.fitted is not None
        tensors, description = artifact.pack(strategy.fitted)
        files.write_tensors(_codes(number), tensors)
        described.append({**strategy.choices, "description": description, **facts})
    files.write_json(files.LADDER, described)


def read_ladder() -> list[tuple[Strategy, dict[str, Any]]]:
    """What `write_ladder` wrote.

    Raises: ValueError naming a file that is not whole; OSError where it can't be read.
    """
    steps = []
    for number, facts in enumerate(files.read_json(files.LADDER)):
        tensors, activations, description = (
            facts.pop(key) for key in ("tensors", "activations", "description")
        )
        fitted = artifact.unpack(files.read_tensors(_codes(number)), description)
        steps.append((Strategy(tensors, activations, fitted), facts))
    return steps


def _codes(number: int) -> Path:
    return files.LADDER.with_name(f"codes-{number:02d}.safetensors")
