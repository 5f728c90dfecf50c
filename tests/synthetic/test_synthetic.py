"""The synthetic data: schemas, split, balance, and answers checked against the scenes by other means."""

import errno
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import hubdata
import numpy as np
import pytest
from datasets import load_from_disk
from visibench.errors import DataError, StorageError
from visibench.evals.tasks.tasks import load_tasks
from visibench.synthetic import datasets, tables
from visibench.synthetic.questions import FORBIDDEN, KINDS, NUMBERS, WORDS
from visibench.synthetic.scene import (
    COLOURS,
    GAP,
    HELD_OUT,
    PATCH,
    SHAPES,
    SIZE,
    Scene,
    fingerprint,
    is_test_word,
    render,
    sample_scene,
    shape_mask,
)

SPLITS = {
    "GQA_images": "testdev",
    "GQA_instructions": "testdev",
    "MME": "test",
    "POPE": "test",
    "textvqa": "validation",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = datasets.ensure(tmp_path_factory.mktemp("cache"))
    return {name: load_from_disk(str(folder / name))[split] for name, split in SPLITS.items()}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Data sets of a few rows, with a manifest of their own."""
    for name, number in {"GQA_IMAGES": 5, "MME_PAIRS": 2, "TEXTVQA_IMAGES": 3, "POPE_IMAGES": 2}.items():
        monkeypatch.setattr(tables, name, number)
    monkeypatch.setattr(datasets, "MANIFEST", tmp_path / "manifest.json")
    datasets.write_manifest()
    return tmp_path / "cache"


def scenes(number, seed=0, **wanted):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, forbidden=FORBIDDEN, **wanted) for _ in range(number)]


# ---- data sets --------------------------------------------------------------------------------------------------


def test_schemas_equal_those_of_the_hub(built):
    for name, rows in built.items():
        assert rows.features == hubdata.FEATURES[name], name


def test_enough_questions_and_images_of_144_px(built):
    assert all(len(rows) >= 500 for name, rows in built.items() if name != "GQA_images")
    assert built["GQA_images"][0]["image"].size == (SIZE, SIZE)
    assert set(built["GQA_instructions"]["imageId"]) == set(built["GQA_images"]["id"])
    assert len(set(built["GQA_instructions"]["id"])) == len(built["GQA_instructions"])


def test_every_task_has_held_out_images(built):
    columns = {"GQA_instructions": "imageId", "MME": "question_id", "POPE": "image_source", "textvqa": "image_id"}
    for name, column in columns.items():
        marks = Counter(value.split("/")[-1][0] for value in built[name][column])
        assert set(marks) == {"s", "h"}, name
        assert 0.15 < marks["h"] / marks.total() < 0.25, name


def test_gqa_answers_are_balanced(built):
    rows = built["GQA_instructions"]
    kinds = Counter(types["detailed"] for types in rows["types"])
    assert max(kinds.values()) - min(kinds.values()) <= 3
    yes, no = (list(rows["answer"]).count(answer) for answer in ("yes", "no"))
    assert 0.8 < yes / no < 1.25
    assert yes < 0.3 * len(rows), "a constant answer must not score"


def test_mme_has_a_yes_and_a_no_for_every_image(built):
    pairs = defaultdict(list)
    for row in built["MME"].remove_columns("image"):
        pairs[row["category"], row["question_id"]].append(row)
        assert row["question"].endswith(" Please answer yes or no.")
    assert all(sorted(row["answer"] for row in pair) == ["No", "Yes"] for pair in pairs.values())
    assert all(len({row["question"] for row in pair}) == 2 for pair in pairs.values())
    categories = Counter(category for category, _ in pairs)
    assert set(categories) == {"existence", "count", "position", "color", "OCR"}
    assert min(categories.values()) >= 50


def test_pope_is_balanced_and_its_negatives_are_what_they_claim(built):
    rows = built["POPE"].remove_columns("image")
    assert set(Counter(zip(rows["category"], rows["answer"], strict=True)).values()) == {len(rows) // 6}
    absent = defaultdict(Counter)
    for row in rows:
        if row["answer"] == "no":
            absent[row["category"]][row["question"].split()[3]] += 1
    share = {category: counts["circle"] / counts.total() for category, counts in absent.items()}
    assert share["popular"] > 0.4 > share["random"]


def test_textvqa_annotators_agree_mostly(built):
    for row in built["textvqa"].remove_columns("image"):
        word, votes = Counter(row["answers"]).most_common(1)[0]
        assert len(row["answers"]) == 10
        assert votes >= 7
        assert row["ocr_tokens"] == [word]
        assert is_test_word(word)
        assert 2 <= len(word) <= 5
        assert not any(word.startswith(known) for known in WORDS if len(known) > 1)


# ---- the cache --------------------------------------------------------------------------------------------------


def test_built_once_and_rebuilt_when_damaged(small, monkeypatch):
    folder = datasets.ensure(small)
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "all_tables", lambda: pytest.fail("built again"))
        assert datasets.ensure(small) == folder
    arrow = next((folder / "POPE").rglob("*.arrow"))
    intact = arrow.read_bytes()
    arrow.write_bytes(intact[:-100])
    assert datasets.ensure(small) == folder
    assert len(load_from_disk(str(folder / "POPE"))["test"]) == 12


def test_other_data_than_the_manifest_is_refused(small, monkeypatch):
    monkeypatch.setattr(datasets, "SEED", 1)
    with pytest.raises(DataError, match="--write-manifest"):
        datasets.ensure(small)
    assert not any(small.glob("synthetic-*")), "nothing half-made stays"
    assert not any(small.glob(".synthetic-*"))


def test_same_seed_same_rows(small):
    first, second = (json.dumps(tables.all_tables(), default=repr) for _ in range(2))
    assert first == second


def test_cache_folder_from_the_environment(small, monkeypatch):
    monkeypatch.setenv("VISIBENCH_CACHE", str(small))
    assert datasets.ensure().parent == small


def test_unwritable_cache_is_one_clear_line(small):
    small.parent.mkdir(exist_ok=True)
    small.write_text("a file")
    with pytest.raises(DataError, match="VISIBENCH_CACHE"):
        datasets.ensure(small / "x")


def test_a_full_disk_is_called_so(monkeypatch, tmp_path):
    def fail(folder, calibration):
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise RuntimeError("what wraps it") from error

    monkeypatch.setenv("VISIBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "_build", fail)
    with pytest.raises(StorageError, match=r"no room left on the disk .* set VISIBENCH_CACHE to") as caught:
        load_tasks(["gqa"])
    assert "repair" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# ---- scenes -----------------------------------------------------------------------------------------------------


def test_training_and_test_share_neither_scenes_nor_words():
    train, test = scenes(1500), scenes(300, test=True)
    assert not {fingerprint(s) for s in train} & {fingerprint(s) for s in test}
    words = [{s.sign.word for s in side if s.sign} for side in (train, test)]
    assert not words[0] & words[1]


def test_training_never_shows_a_held_out_combination():
    assert not any((o.shape, o.colour) in HELD_OUT for s in scenes(1500) for o in s.objects)
    assert all(s.held_out for s in scenes(30, test=True, held_out=True))
    with pytest.raises(ValueError, match="test=True"):
        sample_scene(np.random.default_rng(0), held_out=True)


def test_things_never_overlap_and_stay_inside():
    for scene in scenes(300):
        boxes = [o.box for o in scene.objects] + ([scene.sign.box] if scene.sign else [])
        assert all(0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE for left, top, right, bottom in boxes)
        for k, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[:k]:
                apart = (left - other[2], other[0] - right, top - other[3], other[1] - bottom)
                assert max(apart) >= GAP


def test_objects_and_words_cover_a_minority_of_patches():
    share = []
    for scene in scenes(100):
        covered = np.zeros((SIZE, SIZE), bool)
        for left, top, right, bottom in [o.box for o in scene.objects] + ([scene.sign.box] if scene.sign else []):
            covered[top:bottom, left:right] = True
        share.append(covered.reshape(12, PATCH, 12, PATCH).any(axis=(1, 3)).mean())
    assert np.mean(share) < 0.3


def test_pixels_show_the_scene():
    for scene in scenes(60):
        image = render(scene)
        assert image.shape == (SIZE, SIZE, 3)
        assert (image == render(scene)).all()
        for o in scene.objects:
            left, top, right, bottom = o.box
            inside = image[top:bottom, left:right][shape_mask(o.shape, right - left)].mean(axis=0)
            nearest = min(COLOURS, key=lambda c: np.abs(inside - COLOURS[c]).sum())
            assert nearest == o.colour


# ---- answers, by reading the question anew ------------------------------------------------------------------------


def fits(phrase: str, scene: Scene) -> list:
    """Objects that a phrase such as ``red circle`` or ``circles`` fits."""
    words = phrase.replace("crosses", "cross").split()
    known = [w if w in (*SHAPES, *COLOURS) else w.removesuffix("s") for w in words if w not in ("object", "objects")]
    return [o for o in scene.objects if all(w in (o.shape, o.colour) for w in known)]


def the(phrase: str, scene: Scene):
    found = fits(phrase, scene)
    assert len(found) == 1, f"{phrase!r} is ambiguous"
    return found[0]


def middle(o):
    return (o.box[0] + o.box[2]) / 2, (o.box[1] + o.box[3]) / 2


def where(o) -> set[str]:
    x, y = middle(o)
    return {"left" if x < SIZE / 2 else "right", "top" if y < SIZE / 2 else "bottom"}


def beside(o, n) -> dict[str, bool]:
    (x, y), (u, v) = middle(o), middle(n)
    return {"to the left of": x < u, "to the right of": x > u, "above": y < v, "below": y > v}


READERS = [
    (r"Is there an? ([a-z ]+) in the image\?", lambda s, p: bool(fits(p, s))),
    (r"What color is the (.+)\?", lambda s, p: the(p, s).colour),
    (r"What shape is the (.+)\?", lambda s, p: the(p, s).shape),
    (r"How many (.+) are there\?", lambda s, p: NUMBERS[len(fits(p, s))]),
    (r"(?:Is|Are) there (one|two|three|four|five) (.+) in the image\?", lambda s, n, p: NUMBERS[len(fits(p, s))] == n),
    (r"Is the (.+) (?:small or large|large or small)\?", lambda s, p: "large" if size(the(p, s)) > 18 else "small"),
    (r"Is the (.+) (?:on|at) the (\w+) or (?:on|at) the (\w+)\?", lambda s, p, a, b: (where(the(p, s)) & {a, b}).pop()),
    (
        r"Is the (.+) (?:on|at) the (left|right|top|bottom)(?: side)? of the image\?",
        lambda s, p, a: a in where(the(p, s)),
    ),
    (
        r"Is the (.+) (to the left of|to the right of|above|below) the (.+)\?",
        lambda s, p, r, q: beside(the(p, s), the(q, s))[r],
    ),
    (r'Is the word on the sign "(\w+)"\?', lambda s, w: s.sign.word == w),
    (rf"Is the ([a-z ]+) ({'|'.join(COLOURS)})\?", lambda s, p, c: the(p, s).colour == c),
    (r"what (?:word is written on the sign|does the sign say|is written on the sign)\?", lambda s: s.sign.word),
]


def size(o) -> int:
    return o.box[2] - o.box[0]


def read(question: str, scene: Scene) -> str:
    pattern, answer = next((p, a) for p, a in READERS if re.fullmatch(p, question))
    found = answer(scene, *re.fullmatch(pattern, question).groups())
    return {True: "yes", False: "no"}.get(found, found)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_scene(kind):
    rng = np.random.default_rng(1)
    answers = Counter()
    for scene in scenes(400, seed=2):
        question = KINDS[kind](scene, rng)
        if question:
            assert read(question.text, scene) == question.answer, (question, scene)
            assert question.kind == kind
            answers[question.answer] += 1
    assert answers.total() > 100
    if set(answers) == {"yes", "no"}:
        assert 0.35 < answers["yes"] / answers.total() < 0.65


def test_manifest_is_committed():
    manifest = json.loads(Path(datasets.__file__).with_name("manifest.json").read_text())
    assert set(manifest) == set(SPLITS)
