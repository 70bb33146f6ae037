"""make: one clear line when it cannot go on, and the job's failure is make's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VENV = Path(sys.prefix)


def make(*args, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | environment
    return subprocess.run(["make", *args], cwd=ROOT, capture_output=True, text=True, env=env, check=False)


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
set_up_by_make = pytest.mark.skipif(not list(VENV.glob(".installed*")), reason="this environment is not make's own")


@pytest.mark.parametrize("missing, said", [("python-that-is-not-there", "not there"), ("old-python", "3.9")])
def test_a_python_that_is_missing_or_too_old_is_named_in_one_line(missing, said, tmp_path):
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1;; *) echo 3.9;; esac\n')
    old.chmod(0o755)
    python = old if missing == "old-python" else missing
    done = make("test", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert lines == [f"jaxlstm needs Python 3.11 or newer, and {python} is {said}; name one: make PYTHON=python3.12"]
    assert not (tmp_path / "venv").exists()


@set_up_by_make
def test_the_exit_code_of_the_job_is_makes_and_nothing_is_set_up_again():
    done = make("train", f"VENV={VENV}", "ARGS=--corpus /nowhere.txt")
    assert done.returncode != 0
    assert "char_lm: --corpus /nowhere.txt cannot be read as UTF-8 text" in done.stderr
    assert "Setting up" not in done.stdout and "Traceback" not in done.stderr


@set_up_by_make
def test_a_visible_gpu_that_jax_does_not_use_is_said_in_one_line(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = make("train", f"VENV={VENV}", "ARGS=--corpus /nowhere.txt", PATH=path, JAX_PLATFORMS="cpu")
    assert done.stdout.splitlines() == [
        "An NVIDIA GPU is visible and JAX is not using it: add ACCEL=cuda12 or ACCEL=cuda13 to use it."
    ]
