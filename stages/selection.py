"""What `model` in params.yaml selects: found wrong before anything runs, and which files it is."""

import hashlib
from pathlib import Path
from typing import Any

from quantifind.certification.goal import Goal
from quantifind.utils import plugins
from quantifind.utils.naming import naming
from quantifind.utils.sources import own_sources
from stages import files
from stages.params import Params

WEIGHTS = (".safetensors", ".pt", ".pth")


def check(params: Params) -> None:
    """What can be found wrong in the parameters without running anything.

    params: all of params.yaml.
    Raises: ValueError, one line, that names the key.
    """
    entry, key = params.entry, f"{files.PARAMS}: models.{params.model}"
    for package, kind, name in (("models", "network", entry.network), ("data", "data", entry.data)):
        with naming(f"{key}.{kind}"):
            plugins.check(package, name)
    if entry.weights is not None:
        with naming(f"{key}.weights"):
            _check_weights(entry.weights)
    with naming(f"{files.PARAMS}: quantize.scheme"):
        plugins.check("schemes", params.quantize.scheme)
    with naming(f"{files.PARAMS}: search"):
        Goal.of(params.search.limit, params.search.budget)
    if (params.engine == "dask") != (params.scheduler is not None):
        raise ValueError(
            f"{files.PARAMS}: engine {params.engine!r} with scheduler {params.scheduler!r}: "
            "dask needs one, others take none"
        )


def _check_weights(name: str) -> None:
    if not name.endswith(WEIGHTS):
        raise ValueError(f"{name!r} is not a file of weights: {', '.join(WEIGHTS)} are read")
    if not Path(name).is_file():
        raise ValueError(f"no file {name!r}: a path starts where the project does, or is absolute")


def digests(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the files of one's own that the selected network and data are made of; and of the weights.

    params: all of params.yaml.
    Raises: ValueError for a module that is not there; OSError for a file that can't be read.
    """
    entry, key = params.entry, f"{files.PARAMS}: models.{params.model}"
    sources = {}
    for kind in ("network", "data"):
        with naming(f"{key}.{kind}"):
            sources[kind] = [digest(path) for path in own_sources(getattr(entry, kind))]
    weights = None if entry.weights is None else digest(Path(entry.weights))
    return sources, {"weights": weights}


def digest(path: Path) -> str:
    """Of a file.

    path: the file.
    Raises: OSError where it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
