"""What the harness costs over a plain loop of `model.generate` on the same batches, at a width of real models.

    python benchmarks/harness.py [--hidden 1024] [--layers 8] [--limit 32] [--batch-size 8] [--repeats 5]

Tiny's tokenizer, processor and questions, and a decoder with random weights of another width. One side lets the
harness answer: batches, prompts, images, inputs, `generate` under the method `none`, the trace, records on disk. The
other one is given inputs that are made already and calls `generate`, nothing else. Both run in turn, first one and then
the other in front, and must say the same. CPU time stands beside wall time: other work on the machine moves it less.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import visibench
from transformers import AutoConfig
from visibench.evals.answers.checkpoint import KeptAnswers
from visibench.evals.answers.generate import Bridge, batches, generation, questions
from visibench.evals.compute.memory import keep_freed_memory
from visibench.evals.compute.timing import clock_of, iqr, undisturbed
from visibench.evals.tasks import lmms_eval
from visibench.evals.tasks.question import Question
from visibench.evals.tasks.tasks import Task, load_tasks
from visibench.models import LoadedModel
from visibench.models.geometry import build
from visibench.models.inputs import upright

LIMIT = 1.02


def wide(hidden: int, layers: int, device: str) -> LoadedModel:
    """Tiny with a decoder of another size and random weights."""
    tiny = visibench.load_model("tiny", device=device)
    config: Any = AutoConfig.for_model(**tiny.model.config.to_dict())
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, hidden * 11 // 4, layers
    text.num_attention_heads = text.num_key_value_heads = hidden // 64
    text.head_dim, text.layer_types = 64, None
    model = build(config, "random", None, torch.device(device), torch.float32, "sdpa")
    model.generation_config = tiny.model.generation_config
    return replace(tiny, name=f"tiny, {hidden} wide", model=model.eval(), weights="random")


def harness(loaded: LoadedModel, task: Task, asked: list[Question], size: int) -> list[str]:
    """What the harness answers, in the order of the questions."""
    session = visibench.prune(loaded.model, visibench.load_method("none"))
    with tempfile.TemporaryDirectory() as folder, lmms_eval.quiet(), session:
        bridge = Bridge(loaded, session, task, size, answers=KeptAnswers(Path(folder), "benchmark"))
        bridge.answer(asked)
    return [bridge.records[question.doc_id].output for question in asked]


def plain(loaded: LoadedModel, prepared: list[tuple[list[Question], Any]]) -> dict[int, str]:
    """What a loop of ``generate`` answers."""
    said: dict[int, str] = {}
    model: Any = loaded.model
    for chunk, inputs in prepared:
        with torch.inference_mode():
            ids = model.generate(**inputs, **generation(chunk[0].options), temperature=None, top_p=None, top_k=None)
        new = loaded.decode(ids[:, inputs["input_ids"].shape[1] :].cpu())
        said |= {question.doc_id: text for question, text in zip(chunk, new, strict=True)}
    return said


def main() -> None:
    """Measure, print, and exit with 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in {"hidden": 1024, "layers": 8, "limit": 32, "batch-size": 8, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    loaded, (task,) = wide(given.hidden, given.layers, given.device), load_tasks(["gqa"])
    asked = questions(task, given.limit)
    prepared = []
    for chunk in batches(asked, given.batch_size):
        images = [[upright(image) for image in task.images(question.doc_id)] for question in chunk]
        prepared.append((chunk, loaded.inputs([question.prompt for question in chunk], images)))
    clock = clock_of(loaded.model.device)
    times: dict[str, list[tuple[float, float]]] = {"plain loop": [], "harness": []}
    for number in range(1 + given.repeats):
        said: dict[str, list[str]] = {}
        for side in ("plain loop", "harness")[:: 1 if number % 2 else -1]:
            with undisturbed(clock):
                start, cpu = clock.mark(), time.process_time()
                if side == "harness":
                    said[side] = harness(loaded, task, asked, given.batch_size)
                else:
                    answers = plain(loaded, prepared)
                    said[side] = [answers[question.doc_id] for question in asked]
                end = clock.mark()
            if number:
                times[side].append((clock.between(start, end) / 1e3, time.process_time() - cpu))
        if said["harness"] != said["plain loop"]:
            raise SystemExit("the two sides answered differently")
    ratio = 0.0
    for place, kind in enumerate(("wall", "CPU")):
        loop, own = ([pair[place] for pair in times[side]] for side in ("plain loop", "harness"))
        ratios = [b / a for a, b in zip(loop, own, strict=True)]
        ratio = ratio or statistics.median(ratios)
        print(
            f"{kind}: plain loop {statistics.median(loop):.2f} s, harness {statistics.median(own):.2f} s, harness / "
            f"loop median {statistics.median(ratios):.3f}, IQR {iqr(ratios):.3f}, of minima {min(own) / min(loop):.3f}"
        )
    print(
        f"limit {LIMIT} of wall time; n = {given.repeats}, {given.limit} questions in batches of {given.batch_size}, "
        f"{given.hidden} wide, {given.layers} layers; {given.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    raise SystemExit(ratio > LIMIT)


if __name__ == "__main__":
    main()
