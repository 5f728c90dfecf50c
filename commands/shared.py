"""Options and output that several commands have in common."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import DataError, OptionError, UnknownNameError, suggest
from ..utils.rows import laid_out

if TYPE_CHECKING:
    from ..models.adapters import Adapter
    from ..results.store.store import Cell

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
FeatureCache = Annotated[
    float | None,
    typer.Option(
        "--feature-cache-gb",
        min=0,
        metavar="GIB",
        help="Memory for vision features that questions and methods share, and four times as much on disk; 0: none. "
        "Results are the same. (default: 1)",
    ),
]
DEVICES, DTYPES = "auto, cpu, cuda, cuda:1 …", "auto, float32, bfloat16, float16."
Seed = Annotated[int, typer.Option(min=0, max=2**53, help="Each batch starts from generators seeded with it.")]
Device = Annotated[str, typer.Option(help=DEVICES)]
Dtype = Annotated[str, typer.Option(help=DTYPES)]
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 … (default: sdpa)")]
Packed = Annotated[
    str | None,
    typer.Option("--quantization", metavar="4bit|8bit", help="Pack weights, by bitsandbytes."),
]
DeviceMap = Annotated[
    str | None, typer.Option(metavar="auto|…", help="As transformers takes it, in place of --device; decoder on one.")
]
Compiled = Annotated[bool | None, typer.Option("--compile", help="Norms and MLPs of the decoder by torch.compile.")]
FewestPixels = Annotated[int | None, typer.Option("--min-pixels", min=1, help="Of an image, for Qwen-VL.")]
MostPixels = Annotated[int | None, typer.Option("--max-pixels", min=1, help="Of an image, for Qwen-VL.")]
SizedLayers = Annotated[int | None, typer.Option(min=1, help="With --weights: only so many decoder layers.")]
SizedPrompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT/VISUAL", help="With --weights: the prompt. (default: 64 and one image)"),
]
Margin = Annotated[
    float | None,
    typer.Option(metavar="PERCENT", help="Also test whether they differ by less than this, in % of the best score."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Ask only the first N questions of each task.")]


def add(app: typer.Typer, command: Callable[..., None]) -> None:
    """Make a function a command of ``app``; the first paragraph of its docstring stands in the list, uncut."""
    app.command(short_help=" ".join((command.__doc__ or "").partition("\n\n")[0].split()))(command)


def run_folder(model: str) -> Path:
    """Where the results of a model lie if nothing else is said: in ``runs``, whatever the way to its folder."""
    name = Path(model).name
    return Path("runs") / (Path(model).resolve().name or "model" if name in ("", "..") else name)


def print_list(
    records: list[dict[str, Any]], header: list[str], rows: list[list[str]], also: str = "", *, as_json: bool
) -> None:
    """Print ``records`` as JSON, or ``rows`` as a table with the lines ``also`` below."""
    if as_json:
        print(json.dumps(records, indent=1))
        return
    print(laid_out(header, rows, width()))
    for line in also.splitlines():
        wrapped(line)


Current = Annotated[
    bool,
    typer.Option("--current", help="Only what the code as it is now made, not what older code did."),
]


def finished(folder: Path, *, current: bool = False) -> list[Cell]:
    """The finished cells of a run folder; a line on standard error says if there are others.

    ``current``: only those of the code as it is now. Raises :class:`DataError` if all are of other code.
    """
    from ..results.store.store import FAILURES, Store

    store = Store(folder)
    cells, others = store.cells(), store.unfinished()
    if others:
        failed = [path / FAILURES for path in others if (path / FAILURES).exists()]
        told = f"{len(failed)} failed: see {failed[0]}" if failed else f"first: {others[0].name}"
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(
            f"Left out: {len(others)} of {len(cells) + len(others)} cells of {folder} are not finished ({told}); the "
            "command that began them goes on with them."
        )
    chosen = [cell for cell in cells if not cell.other_code] if current else cells
    if cells and not chosen:
        raise DataError(f"all cells of {folder} are of other code than is here: run it again, or drop --current")
    return chosen


def terminal() -> int | None:
    """Columns of the terminal to print in; None where the output goes to a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def width() -> int:
    """Columns to print in: the terminal's, or many where the output goes to a file."""
    return terminal() or 160


def share(percent: float | None) -> float | None:
    """What ``--margin`` gives, as a share. Raises :class:`OptionError` for what is none."""
    if percent is not None and not 0 < percent < 100:
        raise OptionError(f"--margin {percent:g} is no share of a score: give percent above 0 and below 100, such as 2")
    return None if percent is None else percent / 100


def names(text: str | None, known: Collection[str], option: str) -> list[str]:
    """Names separated by commas, each one of ``known``; none without a text."""
    found = [name.strip() for name in text.split(",")] if text is not None else []
    for name in found:
        if name not in known:
            raise UnknownNameError(f"{option}: {name!r} is unknown; {suggest(name, known)}")
    return list(dict.fromkeys(found))


def methods_in(texts: Iterable[str]) -> list[str]:
    """Methods named by options, one or several in each: a comma in front of key=value goes on with the same method."""
    found = (one.strip() for text in texts for one in re.split(r",(?!\s*\w+\s*=)", text))
    return [one for one in found if one]


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, of so many steps; what is yielded takes how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def wrapped(text: str, hang: str | None = None) -> None:
    """Print a line of prose, broken between words where the terminal is narrower.

    ``hang``: what stands before its second line and those behind it; by default what stands before the first.
    """
    indent = text[: len(text) - len(text.lstrip())] if hang is None else hang
    room = min(terminal() or 120, 120)
    print(textwrap.fill(text, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def spelled_p(p: float) -> str:
    """A p-value in four decimals; none is 0."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def integers(text: str, separator: str, option: str) -> list[int]:
    """The numbers that ``option`` was given. Raises :class:`OptionError` for what is none."""
    parts = [part.strip() for part in text.split(separator)]
    wrong = [part for part in parts if not part.isascii() or not part.isdigit()]
    if wrong:
        raise OptionError(f"{option}: expected a number, not {wrong[0]!r}")
    return [int(part) for part in parts]


def prompt_lengths(text: str | None, adapter: Adapter) -> tuple[int, int]:
    """Text and visual tokens from ``TEXT/VISUAL``; without it, 64 and those of an ordinary image of the model.

    Raises :class:`OptionError` for anything else.
    """
    from ..models.geometry import MOST_TOKENS, typical

    if text is None:
        return 64, typical(adapter)
    numbers = integers(text, "/", "--lengths")
    if len(numbers) != 2 or not numbers[0] or sum(numbers) > MOST_TOKENS:
        raise OptionError(
            f"--lengths: expected TEXT/VISUAL such as 64/576, of {MOST_TOKENS:,} tokens at most, not {text!r}"
        )
    return numbers[0], numbers[1]


def check_writable(file: Path) -> None:
    """Raise :class:`DataError` if ``file`` cannot be written: before the work whose outcome goes there."""
    if file.is_fifo():
        raise DataError(f"cannot write to {file} (a pipe, which nobody may ever read): choose another file")
    existed = file.exists()
    try:
        file.open("a", encoding="utf-8").close()
    except OSError as error:
        raise DataError(f"cannot write to {file} ({error.strerror}): choose another file") from error
    if not existed:
        file.unlink()
