"""What a batch of uneven rows executes and takes, against its rows and against the dense model.

    python benchmarks/batches.py [--model llava-cpu] [--batch-size 16] [--method …] [--repeats 5]

Random weights, random images, texts of 32 to 64 tokens. By default VisiPruner by its own rule, with a threshold at
which rows of random weights keep some 30 tokens, each another number, searched on two of them. Executed multiply-adds
of the batch are divided by the sum of what its rows execute alone (1: no padding), and times of prefill by those of the
dense model, in turn.
"""

import argparse
import statistics
from contextlib import nullcontext
from typing import Any

import torch
import visibench
from visibench.evals.compute import flops
from visibench.evals.compute.memory import keep_freed_memory
from visibench.evals.compute.timing import clock_of, iqr, undisturbed
from visibench.evals.settings.method_spec import parse

RULE = "visipruner:layers=scaled,layer_threshold=1,exit_threshold=1,token_threshold={:.4g}"
LEFT = 30


def uneven(inputs: dict[str, Any], texts: list[int], longest: int) -> dict[str, Any]:
    """Rows whose texts are cut to so many tokens at the front, left padded."""
    mask = inputs["attention_mask"].clone()
    for row, text in enumerate(texts):
        mask[row, : longest - text] = 0
    return inputs | {"attention_mask": mask}


def rule(model: Any, inputs: dict[str, Any]) -> str:
    """VisiPruner with a threshold at which about ``LEFT`` visual tokens stay."""
    few, many = 10.0, 1e-4
    for _ in range(12):
        between = (few * many) ** 0.5
        with torch.inference_mode(), visibench.prune(model, parse(RULE.format(between))) as session:
            model(**inputs, logits_to_keep=1)
        if session.trace.visual_counts()[:, -1].double().mean() > LEFT:
            many = between
        else:
            few = between
    return RULE.format(few)


def main() -> None:
    """Count, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--method", default=None)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    loaded = visibench.load_model(
        given.model, weights="random", device=given.device, dtype=given.dtype, layers=given.layers
    )
    model: Any = loaded.model
    clock, rows = clock_of(model.device), given.batch_size
    texts = [32 + 32 * row // max(rows - 1, 1) for row in range(rows)]
    inputs = uneven(loaded.synthetic_inputs(rows, 64, given.visual_tokens), texts, 64)
    two = uneven(loaded.synthetic_inputs(2, 64, given.visual_tokens), texts[:2], 64)
    method = parse(given.method or rule(model, two))
    times: dict[str, list[float]] = {"dense": [], str(method): []}
    with torch.inference_mode():
        for number in range(1 + given.repeats):
            for name in [*times][:: 1 if number % 2 else -1]:
                session: Any = nullcontext() if name == "dense" else visibench.prune(model, method)
                with session, undisturbed(clock):
                    start = clock.mark()
                    model(**inputs, use_cache=True, logits_to_keep=1)
                    end = clock.mark()
                if number:
                    times[name].append(clock.between(start, end))
                if name != "dense":
                    trace = session.trace
    together, alone = (count(trace, loaded.geometry).total() for count in (flops.executed_by_batch, flops.executed))
    with visibench.prune(model, visibench.load_method("none")) as session, torch.inference_mode():
        model(**inputs, logits_to_keep=1)
    dense = flops.executed_by_batch(session.trace, loaded.geometry).total()[0]
    counts = trace.visual_counts()
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    left = counts[:, -1]
    print(f"visual tokens in the last layer: {left.min()} to {left.max()}, T {counts.float().mean():.1f}")
    print(f"multiply-adds of the batch / its rows alone: {together[0] / sum(alone):.4f}")
    print(f"multiply-adds, dense batch / batch: {dense / together[0]:.2f}")
    print(f"time of prefill, dense / method: median {statistics.median(ratios):.2f}, IQR {iqr(ratios):.2f}")
    print(
        f"{method}; n = {given.repeats}, batch {rows}, {given.model}, {loaded.geometry.layers} layers, {given.dtype}, "
        f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
