"""Errors that a user can fix. Each message is one line that names the fix; the CLI prints it and exits.

The exit code is 2, 3 where the work was done but for what failed, 130 after Ctrl-C and 143 after SIGTERM.
"""

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

FOREIGN = (Exception, SystemExit)
"""What may come out of code of others, such as plug-ins: they leave with ``sys.exit(0)``, too."""
LONGEST = 300
"""Characters of another library's message that are passed on."""
_MEND = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room")
_MEND |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "have yourself allowed to do that")
_MEND |= {errno.ENAMETOOLONG: "use shorter names"}


class VisibenchError(Exception):
    """Base of all errors that a user can fix. ``foreign``: code of others raised what lies behind it."""

    exit_code = 2

    def __init__(self, *arguments: Any, foreign: bool = False) -> None:
        super().__init__(*arguments)
        self.foreign = foreign


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


class NoRoomError(VisibenchError, MemoryError):
    """What does not fit into memory, by an estimate that was made before it was tried."""


class IncompleteError(VisibenchError):
    """Some cells of a sweep failed, in whole or for some questions. ``cells``: those that are done."""

    exit_code = 3

    def __init__(self, message: str, cells: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.cells = list(cells)


class StoppedError(VisibenchError):
    """Ctrl-C or SIGTERM, where the command can say what is left of its work."""

    exit_code = 130


@contextmanager
def boundary(what: str, kind: type[VisibenchError] = VisibenchError) -> Iterator[None]:
    """Within: whatever code of others raises becomes a ``kind``: ``what``, and why in one line."""
    try:
        yield
    except VisibenchError:
        raise
    except FOREIGN as error:
        raise kind(f"{what}: {reason(error)}", foreign=True) from error


def reason(error: BaseException) -> str:
    """Why, in one line, and of which type; of tenacity's retries what the last one raised."""
    last = getattr(error, "last_attempt", None)
    if last is not None and last.exception() is not None:
        return reason(last.exception())
    name = type(error).__name__
    try:
        text = str(error).strip()
    except Exception:  # its own
        text = ""
    return shortened(f"{name}: {text.splitlines()[0]}" if text else name, LONGEST)


def said(error: BaseException) -> str:
    """What to pass on of an error: our own words as they are, of others why."""
    return " ".join(str(error).split()) if isinstance(error, VisibenchError) else reason(error)


def shortened(text: str, most: int) -> str:
    """The text, in the middle of which something is left out if it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def mend(error: OSError) -> str:
    """What to do about a file that cannot be used."""
    return _MEND.get(error.errno or 0, "fix that")


def about_file(error: BaseException) -> str:
    """What to say of a file that cannot be used, which nobody looked at before; empty for other errors."""
    if not isinstance(error, OSError) or error.filename is None:
        return ""
    name = shortened(str(error.filename), LONGEST)
    return f"cannot use {name} ({error.strerror}): {mend(error)}, or give another path"


def disk_full(error: BaseException | None) -> bool:
    """Whether a disk without room, or a used-up quota, lies behind an exception."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(one, OSError) and one.errno in full for one in behind(error))


def behind(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'fastv'? `` when a known name is close, and the list of known names in any case."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
