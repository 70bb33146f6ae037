"""The notebooks run, and they are up to date with their scripts."""

import json
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = {"tour": 3, "check_gradients": 1, "find_fixed_points": 1}


def sources(notebook):
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


@pytest.mark.parametrize("name", PICTURES)
def test_the_notebook_equals_the_script_and_has_its_pictures(name):
    notebook = json.loads((DOCS / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert sources(notebook) == sources(jupytext.read(DOCS / f"{name}.py"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]


def test_all_notebooks_are_known():
    assert {path.stem for path in DOCS.glob("*.ipynb")} == PICTURES.keys()
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    assert f"NOTEBOOKS := {' '.join(PICTURES)}\n" in makefile


def run(name, monkeypatch):
    """Run a script as a notebook and return its printed output."""
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    notebook = jupytext.read(DOCS / f"{name}.py")
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": DOCS}}).execute()
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


@pytest.mark.ci  # a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tour_runs(monkeypatch):
    text = run("tour", monkeypatch)
    assert "AGREE in float64" in text and "Departure(block='gates i, f, g, o'" in text and "step=10" in text
    assert text.count("rows add up to the gradient: True") == 3
    assert "accuracy in the last steps: 1.00" in text and text.rstrip().endswith("AGREE")


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_checks_of_gradients_run(monkeypatch):
    text = run("check_gradients", monkeypatch)
    right, wrong = text.index("AGREE\n"), text.index("DISAGREE on layer.w_ih, layer.w_hh, layer.b, w\n")
    assert right < wrong
    assert "Departure(block='gate f', step=20" in text and text.rstrip().endswith("None")


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_search_for_fixed_points_runs(monkeypatch):
    text = run("find_fixed_points", monkeypatch)
    found = [
        (kind, text.count(f"{kind}    unstable directions: {n} "))
        for n, kind in enumerate(("stable", "saddle", "saddle"))
    ]
    assert found == [("stable", 4), ("saddle", 4), ("saddle", 1)] and text.count("unstable directions:") == 9
    for push, output in (("-0.2", "+1.00"), ("-1.0", "-1.00")):
        assert f"a push of {push}: the first output 30 steps later is {output}\n" in text
