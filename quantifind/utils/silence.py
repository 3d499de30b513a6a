"""Libraries that print unasked."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1


@contextmanager
def silent() -> Iterator[None]:
    """Within it, what other languages print to standard output is lost."""
    sys.stdout.flush()
    # what C has printed waits in a buffer of its own
    library = ctypes.CDLL(None if os.name == "posix" else "ucrtbase")
    library.fflush(None)
    kept, nowhere = os.dup(STDOUT), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)
