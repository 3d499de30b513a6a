"""A folder is its own table of plug-ins: a module put there is found by its name; anyone's module
by its dotted path, and anyone's file by its own."""

import importlib
import inspect
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from quantifind.utils.naming import described
from quantifind.utils.own_files import of_file
from quantifind.utils.sources import is_file


def names(package: str) -> list[str]:
    """The plug-ins in ``quantifind/<package>/``, sorted.

    >>> "uniform" in names("schemes")
    True
    """
    folder = importlib.import_module(f"quantifind.{package}")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def check(package: str, name: str) -> None:
    """Raise ValueError unless ``name`` is in the folder, a dotted path, or the path of a file that
    is there; nothing is imported."""
    if is_file(name):
        if not (name.endswith(".py") and Path(name).is_file()):
            here = "a path ends in .py and starts where the project does"
            raise ValueError(f"no file {name!r}: {here}, or is absolute")
        return
    if "." in name:
        return
    # a module that was imported is known without a look at the folder
    if f"quantifind.{package}.{name}" not in sys.modules and name not in names(package):
        found = ", ".join(names(package))
        raise ValueError(
            f"unknown {name!r}: quantifind/{package}/ has {found}; one of your own is given as "
            "path/to/file.py or package.module"
        )


def load(package: str, name: str, function: str) -> Callable[..., Any]:
    """A plug-in's function.

    package: a folder of quantifind.
    name: of a module in it, the dotted path of anyone's, or the path of anyone's file.
    function: what the module must have.
    Raises: ValueError for a module that is not there, can't be imported, or has no such function.
    """
    found = find(package, name, function)
    if found is None:
        raise ValueError(f"{_path(package, name)} has no function {function}()")
    return found


def find(package: str, name: str, function: str) -> Callable[..., Any] | None:
    """As `load`, but None where the module has no such function."""
    found = getattr(_module(package, name), function, None)
    return found if callable(found) else None


def _path(package: str, name: str) -> str:
    return name if "." in name or is_file(name) else f"quantifind.{package}.{name}"


def _module(package: str, name: str) -> ModuleType:
    check(package, name)
    path = _path(package, name)
    try:
        return of_file(Path(name)) if is_file(name) else importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{path}.".startswith(f"{error.name}."):
            raise ValueError(f"no module {name!r} can be imported: no {error.name!r}") from error
        raise ValueError(f"{path} can't be imported: {reason(error)}") from error
    except Exception as error:
        raise ValueError(f"{path} can't be imported: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Of an error in someone's own code: its kind, its first line, and the place in that code.

    >>> reason(KeyError("weight"))
    "KeyError: 'weight'"
    """
    package = Path(__file__).parents[1]
    ours = (f"{package}/", f"{package.with_name('stages')}/")
    others = (*ours, sysconfig.get_path("stdlib"), "<frozen")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith(others)
    ]
    # a SyntaxError says where it is by itself
    known = frames and not isinstance(error, SyntaxError)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if known else ""
    return f"{described(error)}{where}"


def arguments(
    function: Callable[..., Any], options: Mapping[str, Any], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments to call a plug-in's function with.

    options: what the user set. offered: what the pipeline knows; a function takes of it what it has
    a parameter for, unless the user set that.
    Raises: ValueError for an option that the function does not have, naming those it has.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any and (unknown := options.keys() - parameters.keys()):
        raise ValueError(
            f"unknown option {', '.join(sorted(unknown))}: {function.__module__}."
            f"{function.__name__}() has {', '.join(parameters) or 'none'}"
        )
    return {name: value for name, value in offered.items() if name in parameters} | {**options}
