"""Runs that are interrupted, or whose folder or disk is broken, lose nothing and report the reason in one line."""

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import checkpoints, runs, trainer
from jaxlstm import init_train_state, make_train_step

from jobs import bits

STEPS, BLOCK = 42, 5
SCHEDULE = trainer.Schedule(STEPS, BLOCK, evaluate_every=10, save_every=15, keep=2)


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    # Processes in the background of a script inherit the setting to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def as_on_the_command_line(caplog):
    # Optax's Adam needs JAX's default promotion.
    with jax.numpy_dtype_promotion("standard"), caplog.at_level(logging.INFO):
        yield


def loss_fn(params, batch, carry, key):
    noise = jax.random.normal(key, params["w"].shape, "float32")
    return jnp.sum((params["w"] - batch + noise) ** 2), (carry + batch.sum(), {})


def batches(steps):
    return np.stack([np.random.default_rng(step).normal(size=3).astype("float32") for step in steps])


def examine(state, metrics, steps_per_second):
    assert steps_per_second > 0
    return {"distance": float(jnp.abs(state.params["w"]).sum())}


ADAM = optax.adam(0.1)
TRAIN_STEP = make_train_step(loss_fn, ADAM)  # one for all runs, so that its blocks are compiled once


def go(folder, *, batches=batches, optimizer=ADAM, train_step=TRAIN_STEP, resume=False, examine=examine, **schedule):
    """Train a toy model in a run's folder, as an experiment does."""
    folder = runs.open_folder("toy", str(folder), {"steps": STEPS}, resume=resume)
    state = init_train_state({"w": jnp.ones(3, "float32")}, optimizer, jax.random.key(0), carry=jnp.float32(0))
    return trainer.train(
        "toy", folder, train_step, runs.restore(folder, state), batches, examine,
        SCHEDULE._replace(**schedule), score="distance",
    )  # fmt: skip


def rows(folder):
    return (folder / "metrics.jsonl").read_text()


def refusal(call, *args, **options):
    with pytest.raises(SystemExit) as stopped:
        call(*args, **options)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def during(step, do):
    """Return a function that returns the batches, and calls `do` when it is asked for a step's batch."""

    def interrupted(steps):
        if step in steps:
            do()
        return batches(steps)

    return interrupted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with jax.numpy_dtype_promotion("standard"):
        return folder, go(folder)


def test_every_step_and_every_evaluation_writes_a_row(uninterrupted):
    folder, state = uninterrupted
    found = runs.read_metrics(folder)
    assert [row["step"] for row in found if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found if "distance" in row] == [10, 20, 30, 40, 42]
    assert int(state.step) == STEPS
    assert [c.step for c in checkpoints.intact(folder / "checkpoints")][:2] == [42, 40]


def test_a_run_saves_at_every_interval_and_every_evaluation(tmp_path):
    go(tmp_path, keep=99)
    assert [c.step for c in checkpoints.intact(tmp_path / "checkpoints")] == [42, 40, 30, 20, 15, 10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [7, 22, 41], ids="at {}".format)
def test_a_stopped_run_saves_at_the_end_of_its_block_and_resumes_to_the_same_bits(
    number, step, uninterrupted, tmp_path, caplog
):
    with pytest.raises(SystemExit) as stopped:
        go(tmp_path, batches=during(step, lambda: os.kill(os.getpid(), number)))
    assert stopped.value.code == 128 + number
    done = min(STEPS, step // BLOCK * BLOCK + BLOCK)
    assert next(checkpoints.intact(tmp_path / "checkpoints")).step == done
    assert f"stopped after step {done}; the last good checkpoint is" in caplog.text
    assert f"-m experiments.toy --workdir {tmp_path} --resume" in caplog.text
    state = go(tmp_path, resume=True)
    assert bits(state) == bits(uninterrupted[1])
    assert rows(tmp_path) == rows(uninterrupted[0])


def after_a_signal(call, when=lambda *_: True):
    """Return a function that sends SIGTERM to this process before its first call."""
    sent = []

    def interrupted(*args, **options):
        if not sent and when(*args):
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return call(*args, **options)

    return interrupted


@pytest.mark.parametrize("where", ["examine", "save"])
def test_a_signal_after_a_block_stops_the_run_after_the_next_block(where, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        if where == "save":
            patched.setattr(checkpoints, "save", after_a_signal(checkpoints.save))
        go(tmp_path, examine=after_a_signal(examine) if where == "examine" else examine)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert next(checkpoints.intact(tmp_path / "checkpoints")).step == 15
    assert bits(go(tmp_path, resume=True)) == bits(uninterrupted[1])


def test_a_signal_during_the_last_evaluation_stops_the_run(uninterrupted, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        go(tmp_path, examine=after_a_signal(examine, lambda state, *_: state.step == STEPS))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert bits(go(tmp_path, resume=True, batches=None)) == bits(uninterrupted[1])


def test_a_second_interrupt_takes_effect_at_once_and_the_run_resumes_from_the_last_checkpoint(uninterrupted, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, batches=during(22, twice))
    assert bits(go(tmp_path, resume=True)) == bits(uninterrupted[1])
    assert rows(tmp_path) == rows(uninterrupted[0])


def test_a_background_job_still_ignores_ctrl_c(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    state = go(tmp_path, batches=during(7, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert state.step == STEPS and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_restores_the_signal_handlers(uninterrupted, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    go(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_resuming_a_finished_run_changes_nothing(uninterrupted, tmp_path):
    folder = Path(shutil.copytree(uninterrupted[0], tmp_path / "copy"))
    assert bits(go(folder, resume=True, batches=None)) == bits(uninterrupted[1])
    assert rows(folder) == rows(uninterrupted[0])


@pytest.mark.parametrize("broken", [20, 40, 42])
def test_a_run_resumes_from_an_older_checkpoint_if_the_newest_are_damaged(broken, uninterrupted, tmp_path, caplog):
    folder = tmp_path / "run"
    go(folder, keep=9)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[-2:]) >= broken:
            (path / "about.json").write_text("{}")
    assert bits(go(folder, resume=True)) == bits(uninterrupted[1])
    assert rows(folder) == rows(uninterrupted[0])
    assert caplog.text.count("is damaged and was skipped") == len([k for k in (20, 30, 40, 42) if k >= broken])


@pytest.mark.parametrize(
    "tail, kept",
    [
        ('{"step": 43, "lo', True),
        ('{"step": 43, "loss": 1.0}\n', True),
        ("\0\0\0", True),
        ('{"step": null}\n', True),
        ("", False),
    ],
    ids=["half a row", "a later row", "zeros", "no step", "lost"],
)
def test_rows_after_the_checkpoint_are_cut_and_lost_rows_are_reported(tail, kept, uninterrupted, tmp_path, caplog):
    folder = Path(shutil.copytree(uninterrupted[0], tmp_path / "copy"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(tail)
    if not kept:
        (folder / "metrics.jsonl").write_text(rows(folder)[:500])
    go(folder, resume=True)
    if kept:
        assert rows(folder) == rows(uninterrupted[0]) and "metrics.jsonl" not in caplog.text
    else:
        assert rows(uninterrupted[0]).startswith(rows(folder))
        assert (folder / "metrics.jsonl.damaged").read_text() == rows(uninterrupted[0])[:500]
        assert "can be read up to step 6, but the checkpoint is from step 42; a copy was kept as" in caplog.text


def test_two_processes_never_write_into_one_run(uninterrupted, tmp_path):
    folder = Path(shutil.copytree(uninterrupted[0], tmp_path / "copy"))
    with runs.metrics_writer(folder, after=STEPS, tensorboard=False):
        (folder / "checkpoints" / f"step-{STEPS:08d}" / "about.json").write_text(
            "{}"
        )  # a second process would cut rows
        assert "another process is writing to the run in" in refusal(go, folder, resume=True)
    assert rows(folder) == rows(uninterrupted[0])


def test_two_new_runs_never_share_a_folder(tmp_path, monkeypatch):
    right = runs.write_json

    def late(path, content):
        monkeypatch.setattr(runs, "write_json", right)
        runs.open_folder("toy", str(tmp_path / "run"), {"seed": 2})  # another process, after this one's check
        right(path, content)

    monkeypatch.setattr(runs, "write_json", late)
    assert "is not empty (it contains config.json)" in refusal(
        runs.open_folder, "toy", str(tmp_path / "run"), {"seed": 1}
    )
    assert runs.read_config(tmp_path / "run")["seed"] == 2


# Numbers that are not finite.


@jax.debug_nans(False)
@pytest.mark.parametrize(
    "start, last", [(33, r"the last good checkpoint is \S+step-00000030"), (2, "no checkpoint has been saved")]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(start, last, tmp_path):
    def poisoned(steps):
        found = batches(steps)
        found[np.array(steps) >= start] = np.nan
        return found

    message = refusal(go, tmp_path, batches=poisoned)
    assert message.startswith(f"toy: at step {start + 1} ") and "is nan" in message
    assert re.search(last, message)
    assert all(c.step <= start for c in checkpoints.intact(tmp_path / "checkpoints"))
    assert refusal(go, tmp_path, batches=poisoned, resume=True) == message


@jax.debug_nans(False)
def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    # At this step the loss and its gradient are finite, but the update is not.
    spoil = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u / jnp.float32(0), updates))
    message = refusal(go, tmp_path, optimizer=spoil, train_step=make_train_step(loss_fn, spoil), steps=1)
    assert message.startswith("toy: at step 1 a parameter is no longer finite; no checkpoint has been saved.")
    assert not list(checkpoints.intact(tmp_path / "checkpoints"))


# Disks.


@contextlib.contextmanager
def files_no_larger_than(size):
    """Make the disk look full to this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, where", [(1500, "File too large"), (60_000, "could not be saved: File too large")])
def test_a_full_disk_is_reported_in_one_line_and_the_run_resumes_when_there_is_room(
    size, where, uninterrupted, tmp_path
):
    with files_no_larger_than(10**9):
        folder = runs.open_folder("toy", str(tmp_path), {"steps": STEPS})

    def full(steps):
        if 17 in steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return batches(steps)

    with files_no_larger_than(10**9):
        message = refusal(go, folder, batches=full, resume=True)
    assert re.match(
        rf"toy: at step 20: .*{where}.*; the last good checkpoint is \S+step-00000015; resume with: ", message
    )
    assert bits(go(folder, resume=True)) == bits(uninterrupted[1])
    assert rows(folder) == rows(uninterrupted[0])


def test_a_failed_write_keeps_the_old_json_file(tmp_path):
    runs.write_json(tmp_path / "result.json", {"x": 1})
    with files_no_larger_than(1000), pytest.raises(OSError, match="File too large"):
        runs.write_json(tmp_path / "result.json", {"x": "y" * 9999})
    assert json.loads((tmp_path / "result.json").read_text()) == {"x": 1}


# Folders.


def test_a_deleted_folder_is_reported_in_one_line(tmp_path):
    folder = tmp_path / "run"
    message = refusal(go, folder, batches=during(22, lambda: shutil.rmtree(folder)))
    assert message.startswith("toy: at step 30: ") and "No such file or directory" in message
    assert not folder.exists()


def test_a_new_run_never_writes_into_another_folder(uninterrupted, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    assert "is not empty (it contains thesis.tex); choose a new folder" in refusal(go, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert "is not empty (it contains config.json)" in refusal(go, uninterrupted[0])
    (tmp_path / "file").write_text("")
    assert "--workdir" in (message := refusal(go, tmp_path / "file")) and "cannot be written" in message
    assert "cannot be written" in refusal(go, "/proc/run")


def test_a_folder_that_cannot_be_resumed_is_reported(uninterrupted, tmp_path):
    assert "--resume continues the run in --workdir" in refusal(go, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "thesis.tex").write_text("...")
    assert "has no config.json" in refusal(go, tmp_path, resume=True)
    folder = Path(shutil.copytree(uninterrupted[0], tmp_path / "copy"))
    for content in ("", "{", "[1]", '"x"'):
        (folder / "config.json").write_text(content)
        assert "does not contain a readable run: config.json" in refusal(go, folder, resume=True)


def test_a_run_killed_before_it_wrote_its_config_can_start_again_in_the_same_folder(uninterrupted, tmp_path):
    (tmp_path / "config.json.17.part").write_text("{")
    (tmp_path / "checkpoints").mkdir()
    assert "has no config.json" in refusal(go, tmp_path, resume=True)
    assert bits(go(tmp_path)) == bits(uninterrupted[1])


def test_a_resumed_run_must_have_the_same_settings(uninterrupted, tmp_path, caplog):
    folder, _ = uninterrupted
    config = {"steps": 50, "learning_rate": 0.2, "workdir": "elsewhere", "keep": 7}
    message = refusal(runs.open_folder, "toy", str(folder), config, resume=True)
    assert "has other settings: steps was 42, is 50; learning_rate was None, is 0.2. Leave out" in message
    assert runs.open_folder("toy", str(folder), {"steps": 42, "keep": 7}, resume=True) == folder
    assert "bitwise" not in caplog.text
    folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "devices": "8 x tpu (v9)"}))
    runs.open_folder("toy", str(folder), {"steps": 42}, resume=True)
    assert "devices changed from 8 x tpu (v9) to 1 x cpu (cpu): the run will not be bitwise identical" in caplog.text


def test_the_command_line_uses_the_flags_of_the_run_it_resumes(tmp_path, monkeypatch):
    seen = []

    def main(*, width: int = 1, rate: float = 0.5, workdir: str | None = None, resume: bool = False):
        seen.append((width, rate, workdir, resume))

    (tmp_path / "config.json").write_text(json.dumps({"width": 7, "rate": 0.1, "workdir": "x", "old": 3}))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    for flags in (["--workdir", str(tmp_path), "--resume"], [f"--workdir={tmp_path}", "--resume", "--rate", "0.2"], []):
        monkeypatch.setattr("sys.argv", ["toy", *flags])
        runs.cli("toy", main)
    assert seen == [(7, 0.1, str(tmp_path), True), (7, 0.2, str(tmp_path), True), (1, 0.5, None, False)]
