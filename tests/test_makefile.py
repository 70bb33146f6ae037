"""make sets up an environment when needed and only then, reports errors in one line, and fails if its command fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VENV = Path(sys.prefix)

# A stand-in for Python that logs how it is called: for its version, `-m venv`, `-m pip`, or a job.
STUB = """#!/bin/bash
version=$(basename "$(readlink -f "$0")" | grep -o '3\\.[0-9]*')
case "$*" in
  *"sys.exit(sys.version_info"*) [ "${version#3.}" -ge 11 ];;
  *base_executable*) readlink -f "$0";;
  *version_info*) echo "$version";;
  "-m venv --clear "*)
    rm -rf "$4"; mkdir -p "$4/bin"; ln -s "$(readlink -f "$0")" "$4/bin/python"
    echo "venv $version" >> log;;
  *"-m pip"*) echo "pip ${@: -1}" >> log;;
  *) echo "job" >> log; exit "${JOB:-0}";;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
set_up_by_make = pytest.mark.skipif(not list(VENV.glob(".installed*")), reason="this environment is not make's own")


def make(*args, cwd=ROOT, **environment):
    # `make test` passes its own variables on to the tests.
    own = {"VENV", "PYTHON", "ACCEL", "ARGS"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name not in own}
    env |= environment
    return subprocess.run(["make", *args], cwd=cwd, capture_output=True, text=True, env=env, check=False)


@pytest.fixture
def fresh(tmp_path):
    """Copy the files make reads next to fake Pythons 3.9, 3.11 and 3.12; return a function that runs make there."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for version in ("3.9", "3.11", "3.12"):
        path = tmp_path / f"stub{version}"
        path.write_text(STUB)
        path.chmod(0o755)
    (tmp_path / "python3").symlink_to(tmp_path / "stub3.11")

    def did(*args, **environment):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        done = make(*args, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **environment)
        return log.read_text().splitlines() if log.exists() else [], done

    did.path = tmp_path
    return did


def test_make_sets_up_once_and_again_when_pyproject_changes(fresh):
    set_up = ["venv 3.11", "pip .[dev]", "job"]
    assert fresh("train")[0] == set_up
    assert fresh("train")[0] == fresh("test")[0] == ["job"]
    stamp = (fresh.path / ".venv" / ".installed").stat().st_mtime
    os.utime(fresh.path / "pyproject.toml", (stamp + 5, stamp + 5))
    assert fresh("test")[0] == set_up


def test_python_chooses_the_interpreter_and_the_choice_persists(fresh):
    assert fresh("test", "PYTHON=./stub3.12")[0] == ["venv 3.12", "pip .[dev]", "job"]
    assert fresh("test")[0] == fresh("test", "PYTHON=./stub3.12")[0] == ["job"]
    assert fresh("test", "PYTHON=./stub3.11")[0] == ["venv 3.11", "pip .[dev]", "job"]


def test_accel_adds_its_extra_and_the_choice_persists_until_another_is_made(fresh):
    assert fresh("train", "ACCEL=cuda12")[0] == ["venv 3.11", "pip .[dev,cuda12]", "job"]
    assert fresh("test")[0] == fresh("train", "ACCEL=cuda12")[0] == ["job"]
    assert fresh("train", "ACCEL=cuda13")[0] == ["venv 3.11", "pip .[dev,cuda13]", "job"]
    log, done = fresh("train", "ACCEL=cuda99")
    assert not log and done.returncode != 0 and "ACCEL must be cuda12, cuda13 or tpu, got cuda99" in done.stderr


def test_a_failing_job_fails_make(fresh):
    assert fresh("train", JOB="0")[1].returncode == 0
    assert fresh("train", JOB="3")[1].returncode != 0
    assert fresh("test", JOB="1")[1].returncode != 0


@pytest.mark.parametrize("python, message", [("./nowhere", "not installed"), ("./stub3.9", "3.9")])
def test_a_missing_or_outdated_python_is_reported_in_one_line(fresh, python, message):
    log, done = fresh("test", f"PYTHON={python}")
    assert done.returncode != 0 and not log
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines == [
        f"jaxlstm needs Python 3.11 or newer, and {python} is {message}; choose one: make PYTHON=python3.12"
    ]


@pytest.mark.ci
@set_up_by_make
@pytest.mark.parametrize("devices, hint", [("GPU 0: a fake", True), ("No devices found", False)])
def test_a_visible_gpu_that_jax_does_not_use_is_reported_in_one_line(devices, hint, tmp_path):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {devices}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    # --old-file: a newer pyproject.toml must not make this test rebuild the environment that it runs in.
    stamps = [f"--old-file={stamp}" for stamp in VENV.glob(".installed*")]
    done = make("train", *stamps, f"VENV={VENV}", "ARGS=--corpus /nowhere.txt", PATH=path, JAX_PLATFORMS="cpu")
    line = "An NVIDIA GPU is visible but JAX does not use it; ACCEL=cuda12 or ACCEL=cuda13 installs what it needs."
    assert done.stdout.splitlines() == ([line] if hint else [])
    assert done.returncode != 0 and "--corpus /nowhere.txt cannot be read" in done.stderr
