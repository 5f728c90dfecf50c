"""Writing files that are whole or not there at all, also after a crash, a power cut or a full disk."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import StorageError, mend
from ...utils.files import read as read

PARTIAL = ".partial"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within: an :class:`OSError` becomes a :class:`StorageError` about ``path``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write to {path} ({error.strerror or error}): {mend(error)}, or choose another --out; what is "
            "finished is kept"
        ) from error


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield a name to write to; afterwards that file stands in the place of ``file``, or nothing has changed.

    A link stays one, to the new file. A terminal or ``/dev/null`` is written to as it is.
    """
    file = Path(os.path.realpath(file))
    if file.is_char_device():
        yield file
        return
    partial = file.with_name(f"{file.name}.{secrets.token_hex(6)}{PARTIAL}")  # processes of several machines write
    try:
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write(file: Path, text: str) -> None:
    """Write a text file as a whole."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def sweep_up(folder: Path, now: float) -> None:
    """Remove what crashed writers have left in a folder that several processes may write to.

    ``now``: when a file was written there just now, by the clock of the file system; what is older than a day goes.
    """
    for partial in folder.glob(f"*{PARTIAL}"):
        with suppress(OSError):
            if partial.stat().st_mtime < now - 24 * 3600:
                partial.unlink()


def append(file: Path, line: bytes) -> None:
    """Add a line to a file and force it to disk. A line that does not fit is taken back."""
    with file.open("ab", buffering=0) as stream:
        length = stream.seek(0, os.SEEK_END)
        try:
            if stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                stream.truncate(length)
            raise


def bound_lines(file: Path, head: bytes) -> list[bytes]:
    """The whole lines of a file behind its ``head``, which says what they belong to; none where it has another one."""
    try:
        lines = read(file).splitlines(keepends=True)
    except OSError:
        return []
    return [line for line in lines[1:] if line.endswith(b"\n")] if lines[:1] == [head] else []


def bind(file: Path, head: bytes) -> None:
    """Bring a file into a state to which lines can be added: its ``head``, what belongs to it, and no torn end."""
    with writing(file):
        make(file.parent)
        wanted = head + b"".join(bound_lines(file, head))
        if not file.exists() or read(file) != wanted:
            with whole(file) as partial:
                partial.write_bytes(wanted)


def make(folder: Path) -> None:
    """Make a folder, and those that it lies in, so that they are there after a power cut."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Within: the folder is there, and can be written to. If it was not, and stays empty, it goes again."""
    new = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    with writing(folder):
        make(folder)
        probe = folder / f"{secrets.token_hex(6)}{PARTIAL}"
        probe.touch()
        probe.unlink()
    try:
        yield
    finally:
        with suppress(OSError):
            for one in new:
                one.rmdir()


def sync(folder: Path) -> None:
    """Force the names in a folder to disk: a renamed file is there only when its folder is."""
    if os.name == "nt":  # cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(handle)
