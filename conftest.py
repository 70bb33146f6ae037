"""Settings for all tests.

Tests run in float64 on two simulated CPU devices, with JAX's debugging checks on: implicit promotion of dtypes and
ranks, NaNs, reused keys and all warnings are errors. A test that makes a NaN on purpose is marked
`@jax.debug_nans(False)`. `make test-full` also checks for leaked tracers, which makes JAX trace every function anew; CI
does so for the table of keywords. Tests run most programs once or twice, so optimizing them costs more time than it
saves: unless XLA_FLAGS is set, XLA compiles without its optimizations, and does not split a program over threads. All
test processes share one compilation cache. Python collects garbage less often than by default, because each collection
scans the millions of small objects that JAX keeps from earlier tests.

Hypothesis tries 5 examples of each property in `make test`, 20 in CI and 200 in `make test-full`, always the same ones.

`make test-full` writes a report to tests/results/: the commit, the command, the seed, and what passed and failed.
"""

import atexit
import gc
import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from platform import python_version

if "JAXLSTM_TESTS_COMPILED" not in os.environ:  # the first test process; all others inherit its folder
    os.environ["JAXLSTM_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="jaxlstm-tests-")
    atexit.register(shutil.rmtree, os.environ["JAXLSTM_TESTS_COMPILED"], ignore_errors=True)
if "XLA_FLAGS" not in os.environ:
    # Each version of XLA refuses flags that it does not know.
    of_jax_0_10 = version("jaxlib").startswith("0.10.")
    fast = "--xla_cpu_use_fusion_emitters=false" if of_jax_0_10 else "--xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 {fast}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAXLSTM_TESTS_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# A test may kill a process while it writes a cache entry. JAX warns that it cannot read the entry, then compiles.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"

import hypothesis
import jax
import pytest

gc.set_threshold(50_000, 50, 1000)
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", True)
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(autouse=True)
def documented_code_runs_with_default_settings(request):
    """Run doctests and code blocks from the docs with JAX's default dtypes, as users do."""
    if isinstance(request.node, pytest.DoctestItem) or request.node.get_closest_marker("documented"):
        with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    else:
        yield


@pytest.fixture
def ranks_may_be_promoted():
    """For tests of experiments and benchmarks, which broadcast as users do."""
    with jax.numpy_rank_promotion("allow"):
        yield


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="the seed of the sweeps")
    parser.addoption("--results", type=Path, metavar="FOLDER", help="write a report to this folder")


def pytest_configure(config):
    selected = config.getoption("markexpr", "")
    examples = 5 if "not ci" in selected else 20 if "not slow" in selected else 200
    hypothesis.settings.register_profile(
        "jaxlstm", max_examples=examples, deadline=None, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("jaxlstm")


@pytest.fixture(scope="session")
def seed(request):
    return request.config.getoption("seed")


@pytest.fixture(autouse=True)
def sweeps_are_counted(request, record_property):
    if marker := request.node.get_closest_marker("sweep"):
        record_property("sweep", marker.args[0])


UNCOMMITTED = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!tests/results")


def _git(config, *args):
    return subprocess.run(["git", *args], cwd=config.rootpath, capture_output=True, text=True).stdout


def pytest_terminal_summary(terminalreporter, config):
    folder = config.getoption("results")
    if folder is None or hasattr(config, "workerinput"):
        return
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    properties = [(report, *pair) for report in reports for pair in report.user_properties]
    tried = Counter(value for _, name, value in properties if name == "sweep")
    passed = Counter(value for report, name, value in properties if name == "sweep" and report.passed)
    result = {
        "commit": _git(config, "rev-parse", "HEAD").strip(),
        "uncommitted": _git(config, *UNCOMMITTED).splitlines(),
        "command": " ".join(["pytest", *config.invocation_params.args]),
        "seed": config.getoption("seed"),
        "versions": {
            "python": python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "optax", "flax")},
        },
        "examples of each property": hypothesis.settings.default.max_examples,
        "tests": {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")},
        "failed": sorted(report.nodeid for report in reports if report.failed),
        "sweeps": {name: f"{passed[name]}/{tried[name]}" for name in sorted(tried)},
        "caught": sorted(value for _, name, value in properties if name == "caught"),
        "killed": sorted(value for _, name, value in properties if name == "killed"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"jax-{jax.__version__}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"report: {path}")
