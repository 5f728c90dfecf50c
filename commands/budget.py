"""Options with which methods meet one compute target."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import OptionError, UnsupportedModelError
from ..utils.rows import laid_out
from .shared import AsJson, Device, Dtype, SizedLayers, SizedPrompt, methods_in, prompt_lengths, terminal

if TYPE_CHECKING:
    from ..evals.compute.budget import Cost, Prompts, Solution
    from ..evals.compute.timing import Timing
    from ..evals.settings.method_spec import MethodSpec
    from ..evals.settings.target import Target

_LEGEND = (
    "T: visual tokens, mean over decoder-layer inputs and prompts, {how}. TFLOPs: {what}, one multiply-add = 1. The "
    "nearest setting is shown, however coarse the knob."
)
OFF = 0.1
"""A solution farther from its target, as a share of that, is named."""
_TRACED = {"how": "as traced", "what": "all that a prefill executes"}
_PLANNED = {"how": "by plan", "what": "what a prefill executes outside the method itself"}
Wanted = Annotated[
    str,
    typer.Option(
        metavar="KIND=NUMBER",
        help="tokens: mean visual tokens over layer inputs; tflops: executed in a prefill; ms: its measured time.",
    ),
]


def budget(
    model: Annotated[str, typer.Option(help="See `visibench models`; a local folder, or a hub name.")],
    target: Wanted,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "--method", metavar="NAME[:key=value,…],…", help="(default: all, layers scaled)"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The prompts are a task's first questions. (default: gqa)")] = None,
    samples: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of prompts. (default: 16)")] = None,
    data: Annotated[
        str | None, typer.Option(help="embedded, hub, or a folder laid out like the hub. (default: embedded)")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="random: run on a random prompt; meta: add up what options leave.")
    ] = None,
    layers: SizedLayers = None,
    lengths: SizedPrompt = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts at once; times are of one. (default: 8)")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Solve each method's options for one budget: what to pass to run and sweep, and what it really costs."""
    from ..evals.compute.budget import DENSE
    from ..evals.settings.target import Target

    wanted = Target.parse(target)
    specs = [spec.on(model) for spec in _specs(methods)]
    if weights in (None, "pretrained"):
        if layers is not None or lengths is not None:
            raise OptionError("--layers and --lengths belong to --weights random or meta: add it, or leave them out")
        prompts, where = _questions(
            model, device, dtype, task or "gqa", data or "embedded", samples or 16, batch_size or 8
        )
    elif any(option is not None for option in (task, samples, data, batch_size)):
        others = "--task, --samples, --data or --batch-size"
        raise OptionError(f"--weights {weights} means one prompt of any kind: give --lengths, not {others}")
    else:
        prompts, where = _sizes(model, device, dtype, str(weights), layers, lengths)
    solved, refused = _solved(specs, wanted, prompts)
    dense = prompts.time(DENSE) if wanted.kind == "ms" else None
    if not solved and len(refused) == 1:
        raise OptionError(*refused.values())
    result = {
        "model": prompts.loaded.describe(),
        "prompts": where,
        "target": {wanted.kind: wanted.value},
        "dense": _cost(prompts.dense, dense),
        "solved": [_solution(one) for one in solved],
        "refused": [{"method": method, "reason": reason} for method, reason in refused.items()],
    }
    print(json.dumps(result, indent=1)) if as_json else _print(result, str(wanted))
    if not solved:
        raise OptionError(f"{wanted} is out of reach of all {len(refused)} methods: the reasons stand above")


def _solved(specs: list[MethodSpec], wanted: Target, prompts: Prompts) -> tuple[list[Solution], dict[str, str]]:
    """The methods that meet the target, and why the others do not."""
    from ..evals.compute.budget import solve
    from ..evals.settings.method_spec import written

    solved, refused = [], {}
    with Console(stderr=True).status("Solving …") as status:
        for spec in specs:
            status.update(f"Solving {spec.name} for {wanted} …")
            try:
                solved.append(solve(spec.reference, spec.given, wanted, prompts))
            except (OptionError, UnsupportedModelError) as error:
                refused[written(spec.cls, spec.options)] = str(error)
    return solved, refused


def _questions(
    model: str, device: str, dtype: str, task: str, data: str, samples: int, batch_size: int
) -> tuple[Prompts, dict[str, Any]]:
    """The first questions of a task, and what they are."""
    from ..evals.compute.budget import Prompts
    from ..evals.tasks.tasks import load_tasks
    from ..models import load_model

    (loaded_task,) = load_tasks([task], data)
    prompts = Prompts.of(load_model(model, device=device, dtype=dtype), [loaded_task], samples, batch_size)
    where = {"task": task, "origin": loaded_task.origin, "first": prompts.count, "of": len(loaded_task.docs)}
    return prompts, where


def _sizes(
    model: str, device: str, dtype: str, weights: str, layers: int | None, lengths: str | None
) -> tuple[Prompts, dict[str, Any]]:
    """One random prompt on random weights, or one that only has a size; and what it is."""
    from ..evals.compute.budget import Planned, Prompts
    from ..models import load_model

    loaded = load_model(model, device=device, dtype=dtype, weights=weights, layers=layers)  # type: ignore[arg-type]
    text, visual = prompt_lengths(lengths, loaded.adapter)
    where = {"weights": weights, "layers": loaded.geometry.layers, "text_tokens": text, "visual_tokens": visual}
    if weights == "meta":
        return Planned(loaded, text, visual), where
    inputs = loaded.synthetic_inputs(1, text, visual)
    return Prompts(loaded, [inputs], inputs), where


def _specs(methods: list[str] | None) -> list[MethodSpec]:
    """What to solve, checked: those given, or the plainest example of every method less what a budget decides."""
    from ..evals.settings.method_spec import MethodSpec, decided, spell, split
    from ..methods import list_methods

    if methods is None:
        turned = [cls for cls in list_methods().values() if cls.knobs]
        plainest = [(cls, split(spell(cls, cls.examples[0]))[1]) for cls in turned]
        return [
            MethodSpec.of(cls.name, {key: value for key, value in options.items() if key not in decided(cls.knobs[0])})
            for cls, options in plainest
        ]
    specs = [MethodSpec.parse(text) for text in methods_in(methods)]
    for spec in specs:
        spec.knobs()  # raises where nothing is left to turn
    return specs


def _solution(one: Solution) -> dict[str, Any]:
    return {
        "spec": str(one.method),
        "method": one.method.name,
        "options": one.method.hyperparameters(),
        "knob": one.knob,
        "achieved": _cost(one.cost, one.timing),
    }


def _cost(cost: Cost, timing: Timing | None) -> dict[str, Any]:
    tokens = cost.tokens
    achieved: dict[str, Any] = {"tokens": tokens.mean, "last_layer": tokens.last, "per_layer": tokens.per_layer}
    achieved["tflops"] = cost.tflops
    if timing is not None:
        achieved["prefill_ms"] = {"median": timing.median_ms, "iqr": timing.iqr_ms, **dataclasses.asdict(timing)}
    return achieved


def _print(result: dict[str, Any], target: str) -> None:
    prompts, solved = result["prompts"], result["solved"]
    dense = _cells(result["dense"])
    wording = "first {first} of {of} prompts of {task} ({origin})"
    if "weights" in prompts:
        wording = "{weights} weights, {layers} layers, a prompt of {text_tokens} text and {visual_tokens} visual tokens"
    print(
        f"{result['model']['name']}, {wording.format(**prompts)}. "
        f"Dense: T={dense[0]}, {dense[2]} TFLOPs{', ' + dense[3] if dense[3:] else ''}.\n"
    )
    header = ["target", "T", "last layer", "TFLOPs", *["prefill"] * len(dense[3:]), "--method"]
    if solved:  # no specification is broken: it is there to be copied
        rows = [[target, *_cells(one["achieved"]), one["spec"]] for one in solved]
        print(laid_out(header, rows, terminal(), header[:-1]))
        print(f"\n{_LEGEND.format(**(_PLANNED if prompts.get('weights') == 'meta' else _TRACED))}")
    if solved and dense[3:]:
        timing = result["dense"]["prefill_ms"]
        print(
            f"Prefill: median ± interquartile range of {len(timing['times_ms'])} runs of the first prompt on "
            f"{timing['device']} after {timing['warmup']} to warm up, measured again once the setting was chosen: part "
            "of what it misses the target by is noise."
        )
    far = [one["spec"] for one in solved if _apart(one["achieved"], result["target"]) > OFF]
    if far:
        print(f"More than {OFF:.0%} off the target, the knob being coarse or the time noisy: {'; '.join(far)}.")
    if result["refused"]:
        print("\n".join(["", "Not possible:", *(f"  {one['reason']}" for one in result["refused"])]))


def _apart(cost: dict[str, Any], target: dict[str, float]) -> float:
    """How far a cost lies from the target, as a share of that."""
    ((kind, wanted),) = target.items()
    achieved = cost["prefill_ms"]["median"] if kind == "ms" else cost[kind]
    return abs(achieved - wanted) / wanted if wanted else float(achieved > 0)


def _cells(cost: dict[str, Any]) -> list[str]:
    cells = [f"{cost['tokens']:.2f}", f"{cost['last_layer']:.4g}", f"{cost['tflops']:.4g}"]
    timing = cost.get("prefill_ms")
    return [*cells, f"{timing['median']:.4g} ± {timing['iqr']:.2g} ms"] if timing else cells
