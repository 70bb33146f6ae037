"""The house rules: imports run one way, importing is light, few public names, all of them documented."""

import ast
import doctest
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlstm
from jaxlstm.moved import MOVED

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlstm"
sys.path.insert(0, str(ROOT / "tools"))

# Each module, and the modules of the package that it may import.
MAY_IMPORT = {
    "cell": set(),
    "checks": {"cell"},
    "tangents": {"cell"},
    "gradients": {"checks"},
    "masks": {"cell", "checks", "tangents"},
    "lstm": {"cell", "checks"},
    "baselines": {"cell", "checks"},
    "initializers": {"cell", "checks", "lstm"},
    "tuning": {"cell", "checks", "gradients", "masks", "structure"},
    "bulk": {"cell", "masks", "tangents", "tuning"},
    "precision": {"cell", "checks", "tangents"},
    "recurrence": {"bulk", "cell", "checks", "gradients", "masks", "tuning"},
    "regularize": {"baselines", "cell", "checks", "lstm", "masks"},
    "bidirectional": {"cell", "checks", "gradients", "masks", "recurrence", "regularize"},
    "layers": {"bidirectional", "cell", "checks", "gradients", "masks", "recurrence", "regularize"},
    "bptt": {"cell", "checks", "lstm"},
    "structure": {"cell"},
    "rtrl": {"cell", "checks", "masks", "structure"},
    "diagnostics.dynamics": {"cell", "checks", "lstm", "masks", "recurrence", "rtrl"},
    "diagnostics.flow": {"cell", "checks", "recurrence", "structure"},
    "diagnostics.sources": {"cell", "checks", "recurrence"},
    "diagnostics.differences": {"cell", "checks"},
    "diagnostics.statespace": {"cell", "checks", "diagnostics.differences", "diagnostics.dynamics"},
    "diagnostics.comparison": {"bptt", "cell", "checks", "diagnostics.differences", "lstm", "recurrence", "rtrl"},
    "train": {"cell", "checks"},
    "epochs": {"cell", "checks", "train"},
    "ensembles": {"cell", "checks", "structure", "tuning"},
    "variants": {"cell", "checks", "lstm"},
    "plots": {
        "cell",
        "checks",
        "diagnostics.comparison",
        "diagnostics.dynamics",
        "diagnostics.sources",
        "diagnostics.statespace",
    },
    "moved": set(),
}
ADAPTERS = {f"jaxlstm.adapters.{name}" for name in ("linen", "nnx", "onnx", "weights")}  # public modules too
STOREYS = ("examples", "experiments", "benchmarks")
ROOMS = ("diagnostics", "epochs", "initializers", "plots", "regularize", "rtrl", "variants")


def imports(path):
    """Return (module, name) of every import in a file; the name is None for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def of_package(path):
    """Return the modules of the package that a file imports, as they are named in MAY_IMPORT."""
    for module, name in imports(path):
        if module == "jaxlstm":
            yield name
        elif module.startswith("jaxlstm."):
            inner = module.removeprefix("jaxlstm.")
            yield inner if inner in MAY_IMPORT else f"{inner}.{name}"


def test_imports_run_one_way():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    modules |= {f"diagnostics.{path.stem}" for path in (PACKAGE / "diagnostics").glob("*.py")} - {
        "diagnostics.__init__"
    }
    assert modules == MAY_IMPORT.keys()
    for module, allowed in MAY_IMPORT.items():
        found = set(of_package(PACKAGE / f"{module.replace('.', '/')}.py"))
        assert found <= allowed, f"{module} imports {found - allowed}"


def test_the_picture_of_the_imports_is_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    import diagrams

    drawn = (ROOT / "docs" / "imports.svg").read_text(encoding="utf-8")
    assert f"<dc:description>{diagrams.imports_as_text()}</dc:description>" in drawn, "python docs/diagrams.py"
    for module, own in diagrams.import_graph().items():
        assert own <= MAY_IMPORT[module]


def is_public(module, name):
    """Return whether a name can be imported from the top or from one of the rooms."""
    room = module.removeprefix("jaxlstm.")
    if module == "jaxlstm":
        return name in jaxlstm.__all__ or name in ROOMS
    if room in ROOMS:
        return name in getattr(jaxlstm, room).__all__
    return module in ("jaxlstm.bptt", "jaxlstm.baselines", "jaxlstm.train") and not name.startswith("_")


def test_adapters_know_public_names_and_nobody_knows_them():
    for path in (PACKAGE / "adapters").glob("*.py"):
        for module, name in imports(path):
            if module.startswith("jaxlstm") and module != "jaxlstm.adapters":
                assert is_public(module, name), f"{path.name}: {module}.{name}"
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "diagnostics").glob("*.py")]:
        assert not any("adapters" in f"{module}.{name}" for module, name in imports(path)), path.name


def test_nothing_private_of_jax_and_no_pickle():
    for path in [*PACKAGE.rglob("*.py"), *(path for storey in STOREYS for path in (ROOT / storey).rglob("*.py"))]:
        for module, _ in imports(path):
            assert "._src" not in module and not module.startswith(("pickle", "cloudpickle", "dill")), path


def test_examples_experiments_and_benchmarks_use_public_names_only():
    paths = [path for storey in STOREYS for path in (ROOT / storey).rglob("*.py")]
    assert len(paths) > 20
    for path in paths:
        if path.name == "choices.py":  # it measures the plan itself, which no user sees
            continue
        for module, name in imports(path):
            if module.split(".")[0] == "jaxlstm" and name is not None:
                of_adapter = module in ADAPTERS or f"{module}.{name}" in ADAPTERS
                assert of_adapter or is_public(module, name), f"{path.name}: {module}.{name}"


def test_importing_is_light():
    code = "import sys, jaxlstm; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "optax" in loaded and "jaxtyping" in loaded
    heavy = {"flax", "orbax", "matplotlib", "tyro", "tqdm", "torch", "equinox", "tensorstore", "onnx", "safetensors"}
    assert not heavy & set(loaded)


def test_every_public_name_is_there_and_documented():
    assert len(jaxlstm.__all__) <= 40
    for room in (jaxlstm, *(getattr(jaxlstm, name) for name in ROOMS)):
        assert len(set(room.__all__)) == len(room.__all__)
        for name in room.__all__:
            thing = getattr(room, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing) and not inspect.getdoc(thing).startswith(name + "("), name


def test_a_name_that_moved_says_where_it_went():
    for name, place in MOVED.items():
        assert name not in jaxlstm.__all__
        with pytest.raises(ImportError) as raised:
            exec(f"from jaxlstm import {name}")
        assert str(raised.value) == f"jaxlstm.{name} has moved: use {place}."
        if re.fullmatch(r"jaxlstm(\.\w+)+", place):  # the others are recipes
            module, _, attribute = place.removeprefix("jaxlstm.").rpartition(".")
            thing = jaxlstm
            for part in (*module.split("."), attribute):
                thing = getattr(thing, part)
    with pytest.raises(AttributeError, match="has no attribute 'lstm_of_2031'"):
        _ = jaxlstm.lstm_of_2031


def test_the_package_is_as_readable_as_it_should_be():
    """Bounds on what `tools/house.py` counts, so that no change loses them unnoticed."""
    import house

    counted = house.count(ROOT)
    assert counted["public names at the top"] <= 40
    assert int(str(counted["longest parameter list of a private function"]).split()[0]) <= 8
    assert counted["lambdas per 100 lines"] <= 0.8
    assert counted["words of README.md"] <= 1000
    assert counted["comment lines per 100 lines of code"] >= 3
    # The last 40 lines are the report on the machine and the JSON of `python -m jaxlstm`.
    assert counted["of these, code, without what was added to the engine"] <= 3660
    assert counted["of these, code"] <= 5300
    assert len(str(counted["files that xs passes through"]).split(", ")) <= 4


def test_the_numbers_cited_in_the_gradient_by_hand_are_those_of_the_derivation():
    code = (PACKAGE / "bptt.py").read_text(encoding="utf-8")
    forward, backward = code.split("def lstm_backward(")
    numbered = re.findall(r"# \((\d+)\)$", forward, re.M)
    assert numbered == [str(n) for n in range(1, 13)]
    cited = set(re.findall(r"\((\d+)\)", "".join(re.findall(r"# (\(.*\))$", backward, re.M))))
    assert cited == set(numbered), "every forward line is differentiated"
    derived = set(re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")))
    assert derived >= set(numbered)


# doctest does not see a docstring under an assignment.


def documented_assignments():
    """Yield (file, assigned name, docstring) for the names that are documented under their assignment."""
    for path in sorted(PACKAGE.rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        is_text = [isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body]
        assert not any(first and second for first, second in itertools.pairwise(is_text)), f"{path.name}: a text twice"
        for before, node in itertools.pairwise(body):
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(node, ast.Expr):
                target = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
                yield path.name, target.id, node.value.value


def test_every_cell_has_a_docstring_whose_example_runs():
    documented = {name: (file, text) for file, name, text in documented_assignments()}
    modules = (jaxlstm, jaxlstm.variants)
    cells = {name for module in modules for name in module.__all__ if isinstance(getattr(module, name), jaxlstm.Cell)}
    assert len(cells) > 10 and cells <= documented.keys()
    for name in cells:
        file, text = documented[name]
        example = doctest.DocTestParser().get_doctest(text, {}, name, file, None)
        assert example.examples and doctest.DocTestRunner().run(example).failed == 0, name
