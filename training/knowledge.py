"""What training tells the model beyond the answers: what a patch shows, and what can be known at a word of a question.

Everything is said in words of the vocabulary, several a place; of the words of one group at most one is true.
"""

from __future__ import annotations

from string import ascii_lowercase

import numpy as np

from ..synthetic.questions import NUMBERS, SceneQuestion, singular
from ..synthetic.scene import COLOURS, GRID, PATCH, SHAPES, SIZE, Object, Scene

ORDINALS = ("first", "second", "third", "fourth", "fifth")
ACROSS, DOWN = tuple(f"x{n}" for n in range(GRID)), tuple(f"y{n}" for n in range(GRID))
# Words of training alone, which no question uses.
LABEL_WORDS = ("background", "center", "border", *ORDINALS, *ACROSS, *DOWN, "true", "false")
# Words of which at most one is true, and the weight of telling them apart.
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "shape": (tuple(SHAPES), 2.0),
    "color": (tuple(COLOURS), 1.0),
    "size": (("small", "large"), 0.5),
    "part": (("center", "border"), 0.5),
    "letter": ((*ascii_lowercase, *("##" + letter for letter in ascii_lowercase)), 2.0),
    "place": (ORDINALS, 1.0),
    "column": (("left", "right"), 0.5),
    "row": (("top", "bottom"), 0.5),
    "height": (("above", "below"), 1.0),
    "across": (ACROSS, 0.5),
    "down": (DOWN, 0.5),
    "number": (NUMBERS, 1.0),
    "truth": (("yes", "no"), 1.0),
    "claim": (("true", "false"), 2.0),
}
MOST = 10  # words at one place, at the most


def patch_words(scene: Scene) -> list[list[str]]:
    """What each of the 144 patches shows: attributes, letters, whether it holds an object's centre, where it lies."""
    words: list[list[str]] = [[] for _ in range(GRID * GRID)]
    for o in scene.objects:
        centre = _cell(o.centre)
        for patch in {*_covered(o.box, 0.2), centre}:
            words[patch] = [o.shape, o.colour, o.size, "center" if patch == centre else "border"]
    if scene.sign:
        x, y = scene.sign.origin
        for k, letter in enumerate(scene.sign.word):
            left = x + k * PATCH
            for patch in _covered((left, y, left + PATCH, y + 22), 0.3):
                words[patch] = [_piece(letter, k), ORDINALS[k]]
    for patch, named in enumerate(words):
        row, column = divmod(patch, GRID)
        named += [] if named else ["background"]
        named += [*_sides((column + 0.5) * PATCH, (row + 0.5) * PATCH), ACROSS[column], DOWN[row]]
    return words


def hints(tokens: list[str], scene: Scene, question: SceneQuestion, claims: bool = True) -> dict[int, list[str]]:
    """What can be known at each token of a question: {token: words}.

    Where a thing is named ("circle", "red objects"): whether the image has it, how many, and if it is one, what it is
    like and where. At the question mark: the fact in question, and the answer. Inside a quoted word: the sign's next
    letter, and whether all was right so far. With ``claims``, at the word with which a claim is complete and at the
    question mark: whether it is true.
    """
    known = {at: _of_things(*thing, scene) for at, thing in _named(tokens)}
    if question.kind != "text":
        known[tokens.index("?")] = [word for word in (question.answer, question.fact) if word]
    if question.kind == "verify_text" and scene.sign:
        known |= _of_letters(tokens, scene.sign.word)
    if claims and question.fact:
        for at in (_claimed(tokens, question.fact), tokens.index("?")):
            known[at] = [*known.get(at, [question.fact]), {"yes": "true", "no": "false"}[question.answer]]
    return known


def _claimed(tokens: list[str], fact: str) -> int:
    """The token with which the claim is complete: the word offered for the fact, or the last thing named."""
    group = next(words for words, _ in GROUPS.values() if fact in words)
    return max(at for at in (*(at for at, _ in _named(tokens)), *(i for i, t in enumerate(tokens) if t in group)))


def _named(tokens: list[str]) -> list[tuple[int, tuple[str, str]]]:
    """(token, (colour or "", shape or "object")) for every noun."""
    nouns = []
    for at, word in enumerate(tokens):
        noun = word if word in SHAPES else singular(word)
        if noun in SHAPES or noun == "object":
            nouns.append((at, (tokens[at - 1] if at and tokens[at - 1] in COLOURS else "", noun)))
    return nouns


def _of_things(colour: str, noun: str, scene: Scene) -> list[str]:
    fitting = [o for o in scene.objects if noun in (o.shape, "object") and colour in (o.colour, "")]
    known = ["yes" if fitting else "no", NUMBERS[min(len(fitting), len(NUMBERS) - 1)]]
    return known + (_of_object(fitting[0]) if len(fitting) == 1 else [])


def _of_object(o: Object) -> list[str]:
    row, column = divmod(_cell(o.centre), GRID)
    return [o.shape, o.colour, o.size, *_sides(*o.centre), ACROSS[column], DOWN[row]]


def _of_letters(tokens: list[str], word: str) -> dict[int, list[str]]:
    opening, closing = (at for at, token in enumerate(tokens) if token == '"')
    spelled = [_piece(letter, k) for k, letter in enumerate(word)]
    known: dict[int, list[str]] = {}
    for k, at in enumerate(range(opening, closing)):
        said = tokens[opening + 1 : at + 1]
        known[at] = spelled[k : k + 1] + ([] if not said else ["yes" if said == spelled[:k] else "no"])
    return known


def _piece(letter: str, place: int) -> str:
    return letter if place == 0 else "##" + letter


def _sides(x: float, y: float) -> tuple[str, str]:
    return ("left", "right")[x > SIZE / 2], ("top", "bottom")[y > SIZE / 2]


def _cell(point: tuple[float, float]) -> int:
    """The patch in which a point lies."""
    return int(point[1]) // PATCH * GRID + int(point[0]) // PATCH


def _covered(box: tuple[int, int, int, int], share: float) -> list[int]:
    """Patches of which the box covers at least ``share``, or the one it covers most."""
    left, top, right, bottom = box
    edges = np.arange(GRID) * PATCH
    across = np.clip(np.minimum(edges + PATCH, right) - np.maximum(edges, left), 0, None)
    down = np.clip(np.minimum(edges + PATCH, bottom) - np.maximum(edges, top), 0, None)
    area = np.outer(down, across).ravel() / PATCH**2
    covered = np.flatnonzero(area >= share)
    return covered.tolist() if len(covered) else [int(area.argmax())]
