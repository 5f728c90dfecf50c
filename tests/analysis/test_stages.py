"""Stages of decoders whose answer is known, and what the command writes, resumes and refuses."""

import json

import numpy as np
import pytest
from PIL import Image
from refusals import assert_refused
from visibench.analysis import boundaries
from visibench.analysis.stages import StageAnalysis
from visibench.analysis.windows import Window, windows
from visibench.errors import OptionError
from visibench.evals.tasks.tasks import load_tasks
from visibench.models import load_model
from visibench.results.store import stage_records

DEPTH = 10


def reading(loaded, layers):
    """The model, but with attention in these layers alone, in the last of them so much that every answer needs it."""
    for layer, part in enumerate(loaded.model.model.language_model.layers):
        part.self_attn.o_proj.weight.mul_(30 if layer == max(layers) else layer in layers)
    return loaded


def analysed(checkpoint, disk_data, reads, layers, **settings):
    tasks = load_tasks(["gqa"], str(disk_data))
    loaded = reading(load_model(str(checkpoint)), reads)
    return StageAnalysis(loaded, tasks, layers, limit=3, batch_size=3, **settings).run()


def kl(record, kind, first, end):
    (window,) = [w for w in record.windows if (w.kind, w.first, w.end) == (kind, first, end)]
    return window.effects["gqa"]["kl"].value


def stages(record):
    """First layers of the middle and the deep stage, by the next token."""
    (found,) = [one for one in record.stages if (one.task, one.by) == ("gqa", "next token")]
    assert (found.needed, found.none_because) == (found.asked, "")
    return found.begin, found.end


def test_a_decoder_that_reads_vision_in_one_layer_is_found_out(checkpoint, disk_data):
    record = analysed(checkpoint, disk_data, {3}, (2, 3, 4), parts=("windows",))
    for kind in ("masked", "moved"):
        assert kl(record, kind, 3, 4) > 0.01
        assert kl(record, kind, 2, 3) == kl(record, kind, 4, 5) == 0
        assert kl(record, kind, 0, 3) == 0 < kl(record, kind, 0, 4)
        assert kl(record, kind, 4, DEPTH) == 0 < kl(record, kind, 3, DEPTH)
    assert kl(record, "dropped", 4, DEPTH) == 0 < kl(record, "dropped", 3, DEPTH)
    assert stages(record) == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [3, 6])
def test_the_one_layer_that_reads_vision_is_told_among_all(checkpoint, disk_data, layer):
    record = analysed(checkpoint, disk_data, {layer}, range(DEPTH), parts=("windows",))
    for window in record.windows:
        touches = window.first <= layer < window.end
        assert (window.effects["gqa"]["kl"].value > 0) == touches, window


def test_a_decoder_that_ignores_vision_from_a_layer_on_is_found_out(checkpoint, disk_data):
    record = analysed(checkpoint, disk_data, {0, 1, 2, 3, 4}, (4, 5), parts=("windows",))
    assert kl(record, "dropped", 5, DEPTH) == 0 < kl(record, "dropped", 4, DEPTH)
    assert kl(record, "masked", 5, 6) == kl(record, "moved", 5, DEPTH) == 0
    assert stages(record) == (0, 5)


def unchanged(depth, begin, end, needs=True, questions=4):
    """What a decoder with fusion in ``begin`` … ``end`` - 1 leaves unchanged, all questions alike."""
    found = {}
    for window in windows(range(depth), depth):
        touches = window.first < end and window.end > begin
        found[window] = np.full(questions, not (touches and needs))
    return found


@pytest.mark.parametrize(("begin", "end"), [(3, 4), (0, 5), (4, 10), (2, 9)])
def test_rule_finds_what_was_built(begin, end):
    found = boundaries.find(unchanged(DEPTH, begin, end), DEPTH)
    assert (found.begin, found.end, found.none_because) == (begin, end, "")
    assert len(found.begins) == found.asked == 4


def test_rule_finds_no_stages_where_there_are_none():
    everywhere = boundaries.find(unchanged(DEPTH, 0, DEPTH), DEPTH)
    assert "goes on to the last layer" in everywhere.none_because
    without = boundaries.find(unchanged(DEPTH, 3, 5, needs=False), DEPTH)
    assert without.none_because == "only 0 of 4 questions need their image"


def test_windows_are_each_asked_once():
    every = windows(range(4), 4)
    assert len(every) == len({*every}) == 4 + 2 * (3 * 4 - 3)
    assert Window("dropped", 0, 4) in every


@pytest.mark.slow
def test_an_analysis_says_all_and_goes_on_where_it_stopped(checkpoint, disk_data, tmp_path):
    journal, asked = tmp_path / "stages.jsonl", []

    def stop(questions):
        asked.append(questions)
        if len(asked) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysed(checkpoint, disk_data, range(DEPTH), (0, 9), journal=journal, on_batch=stop)
    kept = journal.read_text().splitlines()
    assert len(kept) == 1 + 2  # a head, and the windows behind the dense pass; the one that was stopped is not kept
    record = analysed(checkpoint, disk_data, range(DEPTH), (0, 9), journal=journal)
    assert journal.read_text().splitlines()[:3] == kept
    again = analysed(checkpoint, disk_data, range(DEPTH), (0, 9), parts=("attention", "windows"))
    assert [w.model_dump() for w in record.windows] == [w.model_dump() for w in again.windows]
    assert again.curve("last_share", "gqa") == record.curve("last_share", "gqa")
    assert again.curve("lens_hidden_rank") is None
    assert record.curve("lens_hidden_first").means[-1].value == 1
    assert {found.by for found in record.stages} == {"next token", "answer"}


@pytest.mark.slow
def test_windows_are_asked_anew_where_questions_or_code_have_changed(tmp_path, monkeypatch):
    loaded, file, journal = load_model("tiny"), tmp_path / "mine.jsonl", tmp_path / "stages.jsonl"
    Image.new("RGB", (144, 144), "red").save(tmp_path / "red.png")

    def lines(answer):
        file.write_text(json.dumps({"image": "red.png", "question": "What color is it?", "answers": [answer]}))
        StageAnalysis(loaded, load_tasks([str(file)]), (5,), ("windows",), journal=journal).run()
        return journal.read_text().splitlines()

    first = lines("red")
    assert lines("red") == first
    second = lines("blue")
    assert (second[: len(first)], len(second)) == (first, 2 * len(first) - 1)
    monkeypatch.setattr("visibench.results.store.code.engine", lambda: "another one")
    assert len(lines("blue")) == len(first)


@pytest.mark.slow
def test_command_writes_json_and_pictures_and_resumes(cli, checkpoint, disk_data, tmp_path):
    few = ["--data", disk_data, "--tasks", "pope", "--limit", 2, "--layers", "1,8-9", "--out", "out"]
    code, out, err = cli("analyze", "--model", checkpoint, *few)
    assert code == 0, err
    assert "pope, by the next token:" in out
    record = stage_records.read(tmp_path / "out" / "stages.json")
    assert record.layers == [1, 8, 9]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "stages.json",
        "stages.jsonl",
        "stages.png",
        "stages.svg",
    }
    code, again, _ = cli("analyze", "--model", checkpoint, *few, "--json", "--against", "out/stages.json")
    assert code == 0
    assert json.loads(again)["windows"] == json.loads(record.model_dump_json())["windows"]


def test_command_refuses(cli, checkpoint, disk_data):
    for weights in ("meta", "random"):
        refused = cli("analyze", "--model", "llava-1.5-7b", "--weights", weights)
        assert_refused(refused, "such weights were never trained: leave --weights out")
        shown = ["--image", "a.png", "--question", "?", "--model", "llava-1.5-7b", "--methods", "vtw"]
        assert_refused(cli("show", *shown, "--weights", weights), "such weights were never trained")
    assert_refused(cli("analyze", "--model", "tiny", "--only", "atention"), "did you mean 'attention'")
    assert_refused(cli("analyze", "--model", "tiny", "--layers", "3-1"), "numbers and ranges such as 0,2,4-7")
    assert_refused(cli("analyze", "--model", "tiny", "--against", "no.json"), "give a file of `visibench analyze`")


def test_layers_that_are_not_there_are_refused(checkpoint, disk_data):
    with pytest.raises(OptionError, match="the model has layers 0–9"):
        StageAnalysis(load_model(str(checkpoint)), load_tasks(["gqa"], str(disk_data)), [3, 10])
