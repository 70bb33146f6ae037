"""The tour runs, and the notebook is up to date with its script."""

import json
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"


def sources(notebook):
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def test_the_notebook_equals_the_script_and_has_its_pictures():
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    assert sources(notebook) == sources(jupytext.read(DOCS / "tour.py"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


@pytest.mark.ci  # a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    notebook = jupytext.read(DOCS / "tour.py")
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": DOCS}}).execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "AGREE in float64" in text and "Departure(block='gates i, f, g, o'" in text and "step=10" in text
    assert text.count("rows add up to the gradient: True") == 3
    assert "accuracy in the last steps: 1.00" in text and text.rstrip().endswith("AGREE")
