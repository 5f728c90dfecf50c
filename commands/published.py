"""Print the figures that papers publish."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import OptionError
from .shared import AsJson, terminal


def published(
    model: Annotated[str | None, typer.Option(help="E.g. llava-1.5-7b. (default: all)")] = None,
    method: Annotated[str | None, typer.Option(help="E.g. fastv, or none for the dense model. (default: all)")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="E.g. pope, or one column such as pope_f1. (default: all)")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", metavar="text|md|csv|json", help="How to print it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print figures from papers: by method and budget, each with its source and what to know about it."""
    from ..results.published import figures
    from ..results.published.show import render

    if as_json and form is not None:
        raise OptionError("--json and --format exclude each other: give one")
    print(render(figures(model, method, benchmark), "json" if as_json else form or "text", terminal()))
