"""Training batches: scenes, several questions packed behind each image, and what is to be seen in every patch.

Batch ``step`` depends on the seed and ``step`` alone, so that a resumed run sees the same stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ..synthetic.questions import FORBIDDEN, KINDS, SceneQuestion
from ..synthetic.scene import GRID, HELD_OUT, Scene, render, sample_scene
from .build import SYSTEM, make_tokenizer
from .knowledge import MOST, hints, patch_words

SUFFIX = "\nAnswer the question using a single word or phrase."  # what lmms-eval appends
IGNORE = -100


@dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum: ``steps`` batches with these settings. ``patches``: visual tokens kept of 144."""

    steps: int
    images: int
    questions: int
    patches: int
    objects: tuple[int, int]
    kinds: dict[str, float]
    answers: float = 1.0  # weight of the answers' loss; 0: only the patches are trained
    patch_weight: float = 0.5  # weight of the patches' loss beside the answers'
    claims: bool = True  # whether hints say at which word a claim has proved true or false
    sign: float = 0.5
    renumber: float = 0.0  # share of images whose patches get new positions, as after a cut that renumbers
    suffix: float = 1.0  # share of the batches whose questions end as lmms-eval ends them; without, they are shorter


class Packer:
    """Turns scenes into arrays."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.words = self.tokenizer.get_vocab()
        self.prefix = self.tokenizer(SYSTEM + "USER:").input_ids

    def ask(self, scene: Scene, phase: Phase, rng: np.random.Generator) -> list[SceneQuestion]:
        """Questions of the phase's kinds that the scene allows, with repetition."""
        kinds, weights = list(phase.kinds), np.array(list(phase.kinds.values()))
        questions: list[SceneQuestion] = []
        while len(questions) < phase.questions:
            kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
            question = KINDS[kind](scene, rng)
            if question is not None and not _speaks_of_held_out(question):
                questions.append(question)
        return questions

    def tail(self, question: SceneQuestion, suffix: str) -> tuple[list[int], int]:
        """Token ids from the question to the end of the answer, and where the answer starts."""
        prompt = self.tokenizer(f"{question.text}{suffix} ASSISTANT:", add_special_tokens=False).input_ids
        answer = self.tokenizer(question.answer, add_special_tokens=False).input_ids
        return prompt + answer + [2], len(prompt)

    def batch(self, phase: Phase, seed: int, step: int) -> dict[str, Any]:
        """Arrays of one batch; see :class:`~visibench.training.train.Trainer` for their use."""
        rng = np.random.default_rng([seed, step])
        scenes = [self._scene(phase, rng) for _ in range(phase.images)]
        questions = [self.ask(scene, phase, rng) if phase.answers else [] for scene in scenes]
        suffix = SUFFIX if rng.random() < phase.suffix else ""
        labels = torch.full((phase.images, GRID * GRID, MOST), IGNORE)
        chosen = torch.empty(phase.images, phase.patches, dtype=torch.long)
        for row, scene in enumerate(scenes):
            named = patch_words(scene)
            for patch, words in enumerate(named):
                labels[row, patch, : len(words)] = torch.tensor([self.words[w] for w in words])
            plain = np.array(["background" in words for words in named])
            # Everything that matters stays; of the background a random part.
            order = np.argsort(plain + 0.5 * rng.random(len(plain)))
            chosen[row] = torch.from_numpy(np.sort(order[: phase.patches]))
        pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
        anew = torch.from_numpy(rng.random(len(scenes)) < phase.renumber)
        image = {"pixels": pixels, "labels": labels, "chosen": chosen, "renumbered": anew}
        return image | self._pack(scenes, questions, suffix, phase.claims)

    def _scene(self, phase: Phase, rng: np.random.Generator) -> Scene:
        sign = bool(rng.random() < phase.sign)
        return sample_scene(rng, sign=sign, count=phase.objects, forbidden=FORBIDDEN)

    def _pack(
        self, scenes: list[Scene], by_scene: list[list[SceneQuestion]], suffix: str, claims: bool
    ) -> dict[str, Any]:
        """``ids`` and ``targets`` (B, questions, S): every question with its answer in a slot, padded at the end.

        ``hints`` (B, questions, S, words): what could be known at a token, see :func:`~.knowledge.hints`.
        """
        tails = [[self.tail(question, suffix) for question in questions] for questions in by_scene]
        slot = max((len(ids) for row in tails for ids, _ in row), default=0)
        shape = (len(by_scene), len(by_scene[0]), slot)
        ids, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
        known = torch.full((*shape, MOST), IGNORE)
        for row, questions in enumerate(tails):
            for number, (tokens, start) in enumerate(questions):
                named = [str(token) for token in self.tokenizer.convert_ids_to_tokens(tokens[:start])]
                for at, words in hints(named, scenes[row], by_scene[row][number], claims).items():
                    known[row, number, at, : len(words)] = torch.tensor([self.words[word] for word in words])
                ids[row, number, : len(tokens)] = torch.tensor(tokens)
                targets[row, number, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
        kinds = [[question.kind for question in questions] for questions in by_scene]
        return {"ids": ids, "targets": targets, "hints": known, "kinds": kinds}


def _speaks_of_held_out(question: SceneQuestion) -> bool:
    """Whether it may name a combination that training never shows: the answer would always be no."""
    words = set(question.text.rstrip("?").split())
    return any({shape, colour} <= words for shape, colour in HELD_OUT)


class Stream(IterableDataset):
    """Batches from ``start`` on, phase after phase; each worker makes every n-th."""

    def __init__(self, phases: list[Phase], seed: int, start: int) -> None:
        self.phases, self.seed, self.start = phases, seed, start

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        packer = Packer()
        first = 0
        for phase in self.phases:
            for step in range(max(first, self.start), first + phase.steps):
                if (step - self.start) % workers == number:
                    yield packer.batch(phase, self.seed, step)
            first += phase.steps
