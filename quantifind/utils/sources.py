"""Which files a module is made of: its own, and those beside it that it imports; nothing runs."""

import ast
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from quantifind.utils.plugins import is_file


def own_sources(name: str, root: Path = Path()) -> list[Path]:
    """The files of a module that is not of this package: its file first, then, sorted, the files
    under ``root`` or beside it that it imports, and that these import.

    name: the path of a file, or a dotted path; one of a single word, or in quantifind, has none.
    Raises: ValueError naming what is not there.
    """
    if not is_file(name) and ("." not in name or name.startswith("quantifind.")):
        return []
    first = Path(name) if is_file(name) else _file_of(name)
    folders = [root.resolve(), *([first.resolve().parent] if is_file(name) else [])]
    found: list[Path] = []
    waiting = [first.resolve()]
    if not is_file(name):
        waiting += _files(name.split("."), folders)  # of its packages, which run too
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.append(path)
            waiting += _imported(path, folders)
    return [first, *sorted(found[1:])]


def _file_of(name: str) -> Path:
    """Without running the packages that it is in, where the usual finder knows them."""
    folders, parts = None, name.split(".")
    spec = None
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), folders)
        folders = None if spec is None else spec.submodule_search_locations
        if folders is None and depth < len(parts):
            spec = None
            break
    if spec is None or spec.origin is None:
        try:
            spec = find_spec(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"no module {name!r} can be imported: no {error.name!r}") from error
    if spec is None or spec.origin is None:
        raise ValueError(f"no module {name!r} can be imported")
    return Path(spec.origin)


def _imported(path: Path, folders: list[Path]) -> Iterator[Path]:
    """The files that a file's import statements name, of those that are there."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # is said when it is imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name.split("."), folders)
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            starts = [path.parents[node.level - 1]] if node.level else folders
            for alias in node.names:
                yield from _files([*module, alias.name], starts)


def _files(parts: list[str], folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        if parts[0] in ("quantifind", "stages"):
            continue  # dvc.yaml has them
        place = folder
        for part in parts:
            place = place / part
            for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
                if file.is_file():
                    yield file.resolve()
