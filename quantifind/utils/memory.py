"""How this process keeps memory that is freed."""

import ctypes
import platform
import sys
from functools import cache


@cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next pass, for the whole process.

    It would give it back to the system, and take it anew page by page, which takes longer than
    what is computed on it. Called where a process starts.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        library.mallopt(trim_threshold, 2**30)
        library.mallopt(mmap_threshold, 2**30)
