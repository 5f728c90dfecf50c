"""Seeded scenes of coloured shapes and rendered words on distracting backgrounds.

A scene is a plain description; ``render`` turns it into pixels. Only integer arithmetic and IEEE-exact
float operations are used, so that the same scene gives the same pixels on every machine.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 144  # image side, px
PATCH = 12  # side of one visual token, px
GRID = SIZE // PATCH

# Skewed on purpose: POPE's "popular" negatives need popular shapes, "adversarial" ones need habitual companions.
SHAPES = {
    "circle": 0.22,
    "square": 0.19,
    "triangle": 0.15,
    "heart": 0.12,
    "diamond": 0.10,
    "cross": 0.09,
    "ring": 0.07,
    "moon": 0.06,
}
COMPANIONS = {
    "circle": "square",
    "square": "circle",
    "triangle": "diamond",
    "heart": "moon",
    "diamond": "triangle",
    "cross": "ring",
    "ring": "cross",
    "moon": "heart",
}
COMPANY = 0.4  # probability that an object brings its companion next
COLOURS = {
    "red": (214, 32, 38),
    "orange": (244, 136, 24),
    "yellow": (244, 226, 48),
    "green": (34, 158, 56),
    "cyan": (54, 216, 226),
    "blue": (34, 62, 214),
    "purple": (126, 36, 168),
    "pink": (248, 128, 196),
}
SIZES = {"small": (12, 14), "large": (22, 26)}  # px, inclusive
HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "cyan"),
        ("heart", "blue"),
        ("diamond", "red"),
        ("cross", "pink"),
    }
)
LETTER = (12, 22)  # width and height of one rendered letter, px
GAP = 6  # free pixels between any two things in a scene

_SHAPE_NAMES, _SHAPE_CDF = tuple(SHAPES), np.cumsum(list(SHAPES.values()))
_COLOUR_NAMES = tuple(COLOURS)
_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_PATTERNS = ("cv", "vc", "cvc", "vcv", "cvcv", "cvcc", "ccvc", "vccv", "cvcvc", "ccvcc", "vcvcv")


@dataclass(frozen=True)
class Object:
    """A shape in a colour; ``box`` is (left, top, right, bottom) in px, right and bottom exclusive."""

    shape: str
    colour: str
    size: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Sign:
    """A plate ``box`` (px) carrying ``word``; the first letter's top left corner is ``origin`` (px)."""

    word: str
    box: tuple[int, int, int, int]
    origin: tuple[int, int]
    upper: bool
    dark: bool


@dataclass(frozen=True)
class Scene:
    """Objects, perhaps a sign, and the seed from which the background is drawn."""

    objects: tuple[Object, ...]
    sign: Sign | None
    background: int

    @property
    def held_out(self) -> bool:
        """Whether some object shows a shape-colour combination that training never shows."""
        return any((o.shape, o.colour) in HELD_OUT for o in self.objects)


def fingerprint(scene: Scene) -> int:
    """Hash of everything but the background; it decides on which side of the split the scene falls."""
    return zlib.crc32(repr((scene.objects, scene.sign)).encode())


def is_test(scene: Scene) -> bool:
    """Scenes are split by a rule, not by luck: one in eight belongs to the test side."""
    return fingerprint(scene) % 8 == 0


def is_test_word(word: str) -> bool:
    """Words are split by a rule too: one in five is only ever shown in test scenes."""
    return zlib.crc32(word.encode()) % 5 == 0


def sample_word(rng: np.random.Generator, test: bool, forbidden: frozenset[str] = frozenset()) -> str:
    """A pronounceable word of 2-5 letters from the asked side of the split.

    No word may begin with one of ``forbidden``: those would not be spelled letter by letter.
    """
    while True:
        pattern = _PATTERNS[rng.integers(len(_PATTERNS))]
        draws = rng.integers(105, size=len(pattern))  # 105 = 21 consonants x 5: both alphabets evenly
        word = "".join(_CONSONANTS[d % 21] if p == "c" else _VOWELS[d % 5] for p, d in zip(pattern, draws, strict=True))
        if is_test_word(word) == test and not any(word[:n] in forbidden for n in range(2, len(word) + 1)):
            return word


def sample_scene(
    rng: np.random.Generator,
    *,
    test: bool = False,
    held_out: bool = False,
    sign: bool | None = None,
    count: tuple[int, int] = (1, 5),
    forbidden: frozenset[str] = frozenset(),
) -> Scene:
    """Draw one scene.

    ``test`` picks the side of the split, ``held_out`` asks for a combination absent from training (test only),
    ``sign`` forces or forbids a sign (default: half of the scenes), ``count`` bounds the number of objects.
    """
    if held_out and not test:
        raise ValueError("held-out combinations exist in test scenes only: pass test=True")
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        plate = _sample_sign(rng, test, forbidden) if (sign if sign is not None else rng.random() < 0.5) else None
        if plate:
            boxes.append(plate.box)
        objects = _sample_objects(rng, int(rng.integers(count[0], count[1] + 1)), boxes, held_out)
        scene = Scene(tuple(objects), plate, int(rng.integers(2**31)))
        if len(objects) >= count[0] and scene.held_out == held_out and is_test(scene) == test:
            return scene


def _sample_sign(rng: np.random.Generator, test: bool, forbidden: frozenset[str]) -> Sign:
    word = sample_word(rng, test, forbidden)
    width, height = LETTER
    columns = GRID - len(word) - 1
    # Letters keep to the columns of the patch grid, give or take a pixel, as print keeps to its lines.
    x = PATCH * int(rng.integers(1, columns + 1)) + int(rng.integers(0, 2))
    y = PATCH * int(rng.integers(1, GRID - 2)) + int(rng.integers(0, 3))
    pad_x, pad_y = int(rng.integers(3, 8)), int(rng.integers(2, 6))
    box = (x - pad_x, y - pad_y, min(x + width * len(word) + pad_x, SIZE), min(y + height + pad_y, SIZE))
    return Sign(word, box, (x, y), bool(rng.random() < 0.5), bool(rng.random() < 0.5))


def _sample_objects(rng: np.random.Generator, count: int, boxes: list, held_out: bool) -> list[Object]:
    objects: list[Object] = []
    for _ in range(count):
        shape = _SHAPE_NAMES[min(int(np.searchsorted(_SHAPE_CDF, rng.random())), len(_SHAPE_NAMES) - 1)]
        if objects and rng.random() < COMPANY:
            shape = COMPANIONS[objects[-1].shape]
        colour = _COLOUR_NAMES[rng.integers(len(_COLOUR_NAMES))]
        if held_out and not objects:
            shape, colour = sorted(HELD_OUT)[rng.integers(len(HELD_OUT))]
        elif not held_out and (shape, colour) in HELD_OUT:
            colour = next(
                c for c in _COLOUR_NAMES if ((shape, c) not in HELD_OUT and rng.random() < 0.5) or c == "green"
            )
        size = "small" if rng.random() < 0.5 else "large"
        box = _place(rng, int(rng.integers(SIZES[size][0], SIZES[size][1] + 1)), boxes)
        if box:
            boxes.append(box)
            objects.append(Object(shape, colour, size, box))
    return objects


def _place(rng: np.random.Generator, side: int, boxes: list) -> tuple[int, int, int, int] | None:
    for x, y in rng.integers(2, SIZE - side - 1, size=(30, 2)).tolist():
        if all(x >= r + GAP or x + side + GAP <= l or y >= b + GAP or y + side + GAP <= t for l, t, r, b in boxes):  # noqa: E741
            return x, y, x + side, y + side
    return None


@lru_cache(maxsize=1024)
def shape_mask(shape: str, side: int) -> np.ndarray:
    """Bool (side, side): the pixels a shape covers in its box."""
    axis = (2 * np.arange(side) + 1 - side) / side
    u, v = axis[None, :], axis[:, None]
    r = u * u + v * v
    if shape == "circle":
        return r <= 1
    if shape == "square":
        return (abs(u) <= 0.88) & (abs(v) <= 0.88)
    if shape == "triangle":
        return abs(u) <= (v + 1) / 2
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "cross":
        return (abs(u) <= 0.34) | (abs(v) <= 0.34)
    if shape == "ring":
        return (r <= 1) & (r >= 0.34)
    if shape == "moon":
        return (r <= 1) & ((u - 0.55) * (u - 0.55) + v * v >= 0.62)
    if shape == "heart":
        lobes = (abs(u) - 0.5) * (abs(u) - 0.5) + (v + 0.45) * (v + 0.45) <= 0.28
        return lobes | ((v >= -0.4) & (abs(u) <= (1 - v) * 0.72))
    raise ValueError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")


@lru_cache(maxsize=64)
def letter_mask(letter: str) -> np.ndarray:
    """Bool (22, 12): one letter of Pillow's legacy bitmap font, doubled in size."""
    tile = Image.new("1", (LETTER[0] // 2, LETTER[1] // 2))
    ImageDraw.Draw(tile).text((0, 0), letter, fill=1, font=ImageFont.load_default_imagefont())
    return np.asarray(tile).repeat(2, axis=0).repeat(2, axis=1)


def render(scene: Scene) -> np.ndarray:
    """Pixels of a scene, uint8 (144, 144, 3)."""
    rng = np.random.default_rng(scene.background)
    image = _background(rng)
    for o in scene.objects:
        left, top, right, bottom = o.box
        colour = np.array(COLOURS[o.colour]) + rng.integers(-12, 13, size=3)
        image[top:bottom, left:right][shape_mask(o.shape, right - left)] = colour
    if scene.sign:
        _draw_sign(image, scene.sign, rng)
    image += rng.integers(-6, 7, size=(SIZE, SIZE, 1), dtype=np.int16)
    return np.clip(image, 0, 255).astype(np.uint8)


def _draw_sign(image: np.ndarray, sign: Sign, rng: np.random.Generator) -> None:
    left, top, right, bottom = sign.box
    light, dark = rng.integers(205, 246, size=3), rng.integers(10, 61, size=3)
    plate, ink = (dark, light) if sign.dark else (light, dark)
    image[top:bottom, left:right] = plate
    x, y = sign.origin
    for letter in sign.word.upper() if sign.upper else sign.word:
        tile = letter_mask(letter)[: SIZE - y]
        image[y : y + len(tile), x : x + LETTER[0]][tile] = ink
        x += LETTER[0]


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted int16 (144, 144, 3): a base tint, then a gradient, stripes, blotches or specks, then grain."""
    base = rng.integers(85, 166) + rng.integers(-22, 23, size=3)
    image = np.empty((SIZE, SIZE, 3), np.int16)
    image[:] = base
    ramp = np.arange(SIZE, dtype=np.int16)
    kinds = rng.random(4) < (0.5, 0.4, 0.4, 0.4)
    tint = rng.integers(-30, 31, size=(4, 3)).astype(np.int16)
    if kinds[0]:
        image += (ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]) * tint[0] // SIZE
    if kinds[1]:
        period, slope = int(rng.integers(5, 24)), int(rng.integers(-2, 3))
        image[(ramp[:, None] + slope * ramp[None, :]) % period < period // 2] += tint[1] // 2
    if kinds[2]:
        cells = rng.integers(0, 2, size=(GRID * 2, GRID * 2)).astype(bool)
        image[cells.repeat(PATCH // 2, axis=0).repeat(PATCH // 2, axis=1)] += tint[2] // 2
    if kinds[3]:
        for x, y, w, h in rng.integers((0, 0, 2, 2), (SIZE, SIZE, 5, 5), size=(40, 4)).tolist():
            image[y : y + h, x : x + w] += tint[3]
    return image + rng.integers(-10, 11, size=(SIZE, SIZE, 1), dtype=np.int16)
