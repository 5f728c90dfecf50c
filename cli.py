"""The command line. Heavy imports stand inside the functions of ``commands``, so that ``--help`` answers at once."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__
from .commands import (
    analyze,
    budget,
    check,
    check_method,
    compare,
    fit,
    flops,
    lists,
    plot,
    profile,
    published,
    report,
    runs,
    wandb,
)
from .errors import VisibenchError
from .utils import machine

app = typer.Typer(
    name="visibench",
    help="Compare visual-token pruning methods for multimodal LLMs: accuracy against compute.",
    add_completion=False,
    pretty_exceptions_enable=False,
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
    fit.fit,
    analyze.analyze,
)

RESUMED = ("run", "sweep", "analyze")
"""Commands that go on where they stopped."""


def main() -> NoReturn:
    """Entry point: what a user can mend ends as one line on standard error and exit code 2."""
    # Where cores are shared with other programs, OpenMP threads that spin while they wait make small models several
    # times slower. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    atexit.register(gc.freeze)  # or the collector goes through all that was imported once more, for a second or two
    try:
        code = app(standalone_mode=False)
    except VisibenchError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        code = 130
    except _UsageProblem as error:
        _fail(f"{error.format_message()} (see `visibench --help`)", error.exit_code)
    if code == 130:  # Ctrl-C: raised or returned, depending on typer's version
        again = shlex.join(["visibench", *sys.argv[1:]])
        resumes = sys.argv[1:2] and sys.argv[1] in RESUMED
        _fail(f"interrupted{f': the same command goes on where this one stopped: {again}' if resumes else ''}", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    line = f"[bold red]error:[/] {escape(' '.join(message.split()))}"
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
    sys.exit(code)


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


for command in COMMANDS:
    app.command()(command)
app.add_typer(wandb.app, name="wandb")
