"""Libraries that print unasked."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1
# how many are within it, and where output went before the first
_lock, _within, _kept = threading.Lock(), 0, STDOUT


@contextmanager
def silent() -> Iterator[None]:
    """Within it, what is printed to standard output by any language is lost, in all threads."""
    try:
        _begin()
    except OSError:  # there is no output: test_silence_without_an_output
        yield
        return
    try:
        yield
    finally:
        _end()


def _begin() -> None:
    global _within, _kept
    with _lock:
        if _within == 0:
            _flush()
            _kept, nowhere = os.dup(STDOUT), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STDOUT)
            os.close(nowhere)
        _within += 1


def _end() -> None:
    global _within
    with _lock:
        _within -= 1
        if _within == 0:
            _flush()
            os.dup2(_kept, STDOUT)
            os.close(_kept)


def _flush() -> None:
    """What Python and C have printed waits in buffers of their own."""
    if sys.stdout is not None:
        sys.stdout.flush()
    ctypes.CDLL(None if os.name == "posix" else "ucrtbase").fflush(None)
