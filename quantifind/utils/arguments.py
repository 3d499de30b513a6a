"""What a function is given, looked at before it begins: an error names the argument, what it is,
and what is needed."""

import os
from pathlib import Path
from typing import Any


def check(fits: bool, argument: str, given: Any, needed: str) -> None:
    """Raise ValueError unless what is given fits.

    needed: what would, in words.

    >>> check(False, "opset", "new", "a whole number is needed")
    Traceback (most recent call last):
    ValueError: opset is 'new': a whole number is needed
    """
    if not fits:
        raise ValueError(f"{argument} is {_described(given)}: {needed}")


def path_of(given: Any) -> Path:
    """The path of a file.

    Raises: ValueError for what is none: a number, None, an open file, or a text without a name.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    named = isinstance(text, str) and "\0" not in text and Path(text).name not in ("", "..")
    check(named, "path", given, "the path of a file, such as 'net.safetensors', is needed")
    return Path(given)


def _described(given: Any) -> str:
    """Plain values themselves, of others the kind; a line."""
    if given is None or isinstance(given, bool | int | float | str | bytes):
        text = repr(given)
        return text if len(text) < 60 else f"{text[:50]}…"
    kind = type(given).__name__
    return f"an {kind}" if kind[0] in "AEIOUaeiou" else f"a {kind}"
