"""Compute: figures in print beside what their settings execute, and what a model executes on real prompts."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, VisibenchError
from .shared import AsJson, SizedLayers, SizedPrompt, print_list, prompt_lengths

if TYPE_CHECKING:
    import pandas as pd

    from ..evals.compute.paper_flops import Reproduction
    from ..models import LoadedModel

PLANNED = "Nothing ran: the method's own scoring, merging and edited attention are not counted."
MARKS = {"rounded": "✓", "cut": "✓ cut off", "differs": "✗"}
HEADER = ["printed in", "setting", "text tokens", "printed", "by its formula", "executed", "÷ printed"]
UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))
TITLES = {
    "executed": "executed, all of the above",
    "planned": "planned, all of the above",
    "paper": "paper convention, visual tokens alone",
    "decode": "first decoding step",
    "lm_head": "LM head",
    "ffn": "FFN",
}
LEGEND = (
    "LLaVA-1.5-7B unless named. Text tokens: those of the prompt. By its formula: ✓ it gives the printed "
    "figure, rounded or cut off. Executed, in the printed unit: the whole prefill with vision tower, text, LM head and "
    "scoring; for FastV's figures the mean decoder layer, for attention that of the decoder, with scoring; – where no "
    "plan of tokens is printed, or the vision side is not LLaVA-1.5's. One multiply-add = 1, in ShortV's figures 2."
)


def flops(
    published: Annotated[
        bool, typer.Option("--published", help="Figures in print: recomputed, and what the same settings execute.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --published: a Markdown table.")] = False,
    model: Annotated[str | None, typer.Option(help="See `visibench models`; a local folder, or a hub name.")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME[:key=value,…]", help="E.g. fastv:keep=0.5. (default with --weights: each in turn)"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The prompts are a task's first questions. (default: pope)")] = None,
    data: Annotated[str | None, typer.Option(help="embedded, hub, or a folder. (default: embedded)")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of prompts. (default: 20)")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="random: run on a random prompt; meta: add up what the options leave, without any memory."),
    ] = None,
    layers: SizedLayers = None,
    lengths: SizedPrompt = None,
    as_json: AsJson = False,
) -> None:
    """Compute in multiply-adds: of figures in print, or of a model under a method."""
    ours, prompts, sizes = (model, method), (task, data, limit), (weights, layers, lengths)
    if published and any(option is not None for option in (*ours, *prompts, *sizes)):
        raise OptionError("--published takes no other option but --markdown and --json: leave them out")
    if published and markdown and as_json:
        raise OptionError("--markdown and --json exclude each other: give one")
    if published:
        _published(markdown, as_json)
        return
    sized = weights not in (None, "pretrained")
    if model is None or (method is None and not sized) or markdown:
        raise OptionError("give --published (alone or with --markdown), or --model with --method or --weights")
    if not sized:
        if any(option is not None for option in (layers, lengths)):
            raise OptionError("--layers and --lengths belong to --weights random or meta: add it, or leave them out")
        _print(*_questions(model, str(method), task or "pope", data or "embedded", limit or 20), as_json)
        return
    if any(option is not None for option in prompts):
        raise OptionError("--weights means a random prompt: give --lengths, not --task, --data or --limit")
    # Sizes alone count: half of the memory will do.
    from ..models import load_model

    loaded = load_model(model, dtype="bfloat16", weights=weights, layers=layers)  # type: ignore[arg-type]  # checked there
    tokens = prompt_lengths(lengths, loaded.adapter)
    if method is None:
        _print_each(loaded, tokens, as_json)
    else:
        _print(*_sized(loaded, method, tokens), as_json)


# ---- figures in print -----------------------------------------------------------------------------------------------


def _published(markdown: bool, as_json: bool) -> None:
    figures = reproductions()
    if markdown:
        print(published_markdown(figures))
        return
    from ..evals.compute.paper_flops import FORMULAS

    rows = [[*_row(one), one.claim.formula] for one in figures]
    formulas = [f"{name}: {formula.words}" for name, formula in FORMULAS.items()]
    notes = [f"{where(one)}, {one.claim.setting}: {one.claim.note}." for one in figures if one.claim.note]
    also = "\n".join(["", LEGEND, "", *formulas, "", *notes])
    print_list([_json(one) for one in figures], [*HEADER, "formula"], rows, also, as_json=as_json)


def reproductions() -> list[Reproduction]:
    """All figures in print, recomputed."""
    from ..evals.compute.paper_flops import claims, reproduce

    return [reproduce(claim) for claim in claims()]


def published_markdown(figures: list[Reproduction]) -> str:
    """The table of figures in print in docs/flops.md."""
    rule = ["---", "---", *["---:"] * (len(HEADER) - 2)]
    lines = ["| " + " | ".join(line) + " |" for line in (HEADER, rule, *map(_row, figures))]
    return "\n".join([*lines, "", LEGEND])


def where(one: Reproduction) -> str:
    """Paper and place of a printed figure."""
    return f"{one.claim.paper}, {one.claim.where}"


def _row(one: Reproduction) -> list[str]:
    claim = one.claim
    decimals = len(claim.printed.partition(".")[2]) + 1
    return [
        where(one),
        claim.setting,
        str(claim.prompt_text) if claim.text or claim.executed else "–",
        f"{claim.printed} {claim.unit}",
        f"{one.recomputed:.{decimals}f} {MARKS[one.agreement]}",
        "–" if one.executed is None else f"{one.executed:.{decimals}f}",
        "" if one.ratio is None else f"{one.ratio:.2f}",
    ]


def _json(one: Reproduction) -> dict[str, Any]:
    from ..evals.compute.paper_flops import FORMULAS, arxiv

    return one.claim.model_dump(exclude={"agrees"}) | {
        "arxiv": arxiv(one.claim.paper),
        "formula_in_words": FORMULAS[one.claim.formula].words,
        "recomputed": one.recomputed,
        "agreement": one.agreement,
        "executed_in_unit": one.executed,
        "executed_over_printed": one.ratio,
        "prompt_tokens": {"text": one.claim.prompt_text, "visual": one.claim.prompt},
    }


# ---- a model under a method -----------------------------------------------------------------------------------------


def _questions(model: str, method: str, task_name: str, data: str, limit: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Prefills of a task's first questions, and what they are."""
    from ..evals.compute.prefills import prefills, prompts
    from ..evals.settings.method_spec import parse
    from ..evals.tasks.tasks import load_tasks
    from ..models import load_model

    chosen = parse(method, model)
    (task,) = load_tasks([task_name], data)
    size, note = task.size(limit)
    loaded = load_model(model)
    chosen.check(loaded.geometry)
    facts: dict[str, Any] = {"model": model, "method": str(chosen), "task": task.name, "origin": task.origin}
    facts |= {"prompts": size, "of": len(task.docs), "note": note}
    return prefills(loaded, chosen, prompts(loaded, task, size)), facts


def _sized(loaded: LoadedModel, method: str, tokens: tuple[int, int]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The prefill of one random prompt of ``tokens`` (text, visual), run or planned, and what it is."""
    from ..evals.compute.prefills import planned, prefills
    from ..evals.settings.method_spec import parse

    chosen = parse(method, loaded.name)
    facts: dict[str, Any] = {"model": loaded.name, "method": str(chosen), "weights": loaded.weights}
    facts |= {"layers": loaded.geometry.layers, "text_tokens": tokens[0], "visual_tokens": tokens[1]}
    if loaded.weights == "random":
        return prefills(loaded, chosen, [loaded.synthetic_inputs(1, *tokens)]), facts | {"note": ""}
    frame = planned(loaded, chosen, *tokens).drop(columns="scoring").rename(columns={"executed": "planned"})
    return frame, facts | {"note": PLANNED}


def _print_each(loaded: LoadedModel, tokens: tuple[int, int], as_json: bool) -> None:
    """The prefill of one prompt under each method that the model runs: by its defaults, or else its first example."""
    from ..evals.invariants.families import ways
    from ..methods.registry import list_methods

    described: list[dict[str, Any]] = []
    refused: dict[str, list[str]] = {}
    adaptive: list[str] = []
    for name, cls in list_methods().items():
        reasons: list[str] = []
        for text in (name, *ways(cls).values()):
            try:
                frame, facts = _sized(loaded, text, tokens)
            except VisibenchError as error:
                reasons.append(str(error).removeprefix(name).lstrip(": "))
                continue
            macs = float(frame[frame.columns.intersection(["executed", "planned"])[0]].iloc[0])
            described.append(facts | {"macs": macs, "T": statistics.fmean(frame["visual_tokens"].iloc[0])})
            adaptive += [facts["method"]] * cls.adaptive
            break
        else:
            # Of the example with nothing named besides, unless something named lets it run and not be planned.
            why = next((reason for reason in reasons[1:] if "--weights random" in reason), reasons[1])
            refused.setdefault(why, []).append(name)
    dense = next((one["macs"] for one in described if one["method"] == "none"), None)
    if dense is None:  # nor anything else
        raise OptionError(next(why for why, names in refused.items() if "none" in names))
    open_ended = f"{', '.join(adaptive)}: how much they drop depends on the model; here its weights are random."
    note = described[0]["note"] or open_ended
    if as_json:
        whys = {name: why for why, names in refused.items() for name in names}
        print(json.dumps({"methods": described, "refused": whys, "note": note}, indent=1))
        return
    scale, unit = next(pair for pair in UNITS if dense >= pair[0] or pair is UNITS[-1])
    rows = [
        [one["method"], f"{one['T']:.1f}", f"{one['macs'] / scale:.4g}", f"{one['macs'] / dense:.1%}"]
        for one in described
    ]
    print(f"{loaded.name}: {_spell(described[0])}. One multiply-add = 1; LM head for one position.")
    notes = [note, *(f"{', '.join(names)}: {why}" for why, names in refused.items())]
    print_list([], ["method", "T", unit, "of dense"], rows, "\n" + "\n".join(notes), as_json=False)


def _print(frame: pd.DataFrame, facts: dict[str, Any], as_json: bool) -> None:
    layers = {name: _mean(frame.pop(name).tolist()) for name in ("visual_tokens", "kv_lengths")}
    macs = {name: {"mean": float(column.mean()), "sd": float(column.std(ddof=0))} for name, column in frame.items()}
    if as_json:
        print(json.dumps(facts | {"macs": macs, "mean_per_layer": layers}, indent=1))
        return
    scale, unit = next((pair for pair in UNITS if max(one["mean"] for one in macs.values()) >= pair[0]), UNITS[-1])
    rows = [
        [TITLES.get(str(name), str(name).replace("_", " ")), _spread(one, scale, len(frame))]
        for name, one in macs.items()
    ]
    print(f"{facts['model']} under {facts['method']}: {_spell(facts)}. One multiply-add = 1; LM head for one position.")
    counts = (" ".join(f"{count:.4g}" for count in layers[name]) for name in ("visual_tokens", "kv_lengths"))
    also = "\nVisual tokens at each layer's input, mean: {}\nKV cache of each layer after prefill, mean: {}"
    print_list(
        [], ["component", unit], rows, "\n".join(filter(None, [also.format(*counts), facts["note"]])), as_json=False
    )


def _spread(macs: dict[str, float], scale: float, prompts: int) -> str:
    mean = f"{macs['mean'] / scale:.4g}"
    return f"{mean} ± {macs['sd'] / scale:.2g}" if prompts > 1 else mean


def _spell(facts: dict[str, Any]) -> str:
    if "weights" in facts:
        prompt = f"{facts['text_tokens']} text and {facts['visual_tokens']} visual tokens"
        return f"{facts['layers']} decoder layers, {facts['weights']} weights, one prefill of {prompt}"
    prompts = f"the first {facts['prompts']} of {facts['of']} prompts of {facts['task']} ({facts['origin']})"
    return f"one prefill of each of {prompts}, mean ± standard deviation over prompts"


def _mean(lists: list[list[int]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*lists, strict=True)]
