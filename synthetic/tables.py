"""Rows of the four data sets: test scenes, and questions about them in each benchmark's manner.

Every fifth image shows a shape-colour combination that training never shows; its id begins with ``h`` (held out)
instead of ``s`` (seen). Rows stand in an order that keeps any prefix balanced: images of all categories in turn.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from .questions import FORBIDDEN, KINDS, SceneQuestion, article, referents
from .scene import COMPANIONS, HELD_OUT, SHAPES, SIZE, Scene, render, sample_scene

SEED, CALIBRATION_SEED = 20_26, 20_27
"""Of the questions that methods are evaluated on, and of those that they are calibrated on."""
GQA_IMAGES, GQA_EACH = 250, 3
MME_PAIRS = 60  # a category
TEXTVQA_IMAGES = 500
POPE_IMAGES = 120
MME_CATEGORIES = {
    "existence": ("exist",),
    "count": ("verify_count",),
    "position": ("verify_side", "relation"),
    "color": ("verify_color",),
    "OCR": ("verify_text",),
}
POPE_CATEGORIES = ("adversarial", "popular", "random")
# Of GQA's types: the structural and the semantic one.
GQA_TYPES = {
    "exist": ("verify", "obj"),
    "exist_pair": ("verify", "obj"),
    "color": ("query", "attr"),
    "shape": ("query", "cat"),
    "verify_color": ("verify", "attr"),
    "size": ("choose", "attr"),
    "side": ("choose", "attr"),
    "verify_side": ("verify", "attr"),
    "relation": ("verify", "rel"),
    "count": ("query", "attr"),
}
# Words of prompts with which a word on a test sign may not begin either: all its letters are to be read.
_FORBIDDEN = FORBIDDEN | {"and", "using", "first", "third", "fifth", "two"}

Row = dict[str, Any]


def _drawn(seed: int, task: int, number: int, ask: Callable, **wanted: Any) -> Iterator[tuple[str, Scene, Any]]:
    """(image id, scene, what ``ask(scene, rng)`` returned); scenes about which it returns nothing are drawn again."""
    for index in range(number):
        rng = np.random.default_rng([seed, task, index])
        held_out, questions = index % 5 == 4, None
        while not questions:
            scene = sample_scene(rng, test=True, held_out=held_out, forbidden=_FORBIDDEN, **wanted)
            questions = ask(scene, rng)
        yield f"{'h' if held_out else 's'}{index:05d}", scene, questions


def _png(scene: Scene) -> Row:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _speaks_of_held_out(scene: Scene, question: SceneQuestion) -> bool:
    """Whether the question names (by shape or colour) an object in a combination that training never shows."""
    phrases = question.focus.split()
    return any((o.shape, o.colour) in HELD_OUT and {o.shape, o.colour} & set(phrases) for o in scene.objects)


def gqa(seed: int = SEED) -> dict[str, list[Row]]:
    """Images with three questions each, all types alike often; on held-out images about the held-out object."""
    asked_so_far: Counter[str] = Counter()

    def ask(scene: Scene, rng: np.random.Generator) -> list[SceneQuestion] | None:
        questions: list[SceneQuestion] = []
        for kind in sorted(GQA_TYPES, key=lambda k: (asked_so_far[k], rng.random())):
            question = KINDS[kind](scene, rng)
            if question and (not scene.held_out or _speaks_of_held_out(scene, question)):
                questions.append(question)
            if len(questions) == GQA_EACH:
                asked_so_far.update(q.kind for q in questions)
                return questions
        return None

    images: list[dict] = []
    rows: list[dict] = []
    for image_id, scene, questions in _drawn(seed, 1, GQA_IMAGES, ask):
        images.append({"id": image_id, "image": _png(scene)})
        rows += [_gqa_row(image_id, scene, q, f"{20_000_000 + len(rows) + k}") for k, q in enumerate(questions)]
    return {"GQA_images": images, "GQA_instructions": rows}


def _gqa_row(image_id: str, scene: Scene, question: SceneQuestion, number: str) -> Row:
    structural, semantic = GQA_TYPES[question.kind]
    named = [o for phrase, o in referents(scene) if phrase == question.focus]
    objects = [{"objectId": str(scene.objects.index(o)), "value": question.focus} for o in named[:1]]
    return {
        "id": number,
        "imageId": image_id,
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": f"{question.answer.capitalize()}.",
        "isBalanced": True,
        "groups": {"global": question.kind, "local": f"{question.kind}-{question.focus}"},
        "entailed": "[]",
        "equivalent": f"['{number}']",
        "types": {"structural": structural, "semantic": semantic, "detailed": question.kind},
        "annotations": {"question": objects, "answer": [], "fullAnswer": []},
        "semantic": [{"operation": "select", "argument": question.focus, "dependencies": []}],
        "semanticStr": f"select: {question.focus}",
    }


def mme(seed: int = SEED) -> dict[str, list[Row]]:
    """Pairs of questions about one image, one to be answered with yes and one with no, by categories in turn."""
    categories = list(MME_CATEGORIES)
    pairs = [_mme_pairs(seed, number, category) for number, category in enumerate(categories)]
    return {"MME": [row for group in zip(*pairs, strict=True) for pair in group for row in pair]}


def _mme_pairs(seed: int, number: int, category: str) -> list[list[Row]]:
    def ask(scene: Scene, rng: np.random.Generator) -> list[SceneQuestion] | None:
        kind = KINDS[MME_CATEGORIES[category][rng.integers(len(MME_CATEGORIES[category]))]]
        questions = [q for q in (kind(scene, rng) for _ in range(12)) if q]
        yes = next((q for q in questions if q.answer == "yes"), None)
        no = next((q for q in questions if q.answer == "no"), None)
        return [yes, no] if yes and no else None

    sign = True if category == "OCR" else None
    pairs = []
    for image_id, scene, questions in _drawn(seed, 10 + number, MME_PAIRS, ask, sign=sign):
        shared = {"question_id": f"{category}/{image_id}.png", "image": _png(scene), "category": category}
        texts = [(f"{q.text} Please answer yes or no.", q.answer.capitalize()) for q in questions]
        pairs.append([shared | {"question": text, "answer": answer} for text, answer in texts])
    return pairs


def textvqa(seed: int = SEED) -> dict[str, list[Row]]:
    """One question an image about the word on its sign, answered by ten annotators of whom up to three err."""
    rows: list[dict] = []
    for image_id, scene, (question, answers) in _drawn(seed, 2, TEXTVQA_IMAGES, _ask_annotators, sign=True):
        rows.append(
            {
                "image_id": image_id,
                "question_id": 30_000 + len(rows),
                "question": question.text,
                "question_tokens": question.text.rstrip("?").split(),
                "image": _png(scene),
                "image_width": SIZE,
                "image_height": SIZE,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": answers,
                "image_classes": ["Sign", *sorted({o.shape.capitalize() for o in scene.objects})],
                "set_name": "val",
                "ocr_tokens": [question.answer],
            }
        )
    return {"textvqa": rows}


def _ask_annotators(scene: Scene, rng: np.random.Generator) -> tuple[SceneQuestion, list[str]] | None:
    question = KINDS["text"](scene, rng)
    if question is None:
        return None
    answers = [question.answer] * 10
    for annotator in rng.permutation(10)[: rng.integers(0, 4)]:
        answers[annotator] = _misread(question.answer, rng)
    return question, answers


def _misread(word: str, rng: np.random.Generator) -> str:
    """The word with one letter wrong."""
    at = int(rng.integers(len(word)))
    others = [c for c in "abcdefghijklmnopqrstuvwxyz" if c != word[at]]
    return word[:at] + others[rng.integers(len(others))] + word[at + 1 :]


def pope(seed: int = SEED) -> dict[str, list[Row]]:
    """Six questions an image: for each way of choosing absent shapes, one present shape and one absent."""
    rows: list[Row] = []
    numbers: Counter[str] = Counter()
    for image_id, scene, questions in _drawn(seed, 3, POPE_IMAGES, _ask_pope, count=(2, 5)):
        image = _png(scene)
        for category, shape, answer in questions:
            numbers[category] += 1
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(numbers[category]),
                    "question": f"Is there {article(shape)} in the image?",
                    "answer": answer,
                    "image_source": image_id,
                    "image": image,
                    "category": category,
                }
            )
    return {"POPE": rows}


def _ask_pope(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, str]] | None:
    present = sorted({o.shape for o in scene.objects})
    absent = [s for s in SHAPES if s not in present]  # in the order of their frequency
    companions = [s for s in absent if COMPANIONS[s] in present]
    if not companions:
        return None
    negatives = {"adversarial": companions[0], "popular": absent[0], "random": absent[rng.integers(len(absent))]}
    order = rng.permutation(present)
    questions = []
    for number, category in enumerate(POPE_CATEGORIES):
        questions += [(category, str(order[number % len(order)]), "yes"), (category, negatives[category], "no")]
    return questions


def all_tables(seed: int = SEED) -> dict[str, list[Row]]:
    """Rows of every data set, by folder name; images as PNG bytes."""
    return gqa(seed) | mme(seed) | pope(seed) | textvqa(seed)
