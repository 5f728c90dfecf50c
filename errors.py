"""Errors that a user can mend. Each message is one line that names the fix; the CLI prints it and exits.

The exit code is 2, 3 where the work was done but for what failed, and 130 after Ctrl-C.
"""

import difflib
import errno
from collections.abc import Iterable, Sequence
from typing import Any


class VisibenchError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 2


class OptionError(VisibenchError, ValueError):
    """An option, key or value that is unknown, unused or out of range."""


class UnknownNameError(VisibenchError, LookupError):
    """A method, model or task that does not exist."""


class UnsupportedModelError(VisibenchError, TypeError):
    """A model, cache or attention implementation that the engine cannot prune."""


class InputError(VisibenchError, ValueError):
    """Inputs that do not fit the model, the method or the token layout."""


class DataError(VisibenchError, OSError):
    """Missing, corrupt or incompatible files: data sets, images, checkpoints, results."""


class StorageError(DataError):
    """A file of a run that cannot be written: a full disk, a missing permission."""


class IncompleteError(VisibenchError):
    """Some cells of a sweep failed, in whole or for some questions. ``cells``: those that are done."""

    exit_code = 3

    def __init__(self, message: str, cells: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.cells = list(cells)


class StoppedError(VisibenchError):
    """Ctrl-C, where the command can say what is left of its work."""

    exit_code = 130


def disk_full(error: BaseException | None) -> bool:
    """Whether a disk without room, or a used-up quota, lies behind an exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'fastv'? `` when a known name is close, and the list of known names in any case."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
