"""Files that others wrote."""

from __future__ import annotations

import errno
import stat
from pathlib import Path


def read(file: Path | str) -> bytes:
    """The content of a file; :class:`OSError` for what is none, such as a pipe, which could be read for ever.

    So too for a name that no file can have.
    """
    try:
        mode = Path(file).stat().st_mode
    except ValueError as error:  # a NUL in it
        raise OSError(errno.EINVAL, str(error)) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "no regular file")
    return Path(file).read_bytes()
