"""A job that is killed at a random moment, sometimes during a save, resumes and ends with the same bits.

A process cannot catch SIGKILL, so the next one has only the files on disk.
"""

import functools
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from jobs import SMALL, UNCHECKED, command, outcome, start, write_corpus
from sweeps import sweep

FLAGS = [*SMALL, "--steps=300", "--block=10", "--save-every=20"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return a function that starts the job in a folder, always with the same flags and environment."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")

    return functools.partial(
        start, "char_lm", "--corpus", corpus, *FLAGS, "--workdir",
        env={**os.environ, **UNCHECKED}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory):
    """The outcome of an uninterrupted job, and how many seconds it trains."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    for time_is_taken in (False, True):  # the first run compiles; the second one, like the killed runs, does not
        folder = folder.with_name(f"uninterrupted-{time_is_taken}")
        running = job(folder)
        wait(running, (folder / "metrics.jsonl").exists)
        began = time.monotonic()
        wait(running, (folder / "checkpoints" / "step-00000300").exists)
        seconds = time.monotonic() - began
        assert running.wait() == 0
    return outcome(folder), seconds


def wait(running, until):
    """Wait until `until()` is true or the process has ended."""
    while running.poll() is None and not until():
        time.sleep(0.0005)


def killed(job, folder, rng, trial, seconds):
    """Start a run and kill it; return where, or None if the signal came at the wrong moment."""
    running = job(folder)
    inside_a_save, at_any_time = trial % 8 in (1, 4, 7), trial % 8 == 0  # 15 and 5 of 40; the others train
    part = folder / "checkpoints" / f"step-{rng.integers(1, 15) * 20:08d}.part"
    since = part if inside_a_save else folder / ("config.json" if at_any_time else "metrics.jsonl")
    wait(running, since.exists)
    time.sleep(rng.uniform(0, 0.05 if inside_a_save else seconds))
    running.send_signal(signal.SIGKILL)
    if running.wait() != -signal.SIGKILL or (inside_a_save and not part.exists()):
        return None
    if inside_a_save:
        return f"inside a save, {part.stem}"
    metrics = folder / "metrics.jsonl"
    return f"at row {len(metrics.read_bytes().splitlines())}" if metrics.exists() else "before the first row"


@sweep("runs killed at a random moment that ended in the same bits", 40)
@pytest.mark.ci
def test_a_killed_run_resumes_and_ends_with_the_same_bits(trial, seed, job, uninterrupted, tmp_path, record_property):
    expected, seconds = uninterrupted
    rng = np.random.default_rng([seed, trial])
    for n in range(50):  # until the signal comes at the right moment
        folder = tmp_path / str(n)
        if where := killed(job, folder, rng, trial, seconds):
            break
    record_property("killed", f"{trial:2d} {where}")
    if "save" in where:
        record_property("sweep", "of these, killed inside a save")
    resumed = command("char_lm", "--workdir", folder, "--resume", environment=UNCHECKED)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert outcome(folder) == expected


@pytest.mark.ci
def test_the_compared_outcome_contains_metrics_results_and_state(uninterrupted):
    (rows, result, step, bits), _ = uninterrupted
    assert len(rows) > 300 and step == 300 and {"loss", "step", "grad_norm"} <= rows[0].keys()
    assert {"params.w", "opt_state.1.count", "carry.0.h", "key", "step"} <= bits.keys()
    assert all(data for _, _, data in bits.values())
    assert {"held_out_bits", "evaluations", "gradient_check"} <= result.keys()
