"""The notebook runs from top to bottom, and shows what it says."""

import os
from pathlib import Path

import pytest
import visibench

nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(visibench.__file__).parent / "docs" / "first_steps.ipynb"


@pytest.mark.slow
def test_first_steps_run(tmp_path, monkeypatch):
    import nbformat

    root = str(Path(visibench.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = " ".join(str(output.get("text", "")) + str(output.get("data", "")) for output in shown)
    for wanted in ("LoadedModel('tiny'", "fastv:keep=0.25", "PruningSession(", "image/png", "data:image/png"):
        assert wanted in texts
    assert '<div class="results">' in shown[-1]["data"]["text/html"]
    assert not [output for output in shown if output.output_type == "error"]
