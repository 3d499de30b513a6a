"""Which look at the test split this is: a ladder that was judged there before is no new one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from quantifind.certification.ledger import Look, look
from stages import files, ladder

LOOKS = Path("looks.json")
# where dvc runs experiments beside the project, which are of its looks:
# test_each_ladder_is_a_look_and_the_cache_none
BESIDE = Path(".dvc/tmp/exps")


def count(limits: Mapping[str, float], *, confidence: float) -> Look:
    """Count the ladder of the search as judged on the test split, if it was not yet.

    The ledger is neither output nor dependency of a stage: what comes from the cache changes
    nothing, and what is judged anew only adds to it. It belongs under version control.

    limits: by measure, to which the ladder is judged.
    confidence: of all looks together.
    Raises: as `quantifind.certification.ledger.look`.
    """
    split = _digest(files.DATA / "test.safetensors")
    return look(ledger(), split, fingerprint(limits), confidence=confidence)


def fingerprint(limits: Mapping[str, float]) -> str:
    """Of the strategies of the ladder, their codes, and the limits.

    limits: by measure.
    """
    steps = files.read_json(files.LADDER)
    # not the facts, such as seconds, which differ between runs of the same search
    choices = [[step["tensors"], step["activations"], step["description"]] for step in steps]
    codes = [_digest(ladder.codes_of(number)) for number in range(len(steps))]
    values = json.dumps([choices, codes, dict(limits)], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:24]


def ledger() -> Path:
    """The ledger of the project, of which an experiment in a folder of dvc's is a copy."""
    for folder in Path.cwd().parents:
        if Path.cwd().is_relative_to(folder / BESIDE):
            return folder / LOOKS
    return LOOKS


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]
