"""Options with which a model is loaded: on the command line, in configurations, and in cells."""

import pytest
from visibench.evals.sweeps.cells import cell_specs
from visibench.evals.sweeps.config import parse_config
from visibench.evals.sweeps.estimate import memory
from visibench.models import load_model, weights
from visibench.results.store.facts import differences
from visibench.results.store.store import Store

CONTENT = {"model": "tiny", "tasks": ["pope"], "methods": ["none"]}
RUN = ["run", "--model", "tiny", "--method", "none", "--tasks", "pope", "--limit", "2", "--no-timing"]


def cell(**more):
    return cell_specs(parse_config(CONTENT | more, "t"))[0].config


def test_what_decides_numbers_is_part_of_a_cell_where_it_is_given():
    plain, said = cell(), {"quantization": "4bit", "device_map": {"model.vision_tower": 1, "model.language_model": 0}}
    packed, limited = cell(**said), cell(max_pixels=1605632, min_pixels=4096)
    assert "placed" not in plain.model_dump()
    assert packed.placed == said
    assert limited.protocol == {"name": "hf", "min_pixels": 4096, "max_pixels": 1605632}
    assert cell(protocol={"extends": "hf", "max_pixels": 9}, max_pixels=16).protocol["max_pixels"] == 16
    compiled = cell(compile=True)
    assert compiled.placed == {"compile": True}
    assert cell(compile=False) == plain
    assert len({one.digest() for one in (plain, packed, limited, compiled, cell(attention="eager"))}) == 5


def test_the_model_is_loaded_as_the_configuration_says():
    loading = parse_config(CONTENT | {"quantization": "8bit", "attention": "eager", "dtype": "float16"}, "t").loading
    assert loading == {
        "device": "auto",
        "dtype": "float16",
        "attn_implementation": "eager",
        "quantization": "8bit",
    }


@pytest.mark.slow
def test_a_run_records_where_its_model_lies_and_how_it_attends(cli, tmp_path):
    for more in ([], ["--device-map", "cpu", "--attention", "eager"]):
        code, _, err = cli(*RUN, "--out", str(tmp_path), *more)
        assert code == 0, err
    plain, other = sorted(Store(tmp_path).cells(), key=lambda one: one.config.attention == "eager")
    assert (plain.config.placed, plain.config.attention) == ({}, "sdpa")
    assert (other.config.placed, other.config.attention) == ({"device_map": "cpu"}, "eager")
    assert other.metrics.environment.model["attention"] == "eager"
    assert "not to be compared with the others" in cli("table", str(tmp_path))[1]
    assert {"attention", "placed.device_map"} <= {*differences([plain, other])[1]}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--quantization", "4bit"], "quantization 4bit needs bitsandbytes: pip install bitsandbytes"),
        (["--quantization", "2bit"], "quantization: input should be '4bit' or '8bit'"),
        (["--max-pixels", "4096"], "protocol hf sets max_pixels, which"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(cli, tmp_path, monkeypatch, more, says):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    code, out, err = cli(*RUN, "--out", str(tmp_path), *more)
    assert code == 2
    assert says.lower() in err.lower()
    assert "Traceback" not in out + err


def test_packed_weights_need_less_memory():
    model = load_model("llava-1.5-7b", weights="meta")
    plain, eight, four = (memory(model, 1, packed) for packed in (None, "8bit", "4bit"))
    linear = 2 * (plain - eight)  # of 16 bits, in bytes
    assert four == plain - 3 * linear // 4
    assert 12e9 < linear < plain
