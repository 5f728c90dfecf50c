"""What the engine costs where nothing is pruned: `generate` under the method `none` against plain `generate`.

    python benchmarks/generate.py [--model llava-cpu] [--new-tokens 16] [--repeats 20] [--threads 1]

End to end, the two in turn, first one and then the other in front; both must give the same tokens.
"""

import argparse
import statistics
from contextlib import nullcontext
from typing import Any

import torch
import visibench
from visibench.evals.compute.memory import keep_freed_memory
from visibench.evals.compute.timing import clock_of, iqr, undisturbed
from visibench.models import LoadedModel

LIMIT = 1.02
PROMPT = 64


def compare(
    loaded: LoadedModel, visual_tokens: int, new_tokens: int, repeats: int, warmup: int = 2
) -> list[list[float]]:
    """Milliseconds of each repeat, plain and under the engine."""
    inputs = loaded.synthetic_inputs(1, PROMPT, visual_tokens)
    method = visibench.load_method("none")
    model: Any = loaded.model
    clock = clock_of(model.device)
    times: list[list[float]] = [[], []]
    for number in range(warmup + repeats):
        outputs = {}
        for side in (0, 1) if number % 2 else (1, 0):
            with visibench.prune(model, method) if side else nullcontext(), undisturbed(clock):
                start = clock.mark()
                outputs[side] = model.generate(
                    **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
                )
                end = clock.mark()
            if number >= warmup:
                times[side].append(clock.between(start, end))
        if not torch.equal(outputs[0], outputs[1]):
            raise SystemExit("the two sides gave other tokens")
    return times


def main() -> None:
    """Measure, print, and exit with 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    loaded = visibench.load_model(given.model, weights="random", device=given.device, dtype="bfloat16")
    plain, engine = compare(loaded, given.visual_tokens, given.new_tokens, given.repeats)
    ratios = [b / a for a, b in zip(plain, engine, strict=True)]
    for side, values in (("plain", plain), ("none", engine)):
        print(f"{side}: median {statistics.median(values):.1f} ms, IQR {iqr(values):.1f}, min {min(values):.1f}")
    ratio = statistics.median(ratios)
    print(
        f"none / plain generate: median {ratio:.3f}, IQR {iqr(ratios):.3f}, of minima {min(engine) / min(plain):.3f} "
        f"(limit {LIMIT}; n = {given.repeats}; {given.model}, {PROMPT} text, "
        f"{given.visual_tokens} visual and {given.new_tokens} new tokens, "
        f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__})"
    )
    raise SystemExit(ratio > LIMIT)


if __name__ == "__main__":
    main()
