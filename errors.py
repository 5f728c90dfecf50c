"""Errors that a user can mend. Each message is one line that names the fix; the CLI prints it and exits with code 2."""

import difflib
from collections.abc import Iterable


class VisibenchError(Exception):
    """Base of all errors that a user can mend."""


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


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean 'fastv'? `` when a known name is close, and the list of known names in any case."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
