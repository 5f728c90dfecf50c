"""How answers to questions of one's own are scored: one score a question, from 0 to 1; the task's is their mean."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = string.ascii_uppercase
_ARTICLE = re.compile(r"^(?:an?|the) ")
_LETTER = re.compile(
    r"\W*(?:(?:the )?answer(?: is)?\W*)?([a-z])(?:\W*$|\s*[-–—.):,\n]|(?<![ai])\W)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Scorer:
    """``key``, ``title``: its metric. ``score`` (answer, references, choices). ``suffix``: what prompts end with."""

    key: str
    title: str
    about: str
    score: Callable[[str, Sequence[str], Sequence[str]], float]
    suffix: str = SHORT


def plain(text: str) -> str:
    """In lower case, without punctuation, single spaces between words: as lmms-eval's exact match compares."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def exact_match(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the answer is one of the references, up to case, punctuation and spaces."""
    return float(plain(answer) in {plain(one) for one in references})


def contains(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether some reference stands in the answer, as whole words, up to case, punctuation and spaces."""
    return float(any(plain(one) and f" {plain(one)} " in f" {plain(answer)} " for one in references))


def reference_in(answer: str, references: Sequence[str]) -> str:
    """The reference that stands in an answer, as whole words, the most frequent one first; else the answer.

    Where yes or no is asked for, the first of both that stands there.
    """
    asked = {plain(one) for one in references}
    if asked <= {"yes", "no"}:
        return next((word for word in plain(answer).split() if word in ("yes", "no")), answer)
    by_number = sorted(references, key=lambda one: -list(references).count(one))
    return next((one for one in by_number if contains(answer, [one])), answer)


def vqa(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """VQA accuracy: mean over all references but one of min(1, agreeing others / 3), as EvalAI normalises them.

    With fewer than four references, whether the answer is one of them.
    """
    said, given = _evalai(answer), [_evalai(one) for one in references]
    if len(given) < 4:
        return float(said in given)
    hits = [min(1.0, sum(said == one for i, one in enumerate(given) if i != left) / 3) for left in range(len(given))]
    return sum(hits) / len(hits)


def multiple_choice(answer: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """Whether the answer names the right choice, by its letter or its text; references are letters or texts."""
    right = {chosen(one, choices) for one in references}
    return float(chosen(answer, choices) in right - {None})


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """The place of the choice that a text names; None for none of them.

    By its text, with another article or none too; or by its letter: ``B``, ``(b)``, ``B. a cat``, ``the answer is B``.
    The words "a" and "I" are no letters.
    """
    for said in (plain, lambda words: _ARTICLE.sub("", plain(words))):
        texts = [said(choice) for choice in choices]
        if said(text) in texts:
            return texts.index(said(text))
    letter = _LETTER.match(text.strip())
    place = LETTERS.index(letter[1].upper()) if letter else len(choices)
    return place if place < len(choices) else None


def anls(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Average normalised Levenshtein similarity to the nearest reference, 0 below one half: lmms-eval's own."""
    from lmms_eval.api.metrics import anls as stock

    return float(stock(list(references), [answer])["anls"])


def listed(choices: Sequence[str]) -> str:
    """Choices as prompts show them, one a line."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


@cache
def _processor() -> Any:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()


def _evalai(text: str) -> str:
    return str(_processor()(text))


SCORERS = {
    "exact": Scorer("exact_match", "exact match", "the answer is a reference, up to case and punctuation", exact_match),
    "vqa": Scorer("vqa_accuracy", "VQA accuracy", "min(1, references that agree / 3), as for VQAv2 and TextVQA", vqa),
    "contains": Scorer("contains", "contains", "a reference stands in the answer, as whole words", contains),
    "choice": Scorer(
        "choice_accuracy", "accuracy", "the answer names the right choice by letter or text", multiple_choice, LETTER
    ),
    "anls": Scorer("anls", "ANLS", "similarity by edit distance, 0 below one half, as for DocVQA", anls),
}
