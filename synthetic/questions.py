"""Questions about scenes, with answers that follow from the scene alone.

Every function in ``KINDS`` looks at a scene and returns one question, or None when the scene offers none.
A question never speaks of an object that its words do not single out.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scene import COLOURS, COMPANIONS, SHAPES, SIZE, Object, Scene, sample_word

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
MARGIN = 10  # px an object must lie off the middle line, or off another object, before we ask about sides
TEXT_QUESTIONS = ("what word is written on the sign?", "what does the sign say?", "what is written on the sign?")


@dataclass(frozen=True)
class SceneQuestion:
    """``kind`` is a key of ``KINDS``; ``focus`` names what is asked about (for meta data).

    ``fact``: the one word that is true where a yes-no question offers a word: the real colour, side or number.
    """

    kind: str
    text: str
    answer: str
    focus: str = ""
    fact: str = ""


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeio' else 'a'} {phrase}"


def singular(noun: str) -> str:
    """``circle`` for ``circles``, ``cross`` for ``crosses``."""
    return noun.removesuffix("es") if noun == "crosses" else noun.removesuffix("s")


def referents(scene: Scene, noun_only: bool = False) -> list[tuple[str, Object]]:
    """Every (phrase, object) such that the phrase fits exactly one object of the scene."""
    shapes = Counter(o.shape for o in scene.objects)
    colours = Counter(o.colour for o in scene.objects)
    pairs = Counter((o.shape, o.colour) for o in scene.objects)
    fitting = [(o.shape, o) for o in scene.objects if shapes[o.shape] == 1]
    if not noun_only:
        fitting += [(f"{o.colour} object", o) for o in scene.objects if colours[o.colour] == 1]
        fitting += [(f"{o.colour} {o.shape}", o) for o in scene.objects if pairs[o.shape, o.colour] == 1]
    return fitting


def _pick(rng: np.random.Generator, items):
    items = list(items)
    return items[rng.integers(len(items))] if items else None


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _absent_shape(scene: Scene, rng: np.random.Generator) -> str | None:
    """A shape the scene lacks; half of the time the companion of one it has, when that is absent."""
    present = {o.shape for o in scene.objects}
    companions = sorted({COMPANIONS[s] for s in present} - present)
    absent = [s for s in SHAPES if s not in present]
    return _pick(rng, companions if companions and rng.random() < 0.5 else absent)


def exist(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    truth = rng.random() < 0.5
    shape = _pick(rng, sorted({o.shape for o in scene.objects})) if truth else _absent_shape(scene, rng)
    if shape is None:
        return None
    return SceneQuestion("exist", f"Is there {article(shape)} in the image?", _yes(truth), shape)


def exist_pair(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    truth = rng.random() < 0.5
    o = _pick(rng, scene.objects)
    if o is None:
        return None
    shape, colour = o.shape, o.colour
    if not truth:  # half of the wrong pairs keep the shape, half keep the colour
        if rng.random() < 0.5:
            colour = _pick(rng, COLOURS)
        else:
            shape = _pick(rng, SHAPES)
        if any((p.shape, p.colour) == (shape, colour) for p in scene.objects):
            return None
    return SceneQuestion("exist_pair", f"Is there {article(f'{colour} {shape}')} in the image?", _yes(truth), shape)


def color(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    referent = _pick(rng, referents(scene, noun_only=True))
    return referent and SceneQuestion("color", f"What color is the {referent[0]}?", referent[1].colour, referent[0])


def shape(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    referent = _pick(rng, [(p, o) for p, o in referents(scene) if p.endswith("object")])
    return referent and SceneQuestion("shape", f"What shape is the {referent[0]}?", referent[1].shape, referent[0])


def verify_color(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    referent = _pick(rng, referents(scene, noun_only=True))
    if referent is None:
        return None
    truth = rng.random() < 0.5
    colour = referent[1].colour if truth else _pick(rng, [c for c in COLOURS if c != referent[1].colour])
    return SceneQuestion(
        "verify_color", f"Is the {referent[0]} {colour}?", _yes(truth), referent[0], referent[1].colour
    )


def size(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    referent = _pick(rng, referents(scene))
    if referent is None:
        return None
    words = "small or large" if rng.random() < 0.5 else "large or small"
    return SceneQuestion("size", f"Is the {referent[0]} {words}?", referent[1].size, referent[0])


def _off_middle(scene: Scene, rng: np.random.Generator, axis: int):
    return _pick(rng, [(p, o) for p, o in referents(scene) if abs(o.centre[axis] - SIZE / 2) >= MARGIN])


def side(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    """Left or right, top or bottom."""
    axis = int(rng.integers(2))
    referent = _off_middle(scene, rng, axis)
    if referent is None:
        return None
    names = (("left", "right"), ("top", "bottom"))[axis]
    answer = names[referent[1].centre[axis] > SIZE / 2]
    first, second = names if rng.random() < 0.5 else names[::-1]
    preposition = ("on", "at")[axis]
    text = f"Is the {referent[0]} {preposition} the {first} or {preposition} the {second}?"
    return SceneQuestion("side", text, answer, referent[0])


def verify_side(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    axis = int(rng.integers(2))
    referent = _off_middle(scene, rng, axis)
    if referent is None:
        return None
    truth = rng.random() < 0.5
    after = referent[1].centre[axis] > SIZE / 2
    place = (("on the left side", "on the right side"), ("at the top", "at the bottom"))[axis][after == truth]
    fact = (("left", "right"), ("top", "bottom"))[axis][after]
    return SceneQuestion("verify_side", f"Is the {referent[0]} {place} of the image?", _yes(truth), referent[0], fact)


def relation(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    """Whether one thing stands beside, above or below another; None if no pair lies far enough apart."""
    axis = int(rng.integers(2))
    phrases = referents(scene, noun_only=rng.random() < 0.7)
    pairs = [
        (p, o, q, n)
        for p, o in phrases
        for q, n in phrases
        if abs(o.centre[axis] - n.centre[axis]) >= MARGIN and o != n
    ]
    if not pairs:
        return None
    p, o, q, n = _pick(rng, pairs)
    truth = rng.random() < 0.5
    after = o.centre[axis] > n.centre[axis]
    words = (("to the left of", "to the right of"), ("above", "below"))[axis][after == truth]
    fact = (("left", "right"), ("above", "below"))[axis][after]
    return SceneQuestion("relation", f"Is the {p} {words} the {q}?", _yes(truth), p, fact)


def count(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    noun, number = _countable(scene, rng)
    return SceneQuestion("count", f"How many {noun} are there?", NUMBERS[number], noun) if number else None


def verify_count(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    noun, number = _countable(scene, rng)
    truth, fact = rng.random() < 0.5, NUMBERS[number]
    if not truth:
        number = _pick(rng, [n for n in range(max(1, number - 2), number + 3) if n != number and n < 6])
    if number == 0:
        return None
    noun, verb = (singular(noun), "Is") if number == 1 else (noun, "Are")
    return SceneQuestion(
        "verify_count", f"{verb} there {NUMBERS[number]} {noun} in the image?", _yes(truth), noun, fact
    )


def _countable(scene: Scene, rng: np.random.Generator) -> tuple[str, int]:
    if not scene.objects or rng.random() < 0.4:
        return "objects", len(scene.objects)
    shape = _pick(rng, scene.objects).shape
    noun = "crosses" if shape == "cross" else f"{shape}s"
    return noun, sum(o.shape == shape for o in scene.objects)


def text(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    if scene.sign is None:
        return None
    return SceneQuestion("text", _pick(rng, TEXT_QUESTIONS), scene.sign.word, "sign")


def verify_text(scene: Scene, rng: np.random.Generator) -> SceneQuestion | None:
    if scene.sign is None:
        return None
    word, truth = scene.sign.word, rng.random() < 0.5
    while not truth and word == scene.sign.word:
        word = sample_word(rng, test=bool(rng.random() < 0.5), forbidden=FORBIDDEN)
    return SceneQuestion("verify_text", f'Is the word on the sign "{word}"?', _yes(truth), "sign")


_ASKERS = (exist, exist_pair, color, shape, verify_color, size, side, verify_side, relation, count, verify_count)
KINDS: dict[str, Callable[[Scene, np.random.Generator], SceneQuestion | None]] = {
    asker.__name__: asker for asker in (*_ASKERS, text, verify_text)
}
_TEMPLATE_WORDS = (
    "is are there a an in the image what color shape small or large on left right at top bottom side of to above below "
    "how many word written sign does say yes no crosses object objects"
)
_PLURALS = (f"{s}s" for s in SHAPES if s != "cross")
WORDS = tuple(sorted({*SHAPES, *COLOURS, *NUMBERS, *_PLURALS, *_TEMPLATE_WORDS.split(" ")}))
# A word on a sign must be spelled letter by letter, so it may not begin with a word of the vocabulary.
FORBIDDEN = frozenset(w for w in WORDS if 2 <= len(w) <= 5) | {"as", "user", "chat"}
