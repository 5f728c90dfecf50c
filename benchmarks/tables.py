"""How long what reads a run folder takes, by its size: CPU seconds of `table`, `report` and `check`, whole processes.

    python benchmarks/tables.py [--cells 100,400,1600] [--samples 1000,100000] [--report 25,100] [--check 25,400]

The runs are made up: answers drawn at random (seed 0), a method that differs from the dense model in every tenth, on
four tasks that are scored as GQA, POPE, MME and TextVQA are. Cells have `--questions` questions (100), three about each
image; for `--samples`, eight cells have as many as it says. Reports ask those of the embedded data and show them with
their images. Behind each series stands its exponent: k where four times
the size takes 4^k times as long, from the two largest sizes, start of the process included. Exit code 1 if the largest
`table` by cells or the largest `report` takes more than `--most` CPU seconds (5), or an exponent is more than 1.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from visibench.evals.tasks.tasks import load_tasks
from visibench.results.statistics.metrics import measure
from visibench.results.store import code
from visibench.results.store.records import (
    CellConfig,
    CellMetrics,
    Compute,
    Environment,
    PrefillTime,
    ScoreRecord,
    VisualTokens,
    environment,
)
from visibench.results.store.store import Store

LAYERS, PROMPT = 12, 144
PARTS = ("vision_tower", "projections", "ffn")
PLACES = {
    "gqa": "gqa/gqa.yaml",
    "pope": "pope/pope.yaml",
    "mme": "mme/mme.yaml",
    "textvqa_val": "textvqa/textvqa_val.yaml",
}
TASKS = {
    "gqa": {"exact_match": ("exact match", 1)},
    "pope": {"pope_f1_score": ("F1", 1), "pope_accuracy": ("accuracy", 1)},
    "mme": {"mme_perception_score": ("perception", 1000)},
    "textvqa_val": {"exact_match": ("VQA accuracy", 1)},
}
ENVIRONMENT: Environment = environment({"dtype": "float32", "attention": "sdpa", "device": "cpu", "threads": 1})


def settings(count: int) -> Iterator[tuple[str, dict[str, float]]]:
    """So many methods with options: the dense model, a sixth of them references at several budgets, the rest FastV."""
    yield "none", {}
    for number in range(1, count):
        name = {1: "random", 2: "downsample"}.get(number % 12, "fastv")
        yield name, {"keep": round(0.1 + 0.8 * number / count, 6)}


def questions(task: str, count: int, embedded: bool) -> pd.DataFrame:
    """What all methods are asked alike; ``embedded``: the prompts of the embedded data."""
    told = load_tasks([task])[0].text if embedded else "Is there a ring in the image (number {})?\nAnswer.".format
    number = np.arange(count)
    image = np.array([f"s{one:06d}" for one in number // (2 if task == "mme" else 3)], object)
    return pd.DataFrame(
        {
            "task": task,
            "doc_id": number,
            "question_id": image if task == "mme" else number.astype(str),
            "image": image,
            "category": "existence" if task == "mme" else None,
            "prompt": [told(int(one)) for one in number],
            "target": np.where(number % 2, "yes", "no"),
        }
    )


def answers(asked: pd.DataFrame, keep: float, rng: np.random.Generator) -> pd.DataFrame:
    """The samples of a cell: right in nine of ten, less at a small ``keep``."""
    count, left = len(asked), int(PROMPT * keep)
    score = (rng.random(count) < 0.7 + 0.2 * keep).astype(float)
    if asked["task"].iloc[0] == "textvqa_val":
        score *= np.where(rng.random(count) < 0.9, 1.0, 0.3)
    wrong = np.where(asked["target"] == "yes", "no", "yes")
    answer = np.where(score >= 0.5, asked["target"], wrong)
    layers = [PROMPT] * 2 + [left] * (LAYERS - 2)
    return asked.assign(
        output=answer,
        answer=answer,
        score=score,
        prompt_tokens=PROMPT + 32,
        new_tokens=1,
        prompt_visual_tokens=PROMPT,
        visual_tokens=[layers] * count,
        kv_lengths=[[tokens + 32 for tokens in layers]] * count,
        executed_macs=1e9 * (0.3 + 0.7 * keep),
        kept=["g8z9z8H1GkC1PhnAEt+y+/AA"] * count,
        nonfinite=False,
        latency_ms=rng.uniform(90, 110, count),
        batch_questions=8,
        places="[[[12,12,1,1,0]]]",
        batch_macs=1e9,
    )


def make(folder: Path, methods: int, count: int, tasks: int, embedded: bool = False) -> None:
    """A finished run of so many methods × tasks, ``count`` questions in each cell, the ``embedded`` ones or others."""
    store, rng = Store(folder), np.random.default_rng(0)
    for task, scores in list(TASKS.items())[:tasks]:
        asked = questions(task, count, embedded)
        for name, options in settings(methods):
            keep = options.get("keep", 1.0)
            samples = answers(asked, keep, rng)
            macs = samples["executed_macs"].mean()
            told = [(key, title, most, measure(key, [samples], most).value) for key, (title, most) in scores.items()]
            label = f"{name}:keep={keep:g}" if options else name
            where = {"method": f"visibench.methods.{name}", "task": f"{PLACES[task]}+"}
            hashes = {"method": code.of_method(where["method"]), "task": code.of_task(where["task"])}
            cell = CellConfig(
                model="tiny",
                method=name,
                options=options,
                label=label,
                task=task,
                limit=count,
                code=hashes | {"engine": code.engine()},
                sources=where,
            )
            metrics = CellMetrics(
                config_hash=cell.digest(),
                size=count,
                total=count,
                scores=[ScoreRecord(key=key, title=t, value=value, maximum=most) for key, t, most, value in told],
                metrics={key: value for key, _, _, value in told},
                visual_tokens=VisualTokens(prompt=PROMPT, per_layer=list(samples["visual_tokens"].iloc[0])),
                compute=Compute(macs=macs, macs_sd=0.0, components=dict.fromkeys(PARTS, macs / 3), batch_macs=1e9),
                prefill=PrefillTime(times_ms=[10.0] * 20, warmup=3, batch_size=1, device="cpu"),
                generation={"max_new_tokens": 16},
                seconds={"answer": 1.0, "total": 1.0},
                data_hash=task,
                environment=ENVIRONMENT,
            )
            store.begin(cell)
            store.finish(cell, samples, metrics)


def seconds(*command: str | Path) -> float:
    """CPU seconds of a command of visibench, from start to end."""
    process = subprocess.Popen([sys.executable, "-m", "visibench", *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed: {os.waitstatus_to_exitcode(status)}")
    return used.ru_utime + used.ru_stime


def series(title: str, sizes: list[int], measured: Callable[[Path, int], float]) -> tuple[float, float]:
    """Measure, print and return the seconds of the largest size and the exponent."""
    times = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            times.append(measured(Path(folder) / "run", size))
        print(f"{title.format(size):<44} {times[-1]:6.1f} s", flush=True)
    exponent = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2]) if len(times) > 1 else 0.0
    print(f"{'':<44} exponent {exponent:.2f}", flush=True)
    return times[-1], exponent


def main() -> int:
    """Command line; 1 where a command takes longer than ``--most`` seconds, or grows faster than its run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, sizes in (
        ("cells", "100,400,1600"),
        ("samples", "1000,100000"),
        ("report", "25,100"),
        ("check", "25,400"),
    ):
        parser.add_argument(
            f"--{name}", default=sizes, type=lambda text: [int(part) for part in text.split(",") if part]
        )
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--most", type=float, default=5.0)
    given = parser.parse_args()

    def table_of_cells(run: Path, cells: int) -> float:
        make(run, cells // len(TASKS), given.questions, len(TASKS))
        return seconds("table", run)

    def table_of_samples(run: Path, count: int) -> float:
        make(run, 4, count, 2)
        return seconds("table", run)

    def report(run: Path, methods: int) -> float:
        make(run, methods, given.questions, len(TASKS), embedded=True)
        return seconds("report", run, "--out", run / "report.html")

    def check(run: Path, methods: int) -> float:
        make(run, methods, given.questions, 1)
        baseline = run / "baseline.json"
        seconds("check", run, "--baseline", baseline, "--update")
        return seconds("check", run, "--baseline", baseline)

    found = [
        series(title, sizes, measured)
        for title, sizes, measured in (
            ("table, {} cells", given.cells, table_of_cells),
            ("table, 8 cells of {} samples", given.samples, table_of_samples),
            ("report, {} methods on 4 tasks", given.report, report),
            ("check, {} methods on one task", given.check, check),
        )
        if sizes
    ]
    slow = [took for took, _ in (found[0], found[2]) if took > given.most] if len(found) == 4 else []
    return int(bool(slow) or any(exponent > 1 for _, exponent in found))


if __name__ == "__main__":
    sys.exit(main())
