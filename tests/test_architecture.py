"""The house rules: imports run one way, importing is light, public names are documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import jaxlstm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlstm"

# Each module, and the modules of the package that it may import.
MAY_IMPORT = {
    "cell": set(),
    "checks": {"cell"},
    "lstm": {"cell", "checks"},
    "baselines": {"cell", "checks"},
    "derivative": {"cell"},
    "precision": {"cell", "derivative"},
    "recurrence": {"cell", "checks", "derivative", "precision"},
    "regularize": {"baselines", "cell", "checks", "derivative", "lstm"},
    "bidirectional": {"cell", "checks", "derivative", "recurrence", "regularize"},
    "layers": {"bidirectional", "cell", "checks", "derivative", "precision", "regularize"},
    "bptt": {"cell", "checks", "lstm"},
    "rtrl": {"cell", "checks", "derivative"},
    "diagnostics": {"cell", "checks", "derivative", "lstm", "recurrence", "rtrl"},
    "flow": {"cell", "checks", "recurrence"},
    "sources": {"cell", "checks", "recurrence"},
    "differences": {"cell", "checks"},
    "comparison": {"bptt", "cell", "checks", "differences", "lstm", "recurrence", "rtrl"},
    "train": set(),
}
ADAPTERS = ("jaxlstm.adapters.linen", "jaxlstm.adapters.nnx")  # public modules too


def imports(path):
    """Return (module, name) of every import in a file; the name is None for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_imports_run_one_way():
    assert {path.stem for path in PACKAGE.glob("*.py")} == MAY_IMPORT.keys() | {"__init__", "__main__"}
    for module, allowed in MAY_IMPORT.items():
        found = {name.split(".")[1] for name, _ in imports(PACKAGE / f"{module}.py") if name.startswith("jaxlstm.")}
        assert found <= allowed, f"{module} imports {found - allowed}"


def test_adapters_know_public_names_and_nobody_knows_them():
    for path in (PACKAGE / "adapters").glob("*.py"):
        for module, name in imports(path):
            if module.startswith("jaxlstm") and module != "jaxlstm.adapters":
                assert module == "jaxlstm" and name in jaxlstm.__all__, f"{path.name}: {module}.{name}"
    for path in PACKAGE.glob("*.py"):
        assert not any("adapters" in f"{module}.{name}" for module, name in imports(path)), path.name


def test_nothing_private_of_jax_and_no_pickle():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for module, _ in imports(path):
            assert "._src" not in module and not module.startswith(("pickle", "cloudpickle", "dill")), path


def test_experiments_use_public_names_only():
    for path in (ROOT / "experiments").rglob("*.py"):
        for module, name in imports(path):
            if module.split(".")[0] == "jaxlstm":
                public = module == "jaxlstm" and name in jaxlstm.__all__
                assert public or module in ADAPTERS, f"{path.name}: {module}.{name}"


def test_importing_is_light():
    code = "import sys, jaxlstm; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "optax" in loaded and "jaxtyping" in loaded
    assert not {"flax", "orbax", "matplotlib", "tyro", "tqdm", "torch", "equinox", "tensorstore"} & set(loaded)


def test_every_public_name_is_there_and_documented():
    assert jaxlstm.__all__ == sorted(jaxlstm.__all__, key=lambda name: (not name.isupper(), name.islower(), name))
    for name in jaxlstm.__all__:
        thing = getattr(jaxlstm, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing) and not inspect.getdoc(thing).startswith(name + "("), name


def test_the_numbers_cited_in_the_gradient_by_hand_are_those_of_the_derivation():
    import re

    code = (PACKAGE / "bptt.py").read_text(encoding="utf-8")
    forward, backward = code.split("def lstm_backward(")
    numbered = re.findall(r"# \((\d+)\)$", forward, re.M)
    assert numbered == [str(n) for n in range(1, 13)]
    cited = set(re.findall(r"\((\d+)\)", "".join(re.findall(r"# (\(.*\))$", backward, re.M))))
    assert cited == set(numbered), "every forward line is differentiated"
    derived = set(re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")))
    assert derived >= set(numbered)
