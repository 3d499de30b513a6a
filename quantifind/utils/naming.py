"""Errors that say which tensor they are about."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Within it, a ValueError's text begins with ``what``; the error itself is its cause."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
