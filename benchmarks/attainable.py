"""What of the promised speed-up a model gives at all: the vision tower and a plain prefill of the tokens that are left.

    python benchmarks/attainable.py [--model llava-cpu] [--method visionzip:tokens=64] [--left 64] [--repeats 20]

For methods that cut in front of the decoder. Prefills of the dense model, of the tower alone, of the model alone with a
text as long as the pruned prompt, and under the method take turns; the ratios are medians over rounds of dense / other.
A method that costs nothing and an engine that costs nothing reach what tower and short prefill take together.
"""

import argparse
import statistics
from typing import Any

import torch
import visibench
from visibench.evals.compute.memory import keep_freed_memory
from visibench.evals.compute.timing import clock_of, iqr, undisturbed
from visibench.evals.settings.method_spec import parse

PROMPT = 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", action="append", help="(default: visionzip:tokens=64 and divprune:tokens=64)")
    parser.add_argument("--visual-tokens", type=int, default=576)
    parser.add_argument("--left", type=int, default=64, help="visual tokens that the methods leave")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    loaded = visibench.load_model(given.model, weights="random", device=given.device, dtype="bfloat16")
    model: Any = loaded.model
    clock = clock_of(model.device)
    whole = loaded.synthetic_inputs(1, PROMPT, given.visual_tokens)
    short = loaded.synthetic_inputs(1, PROMPT + given.left, 0)
    methods = {text: parse(text) for text in given.method or ("visionzip:tokens=64", "divprune:tokens=64")}

    def time(work: Any) -> float:
        with undisturbed(clock):
            start = clock.mark()
            work()
            end = clock.mark()
        return clock.between(start, end)

    def prefill(inputs: dict[str, Any]) -> float:
        return time(lambda: model(**inputs, use_cache=True, logits_to_keep=1))

    times: dict[str, list[float]] = {name: [] for name in ("dense", "tower", "short prefill", *methods)}
    with torch.inference_mode():
        for _ in range(2 + given.repeats):
            times["dense"].append(prefill(whole))
            times["tower"].append(time(lambda: model.model.get_image_features(pixel_values=whole["pixel_values"])))
            times["short prefill"].append(prefill(short))
            for name, method in methods.items():
                with visibench.prune(model, method):
                    times[name].append(prefill(whole))
    times = {name: values[2:] for name, values in times.items()}
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values):.1f} ms, IQR {iqr(values):.1f}, min {min(values):.1f}")
    least = [a + b for a, b in zip(times["tower"], times["short prefill"], strict=True)]
    for name, values in {"tower + short prefill": least, **{name: times[name] for name in methods}}.items():
        ratios = [a / b for a, b in zip(times["dense"], values, strict=True)]
        print(f"dense / {name}: median {statistics.median(ratios):.2f}, IQR {iqr(ratios):.2f}")
    print(
        f"n = {given.repeats}, {given.model}, {PROMPT} text, {given.visual_tokens} visual tokens, {given.left} left; "
        f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
