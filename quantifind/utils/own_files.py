"""Modules from anyone's files: what stands beside a file can be imported by it, as in a script, and
is not what stands beside another (test_a_file_imports_what_stands_beside_it)."""

import builtins
import hashlib
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from quantifind.utils.sources import own_sources, stands_in


def of_file(path: Path) -> ModuleType:
    """The module of a file, which runs once. It, and what it imports from its folder, are modules
    of a package that is this folder's alone."""
    path = path.resolve()
    package = _package(path.parent)
    # no other module has this name: test_a_file_may_be_called_as_a_module_of_python
    stem = path.stem if path.stem.isidentifier() else f"file_{_digest(path)}"
    name = f"{package}.{stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path, loader=_Loader(name, str(path)))
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        _send_by_value(path)
    return sys.modules[name]


def _package(folder: Path) -> str:
    name = f"own_{_digest(folder)}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.meta_path.insert(0, _Finder(name, folder))
        if str(folder) not in sys.path:
            # for what is imported by its name, as by `importlib.import_module`
            sys.path.append(str(folder))
    return name


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()[:8]


class _Finder:
    """Finds the modules of a folder's package, whose imports are their own."""

    def __init__(self, package: str, folder: Path) -> None:
        self.package, self.folder = package, folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith(f"{self.package}."):
            return None
        place = self.folder.joinpath(*name.split(".")[1:])
        file, inside = place.with_name(f"{place.name}.py"), place / "__init__.py"
        if inside.is_file():
            where = [str(place)]
            return spec_from_file_location(
                name, inside, loader=_Loader(name, str(inside)), submodule_search_locations=where
            )
        if file.is_file():
            return spec_from_file_location(name, file, loader=_Loader(name, str(file)))
        return None  # a folder without __init__.py, which python finds by the path of its package


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        own = _Imports(module.__name__, sys.modules[module.__name__.partition(".")[0]].__path__[0])
        # which functions look up when they run, too
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": own}
        super().exec_module(module)


class _Imports:
    """The ``import`` of a module: what stands in its folder comes before all else, but itself."""

    def __init__(self, module: str, folder: str) -> None:
        self.module, self.package, self.folder = module, module.partition(".")[0], Path(folder)

    def __call__(
        self, name: str, globals: Any = None, locals: Any = None, names: Any = (), level: int = 0
    ) -> ModuleType:
        first = name.partition(".")[0]
        itself = f"{self.package}.{first}" == self.module
        if level or itself or not stands_in(self.folder, first):
            return builtins.__import__(name, globals, locals, names or (), level)
        found = builtins.__import__(f"{self.package}.{name}", globals, locals, names or (), 0)
        return found if names else sys.modules[f"{self.package}.{first}"]


def _send_by_value(path: Path) -> None:
    """No other process finds them by their names
    (test_a_network_of_a_file_reaches_other_processes)."""
    import cloudpickle

    sources = set(map(str, own_sources(str(path))))
    for found in list(sys.modules.values()):
        if getattr(found, "__file__", None) in sources:
            cloudpickle.register_pickle_by_value(found)
