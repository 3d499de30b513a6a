"""How often a test split was looked at: the k-th ladder judged on it has level 5%/(k(k + 1)).

These add up to 5% over all k, so that all answers that were ever given on a split are right
together with 95% confidence (Bonferroni; the sum telescopes). The ledger is a small file of the
project: by fingerprint of the split the fingerprints of the ladders, in the order in which they
were judged, each with a few numbers of what was tested. What is judged again is no new look.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantifind.utils.naming import naming
from quantifind.utils.whole_files import written_whole

FORMAT = "quantifind looks 1"
# by how much, as a share, the numbers of one test may differ from machine to machine
ALIKE = 1e-4


@dataclass(frozen=True)
class Look:
    """One ladder, judged on a test split.

    k: which one it is of all that were judged there, from 1.
    level: how often it may err, of what all looks may.
    """

    k: int
    level: float

    @property
    def confidence(self) -> float:
        """Of the tests of this look."""
        return 1 - self.level


def level_of(k: int, *, confidence: float = 0.95) -> float:
    """How often the k-th look may err, where all looks together err in at most 1 − confidence.

    k: from 1.
    confidence: of all looks together.

    >>> round(sum(level_of(k) for k in range(1, 1000)), 4)
    0.05
    """
    return (1 - confidence) / (k * (k + 1))


def look(
    path: Path | str,
    split: str,
    ladder: str,
    *,
    tested: Sequence[float] = (),
    confidence: float = 0.95,
) -> Look:
    """Count a ladder that is judged on a test split; one that was judged there before is found.

    path: the ledger, a file that is made where there is none. It belongs under version control: who
        loses it starts to count anew.
    split: a fingerprint of the test split.
    ladder: a fingerprint of what is judged on it: its strategies, their codes and the limits.
    tested: what else makes it another test, as numbers, such as the float network's mean loss by
        the criterion. They are rounded nowhere, so none lies at an edge: they are the same where
        they differ by less than `ALIKE`.
    confidence: of all looks together.
    Raises: ValueError, one line that names the file, where it is damaged or of another format;
        OSError where it can't be read or written.
    """
    path = Path(path)
    with _alone(path):
        splits = _read(path)
        judged = splits.setdefault(split, [])
        numbers = " ".join(f"{number:.9g}" for number in tested)
        entry = f"{ladder}: {numbers}" if numbers else ladder
        with naming(str(path)):
            places = [i for i, one in enumerate(judged) if _is_of(one, ladder, tested)]
        # the same numbers before none: test_a_look_stands_in_a_ledger_once
        place = min(places, key=lambda i: (judged[i] == ladder, i), default=len(judged))
        # one without numbers, of an earlier version, is from now on of these:
        # test_a_look_without_numbers_is_of_the_first_that_has_some
        if place == len(judged) or (tested and judged[place] == ladder):
            judged[place : place + 1] = [entry]
            _write(path, splits)
    return Look(place + 1, level_of(place + 1, confidence=confidence))


def _is_of(entry: str, ladder: str, tested: Sequence[float]) -> bool:
    name, _, text = entry.partition(": ")
    numbers = [float(number) for number in text.split()]
    alike = len(numbers) == len(tested) and all(
        math.isclose(*pair, rel_tol=ALIKE) for pair in zip(numbers, tested, strict=True)
    )
    return name == ladder and (alike or not numbers)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process looks meanwhile; a kill lets the next one in.

    The folder is locked, since the file is replaced: test_processes_that_look_at_once_count_apart
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _read(path: Path) -> dict[str, list[str]]:
    if not path.exists():
        return {}
    advice = "take it from version control; without it looks are counted anew, and no answer holds"
    with naming(str(path)):
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"a damaged ledger of looks ({error}): {advice}") from error
        known = values.get("format") if isinstance(values, dict) else None
        if known != FORMAT:
            raise ValueError(f"a ledger of looks has format {FORMAT!r}, not {known!r}: {advice}")
        splits: Any = values.get("splits")
        if not _whole(splits):
            raise ValueError(f"a ledger of looks has lists of ladders by split: {advice}")
    return dict(splits)


def _whole(splits: Any) -> bool:
    return isinstance(splits, dict) and all(
        isinstance(ladders, list)
        and all(isinstance(ladder, str) for ladder in ladders)
        and len(set(ladders)) == len(ladders)
        for ladders in splits.values()
    )


def _write(path: Path, splits: dict[str, list[str]]) -> None:
    text = json.dumps({"format": FORMAT, "splits": splits}, indent=2)
    with written_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
