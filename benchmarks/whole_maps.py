"""VisiPruner as its authors' program computes it, visibench's, and plain layers on the same tokens, side by side.

    python benchmarks/whole_maps.py [--dtype bfloat16] [--repeats 20] [--threads 1] [--json FILE]

The authors' program (EIT-NLP/VisiPruner@d778622) runs eager attention in every layer, edits whole attention maps behind
the softmax, and makes what each visual token contributes a tensor of its own. :class:`WholeMaps` does the same work in
our words, over the same weights, with cuts at given layers; in float32 its logits must be visibench's. The prompt and
the plan: 35 + 576 + 64 tokens, K = 3, 10 tokens from layer 8 on, none from layer 12 on, of a decoder of 16 layers.
Prefills in turn, each round in another order; medians over rounds of dense (SDPA) / program.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import visibench
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv
from visibench.evals.compute.attainable import schedule, time_plain
from visibench.evals.compute.flops import executed
from visibench.evals.compute.memory import keep_freed_memory
from visibench.evals.compute.timing import clock_of, iqr, undisturbed
from visibench.evals.settings.method_spec import parse
from visibench.models import LoadedModel

BEFORE, VISUAL, BEHIND = 35, 576, 64
SHALLOW, FILTER, TOKENS, EXIT = 3, 8, 10, 12
PLAN = f"shallow_layers={SHALLOW},forced=true,filter_layer={FILTER},filter_tokens={TOKENS},exit_layer={EXIT}"
TOLERANCE = 1e-5


class WholeMaps:
    """The decoder of a LLaVA over whole attention maps: one prompt, one image."""

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.model.language_model
        text = model.config.text_config
        self.groups = text.num_attention_heads // text.num_key_value_heads
        self.image = slice(BEFORE, BEFORE + VISUAL)

    def prefill(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (1, vocabulary) of the first new token."""
        ids = inputs["input_ids"]
        features = torch.cat([*self.model.model.get_image_features(inputs["pixel_values"]).pooler_output])
        hidden = self.model.get_input_embeddings()(ids)
        hidden = hidden.masked_scatter((ids == self.model.config.image_token_id)[..., None], features.to(hidden.dtype))
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        cache, visual, kept = DynamicCache(config=self.model.config.text_config), self.image, features.new_empty(0)
        for number, layer in enumerate(self.decoder.layers):
            if number in (FILTER, EXIT):
                chosen = kept.topk(TOKENS if number == FILTER else 0).indices.sort().values + visual.start
                text = [torch.arange(start, end) for start, end in ((0, visual.start), (visual.stop, hidden.shape[1]))]
                there = torch.cat([text[0].to(chosen), chosen, text[1].to(chosen)])
                hidden, places = hidden[:, there], places[:, there]
                visual = slice(visual.start, visual.start + len(chosen))
            output, contributed = self.attention(layer, number, hidden, places, visual, cache)
            kept = kept if contributed is None else contributed
            hidden = hidden + output
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.decoder.norm(hidden[:, -1]))

    def attention(
        self, layer: Any, number: int, hidden: Tensor, places: Tensor, visual: slice, cache: DynamicCache
    ) -> tuple[Tensor, Tensor | None]:
        """Output (1, L, D) of the attention, and how much each visual token contributed to the last one (V,)."""
        normed, part = layer.input_layernorm(hidden), layer.self_attn
        projected = [getattr(part, name)(normed) for name in ("q_proj", "k_proj", "v_proj")]
        q, k, v = (states.unflatten(2, (-1, part.head_dim)).transpose(1, 2) for states in projected)
        q, k = apply_rotary_pos_emb(q, k, *self.decoder.rotary_emb(v, places))
        k, v = (repeat_kv(states, self.groups) for states in cache.update(k, v, number))
        width = hidden.shape[1]
        mask = torch.full((width, width), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
        logits = q @ k.transpose(2, 3) * part.scaling + mask
        weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
        if number < SHALLOW:
            self.edit(weights, first=number == 0)
        output = weights @ v
        measured = None
        if number > SHALLOW and visual.stop > visual.start:
            measured = self.contributed(weights, v, output, visual)
        return part.o_proj(output.transpose(1, 2).flatten(2)), measured

    def edit(self, weights: Tensor, *, first: bool) -> None:
        """Text reads no image; in layer 0 no visual token does, and the first one's value gets what text read."""
        visual, text = self.image, slice(self.image.stop, None)
        if not first:
            weights[:, :, text, visual] = 0
            return
        mass = weights[:, :, text, visual].sum(-1)
        weights[:, :, visual.start :, visual] = 0
        weights[:, :, text, visual.start] = mass

    def contributed(self, weights: Tensor, v: Tensor, output: Tensor, visual: slice) -> Tensor:
        """Norms (V,) of what visual tokens give to the last one; the cosines are what thresholds would be met by."""
        each = (weights[:, :, -1, visual, None] * v[:, :, visual])[0].transpose(0, 1).flatten(1)
        whole = output[0, :, -1].flatten()
        without = whole - each
        cosine_similarity(without, whole[None], dim=1)
        return (without - whole).norm(dim=1)


def prompt(loaded: LoadedModel) -> dict[str, Tensor]:
    """Random text around one random image."""
    inputs = loaded.synthetic_inputs(1, BEFORE + BEHIND, VISUAL)
    ids, image = inputs["input_ids"][0], loaded.model.config.image_token_id
    text = ids[ids != image]
    ids = torch.cat([text[:BEFORE], ids[ids == image], text[BEFORE:]])[None]
    return {**inputs, "input_ids": ids}


def check(dtype: str, **where: Any) -> float:
    """Largest difference of logits, whole maps and visibench's, in ``dtype``."""
    loaded = visibench.load_model("llava-cpu", weights="random", dtype=dtype, **where)
    inputs = prompt(loaded)
    with torch.inference_mode():
        theirs = WholeMaps(loaded.model).prefill(inputs)
        with visibench.prune(loaded.model, parse(f"visipruner:{PLAN}")):
            ours = loaded.model(**inputs, logits_to_keep=1).logits[:, -1]
    return float((ours - theirs).abs().max())


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    apart = check("float32", device=given.device)
    print(f"logits of whole maps and of visibench in float32: {apart:.1e} apart (limit {TOLERANCE})")
    if apart > TOLERANCE:
        raise SystemExit(1)
    loaded = visibench.load_model("llava-cpu", weights="random", dtype=given.dtype, device=given.device)
    report = measured(loaded, prompt(loaded), given.repeats)
    for name, figures in report["programs"].items():
        print(
            f"{name:32s} {figures['median_ms']:7.1f} ms ± {figures['iqr_ms']:.0f}, dense / it {figures['ratio']:.3f}"
            f" ± {figures['ratio_iqr']:.3f}, of minima {figures['of_minima']:.3f}"
        )
    print(
        f"promised: {report['promised']:.2f}; visibench / whole maps: {report['ahead']:.2f} ± {report['ahead_iqr']:.2f}"
    )
    print(
        f"n = {given.repeats} rounds, {given.dtype}, {given.threads} threads, {report['model']['hardware']}, "
        f"torch {torch.__version__}"
    )
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


def measured(loaded: LoadedModel, inputs: dict[str, Tensor], repeats: int, warmup: int = 2) -> dict[str, Any]:
    """Times of all programs, in turn."""
    model, clock = loaded.model, clock_of(loaded.model.device)
    method, work = parse(f"visipruner:{PLAN}"), []
    for one in (visibench.load_method("none"), method):
        with torch.inference_mode(), visibench.prune(model, one) as session:
            model(**inputs, use_cache=True, logits_to_keep=1)
        work.append(float(executed(session.trace, loaded.geometry).total()[0]))
    tokens = schedule(session.trace, method, loaded)
    assert tokens is not None

    def timed(run: Callable[[], Any]) -> float:
        with undisturbed(clock):
            start = clock.mark()
            run()
            end = clock.mark()
        return clock.between(start, end)

    def dense() -> float:
        return timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1))

    def ours() -> float:
        with visibench.prune(model, method):
            return dense()

    whole = WholeMaps(model)
    programs: dict[str, Callable[[], float]] = {
        "dense, SDPA": dense,
        "VisiPruner over whole maps": lambda: timed(lambda: whole.prefill(inputs)),
        "visibench's VisiPruner": ours,
        "attainable": lambda: time_plain(loaded, inputs, tokens),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    with torch.inference_mode():
        for number in range(warmup + repeats):
            names = [*programs][number % len(programs) :] + [*programs][: number % len(programs)]
            for name in names:
                took = programs[name]()
                if number >= warmup:
                    times[name].append(took)
    return figures(times) | {"promised": work[0] / work[1], "repeats": repeats, "model": loaded.describe()}


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and spreads, of times and of ratios within rounds."""
    first, theirs, ours, _ = times.values()
    ahead = [a / b for a, b in zip(theirs, ours, strict=True)]
    rows = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(first, values, strict=True)]
        rows[name] = {
            "median_ms": statistics.median(values),
            "iqr_ms": iqr(values),
            "ratio": statistics.median(ratios),
            "ratio_iqr": iqr(ratios),
            "of_minima": min(first) / min(values),
        }
    return {"programs": rows, "ahead": statistics.median(ahead), "ahead_iqr": iqr(ahead)}


if __name__ == "__main__":
    main()
