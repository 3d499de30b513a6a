"""A folder is its own table of plug-ins: a module put there is found by its name."""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def names(package: str) -> list[str]:
    """The plug-ins in ``quantifind/<package>/``, sorted.

    >>> "uniform" in names("schemes")
    True
    """
    folder = importlib.import_module(f"quantifind.{package}")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def check(package: str, name: str) -> None:
    """Raise ValueError unless ``name`` is in the folder or a dotted path; nothing is imported."""
    if "." in name:
        return
    # a module that was imported is known without a look at the folder
    if f"quantifind.{package}.{name}" not in sys.modules and name not in names(package):
        found = ", ".join(names(package))
        raise ValueError(f"unknown {name!r}: quantifind/{package}/ has {found}")


def load(package: str, name: str, function: str) -> Callable[..., Any]:
    """A plug-in's function; ``name`` may be the dotted path of anyone's module.

    Raises: ValueError for a name that is neither in the folder nor importable, or a module that has
    no such function.
    """
    check(package, name)
    path = name if "." in name else f"quantifind.{package}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        # a module that is there but imports something missing is its author's to see
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"no module {name!r} can be imported: no {error.name!r}") from error
    if not callable(found := getattr(module, function, None)):
        raise ValueError(f"{path} has no function {function}()")
    return found


def arguments(
    function: Callable[..., Any], options: Mapping[str, Any], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments to call a plug-in's function with.

    options: what the user set. offered: what the pipeline knows; a function takes of it what it has
    a parameter for, unless the user set that.
    Raises: ValueError for an option that the function does not have, naming those it has.
    """
    parameters = inspect.signature(function).parameters
    if unknown := options.keys() - parameters.keys():
        raise ValueError(
            f"unknown option {', '.join(sorted(unknown))}: {function.__module__}."
            f"{function.__name__}() has {', '.join(parameters) or 'none'}"
        )
    return {name: value for name, value in offered.items() if name in parameters} | {**options}
