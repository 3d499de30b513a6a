"""What a run left at a revision or in an experiment of DVC, read from Git and the cache."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dvc.api
import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.scm import SCMError

from quantifind.utils.naming import naming
from stages.evidence import Evidence, read_evidence

# what stands in the folder, by dvc's name for it
WORKSPACE = "workspace"
# tables that a comparison does not show, and runs of earlier versions did not leave
UNUSED = ("changed", "random")


def results(names: Iterable[str] = ()) -> dict[str, Evidence]:
    """By a name for people the results of each revision.

    names: of revisions or experiments, or `WORKSPACE`; none for all models that have results, each
        once: from the folder, or the newest experiment.
    Returns: named by their models; by model and revision where several have the same.
    Raises: ValueError, one line: for an unknown revision with the ones there are; where one has no
    results, with its name; or where nothing has.
    """
    given = list(dict.fromkeys(names))
    found = [(name, *_at(name)) for name in given] if given else _all()
    if not found:
        raise ValueError("no model has results: run dvc repro, or dvc exp run -S model=…")
    models = [model for _, model, _ in found]
    return {
        model if models.count(model) == 1 else f"{model} ({name})": evidence
        for name, model, evidence in found
    }


def known() -> list[str]:
    """The experiments, newest first, branches and tags that results can be of."""
    with Repo() as repo:
        experiments = [name for names in repo.experiments.ls().values() for name, _ in names]
        branches, tags = repo.scm.list_branches(), repo.scm.list_tags()
    return [*experiments, *branches, *tags]


def _all() -> list[tuple[str, str, Evidence]]:
    """Of each model the first that has results."""
    found: dict[str, tuple[str, str, Evidence]] = {}
    for name in (WORKSPACE, *known()):
        try:
            model, evidence = _at(name)
        except ValueError:
            continue  # has no results, or of an older version
        found.setdefault(model, (name, model, evidence))
    return list(found.values())


def _at(name: str) -> tuple[str, Evidence]:
    """The model of a revision, and its results."""
    if name == WORKSPACE:
        with naming(name):
            params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
            return str(params["model"]), read_evidence(without=UNUSED)
    try:
        files: Any = dvc.api.DVCFileSystem(rev=name)
        params = yaml.safe_load(files.read_text("params.yaml", encoding="utf-8"))
    except (SCMError, DvcException) as error:
        there = ", ".join([WORKSPACE, *known()])
        raise ValueError(f"unknown revision {name!r}: there are {there}") from error

    def read(path: Path) -> str:
        return str(files.read_text(path.as_posix(), encoding="utf-8"))

    with naming(name):
        return str(params["model"]), read_evidence(read, without=UNUSED)
