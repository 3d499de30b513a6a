"""Curves while a stage runs: `dvc plots` and the DVC view of VS Code show them as they grow."""

import csv
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

# takes numbers by name
Log = Callable[[Mapping[str, float]], None]


@contextmanager
def live(folder: Path, names: Sequence[str], *, step: str) -> Iterator[Log]:
    """Within it, each call adds a point to the curve of each name, where it has one.

    folder: has the curves in NAME.tsv, with a header from the start; it is made anew.
    names: of the curves.
    step: the name of what they are drawn over.
    """
    # not by DVCLive, which fails in a repository without a commit, and makes a .dvc where there is
    # none (test_curves_grow_wherever_a_stage_runs)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = {name: folder / f"{name}.tsv" for name in names}
    for name, file in files.items():
        _add(file, ["step", name])

    def log(values: Mapping[str, float]) -> None:
        for name in files.keys() & values.keys():
            _add(files[name], [round(values.get(step, 0), 1), values[name]])

    yield log


def _add(file: Path, row: Sequence[object]) -> None:
    with file.open("a", newline="", encoding="utf-8") as opened:
        csv.writer(opened, delimiter="\t", lineterminator="\n").writerow(row)
