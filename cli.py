"""The command line. Heavy imports stand inside the functions of ``commands``, so that ``--help`` answers at once."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import sys
from functools import cache
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__
from .commands import (
    analyze,
    budget,
    calibrate,
    check,
    check_method,
    compare,
    flops,
    lists,
    plot,
    profile,
    published,
    report,
    reproduce,
    runs,
    shared,
    show,
    wandb,
)
from .errors import FOREIGN, StoppedError, VisibenchError, about_file, behind, reason, shortened
from .utils import interrupt, machine, output
from .utils.output import unwritable

app = typer.Typer(
    name="visibench",
    help="Compare visual-token pruning methods for multimodal LLMs: accuracy against compute.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its panels cut words off
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
# Click's class or typer's own copy of it, depending on typer's version.
_UsageProblem: Any = typer.BadParameter.__mro__[2]

COMMANDS = (
    lists.methods,
    lists.models,
    lists.tasks,
    runs.run,
    runs.sweep,
    runs.table,
    plot.plot,
    report.report,
    compare.compare,
    check.check,
    check_method.check_method,
    profile.profile,
    flops.flops,
    budget.budget,
    published.published,
    reproduce.reproduce,
    calibrate.calibrate,
    show.show,
    analyze.analyze,
)

RESUMED = ("run", "sweep", "analyze", "reproduce")
"""Commands that go on where they stopped."""
READING = ("table", "report", "check", "compare", "plot")
"""Commands that read a run folder, print, and end."""
LONGEST_LINE = 1500
"""Characters of a line that says what went wrong."""


def main() -> NoReturn:
    """Entry point: whatever goes wrong ends as one line on standard error.

    Exit code 2, 3 where the work was done but for what failed, 130 after Ctrl-C and 143 after SIGTERM. What others'
    code raised is in a file, which the line names.
    """
    # OpenMP threads that spin for long while they wait make small models several times slower where cores are shared
    # with other programs; threads that sleep at once, 1.6 times slower where they are not. So they spin for some
    # microseconds, as long as the next kernel takes to come. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    atexit.register(gc.freeze)  # or the collector goes through all that was imported once more, for a second or two
    output.take_all_characters()
    interrupt.listen()
    for argument in sys.argv[1:]:
        if odd := unwritable(argument):
            _fail(f"{argument!a}: {odd}: rename the file, or write it in UTF-8")
    try:
        with _tree().make_context("visibench", sys.argv[1:]) as context:
            context.command.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        again = shlex.join(["visibench", *sys.argv[1:]])
        resumes = sys.argv[1:2] and sys.argv[1] in RESUMED
        told = f": the same command goes on where this one stopped: {again}" if resumes else ""
        _fail(f"interrupted{told}", interrupt.code())
    except VisibenchError as error:
        stopped = isinstance(error, StoppedError)
        _fail(f"{error}{_kept(error) if error.foreign else ''}", interrupt.code() if stopped else error.exit_code)
    except _UsageProblem as error:
        asked = error.ctx.command_path if error.ctx else "visibench"
        _fail(f"{error.format_message()} (see `{asked} --help`)", error.exit_code)
    except FOREIGN as error:
        if any(isinstance(one, BrokenPipeError) for one in behind(error)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or what is left to write complains at the exit
            _fail("nobody reads the output any more")
        _fail(f"{about_file(error) or f'unforeseen: {reason(error)}'}{_kept(error)}")
    sys.exit(0)


@cache
def _tree() -> Any:
    """All commands; to put them together takes most of the time of one that only refuses."""
    return typer.main.get_command(app)


def _fail(message: str, code: int = 2) -> NoReturn:
    line = shortened(output.printable(" ".join(message.split())), LONGEST_LINE)
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(line)}")
    sys.exit(code)


def _kept(error: BaseException) -> str:
    """Write the traceback of an error down, and return where it lies."""
    import tempfile
    import traceback

    try:
        handle, name = tempfile.mkstemp(prefix="visibench-", suffix=".traceback.txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except Exception:  # no room, or an exception that cannot be written: the line says what there is to say
        return ""
    return f" (traceback in {name})"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Compare visual-token pruning methods for multimodal LLMs: accuracy against compute."""
    machine.one_process()
    if version:
        print(f"visibench {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif context.invoked_subcommand in READING and gc.isenabled():
        gc.disable()  # what is read stays: the collector would go through all of it again and again, for nothing
        context.call_on_close(gc.enable)


for command in COMMANDS:
    shared.add(app, command)
app.add_typer(wandb.app, name="wandb")
