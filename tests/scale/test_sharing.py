"""What the cells of a sweep share beside vision features: decoded images."""

from collections import Counter

import pytest
from PIL import Image
from rich.console import Console
from visibench.errors import DataError
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.evals.tasks import tasks
from visibench.models import LoadedModel
from visibench.utils.bounded_cache import BoundedCache


def picture(side: int) -> list[Image.Image]:
    return [Image.new("RGB", (side, side))]


def test_what_fits_stays_and_nothing_makes_room_for_the_rest():
    """An image of 10 × 10 in RGB is 300 bytes: two fit, and a smaller one beside them, round after round."""
    album, decoded = BoundedCache(tasks._bytes, limit=700), Counter()

    def get(doc_id: int, side: int) -> Image.Image:
        def decode() -> list[Image.Image]:
            decoded[doc_id] += 1
            return picture(side)

        return album.get(doc_id, decode)[0]

    for _ in range(3):
        for doc_id, side in ((0, 10), (1, 10), (2, 10), (3, 5)):
            assert get(doc_id, side).size == (side, side)
    assert decoded == {0: 1, 1: 1, 2: 3, 3: 1}
    assert album.room == 700 - 300 - 300 - 75


def test_a_failure_is_not_kept():
    album = BoundedCache(tasks._bytes)

    def damaged() -> list[Image.Image]:
        raise DataError("damaged")

    with pytest.raises(DataError):
        album.get(0, damaged)
    assert album.get(0, lambda: picture(4))[0].size == (4, 4)


@pytest.mark.slow
def test_a_sweep_processes_every_batch_once_unless_nothing_is_shared(disk_data, tmp_path, monkeypatch):
    asked, encoded = Counter(), LoadedModel.encoded

    def spy(self, questions, images):
        asked[tuple(questions)] += 1
        return encoded(self, questions, images)

    monkeypatch.setattr(LoadedModel, "encoded", spy)
    content = {"model": "tiny", "data": str(disk_data), "tasks": ["gqa", "pope"], "limit": 4, "batch_size": 2}
    content |= {"methods": ["fastv:keep=0.5", "pooling:tokens=54"], "timing": None}
    shared = sweep(parse_config(content, "test"), tmp_path / "shared", Console(quiet=True))
    assert list(asked.values()) == [1] * 4
    asked.clear()
    alone = sweep(parse_config(content | {"feature_cache_gb": 0}, "test"), tmp_path / "alone", Console(quiet=True))
    assert list(asked.values()) == [3] * 4
    for one, other in zip(shared, alone, strict=True):
        columns = ["doc_id", "answer", "score", "executed_macs", "prompt_visual_tokens"]
        assert one.samples()[columns].equals(other.samples()[columns])


@pytest.mark.slow
def test_a_sweep_decodes_every_image_once(disk_data, tmp_path, monkeypatch):
    asked, look = Counter(), tasks.decoded

    def spy(task, doc_id, decode):
        asked[task, doc_id] += 1
        return look(task, doc_id, decode)

    monkeypatch.setattr(tasks, "decoded", spy)
    content = {"model": "tiny", "data": str(disk_data), "tasks": ["gqa", "pope"], "limit": 3, "batch_size": 2}
    content |= {"methods": ["fastv:keep=0.5", "pooling:tokens=54"], "timing": {"repeats": 1, "warmup": 0}}
    cells = sweep(parse_config(content, "test"), tmp_path, Console(quiet=True))
    assert len(cells) == 6
    assert asked == {(task, doc_id): 1 for task in ("gqa", "pope") for doc_id in range(3)}
