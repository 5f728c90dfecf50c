"""Operations, kernels, reads and memory of a prefill by method and phase, against the dense model: exact counts.

    python benchmarks/launches.py [--model llava-1.5-7b] [--method fastv:keep=0.5] [--batch 1 --batch 8]

Of a model with all layers and tokens of the named one, but narrow, since counts do not depend on width; on the CPU. An
*operation* is what torch dispatches, views included; a *kernel* is one that works on memory; *reads* are values that
Python waits for. Numbers in brackets are those of the dense model; ratios are to it. Bytes written are of the narrow
model, in fp32: they compare methods, and mean nothing by themselves.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from visibench.evals.compute.launches import PHASES, Launches, count_launches, narrow
from visibench.evals.settings.method_spec import parse

METHODS = (
    "none",
    "vtw",
    "fastv:keep=0.5",
    "random:keep=0.5",
    "dart:keep=0.5",
    "pyramiddrop",
    "v2drop",
    "transprune",
    "staged:enter=6,exit=9",
    "readers",
    "pact",
    "sparsevlm:tokens=192",
    "fitprune:ratio=80",
    "visipruner",
    "visipruner:forced=true",
    "visipruner:forced=true,skip=true",
    "divprune:tokens=64",
    "cdpruner:tokens=64,condition=none",
    "holov:tokens=64",
    "scope:tokens=64",
    "fastervlm:tokens=64",
    "hiprune:tokens=64",
    "visionzip:tokens=64",
    "vispruner:tokens=64",
    "prumerge",
    "prumerge_plus",
    "hired:tokens=64",
    "pooling:tokens=64",
    "downsample:keep=0.25",
    "tome:tokens=64",
    "flowcut:tokens=64",
    "vscan:tokens=64",
)


def cells(counts: dict[str, Launches], dense: dict[str, Launches]) -> list[str]:
    """Of one line of the table, phase by phase."""
    found = []
    for phase in PHASES:
        here, plain = counts[phase], dense[phase]
        found += [
            f"{here.operations / plain.operations:.3f}",
            f"{here.kernels / plain.kernels:.3f}",
            f"+{here.reads - plain.reads}",
            f"{here.written / 2**20:.0f}",
        ]
    return found


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--method", action="append", help=f"(default: {' '.join(METHODS)})")
    parser.add_argument("--batch", type=int, action="append", help="(default: 1 and 8)")
    given = parser.parse_args()
    loaded, console = narrow(given.model), Console(width=170, highlight=False)
    vision = loaded.geometry.vision
    assert vision is not None
    for batch in given.batch or (1, 8):
        inputs = loaded.synthetic_inputs(batch, 64, vision.tokens)
        dense = count_launches(loaded, None, inputs)
        table = Table(box=None, pad_edge=False, title=f"batch {batch}, 64 text and {vision.tokens} visual tokens")
        table.add_column("method")
        for phase in PHASES:
            plain = dense[phase]
            for name in (
                f"{phase}\noperations\n({plain.operations})",
                f"\nkernels\n({plain.kernels})",
                f"\nreads\n({plain.reads})",
                f"\nMiB\n({plain.written / 2**20:.0f})",
            ):
                table.add_column(name, justify="right", no_wrap=True)
        for text in given.method or METHODS:
            table.add_row(text, *cells(count_launches(loaded, parse(text), inputs), dense))
        console.print(table)
        console.print()
    console.print(f"{given.model}, {loaded.geometry.layers} decoder layers; torch {torch.__version__}, CPU")


if __name__ == "__main__":
    main()
