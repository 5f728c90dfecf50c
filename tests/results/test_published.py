"""Published figures: what is on file, whether it holds together, and how it is shown."""

import csv
import io
import json
from decimal import Decimal

import pytest
import yaml
from visibench.errors import DataError, OptionError, UnknownNameError
from visibench.methods.registry import list_methods, load_method
from visibench.results import published
from visibench.results.published import Paper, figures, papers, vocabulary
from visibench.results.published.show import render

FOREIGN = {"mustdrop", "trim"}  # printed methods that this package does not have
ROWS = [(paper, table, row) for paper in papers() for table in paper.tables for row in table.rows]


def printed(name, where, method, quantity, *, tokens=None, setting=None, model="llava-1.5-7b"):
    """The only figure of this description, as printed."""
    (found,) = [
        figure.printed
        for figure in figures(model, method)
        if (figure.paper.name, figure.name) == (name, quantity)
        and figure.table.where.startswith(where)
        and tokens in (None, figure.row.tokens)
        and setting in (None, figure.row.setting)
    ]
    return found


# ---- what is on file ------------------------------------------------------------------------------------------------


def test_every_file_is_read_and_names_its_source():
    assert len(papers()) == len(list(published.FOLDER.glob("*.yaml"))) - 1
    lacking = [paper.name for paper in papers() if not (paper.arxiv or paper.link or paper.title)]
    assert lacking == ["source not recorded"]
    own = {method.paper for method in list_methods().values()}
    assert {"2510.17205", "2403.06764", "2410.04417", "2410.17247", "2502.11494"} <= own & {p.arxiv for p in papers()}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("VisiPruner", "Table 5", "visipruner", "mme_perception"), "1428.3"),
        (("VisiPruner", "Table 6", "visipruner", "attention_reduction"), "98.3"),
        (("VisiPruner", "Table 4", "visipruner", "mmvet", {"setting": "value-aware selection"}), "31.9"),
        (("VisiPruner", "Appendix G", "visipruner", "gqa", {"setting": "no merge"}), "57.41"),
        (("VisiPruner", "Table 5", "visipruner", "mmstar", {"model": "qwen2-vl-7b"}), "77.9"),
        (("SparseVLM", "v4", "sparsevlm", "seed", {"tokens": 128}), "58.2"),
        (("SparseVLM", "v4", "pyramiddrop", "latency", {"tokens": 64}), "43.41"),
        (("SparseVLM", "v4", "tome", "sqa", {"tokens": 192}), "65.2"),
        (("PyramidDrop", "Table 2", "pyramiddrop", "mme_total", {"tokens": 64}), "1561"),
        (("PyramidDrop", "Table 1", "fastv", "tflops", {"model": "llava-next-7b"}), "10.6"),
        (("FastV", "Table 1", "fastv", "gflops_layer", {"setting": "K=5, R=75 %"}), "39.7"),
        (("FastV", "README", "fastv", "mme_cognition"), "349.3"),
        (("MMTok", "Table 16", "divprune", "pope_f1", {"tokens": 192}), "87.00"),
        (("DART", "Table 1", "dart", "ocrbench", {"tokens": 64}), "270"),
        (("DART", "Table 1", "mustdrop", "mme_total", {"tokens": 128}), "1745"),
        (("OccamToken", "Table 1", "vispruner", "mme_perception"), "1271.0"),
        (("TOPS", "appendix", "trim", "pope", {"tokens": 64}), "85.9"),
        (("LLaVA-Mini", "comparison", "prumerge_plus", "vqav2"), "76.8"),
        (("ShortV", "comparison", "vtw", "mme_perception"), "1497.0"),
        (("AdaV", "repository", "fitprune", "pope", {"setting": "about 90 % pruned"}), "53.81"),
        (("RESTORE", "re-runs", "holov", "mme_total", {"tokens": 64}), "1699"),
        (("FastV", "README", "fastv", "seed"), "59.9"),
        (("source not recorded", "README of another", "scope", "mme_total", {"tokens": 128}), "1776"),
        (("source not recorded", "README of another", "holov", "textvqa", {"tokens": 64}), "55.4"),
        (("source not recorded", "tables of other", "vscan", "gqa", {"tokens": 64}), "58.3"),
        (("source not recorded", "tables of other", "hiprune", "pope", {"tokens": 64}), "73.0"),
        (("source not recorded", "re-runs", "cdpruner", "mme_perception", {"tokens": 128}), "1410–1426.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value[:4])),
)
def test_figures_stand_as_printed(where, expected):
    *place, last = where
    arguments, more = (place, last) if isinstance(last, dict) else (where, {})
    assert printed(*arguments, **more) == expected


def test_contradictions_stand_side_by_side():
    """Papers that print different figures for one setting: all of them, each with a remark."""

    def values(method, quantity, tokens):
        found = [f for f in figures("llava-1.5-7b", method, quantity) if f.row.tokens == tokens]
        return {f.printed for f in found}

    assert {"53.4", "59.6", "68.2", "68.3"} <= values("fastv", "pope", 128)
    assert {"1664", "1644", "1761", "1403"} <= values("pyramiddrop", "mme_total", 128)
    assert {"56.1", "57.8", "57.7"} <= values("sparsevlm", "textvqa", 192)
    assert {"1862", "1864"} <= values("none", "mme_total", 576)
    internvl = figures("internvl2.5-8b", "none", "mme")
    assert {f.printed: f.table.where for f in internvl} == {"1680.8": "Table 5", "1700.0": "Table 1"}
    assert all("contradicts itself" in " ".join(f.remarks) for f in internvl)
    headline = {f.printed for f in figures(method="visipruner", benchmark="attention_reduction")}
    assert headline == {"98.3", "99", "99.9"}


def test_doubts_travel_with_the_figures():
    scrambled = [f for f in figures(method="dart", benchmark="gqa") if f.paper.name == "DART" and f.row.tokens < 192]
    assert len(scrambled) == 2
    assert all("check against the PDF" in " ".join(f.remarks) for f in scrambled)
    assert {f.row.fine_tuned for f in figures(method="prumerge") if f.paper.name == "LLaVA-Mini"} == {True}
    assert all("Check before" in " ".join(f.remarks) for f in figures(method="fitprune") if f.paper.name == "AdaV")
    assert {f.quantity.metric for f in figures(benchmark="pope") if f.name == "pope"} == {"F1 or accuracy, not said"}
    assert {f.paper.name for f in figures(benchmark="pope_f1")} == {"MMTok", "DART"}


def test_second_hand_rows_say_so():
    for method in ("scope", "vscan", "hiprune", "flowcut"):
        assert all("Second-hand" in " ".join(f.remarks) for f in figures(method=method))
    sources = {(f.paper.name, "Second-hand" in " ".join(f.remarks)) for f in figures(method="holov")}
    assert sources == {("source not recorded", True), ("RESTORE", False)}


def test_remarks_are_sentences():
    """A remark that was cut at a comma of YAML's lists would not be one."""
    for paper, table, row in ROWS:
        for remark in [*paper.remarks, *table.remarks, *filter(None, [row.remark])]:
            assert remark.endswith("."), remark
            assert remark[0].isupper() or remark[0].isdigit(), remark


@pytest.mark.parametrize("where", ["Table 5", "Table 6"])
def test_printed_averages_follow_from_the_benchmarks_or_are_said_not_to(where):
    """The paper's formula: mean of the benchmarks, MME perception divided by 20. All figures are rounded to 0.1."""
    checked = 0
    for paper, table, row in ROWS:
        if paper.name == "VisiPruner" and table.where == where and "average" in table.columns:
            known = dict(zip(table.columns, row.values, strict=True))
            average = known.pop("average")
            scores = [known[name] for name in known if vocabulary().quantities[name].kind == "benchmark"]
            scores[list(known).index("mme_perception") - 1] /= 20
            follows = abs(sum(scores) / len(scores) - average) <= Decimal("0.1")
            assert follows != ("does not follow" in row.remark), (table.model, row)
            checked += 1
    assert checked == {"Table 5": 10, "Table 6": 8}[where]


def test_average_of_fastv():
    for setting in ("", "K=2, R=50 %"):
        method = "fastv" if setting else "none"
        scores = [
            Decimal(printed("FastV", "Table 1", method, q, setting=setting))
            for q in ("nocaps", "flickr30k", "a_okvqa", "mmmu")
        ]
        average = Decimal(printed("FastV", "Table 1", method, "average", setting=setting))
        assert abs(sum(scores) / 4 - average) <= Decimal("0.1")


def test_options_are_those_of_our_methods():
    checked = set()
    for _, _, row in ROWS:
        assert row.method in list_methods().keys() | FOREIGN
        if row.options:
            built = load_method(
                row.method, **{k: tuple(v) if isinstance(v, list) else v for k, v in row.options.items()}
            )
            assert all(hasattr(built, name) for name in row.options)
            checked.add(row.method)
    assert checked == {"dart", "divprune", "fastv", "fitprune", "pyramiddrop", "sparsevlm", "visipruner", "vtw"}


def test_metrics_exist_in_lmms_eval():
    from visibench.evals.tasks.tasks import TASKS

    for quantity in vocabulary().quantities.values():
        if quantity.task:
            assert quantity.task in TASKS
            assert bool(quantity.keys) != bool(quantity.apart), "either comparable by these keys, or told apart"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vlaues": []}, "vlaues: Extra inputs"),
        ({"rows": [{"method": "a", "values": []}]}, "every row needs 1"),
        ({"columns": ["gqqa"]}, "no gqqa"),
        ({"model": "llava-2"}, "no llava-2"),
        ({"columns": ["tflops"]}, "conventions"),
        ({"conventions": {"sqa": "x"}}, "conventions"),
    ],
)
def test_a_bad_file_is_named(change, complaint, tmp_path):
    file = tmp_path / "paper.yaml"
    table = {"where": "T", "model": "llava-1.5-7b", "columns": ["gqa"], "rows": []} | change
    file.write_text(yaml.safe_dump({"name": "P", "tables": [table]}))
    with pytest.raises(DataError, match=complaint) as caught:
        published._read(file, Paper)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- selection and output -------------------------------------------------------------------------------------------


def test_selection_by_family_and_by_column():
    assert {f.name for f in figures(benchmark="mme")} == {"mme_perception", "mme_cognition", "mme_total"}
    assert {f.name for f in figures(benchmark="pope_f1")} == {"pope_f1"}
    both = figures("llava-1.5-7b", "fastv", "gqa")
    assert {(f.table.model, f.row.method, f.name) for f in both} == {("llava-1.5-7b", "fastv", "gqa")}
    assert len(both) < len(figures("llava-1.5-7b", "fastv")) < len(figures("llava-1.5-7b")) < len(figures())


@pytest.mark.parametrize(
    ("names", "near"),
    [
        ({"model": "llava-1.5-7"}, "did you mean 'llava-1.5-7b'"),
        ({"method": "fastvv"}, "did you mean 'fastv'"),
        ({"benchmark": "popes"}, "did you mean 'pope'"),
    ],
)
def test_unknown_names(names, near):
    with pytest.raises(UnknownNameError, match=near):
        figures(**names)


def test_every_figure_reaches_every_format():
    found = figures("llava-1.5-7b", "fitprune")
    as_json, as_csv = json.loads(render(found, "json")), list(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert len(as_json) == len(as_csv) == len(found)
    assert sorted(row["printed"] for row in as_csv) == sorted(f.printed for f in found)
    for form in ("text", "md"):
        shown = render(found, form)
        assert all(f.printed in shown and f.paper.name in shown for f in found)
        assert all(remark in shown for f in found for remark in f.remarks)


def test_json_tells_all_of_a_figure():
    (entry,) = [
        e
        for e in json.loads(render(figures("llava-1.5-7b", "sparsevlm", "tflops"), "json"))
        if (e["paper"], e["tokens"]) == ("SparseVLM", 64)
    ]
    assert (entry["arxiv"], entry["value"], entry["unit"], entry["printed"]) == ("2410.04417", 1.3, "TFLOPs", "1.30")
    assert (entry["ratio"], entry["tokens_counted"], entry["options"]) == (64 / 576, "outputs", {"tokens": 64})
    assert "whole sequence" in entry["convention"]
    (low_high,) = json.loads(render([f for f in figures(benchmark="pope") if isinstance(f.value, tuple)], "json"))
    assert (low_high["value"], low_high["low"], low_high["high"]) == (None, 86.8, 87.5)


def test_notes_are_numbered_by_row():
    """Each number behind a row leads to a remark or convention of that row, and of no other."""
    lines = render(figures("llava-1.5-7b", "cdpruner", "gqa"), "text").splitlines()
    notes = {line.split("  ")[0]: line.split("  ", 1)[1] for line in lines if line[:1].isdigit()}
    (quoted,) = [line for line in lines if "ViCA" in line]
    assert [notes[number] for number in quoted.rsplit("   ", 1)[1].split()] == [
        "Quoted from CDPruner (2506.10967).",
        "CDPruner's own text was not obtained.",
    ]


# ---- the command line -----------------------------------------------------------------------------------------------


def test_published(cli):
    code, out, err = cli("published", "--model", "llava-1.5-7b", "--method", "fastv", "--benchmark", "pope")
    assert (code, err) == (0, "")
    assert "SparseVLM (2410.04417), v4, Table 1" in out
    assert "POPE: F1 or accuracy, not said." in out
    assert "visionzip" not in out
    code, out, _ = cli("published", "--benchmark", "latency", "--json")
    assert code == 0
    assert {entry["unit"] for entry in json.loads(out)} == {"ms"}
    assert cli("published", "--benchmark", "latency", "--format", "md")[1].startswith("### LLaVA-1.5-7B")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model", "llava-1.5-8b"], "did you mean 'llava-1.5-7b'"),
        (["--method", "sparsvlm"], "did you mean 'sparsevlm'"),
        (["--format", "mdd"], "did you mean 'md'"),
        (["--json", "--format", "csv"], "exclude each other"),
    ],
)
def test_published_says_what_is_wrong(arguments, hint, cli):
    code, out, err = cli("published", *arguments)
    assert (code, out) == (2, "")
    assert hint in " ".join(err.split())


def test_unknown_format():
    with pytest.raises(OptionError, match="did you mean 'json'"):
        render(figures(method="tome"), "jsn")
