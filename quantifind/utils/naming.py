"""Errors that say which tensor they are about, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class NotFinite(ValueError):
    """Of what comes to NaN or infinity."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Within it, a ValueError's text begins with ``what``; the error itself is its cause."""
    try:
        yield
    except ValueError as error:
        kind = NotFinite if isinstance(error, NotFinite) else ValueError
        raise kind(f"{what}: {error}") from error


def first_line(error: BaseException) -> str:
    """Of what an error says.

    >>> first_line(RuntimeError("no kernel\\nsee the log"))
    'no kernel'
    """
    return str(error).strip().partition("\n")[0]


def described(error: BaseException) -> str:
    """An error's kind, and the first line of what it says.

    >>> described(RuntimeError("no kernel\\nsee the log"))
    'RuntimeError: no kernel'
    """
    return f"{type(error).__name__}: {first_line(error)}"


def short(name: str, most: int = 40) -> str:
    """A name of at most so many characters, printable: its end tells it from others.

    >>> short("encoder.layers.11.attention.weight", 20)
    '…11.attention.weight'
    """
    name = printable(name)
    return name if len(name) <= most else f"…{name[1 - most :]}"


def printable(name: str) -> str:
    """A name without what would turn, break or hide text around it.

    >>> printable("a" + chr(0x202E) + "b")
    'a�b'
    """
    return "".join(each if each.isprintable() else "�" for each in name)
