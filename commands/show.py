"""Draw which visual tokens methods keep of one image, and what is answered then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .shared import AsJson, Device, Dtype, methods_in


def show(
    image: Annotated[list[Path], typer.Option(metavar="FILE", help="The image; repeat it for several.")],
    question: Annotated[str, typer.Option(help="What is asked about it.")],
    model: Annotated[str, typer.Option(help="tiny, a local folder, or a hub name.")],
    methods: Annotated[
        list[str],
        typer.Option("--methods", "--method", metavar="NAME[:key=value,…],…", help="Repeat it, or name several: a,b."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .png or .svg file.")] = Path("tokens.png"),
    weights: Annotated[str, typer.Option(help="pretrained; others answer nothing.")] = "pretrained",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw the image with the tokens that each method keeps, layer by layer, beside the dense model and its attention.

    Prints the answers, T (visual tokens, mean over decoder layers) and executed TFLOPs of the prefill.
    """
    from ..analysis.overlay import overlay
    from ..analysis.stages import check_trained
    from ..evals.settings.method_spec import parse
    from ..models import load_model
    from ..models.inputs import as_rgb
    from ..results.figures import style

    check_trained(weights)
    wanted = [parse(text, model) for text in methods_in(methods)]
    style.check(out)
    pictures = [as_rgb(file) for file in image]
    loaded = load_model(model, device=device, dtype=dtype)
    for method in wanted:
        method.check(loaded.geometry)
    drawn, shown = overlay(loaded, pictures, question, wanted)
    style.save(drawn.figure, out)
    if as_json:
        print(json.dumps({"picture": str(out), "methods": [vars(one) for one in shown]}, indent=1))
        return
    for one in shown:
        print(one.said())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"Drawn in {out}.")
