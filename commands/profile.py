"""Time, memory and compute of methods on random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import IncompleteError, OptionError, StoppedError
from ..utils.rows import laid_out
from .shared import (
    DEVICES,
    DTYPES,
    AsJson,
    Attention,
    Compiled,
    DeviceMap,
    Packed,
    check_writable,
    integers,
    methods_in,
    terminal,
    wrapped,
)

if TYPE_CHECKING:
    from ..evals.compute.profile import ProfileConfig
    from ..results.store.profiles import Profile, ProfileRow, RepeatedTimes

HEADER = (
    ("visual", "tokens T"),
    ("vision", "ms"),
    ("prefill", "ms"),
    ("decode", "ms/token"),
    ("end to end", "ms"),
    ("overhead", "ms"),
    ("prefill", "speed-up"),
    ("promised", "speed-up"),
    ("realised", "of it"),
    ("attainable", "speed-up"),
    ("realised", "of it"),
    ("tokens", "1/s"),
    ("KV", "MiB"),
    ("peak", "MiB"),
    ("waits", "+ a step"),
)
RowLengths = Annotated[
    str | None,
    typer.Option(metavar="PROMPT/VISUAL/NEW,…", help="Tokens of a row. (default: 64, one image, 16)"),
]


def profile(
    config: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of one in the package: profile_7b, profile_cpu.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="See `visibench models`; a local folder, or a hub name.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "--method", metavar="NAME[:key=value,…],…", help="Repeat it, or name several: a,b."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="pretrained, or random: sizes count, not answers.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many decoder layers, of random weights.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(metavar="A,B", help="Rows at once. (default: 1)")] = None,
    lengths: RowLengths = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed rounds. (default: 20)")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Rounds before them. (default: 3)")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICES)] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPES)] = None,
    attention: Attention = None,
    quantization: Packed = None,
    device_map: DeviceMap = None,
    compiled: Compiled = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on a CPU. (default: all cores)")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time methods against the dense model: by phase, with memory, and against what their compute promises.

    Takes a configuration, or --model and --methods; options replace what the configuration says.
    """
    from ..evals.compute.profile import ProfileConfig
    from ..evals.settings.config import parse
    from ..evals.settings.include import read

    given: dict[str, Any] = {
        "model": model,
        "methods": methods and methods_in(methods),
        "weights": weights,
        "layers": layers,
        "batch_sizes": batch_sizes and integers(batch_sizes, ",", "--batch-sizes"),
        "lengths": lengths and [_lengths(part) for part in lengths.split(",")],
        "repeats": repeats,
        "warmup": warmup,
    }
    given |= {"device": device, "dtype": dtype, "threads": threads, "attention": attention}
    given |= {"quantization": quantization, "device_map": device_map, "compile": compiled}
    if config is None and not (model and methods):
        raise OptionError("nothing to profile: give a configuration such as profile_cpu, or --model and --methods")
    content, source = read(config) if config else ({}, "visibench profile")
    content |= {key: value for key, value in given.items() if value is not None}
    settings = parse(ProfileConfig, content, str(source))
    if out is not None:
        check_writable(out)
    result = _measured(settings, out)
    if as_json:
        print(result.model_dump_json(indent=1))
    else:
        _print(result)
    if result.left_out:
        raise IncompleteError(f"{', '.join(result.left_out)}: left out, since it does not fit in memory: ask for less")


def _measured(settings: ProfileConfig, out: Path | None) -> Profile:
    """Measure, and write to ``out`` what there is after each batch size and length."""
    from ..evals.compute.profile import profile as measure
    from ..results.store import disk

    done = 0

    def keep(so_far: Profile) -> None:
        nonlocal done
        done = len(so_far.together())
        if out is not None:
            with disk.writing(out):
                disk.write(out, so_far.model_dump_json(indent=1))

    try:
        return measure(settings, Console(stderr=True), keep)
    except KeyboardInterrupt:
        held = f"{out} holds the {done} batch sizes and lengths that were done" if out and done else "nothing is stored"
        raise StoppedError(f"interrupted: {held}") from None


def _lengths(text: str) -> dict[str, int]:
    parts = integers(text, "/", "--lengths")
    if len(parts) != 3:
        raise OptionError(f"--lengths: expected PROMPT/VISUAL/NEW such as 64/576/16, not {text!r}")
    return dict(zip(("prompt", "visual_tokens", "new_tokens"), parts, strict=True))


def _print(result: Profile) -> None:
    header = [f"{name}\n{unit}" for name, unit in HEADER]
    for rows in result.together():
        print(f"batch {rows[0].batch_size}: {rows[0].lengths.spelled()}")
        lines = [[row.method, *_cells(row, rows[0])] for row in rows]
        print(laid_out(["method", *header], lines, terminal(), header), end="\n\n")
    for line in _legend(result):
        wrapped(line)


def _cells(row: ProfileRow, dense: ProfileRow) -> list[str]:
    from ..results.store.profiles import quartiles, ratios

    lower, upper = quartiles(ratios(dense.ms["prefill"].times, row.ms["prefill"].times))
    spread = f" ±{(upper - lower) / row.promised:.0%}" if len(row.ms["prefill"].times) > 1 else ""
    waits = row.host_syncs and f"{row.host_syncs[0]} + {row.host_syncs[1]:.3g}"
    return [
        f"{sum(row.visual_tokens) / len(row.visual_tokens):.1f}",
        *(_time(row.ms.get(phase)) for phase in ("vision", "prefill", "decode", "end_to_end")),
        _time(row.overhead_ms),
        f"{row.speedup['prefill']:.2f}×",
        f"{row.promised:.2f}×",
        f"{row.realised:.0%}{spread}",
        *_attainable(row, dense),
        f"{row.tokens_per_second:.4g}",
        f"{row.kv_bytes / 2**20:.1f}",
        f"{row.peak_memory / 2**20:.0f}",
        waits or "n/a",
    ]


def _attainable(row: ProfileRow, dense: ProfileRow) -> tuple[str, str]:
    """The speed-up of plain layers on the same tokens, and the method's as a part of it."""
    from ..results.store.profiles import quartiles, ratios, speedup

    if row.plain_ms is None:
        return "n/a", "n/a"
    plain, own = row.plain_ms.times, row.ms["prefill"].times
    lower, upper = quartiles(ratios(plain, own))
    spread = f" ±{upper - lower:.0%}" if len(own) > 1 else ""
    return f"{speedup(dense.ms['prefill'].times, plain):.2f}×", f"{speedup(plain, own):.0%}{spread}"


def _time(spread: RepeatedTimes | None) -> str:
    if spread is None:
        return "n/a"
    if len(spread.times) == 1:
        return f"{spread.median:.4g}"
    return f"{spread.median:.4g} ±{spread.iqr:.2g}\nmin {spread.min:.4g}"


def _legend(result: Profile) -> list[str]:
    counts = sorted({len(row.overhead_ms.times) for row in result.rows if row.overhead_ms})
    overhead = f" ({' or '.join(map(str, counts))} prefills of their own)" if counts else ""
    rounds = f"{result.repeats} round{'' if result.repeats == 1 else 's'}"
    return [
        f"Times: median ± interquartile range and minimum of {rounds} over all methods, after "
        f"{result.warmup} to warm up. Prefill ends with the first token and contains vision.",
        "Speed-up: median over rounds of dense / method, on the same attention; dense is the model without the engine. "
        "Promised: executed multiply-adds of prefill, dense / method. Realised: the first as a part of that ± "
        "interquartile range over rounds. Attainable: a prefill of the model's plain layers, without method and "
        "engine, on as many tokens in each layer as the method left; realised of it: that time / the method's.",
        "Visual tokens T: mean over layers. Overhead: what of prefill goes into scoring, merging and carrying out cuts"
        f"{overhead}. Tokens: new ones of the whole batch, end to end. KV: keys and values after prefill. Peak: most "
        "memory allocated at one time, weights included. Waits: of Python for the GPU, in prefill + a decoding step.",
        result.origin(),
        *(f"Note: {note}." for note in result.notes),
    ]
