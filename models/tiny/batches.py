"""Training batches: scenes, several questions packed behind each image, and what is to be seen in every patch.

Batch ``step`` depends on the seed and ``step`` alone, so that a resumed run sees the same stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ...evals.synthetic.questions import FORBIDDEN, KINDS, Question
from ...evals.synthetic.scene import COLOURS, GRID, PATCH, SHAPES, SIZE, Scene, render, sample_scene
from .build import SYSTEM, make_tokenizer

SUFFIX = "\nAnswer the question using a single word or phrase."  # what lmms-eval appends
ORDINALS = ("first", "second", "third", "fourth", "fifth")
# Words of which at most one is true of a patch, and the weight of telling them apart.
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "shape": (tuple(SHAPES), 2.0),
    "color": (tuple(COLOURS), 1.0),
    "size": (("small", "large"), 0.5),
    "letter": ((*ascii_lowercase, *("##" + letter for letter in ascii_lowercase)), 2.0),
    "place": (ORDINALS, 1.0),
    "column": (("left", "right"), 0.25),
    "row": (("top", "bottom"), 0.25),
}
IGNORE = -100
LABELS = 5  # words that describe one patch, at the most
HINTS = 6  # words that are known of one thing in a question, at the most


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
    sign: float = 0.5


class Packer:
    """Turns scenes into arrays."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.words = self.tokenizer.get_vocab()
        self.prefix = self.tokenizer(SYSTEM + "USER:").input_ids

    def ask(self, scene: Scene, phase: Phase, rng: np.random.Generator) -> list[Question]:
        """Questions of the phase's kinds that the scene allows, with repetition."""
        kinds, weights = list(phase.kinds), np.array(list(phase.kinds.values()))
        asked: list[Question] = []
        while len(asked) < phase.questions:
            kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
            question = KINDS[kind](scene, rng)
            if question is not None:
                asked.append(question)
        return asked

    def tail(self, question: Question) -> tuple[list[int], int]:
        """Token ids from the question to the end of the answer, and where the answer starts."""
        asked = self.tokenizer(f"{question.text}{SUFFIX} ASSISTANT:", add_special_tokens=False).input_ids
        answer = self.tokenizer(question.answer, add_special_tokens=False).input_ids
        return asked + answer + [2], len(asked)

    def hints(self, tokens: list[int], scene: Scene) -> list[tuple[int, list[str]]]:
        """What can be known of a thing where a question names it: (token, words) for each "circle", "red object" …

        Nothing that fits: "no". One object: "yes" and its attributes. Several: "yes".
        """
        found = []
        for at, word in enumerate(self.tokenizer.convert_ids_to_tokens(tokens)):
            if word not in SHAPES and word != "object":
                continue
            before = self.tokenizer.convert_ids_to_tokens(tokens[at - 1]) if at else ""
            fitting = [
                o
                for o in scene.objects
                if (word == "object" or o.shape == word) and (before not in COLOURS or o.colour == before)
            ]
            known = ["yes"] if fitting else ["no"]
            if len(fitting) == 1:
                (o,) = fitting
                side, height = (int(o.centre[axis] > SIZE / 2) for axis in (0, 1))
                known += [o.shape, o.colour, o.size, ("left", "right")[side], ("top", "bottom")[height]]
            found.append((at, known))
        return found

    def patch_words(self, scene: Scene) -> list[list[str]]:
        """What each of the 144 patches shows, as vocabulary words: attributes, letters, and where it lies."""
        words: list[list[str]] = [[] for _ in range(GRID * GRID)]
        for o in scene.objects:
            for patch in _covered(o.box, 0.2):
                words[patch] = [o.shape, o.colour, o.size]
        if scene.sign:
            x, y = scene.sign.origin
            for k, letter in enumerate(scene.sign.word):
                left = x + k * PATCH
                for patch in _covered((left, y, left + PATCH, y + 22), 0.3):
                    words[patch] = [letter if k == 0 else "##" + letter, ORDINALS[k]]
        for patch, named in enumerate(words):
            row, column = divmod(patch, GRID)
            named += [] if named else ["background"]
            named += ["left" if column < GRID // 2 else "right", "top" if row < GRID // 2 else "bottom"]
        return words

    def batch(self, phase: Phase, seed: int, step: int) -> dict[str, Any]:
        """Arrays of one batch; see :class:`~visibench.models.tiny.train.Trainer` for their use."""
        rng = np.random.default_rng([seed, step])
        scenes = [self._scene(phase, rng) for _ in range(phase.images)]
        asked = [self.ask(scene, phase, rng) if phase.answers else [] for scene in scenes]
        labels = torch.full((phase.images, GRID * GRID, LABELS), IGNORE)
        chosen = torch.empty(phase.images, phase.patches, dtype=torch.long)
        for row, scene in enumerate(scenes):
            named = self.patch_words(scene)
            for patch, words in enumerate(named):
                labels[row, patch, : len(words)] = torch.tensor([self.words[w] for w in words])
            plain = np.array(["background" in words for words in named])
            # Everything that matters stays; of the background a random part.
            order = np.argsort(plain + 0.5 * rng.random(len(plain)))
            chosen[row] = torch.from_numpy(np.sort(order[: phase.patches]))
        pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
        return {"pixels": pixels, "labels": labels, "chosen": chosen} | self._pack(scenes, asked, phase)

    def _scene(self, phase: Phase, rng: np.random.Generator) -> Scene:
        sign = bool(rng.random() < phase.sign)
        return sample_scene(rng, sign=sign, count=phase.objects, forbidden=FORBIDDEN)

    def _pack(self, scenes: list[Scene], asked: list[list[Question]], phase: Phase) -> dict[str, Any]:
        """``ids`` and ``targets`` (B, questions, S): every question with its answer in a slot, padded at the end.

        ``hints`` (B, questions, S, words): what could be known at a token, see :meth:`hints`.
        """
        tails = [[self.tail(question) for question in questions] for questions in asked]
        slot = max((len(ids) for row in tails for ids, _ in row), default=0)
        shape = (phase.images, phase.questions, slot)
        ids, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
        hints = torch.full((*shape, HINTS), IGNORE)
        for row, questions in enumerate(tails):
            for number, (tokens, start) in enumerate(questions):
                for at, known in self.hints(tokens[:start], scenes[row]):
                    hints[row, number, at, : len(known)] = torch.tensor([self.words[word] for word in known])
                ids[row, number, : len(tokens)] = torch.tensor(tokens)
                targets[row, number, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
        kinds = [[question.kind for question in questions] for questions in asked]
        return {"ids": ids, "targets": targets, "hints": hints, "kinds": kinds}


def _covered(box: tuple[int, int, int, int], share: float) -> list[int]:
    """Patches of which the box covers at least ``share``, or the one it covers most."""
    left, top, right, bottom = box
    edges = np.arange(GRID) * PATCH
    across = np.clip(np.minimum(edges + PATCH, right) - np.maximum(edges, left), 0, None)
    down = np.clip(np.minimum(edges + PATCH, bottom) - np.maximum(edges, top), 0, None)
    area = np.outer(down, across).ravel() / PATCH**2
    covered = np.flatnonzero(area >= share)
    return covered.tolist() if len(covered) else [int(area.argmax())]


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
