"""Pictures of the tokens that stay, of squares, tiles and rectangles."""

from types import SimpleNamespace

import numpy as np
import pytest
import visibench
from decoders import decoder_model, row_samples
from families import model_of, samples_of
from PIL import Image
from support import make_batch
from visibench.analysis.overlay import LastAttention, overlay
from visibench.errors import InputError

TILED = SimpleNamespace(crop_to_patches=False, min_patches=1, max_patches=12, size={"height": 48, "width": 48})
METHOD = visibench.load_method("pyramiddrop", cuts=(2, 3, 5))


def shown(kind):
    """Trace and picture of the first sample of a family."""
    model, sample = model_of(kind), samples_of(kind)[0]
    size = (48, 48)
    if kind == "llava_next":
        tall, wide = sample["image_sizes"][0].tolist()
        size = (wide, tall)
    with visibench.prune(model, METHOD) as session:
        model(**sample, use_cache=False)
    return session.trace, session.trace.show(Image.new("RGB", size, "white"), processor=TILED)


@pytest.mark.parametrize("kind", ["llava_next", "internvl", "qwen2_5_vl"])
def test_panels_are_what_the_trace_kept(kind):
    trace, picture = shown(kind)
    (strip,) = picture.strips
    layers = np.stack([trace.kept(layer)[0].numpy() for layer in range(6)])
    assert (strip.kept == layers).all()
    steps = strip.steps()
    assert [said.partition(":")[0] for said, _ in steps] == ["layers 0–1", "layer 2", "layers 3–4", "layer 5"]
    assert [int(kept.sum()) for _, kept in steps] == trace.visual_counts()[0, [0, 2, 3, 5]].tolist()
    axes = [axis for part in picture.figure.subfigs for axis in part.axes if axis.images]
    assert len(axes) == len(steps) * sum(map(len, picture.places))
    assert picture._repr_html_().startswith("<img")


@pytest.mark.parametrize("kind", ["mistral3", "glm4v", "qwen3_vl"])
def test_rectangles_are_known_by_the_patches_that_were_seen(kind):
    (sample, *_) = row_samples(kind)
    with visibench.prune(decoder_model(kind), visibench.load_method("none")) as session:
        decoder_model(kind)(**sample, use_cache=False)
    ((view,),) = session.trace.show(Image.new("RGB", (48, 48))).places
    assert view == [4, 5, 1, 1, 0]


def test_dark_cells_are_those_that_left(llava):
    (sample,) = make_batch([(5, 9, 1)])
    with visibench.prune(llava, visibench.load_method("fastv", keep=0.5)) as session:
        llava(**sample, use_cache=False)
    picture = session.trace.show(Image.new("RGB", (24, 24), "white"))
    *_, last = (axis for part in picture.figure.subfigs for axis in part.axes if axis.images)
    veil = np.asarray(last.images[1].get_array())
    assert ((veil[..., 3] == 0).ravel() == session.trace.kept(9)[0].numpy()).all()


def test_images_that_were_not_asked_about_are_refused(llava):
    (sample,) = make_batch([(5, 9, 2)])
    with visibench.prune(llava, visibench.load_method("none")) as session:
        llava(**sample, use_cache=False)
    with pytest.raises(InputError, match="has 32 visual tokens, and its images have places for 16"):
        session.trace.show(Image.new("RGB", (24, 24)))


def test_attention_of_the_last_token_is_that_of_the_maps(llava):
    (sample,) = make_batch([(5, 9, 1)])
    look = LastAttention()
    with visibench.prune(llava, look):
        llava(**sample, use_cache=False)
    assert len(look.seen) == 10
    assert all(0 < float(one.sum()) < 1 for one in look.seen)


@pytest.mark.slow
def test_command_draws_answers_and_costs(cli, checkpoint, tmp_path, loaded):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    asked = ["--image", "red.png", "--question", "Is it red?", "--model", checkpoint]
    code, out, err = cli("show", *asked, "--methods", "fastv:keep=0.25,vtw:layer=3", "--out", "a.svg")
    assert code == 0, err
    assert [line.partition(": ")[0] for line in out.splitlines()] == ["none", "fastv:keep=0.25", "vtw:layer=3"]
    assert (tmp_path / "a.svg").stat().st_size > 1000
    vtw = visibench.load_method("vtw", layer=3)
    _, facts = overlay(loaded, [Image.new("RGB", (48, 32), "red")], "Is it red?", [vtw])
    assert facts[1].tokens == 16 * 3 / 10
    assert facts[1].macs < facts[0].macs
