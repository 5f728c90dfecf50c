"""Standard output and error that take every character, whatever the encoding."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_PLAIN = {"±": "+/-", "×": "x", "·": "|", "…": "...", "–": "-", "—": "-", "−": "-", "≥": ">=", "≤": "<=", "→": "->"}
_PLAIN |= {"≈": "~", "█": "#", "▁": "_", "†": "+", "‡": "++", "“": '"', "”": '"', "’": "'", "━": "-", "─": "-"}


def take_all_characters() -> None:
    """Have both streams write what their encoding lacks in ASCII, from now on: ``+/-`` for ±, ``e`` for é, else ``?``.

    So a table is whole in a terminal that knows no ±, and nothing that a sweep has stored is lost over its last line.
    """
    codecs.register_error("visibench.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="visibench.plain")


def unwritable(text: str) -> str:
    """What keeps a text from standing in files and names; empty if nothing does."""
    if "\0" in text:
        return "a NUL character, which no name of a file has"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{error.object[error.start]!a}, which is no character"
    return ""


def printable(text: str) -> str:
    """The text, control characters as Python writes them."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(one) or _base(one) for one in lacking), error.end


def _base(one: str) -> str:
    return unicodedata.normalize("NFKD", one).encode("ascii", "ignore").decode() or "?"
