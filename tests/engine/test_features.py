"""Features of images computed once and shared: the same results, less work, bounded memory, damaged files."""

import os
import socket
import subprocess

import families
import pytest
import torch
import visibench
from cases import every_method
from rich.console import Console
from storing import untimed
from support import IMAGE, collate, make_batch, state
from visibench.engine.vision.features import DISK, FeatureStore
from visibench.engine.vision.tap import CHANGING
from visibench.evals.compute import timing
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.sweep import sweep
from visibench.models.adapters import Adapter
from visibench.results.tables.render import render
from visibench.results.tables.tables import build

# Each registered method, by the plainest of its examples.
# (prefix, text, images): different lengths, none, one and several images.
ROWS = [(5, 9, 1), (3, 12, 2), (4, 6, 0), (2, 20, 1)]


def batch(seed=0, repeated=False):
    rows = make_batch(ROWS, seed)
    if repeated:  # the third row's image is the second one of the row with two
        rows[3]["pixel_values"] = rows[1]["pixel_values"][1:]
    return collate(rows)


def run(model, method, inputs, store=None):
    """Logits of a prefill, two generated tokens, and what the trace counts."""
    with visibench.prune(model, method, features=store) as session:
        place = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=place).logits
        new = model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE])
        trace = session.trace
    kept = [trace.kept(layer) for layer in range(trace.layers)]
    return [logits, new, trace.scoring_macs(), trace.attention_pairs(), trace.projected, *kept], str(trace.tower)


def same(a, b):
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(map(torch.equal, a[0], b[0]))


class Towers:
    """Counts the images that really go through the first block of the vision tower."""

    def __init__(self, model):
        self.images = 0
        self.hook = Adapter(model).vision_blocks[0].register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.images += args[0].shape[0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


@every_method
def test_results_are_the_same_bit_for_bit(llava, method):
    """With nothing stored, with what a method left that reads less, and with all stored; rounding apart, without it."""
    inputs, store = batch(), FeatureStore(2**30)
    off = run(llava, method, inputs, FeatureStore(0))
    with visibench.prune(llava, visibench.load_method("none"), features=store):
        llava(**inputs)
    assert same(run(llava, method, inputs, store), off)
    with Towers(llava) as towers:
        assert same(run(llava, method, inputs, store), off)
    assert (towers.images > 0) == bool(CHANGING & set(method.hook_points))
    without, last = run(llava, method, inputs), off[0][0][:, -1]
    assert (without[0][0][:, -1] - last).abs().max() < 1e-5 * last.abs().max()


@pytest.mark.parametrize("name", ["none", "fastervlm"])
def test_an_image_goes_through_the_tower_once(llava, name):
    """An image that a batch holds twice is not computed twice, and not counted as one of an earlier batch either."""
    method = visibench.load_method(name, **({} if name == "none" else {"keep": 0.5}))
    store = FeatureStore(2**30)
    with Towers(llava) as towers, visibench.prune(llava, method, features=store):
        llava(**batch(repeated=True))
        assert (towers.images, store.computed, store.reused) == (3, 3, 0)
        llava(**batch(repeated=True))
        assert (towers.images, store.computed, store.reused) == (3, 3, 4)
        llava(**batch(seed=1))
        assert (towers.images, store.computed, store.reused) == (7, 7, 4)


def test_nothing_is_shared_where_nothing_is_kept(llava):
    """Not even inside a batch, so that times are those of all that was asked; the answers are the same."""
    method, inputs, store = visibench.load_method("fastervlm", keep=0.5), batch(repeated=True), FeatureStore(0)
    with Towers(llava) as towers, visibench.prune(llava, method, features=store):
        llava(**inputs)
        llava(**inputs)
    assert (towers.images, store.computed, store.reused) == (8, 8, 0)
    assert same(run(llava, method, inputs, store), run(llava, method, inputs, FeatureStore(2**30)))


def test_features_of_an_image_do_not_depend_on_where_it_stood(llava):
    inputs = batch(repeated=True)
    store, method = FeatureStore(2**30), visibench.load_method("fastervlm", keep=0.5)
    for sample in reversed(make_batch(ROWS)):
        run(llava, method, sample, store)
    assert same(run(llava, method, inputs, store), run(llava, method, inputs, FeatureStore(0)))


def test_a_method_that_changes_the_tower_never_shares(llava):
    store, inputs = FeatureStore(2**30), batch()
    run(llava, visibench.load_method("none"), inputs, store)
    before = store.computed, store.reused, store.used
    for method in (visibench.load_method("tome", keep=0.5), visibench.load_method("downsample", keep=0.25)):
        assert same(run(llava, method, inputs, store), run(llava, method, inputs))
    assert (store.computed, store.reused, store.used) == before


@families.every_family
def test_other_families(kind):
    """Tiles are shared one by one; patches of all images in one sequence are not shared, and nothing changes."""
    model, method = families.model_of(kind), visibench.load_method("fastv", keep=0.4)
    inputs, store = families.collate(families.samples_of(kind)), FeatureStore(2**30)

    def logits(store):
        with visibench.prune(model, method, features=store):
            return model(**inputs).logits

    off = logits(FeatureStore(0))
    assert torch.equal(logits(store), off)
    with Towers(model) as towers:
        assert torch.equal(logits(store), off)
    assert (towers.images > 0) == (kind == "qwen2_5_vl")
    assert (store.reused > 0) == (kind != "qwen2_5_vl")


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(llava, fail):
    llava(**batch())  # on first use transformers leaves hooks of its own
    before, store = state(llava), FeatureStore(2**30)
    try:
        with visibench.prune(llava, visibench.load_method("fastervlm", keep=0.5), features=store):
            llava(**batch())
            if fail:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state(llava) == before
    tower = Adapter(llava).vision_tower
    tower.forward = own = tower.forward  # as accelerate's hooks leave it
    with visibench.prune(llava, visibench.load_method("none"), features=store):
        llava(**batch())
    assert tower.forward is own
    del tower.forward


# ---- the store ----------------------------------------------------------------------------------------------------


def entry(number, size=1000):
    return {"x": torch.full((size,), float(number))}


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_least_recently_used_leaves_memory_first(tmp_path):
    store = FeatureStore(3 * 4000)
    for number in range(3):
        store.put(f"k{number}", entry(number))
    store.get("k0")
    store.put("k3", entry(3))
    assert [store.get(f"k{number}") is None for number in range(4)] == [False, True, False, False]
    assert store.used <= store.limit
    with FeatureStore(3 * 4000, tmp_path / "features") as store:
        for number in range(5):
            store.put(f"k{number}", entry(number))
        assert len(files(tmp_path)) == 2
        for number in (0, 1, 2, 3, 4):
            found = store.get(f"k{number}")
            assert found is not None
            assert torch.equal(found["x"], entry(number)["x"])
            assert store.used <= store.limit
    assert not list((tmp_path / "features").iterdir())


def test_disk_is_bounded_and_first_come_stays(tmp_path):
    with FeatureStore(4000, tmp_path) as store:
        for number in range(20):
            store.put(f"k{number}", entry(number))
        stored = sum(file.stat().st_size for file in files(tmp_path))
        assert 0 < stored == store.on_disk <= DISK * 4000 + 1000
        assert store.get("k0") is not None
        assert store.get("k10") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_file_is_computed_again_and_said(llava, tmp_path, damage):
    said: list[str] = []
    inputs = batch()
    method = visibench.load_method("fastervlm", keep=0.5)
    off = run(llava, method, inputs, FeatureStore(0))
    with FeatureStore(3000, tmp_path, say=said.append) as store:
        assert same(run(llava, method, inputs, store), off)
        for file in files(tmp_path):
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.unlink() if damage == "gone" else file.write_bytes(
                {"flip": data, "cut": data[:-9], "empty": b""}[damage]
            )
        damaged = len(files(tmp_path))
        assert same(run(llava, method, inputs, store), off)
        assert said
        assert all("\n" not in line and "computing them again" in line for line in said)
        assert damaged == 0 or len(said) <= damaged


def test_without_a_place_to_write_memory_is_enough(tmp_path):
    said: list[str] = []
    (tmp_path / "file").write_text("not a folder")
    with FeatureStore(4000, tmp_path / "file", say=said.append) as store:
        for number in range(4):
            store.put(f"k{number}", entry(number))
        assert store.get("k3") is not None
    assert len(said) == 1
    assert "cannot write" in said[0]


def test_kept_features_serve_the_next_run(llava, tmp_path):
    inputs, method = batch(), visibench.load_method("fastervlm", keep=0.5)
    with FeatureStore(2**30, tmp_path, identity="model a", keep=True) as store:
        first = run(llava, method, inputs, store)
    assert files(tmp_path)
    with FeatureStore(2**30, tmp_path, identity="model a", keep=True) as store, Towers(llava) as towers:
        assert same(run(llava, method, inputs, store), first)
    assert towers.images == store.computed == 0
    with FeatureStore(2**30, tmp_path, identity="model b", keep=True) as store:
        run(llava, method, inputs, store)
    assert store.computed == 4


def test_the_identity_is_part_of_every_key():
    assert FeatureStore(1, identity="float32").key("image") != FeatureStore(1, identity="float16").key("image")
    assert FeatureStore(1).key("ab", "c") != FeatureStore(1).key("a", "bc")


def test_what_a_killed_process_left_is_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, own = socket.gethostname(), os.getpid()
    dead, alive, other = (tmp_path / name for name in (f"{host}-{ended.pid}-a", f"{host}-{own}-b", f"x-{ended.pid}-c"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "k-h.safetensors").write_bytes(b"")
    with FeatureStore(4000, tmp_path) as store:
        for number in range(3):
            store.put(f"k{number}", entry(number))
    assert [folder.exists() for folder in (dead, alive, other)] == [False, True, True]
    assert len(files(tmp_path)) == 2


# ---- sweeps -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_gives_the_same_with_and_without(checkpoint, disk_data, tmp_path, monkeypatch):
    """Answers, scores and compute; each cell says what it reused, and prefill is timed with the tower."""
    timed = []

    def counting(loaded, method, inputs, **options):
        with Towers(loaded.model) as towers:
            found = real(loaded, method, inputs, **options)
        timed.append(towers.images)
        return found

    def run_sweep(name, **changes):
        monkeypatch.setenv("VISIBENCH_CACHE", str(tmp_path / name / "cache"))
        content = {
            "model": str(checkpoint),
            "tasks": ["pope"],
            "data": str(disk_data),
            "methods": ["fastv:layer=1,keep=0.5", "fastervlm:keep=0.5", "tome:keep=0.5"],
            "timing": {"repeats": 2, "warmup": 1},
        }
        return sweep(parse_config(content | changes, "test.yaml"), tmp_path / name, Console(quiet=True))

    real = timing.time_prefill
    monkeypatch.setattr(timing, "time_prefill", counting)
    on = run_sweep("on")
    off = run_sweep("off", feature_cache_gb=0)
    spilled = run_sweep("disk", feature_cache_gb=3e-5, keep_features=True)
    assert files(tmp_path / "disk" / "cache" / "features")
    assert not files(tmp_path / "on" / "cache")
    assert timed == [3] * 12
    own = {"seconds", "prefill", "reused_images", "samples_hash", "checksum"}
    for a, b, c in zip(on, off, spilled, strict=True):
        for other in (b, c):
            assert untimed(a) == untimed(other)
            assert a.metrics.model_dump(exclude=own) == other.metrics.model_dump(exclude=own)
    assert not any(cell.metrics.reused_images for cell in off)
    reused = {cell.config.method: cell.metrics.reused_images for cell in on}
    images = on[0].metrics.size
    assert (reused["fastv"], reused["tome"]) == (images, 0)
    assert reused["none"] < images
    told = "Vision features of an image were reused in"
    assert told in render(build(on), "text")
    assert told not in render(build([cell for cell in on if cell.config.method == "tome"]), "text")
