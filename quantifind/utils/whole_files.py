"""Files that are whole or not there: written beside their name, which they get when it is done."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from quantifind.utils.naming import first_line


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """Within it, write to the path that it gives; after it, the file has its name.

    What had the name stays until then, and where the writing fails, however it does; then no part
    is left: test_a_write_that_fails_leaves_the_old_file_and_no_part

    path: of a file, there or not, in a folder that is there.
    Raises: ValueError naming the path that can't be written, such as of a full disk.
    """
    path = Path(path)
    try:
        # test_a_link_stays_one
        real = Path(os.path.realpath(path))
    except ValueError as error:  # of a name with a zero in it
        raise ValueError(f"{path}: can't be written ({error})") from error
    # of this write alone (test_writes_at_the_same_time_are_whole), and short, whatever the name
    # (test_names_are_as_long_as_the_system_takes)
    partial = real.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # a device would become a file: test_what_is_no_file_is_not_replaced
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        yield partial
        os.replace(partial, real)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        # torch.save counts bytes, and tells no more
        reason = (
            "too few bytes are taken: is the disk full?" if "unexpected pos" in reason else reason
        )
        raise ValueError(f"{path}: can't be written ({reason})") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
