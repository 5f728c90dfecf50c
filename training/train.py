"""Train ``tiny``: ``python -m visibench.training.train --config train.yaml --run DIR``.

Three losses. The answers: next-token loss on answer tokens, several questions packed behind one image, each seeing the
image and itself alone. The patches: every projected patch names what it shows (a colour, a shape, a letter and its
place in the word, left or right …) through the language model's own token embedding, so that patches and words live in
one space from the start. The hints: where a question names a thing, the decoder says there whether the image has it
and what it is like, so that looking things up is learnt at the token that can do it. A run continues from its last
checkpoint at the exact step.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.data import DataLoader
from transformers import AttentionInterface, LlavaForConditionalGeneration

from ..methods import load_method
from ..models import load
from . import settings
from .batches import IGNORE, Packer, Phase, Stream
from .build import GRID, make_model, make_processor
from .knowledge import GROUPS
from .staged import Staging, staged_forward

BACKGROUND_WORDS = 5  # a patch of background is named "background" and by where it lies


class Trainer:
    """Model, optimiser and step counter of a run."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.phases = [Phase(**phase) for phase in config["phases"]]
        self.total = sum(phase.steps for phase in self.phases)
        torch.manual_seed(config["seed"])
        self.model = make_model(**config["model"])
        if "start" in config:
            self.model.load_state_dict(load.load_model(config["start"], device="cpu").model.state_dict())
        self.model.model.vision_tower.set_attn_implementation("tiny_plain")
        self.model.model.language_model.set_attn_implementation("tiny_packed")
        self.staging = Staging(**config["staged"]) if "staged" in config else None
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.names = [name for name, _ in self.model.named_parameters()] + ["scale"]
        self.parameters = [*self.model.parameters(), self.scale]
        decay = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": config["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config["lr"], betas=(0.9, 0.98))
        self.step = 0
        packer = Packer()
        self.prefix = torch.tensor(packer.prefix)
        self.groups = [torch.tensor([packer.words[w] for w in words]) for words, _ in GROUPS.values()]

    # ---- one step ---------------------------------------------------------------------------------------------

    def phase(self) -> Phase:
        """The phase of the current step."""
        end = 0
        for phase in self.phases:
            end += phase.steps
            if self.step < end:
                return phase
        return self.phases[-1]

    def rate(self) -> float:
        """Learning rate: linear warm-up, constant, then along half cosines from knot to knot of ``cosine``."""
        config = self.config
        factor = min(1.0, (self.step + 1) / config["warmup"])
        for (start, high), (end, low) in pairwise(config["cosine"]):
            if start <= self.step < end:
                factor = low + (high - low) * (1 - math.cos(math.pi * (end - self.step) / (end - start))) / 2
        return config["lr"] * factor

    def see(self, pixels: Tensor) -> Tensor:
        """Projected patches (B, 144, D); the blocks behind the feature layer are not run."""
        core: Any = self.model.model
        tower = core.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1))
        feature: Any = self.model.config.vision_feature_layer
        for block in tower.encoder.layers[: feature + 1]:
            hidden = block(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return core.multi_modal_projector(hidden[:, 1:])

    def naming_loss(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, float]]:
        """How well ``logits`` (N, words) name the words of ``labels`` (N, n), IGNORE filling up; accuracies by group.

        The mean cross entropy to all words of a place, and for each group of words that exclude each other (shapes,
        colours, letters …) the cross entropy among them. ``weight`` (N,) is for the former.
        """
        known = labels != IGNORE
        each = (-log_softmax(logits, -1).gather(-1, labels.clamp(min=0)) * known).sum(-1) / known.sum(-1)
        loss, right = (each * weight).sum() / weight.sum(), {}
        for (name, (_, share)), words in zip(GROUPS.items(), self.groups, strict=True):
            named = labels[..., None] == words
            shown = named.flatten(1).any(-1)
            if shown.any():
                mine, target = logits[shown][:, words], named[shown].any(1).int().argmax(-1)
                loss = loss + share * cross_entropy(mine, target)
                right[name] = (mine.argmax(-1) == target).float().mean().item()
        return loss, right

    def patch_loss(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """How well patches (B, 144, D) name what they show, ``labels`` (B, 144, words)."""
        embed: Any = self.model.get_input_embeddings()
        table = embed.weight.detach()
        normed = patches * torch.rsqrt(patches.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        logits = (normed @ table.T).float() * self.scale.exp()
        # Patches that show something count five times as much as background.
        something = (labels != IGNORE).sum(-1) > BACKGROUND_WORDS
        loss, right = self.naming_loss(
            logits.flatten(0, 1), labels.flatten(0, 1), torch.where(something, 5.0, 1.0).flatten()
        )
        return loss, {"patch_loss": loss.item()} | {f"see_{name}": value for name, value in right.items()}

    def answer_logits(self, patches: Tensor, batch: dict[str, Any]) -> Tensor:
        """Logits at the tokens of the questions and answers (B, questions, S, words)."""
        rows, chosen = patches.shape[0], batch["chosen"]
        embed, prefix = self.model.get_input_embeddings(), self.prefix
        seen = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2]))
        words = embed(batch["ids"].flatten(1))
        tokens = torch.cat([embed(prefix).expand(rows, -1, -1), seen.to(words.dtype), words], 1)
        ids = batch["ids"]
        anew, number = batch["renumbered"][:, None], chosen.shape[1]
        places = torch.where(anew, torch.arange(number), chosen)
        behind = torch.where(anew, number, GRID * GRID) + torch.arange(ids.shape[2]).repeat(ids.shape[1])
        first = torch.arange(len(prefix)).expand(rows, -1)
        positions = torch.cat([first, len(prefix) + places, len(prefix) + behind], dim=1)
        decoder, packing = self.model.model.language_model, {"questions": ids.shape[1], "slot": ids.shape[2]}
        if self.staging:
            hidden = staged_forward(decoder, tokens, positions, len(prefix), number, self.staging, **packing)
        else:
            hidden = decoder(inputs_embeds=tokens, position_ids=positions, use_cache=False, **packing).last_hidden_state
        return self.model.lm_head(hidden[:, -ids[0].numel() :]).view(*ids.shape, -1)

    def losses(self, batch: dict[str, Any], phase: Phase) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch, and figures for the log."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config["bf16"]):
            patches = self.see(batch["pixels"])
            seen, figures = self.patch_loss(patches, batch["labels"])
            if not phase.answers:
                return seen, figures
            logits = self.answer_logits(patches, batch).float()
        targets = batch["targets"]
        answers = cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORE)
        hinted = (batch["hints"] != IGNORE).any(-1)
        hints, known = self.naming_loss(logits[hinted], batch["hints"][hinted], torch.ones(int(hinted.sum())))
        right = ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(-1).tolist()
        for kinds, flags in zip(batch["kinds"], right, strict=True):
            for kind, flag in zip(kinds, flags, strict=True):
                figures.setdefault(kind, []).append(float(flag))
        figures |= {"answer_loss": answers.item(), "hint_loss": hints.item()}
        figures |= {f"know_{name}": value for name, value in known.items()}
        said = phase.answers * (answers + self.config["hint_weight"] * hints)
        return said + phase.patch_weight * seen, figures

    def train_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimiser step."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        loss, figures = self.losses(batch, self.phase())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.step += 1
        return figures

    # ---- keeping and continuing -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write weights, optimiser state and step; the step file comes last, so that a killed save is not taken."""
        state = {f"model.{n}": p.detach().clone() for n, p in zip(self.names, self.parameters, strict=True)}
        for name, p in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimiser.state.get(p, {}).items():
                state[f"{key}.{name}"] = torch.as_tensor(value).clone()
        target = self.folder / f"state-{self.step}.safetensors"
        save_file(state, target)
        pointer = self.folder / "latest.json.part"
        pointer.write_text(json.dumps({"step": self.step, "state": target.name}))
        os.replace(pointer, self.folder / "latest.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != target:
                old.unlink()

    def resume(self) -> None:
        """Continue from the folder's latest checkpoint, if there is one."""
        pointer = self.folder / "latest.json"
        if not pointer.exists():
            return
        latest = json.loads(pointer.read_text())
        state = load_file(self.folder / latest["state"])
        self.step = latest["step"]
        with torch.no_grad():
            for name, p in zip(self.names, self.parameters, strict=True):
                p.copy_(state[f"model.{name}"])
                moments = {k: state[f"{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in state}
                if moments:
                    self.optimiser.state[p] = moments

    def plain_model(self) -> LlavaForConditionalGeneration:
        """The model as it is, with transformers' own attention."""
        model = make_model(**self.config["model"])
        model.load_state_dict(self.model.state_dict())
        return model.eval()

    def export(self, folder: Path) -> None:
        """Write a checkpoint that ``from_pretrained`` reads, in fp16."""
        self.plain_model().half().save_pretrained(folder)
        make_processor().save_pretrained(folder)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float,
    questions: int,
    slot: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention where the last tokens are ``questions`` slots that see what precedes them all, and themselves.

    All (B, H, L, d) → (B, L, H, d). Padding at the end of a slot is seen by padding alone.
    """
    image = query.shape[2] - slot * questions
    before = (query[:, :, :image] @ key[:, :, :image].transpose(-1, -2) * scaling).masked_fill(
        ~torch.ones(image, image, dtype=torch.bool).tril(), float("-inf")
    )
    seen = before.softmax(-1).to(value.dtype) @ value[:, :, :image]
    slots = lambda t: t[:, :, image:].unflatten(2, (questions, -1))  # noqa: E731
    in_slot = slots(query) @ slots(key).transpose(-1, -2)
    in_slot = in_slot.masked_fill(~torch.ones(in_slot.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    common = (query[:, :, image:] @ key[:, :, :image].transpose(-1, -2)).unflatten(2, (questions, -1))
    weights = (torch.cat([common, in_slot], dim=-1) * scaling).softmax(-1).to(value.dtype)
    out = (weights[..., :image].flatten(2, 3) @ value[:, :, :image]).unflatten(2, (questions, -1))
    out = out + weights[..., image:] @ slots(value)
    return torch.cat([seen, out.flatten(2, 3)], dim=2).transpose(1, 2), None


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Full attention by matrix products: on CPU its backward pass is several times faster than the fused kernel's."""
    weights = (query @ key.transpose(-1, -2) * scaling).softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("tiny_packed", packed_attention)
AttentionInterface.register("tiny_plain", plain_attention)


@torch.no_grad()
def scores(trainer: Trainer, limit: int) -> dict[str, float]:
    """The task metrics by lmms-eval's scorers, on the first ``limit`` questions of each embedded test set.

    Under the staging that the decoder is trained with.
    """
    from ..evals.answers.score import evaluate
    from ..evals.tasks.known import TASKS
    from ..evals.tasks.tasks import load_tasks

    loaded = load.LoadedModel("tiny", trainer.plain_model(), make_processor())
    staging, figures = trainer.staging, dict[str, float]()
    method = load_method("none") if staging is None else load_method("staged", **asdict(staging))
    for task in load_tasks(list(TASKS)):
        evaluation = evaluate(loaded, method, task, limit=limit, batch_size=20)
        figures |= {f"test {task.name} {score.key}": score.value for score in evaluation.outcome.scores}
    return figures


def train(config: dict[str, Any], folder: Path, until: int | None = None, workers: int = 1) -> Trainer:
    """Run or continue a training, to the end or up to step ``until``; curves go to ``curves.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, folder)
    trainer.resume()
    stop = trainer.total if until is None else min(until, trainer.total)
    stream = Stream(trainer.phases, config["seed"], trainer.step)
    loader = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    sums: defaultdict[str, list[float]] = defaultdict(list)
    began = saved = time.monotonic()
    for batch in loader:
        if trainer.step >= stop:
            break
        for name, value in trainer.train_step(batch).items():
            sums[name] += value if isinstance(value, list) else [value]
        if trainer.step % config["log_every"] == 0:
            _log(trainer, {k: sum(v) / len(v) for k, v in sums.items()}, time.monotonic() - began)
            sums.clear()
        if trainer.step % config["evaluate"]["every"] == 0:
            _log(trainer, scores(trainer, config["evaluate"]["limit"]), time.monotonic() - began)
        if time.monotonic() - saved > config["save_seconds"]:
            trainer.save()
            saved = time.monotonic()
    trainer.save()
    return trainer


def _log(trainer: Trainer, figures: dict[str, float], seconds: float) -> None:
    line = {"step": trainer.step, "seconds": round(seconds), "lr": round(trainer.rate(), 6)}
    line |= {name: round(value, 4) for name, value in sorted(figures.items())}
    print(" ".join(f"{k} {v}" for k, v in line.items()), flush=True)
    with (trainer.folder / "curves.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        for name, value in figures.items():
            writer.writerow([trainer.step, name, round(value, 5)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("train.yaml"))
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; an existing run is continued")
    parser.add_argument("--seed", type=int, help="instead of the configuration's")
    parser.add_argument("--until", type=int, help="stop after this step")
    parser.add_argument("--export", type=Path, help="write the checkpoint for from_pretrained here")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = settings.read(arguments.config)
    config |= {} if arguments.seed is None else {"seed": arguments.seed}
    trainer = train(config, arguments.run, arguments.until)
    if arguments.export:
        trainer.export(arguments.export)


if __name__ == "__main__":
    main()
