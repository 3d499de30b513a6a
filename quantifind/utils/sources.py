"""Which files a module is made of: its own, and those beside it that it imports; nothing runs."""

import ast
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path


def is_file(name: str) -> bool:
    """Whether a name is the path of a file, such as ``nets/my_net.py``."""
    return name.endswith(".py") or "/" in name


def own_sources(name: str) -> list[Path]:
    """The files of a module that is not of this package: its file first, then, sorted, the files
    in this folder or beside it that it imports, and that these import.

    name: the path of a file, or a dotted path; one of a single word, or in quantifind, has none.
    Raises: ValueError naming what is not there.
    """
    if not is_file(name) and ("." not in name or name.startswith("quantifind.")):
        return []
    first = Path(name) if is_file(name) else _file_of(name)
    # in this order, as it is run: test_a_file_imports_what_stands_beside_it
    folders = [*([first.resolve().parent] if is_file(name) else []), Path().resolve()]
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


def stands_in(folder: Path, name: str) -> bool:
    """Whether a folder has a module of this name; a folder without ``__init__.py`` is one where
    nothing else is called so."""
    place = folder / name
    if place.with_name(f"{name}.py").is_file() or (place / "__init__.py").is_file():
        return True
    return place.is_dir() and _found_elsewhere(name, folder) is None


def _found_elsewhere(name: str, folder: Path) -> ModuleSpec | None:
    others = [path for path in sys.path if Path(path).resolve() != folder.resolve()]
    spec = PathFinder.find_spec(name, others)
    return spec if spec is not None and spec.origin is not None else None


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
            for alias in node.names:
                names = [*module, alias.name]
                if node.level:
                    yield from _in_folder(names, path.parents[node.level - 1])
                else:
                    yield from _files(names, folders)


def _files(parts: list[str], folders: list[Path]) -> Iterator[Path]:
    """Of the first folder that has them."""
    if parts[0] not in ("quantifind", "stages"):  # which dvc.yaml has
        for folder in [folder for folder in folders if stands_in(folder, parts[0])][:1]:
            yield from _in_folder(parts, folder)


def _in_folder(parts: list[str], folder: Path) -> Iterator[Path]:
    for part in parts:
        folder = folder / part
        for file in (folder.with_name(f"{part}.py"), folder / "__init__.py"):
            if file.is_file():
                yield file.resolve()
