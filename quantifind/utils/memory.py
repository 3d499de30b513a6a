"""How much memory is free, and how this process keeps what it frees."""

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

# the folder of a group of processes that has a limit, and names in it: of the limit, of what is
# taken, and of the copies of files among that, which give way
_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        *("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
)


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


def free_bytes() -> int:
    """Bytes of memory that this process may still take, as the system says."""
    try:
        found = [1024 * _entries(Path("/proc/meminfo"))["MemAvailable"]]
    except (OSError, KeyError):  # not Linux: half of all of it
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    for folder, limit, taken, files in _GROUPS:
        try:
            most, used = (int(Path(folder, name).read_text()) for name in (limit, taken))
            given = _entries(Path(folder, "memory.stat")).get(files, 0)
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
        found.append(max(0, most - used + given))
    return min(found)


def _entries(path: Path) -> dict[str, int]:
    """Of lines of a name and a number."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
