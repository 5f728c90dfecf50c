"""Write the report of a run folder."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shared import check_writable, finished

if TYPE_CHECKING:
    from ..reports.question_image import ImageSource
    from ..results.tables.method_facts import MethodFacts


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The page. (default: DIR/report.html)")
    ] = None,
    questions: Annotated[
        int, typer.Option(min=0, max=200, metavar="N", help="How many questions to show with all answers.")
    ] = 24,
    images: Annotated[bool, typer.Option(help="Show the questions' images, from the data of the run.")] = True,
) -> None:
    """Write one HTML page of a run: what it shows, tables, figures, methods, questions with all answers, environment.

    The page is one file that loads nothing. Images that cannot be loaded any more are left out with the reason.
    """
    from ..reports.html.report import report as page_of
    from ..reports.question_image import no_images
    from ..results.store import disk, stage_records
    from ..results.tables.tables import build

    cells = finished(folder)
    file = out or folder / "report.html"
    check_writable(file)
    analysis = folder / stage_records.STAGES
    page = page_of(
        build(cells),
        folder.resolve().name,
        questions=questions,
        images=_images() if images and questions else no_images,
        about=_about(),
        stages=stage_records.read(analysis) if analysis.exists() else None,
    )
    with disk.writing(file):
        disk.write(file, page)
    print(f"{file} ({len(page.encode()) / 1e6:.1f} MB)")


def _images() -> ImageSource:
    from ..reports.image_loader import ImageLoader

    return ImageLoader()


def _about() -> dict[str, MethodFacts]:
    """Facts about all methods by name; nothing that runs one is imported for those of this package."""
    from ..results.store.records import CONTROL
    from ..results.tables.method_facts import MethodFacts, known
    from ..utils.machine import ROOT

    about = "Random tokens at a method's own layers and counts, question by question."
    algorithm = ast.get_docstring(ast.parse((ROOT / "evals" / "answers" / "control.py").read_bytes())) or ""
    return {CONTROL: MethodFacts("Control", about, algorithm)} | known()
