"""The W&B report: what it holds, block by block, and what saving sends to a server on this machine."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from storing import config, full, put
from visibench.cli import main
from visibench.reports.wandb.document import as_json, document, note
from visibench.reports.wandb.sink import Destination
from visibench.results.store.store import Store
from visibench.results.tables.render import render
from visibench.results.tables.tables import build

pytest.importorskip("wandb_workspaces")
KEY = "0123456789abcdef" * 3


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run ``visibench wandb report``; returns (exit code, standard output, standard error)."""
    full(Store(tmp_path / "mine"))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["visibench", "wandb", "report", str(tmp_path / "mine"), *map(str, options)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return stopped.value.code, said.out, said.err

    return run


def texts(block) -> str:
    """All text below a block."""
    return block.get("text", "") + "".join(texts(child) for child in block.get("children", []))


def check(spec, folder):
    blocks = spec["blocks"]
    kinds = [block["type"] for block in blocks]
    assert [texts(b) for b in blocks if b["type"] == "heading"] == ["Summary", "Plots", "Tables", "Methods"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    for grid, kind in zip(grids, ("cell", "sweep"), strict=True):
        (runs,) = grid["runSets"]
        filters = {f["key"]["name"]: f["value"] for f in runs["filters"]["filters"]}
        assert filters == {"group": "mine", "jobType": kind}
    panels, means = (grid["panelBankSectionConfig"]["panels"] for grid in grids)
    scatter = [panel["config"] for panel in panels if panel["viewType"] == "Scatter Plot"]
    axes = [(plot["xAxis"], plot["yAxis"]) for plot in scatter]
    assert axes == [("summary:compute/tflops", f"summary:{task}/s") for task in ("gqa", "mme")]
    bars = [panel["config"] for panel in panels if panel["viewType"] == "Bar Chart"]
    assert [(bar["metrics"], bar["groupBy"]) for bar in bars] == [
        ([f"summary_metrics.{task}/s"], "label.value") for task in ("gqa", "mme")
    ]
    check_means(means, build(Store(folder).cells()))
    contents = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert contents[-1] == render(build(Store(folder).cells()), "md")
    assert "2 settings of 2 methods on tiny" in texts(blocks[3])
    notes = texts(blocks[kinds.index("list")])
    assert "fastv: FastV, arXiv 2403.06764, after pkunlp-icler/FastV@d165972" in notes


def check_means(panels, tables):
    """The chart reads columns that the sweep's run has, whose values are the table's averages."""
    chart, picture = (panel["config"] for panel in panels)
    (query,) = chart["userQuery"]["queryFields"]
    (source,) = (field["args"] for field in query["fields"] if field["name"] == "summaryTable")
    assert [(arg["name"], arg["value"]) for arg in source] == [("tableKey", "table")]
    assert chart["stringSettings"]["title"].startswith("mean over 2 tasks")
    rows = csv.DictReader(io.StringIO(render(tables, "csv")))  # the figures of the sweep's table
    x, y = (chart["fieldSettings"][axis] for axis in "xy")
    points = {row["method"]: (float(row[x]), float(row[y])) for row in rows}
    expected = {"none": (2e-3, 100), "fastv": (2e-3, 75), "random": (1e-3, 62.5)}
    assert set(points) == set(expected)
    for name, point in expected.items():
        assert points[name] == pytest.approx(point)
    assert picture["mediaKeys"] == ["plots/pareto"]


def test_a_control_is_called_by_what_it_is():
    assert note("control") == "control: random tokens at a method's own layers and counts"


def test_one_task_has_no_mean(tmp_path):
    store = Store(tmp_path)
    for method, score in (("none", 0.8), ("fastv", 0.6)):
        put(store, config(method, "gqa"), score)
    blocks = as_json(document(build(store.cells()), Destination("mine")))["spec"]
    assert str(blocks).count("panel-grid") == 1


def test_dry_run_writes_every_block_and_asks_nobody(call, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    file = tmp_path / "report.json"
    assert call("--dry-run", file) == (0, f"{file}\n", "")
    saved = json.loads(file.read_text())
    assert saved["displayName"] == "Visual-token pruning: mine"
    assert saved["project"]["name"] == "visibench"
    check(saved["spec"], tmp_path / "mine")


class StandIn(BaseHTTPRequestHandler):
    """As much of W&B's GraphQL API as saving a report asks for."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        query = asked["query"]
        answer = {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "upsertView" in query:
            sent = asked["variables"]
            view = {"id": "Vmlldzox", "type": "runs", "name": sent["name"], "displayName": sent["displayName"]}
            project = {"id": "p", "name": sent["projectName"], "entityName": sent["entityName"]}
            view |= {"description": "", "spec": sent["spec"], "updatedAt": None, "project": project}
            answer = {"upsertView": {"view": view, "inserted": True}}
        elif "models(" in query or "Projects" in query:
            node = {
                "id": "p",
                "name": "visibench",
                "entityName": "me",
                "createdAt": "",
                "isBenchmark": False,
                "user": None,
            }
            page = {
                "edges": [{"node": node}],
                "pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False},
            }
            answer = {"models": page}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), StandIn) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_save_sends_the_same_blocks(server, tmp_path):
    full(Store(tmp_path / "mine"))
    mine = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "visibench", "wandb", "report", str(tmp_path / "mine")]
    done = subprocess.run(command, env=os.environ | mine, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Vmlldzox" in done.stdout
    assert KEY not in done.stdout + done.stderr
    (sent,) = (asked["variables"] for asked in server.asked if "upsertView" in asked["query"])
    assert (sent["entityName"], sent["projectName"]) == ("me", "visibench")
    check(json.loads(sent["spec"]), tmp_path / "mine")
