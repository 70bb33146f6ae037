"""A checkpoint is restored bit for bit, or it is skipped with a warning that says what is damaged."""

import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import checkpoints, runs
from jaxlstm import LSTM, init_train_state

from jobs import bits
from sweeps import sweep


class Extra(NamedTuple):
    half: jax.Array
    none: jax.Array
    keys: jax.Array


@jax.debug_nans(False)
def make_state(seed):
    """Return a state with every kind of leaf that a run may have."""
    rng = np.random.default_rng(seed)
    params = LSTM.init(jax.random.key(seed), 5, 3)
    extra = Extra(
        half=jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16),
        none=jnp.zeros((0, 4), jnp.float32),
        keys=jax.random.split(jax.random.key(seed, impl="rbg"), 3),
    )
    carry = {"a/b": extra, "NaN": jnp.asarray([np.nan, -0.0, np.inf]), "flag": jnp.asarray(True)}
    return init_train_state(params, optax.adamw(1e-3), jax.random.key(seed), carry=carry)


LIKE = make_state(99)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run's folder with checkpoints of steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "checkpoints").mkdir()
    for step in (10, 20, 30):
        checkpoints.save(folder / "checkpoints", make_state(step), step=step, keep=3)
    return folder


@pytest.fixture
def run(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def test_a_state_with_keys_is_restored_bit_for_bit(run):
    restored = runs.restore(run, LIKE)
    assert bits(restored) == bits(make_state(30)) != bits(LIKE)
    assert jax.tree.structure(restored) == jax.tree.structure(LIKE)
    assert jax.random.key_impl(restored.key) == "threefry2x32"
    assert jax.random.key_impl(restored.carry["a/b"].keys) == "rbg"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_a_state_is_restored_to_the_requested_sharding(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    state = {"x": jax.device_put(jnp.arange(6.0), sharding)}
    checkpoints.save(tmp_path, state, step=1, keep=1)
    (found,) = checkpoints.intact(tmp_path)
    for like in (state["x"], jax.device_put(state["x"], jax.devices()[1])):
        restored = checkpoints.restore(found, {"x": like})["x"]
        assert restored.sharding == like.sharding
        np.testing.assert_array_equal(restored, np.arange(6.0))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_can_verify_a_checkpoint(run):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
        cwd=run / "checkpoints" / "step-00000030", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path):
    scores = {10: 3.0, 20: 1.5, 30: None, 40: 2.0, 50: None, 60: None}
    for step, score in scores.items():
        checkpoints.save(tmp_path, {"x": jnp.float32(step)}, step=step, keep=2, score=score)
    assert [c.step for c in checkpoints.intact(tmp_path)] == [60, 50, 20]
    assert [c.score for c in checkpoints.intact(tmp_path)] == [np.inf, np.inf, 1.5]
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:08d}" for step in (20, 50, 60)}


def test_the_best_checkpoint_is_intact_and_has_a_score(tmp_path):
    scores = {10: 1.0, 20: 2.0, 30: np.nan, 40: 3.0, 50: None}
    for step, score in scores.items():
        checkpoints.save(tmp_path, {"x": jnp.float32(step)}, step=step, keep=1 if step > 10 else 9, score=score)
        if step == 10:
            (tmp_path / "step-00000010" / "SHA256SUMS").unlink()
    assert [c.step for c in checkpoints.intact(tmp_path)] == [50, 20]


def test_checkpoints_are_ordered_by_number_not_by_name(tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoints.save(tmp_path, {"x": jnp.float32(0)}, step=step, keep=1)
    assert [c.step for c in checkpoints.intact(tmp_path)] == [100_000_000]


def test_a_checkpoint_is_renamed_before_it_is_deleted(run, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(run / "checkpoints", make_state(40), step=40, keep=1)
    assert [c.step for c in checkpoints.intact(run / "checkpoints")] == [40, 30, 20]
    assert not (run / "checkpoints" / "step-00000010").exists()


def test_damaged_later_checkpoints_are_neither_counted_nor_deleted_until_they_are_replaced(run):
    folder = run / "checkpoints"
    (folder / "step-00000030" / "SHA256SUMS").unlink()
    checkpoints.save(folder, make_state(25), step=25, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-000000{step}" for step in (20, 25, 30)]
    checkpoints.save(folder, make_state(30), step=30, keep=2)
    assert [c.step for c in checkpoints.intact(folder)] == [30, 25]


def test_the_next_save_removes_what_a_killed_save_left(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000030", folder / "step-00000040.part")
    for leftover in ("step-00000017.old.part", "step-00000040.old.part"):
        (folder / leftover).mkdir()
        (folder / leftover / "about.json").write_text("{}")
    (folder / "thesis.part").write_text("mine")
    assert bits(runs.restore(run, LIKE)) == bits(make_state(30))
    checkpoints.save(folder, make_state(40), step=40, keep=9)
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"step-000000{step}" for step in (10, 20, 30, 40)), "thesis.part",
    ]  # fmt: skip


def test_a_file_in_place_of_a_checkpoint_is_skipped_and_replaced(run, caplog):
    (run / "checkpoints" / "step-00000040").write_text("not a folder")
    assert bits(runs.restore(run, LIKE)) == bits(make_state(30))
    assert "step-00000040 is damaged" in caplog.text
    checkpoints.save(run / "checkpoints", make_state(40), step=40, keep=9)
    assert bits(runs.restore(run, LIKE)) == bits(make_state(40))


def test_every_mismatch_is_listed_by_path(run):
    like = LIKE._replace(
        params=LIKE.params._replace(w_ih=jnp.zeros((5, 16)), b=LIKE.params.b.astype("float64")),
        carry={**LIKE.carry, "new": jnp.zeros(2)},
        key=jax.random.key(0, impl="rbg"),
    )
    del like.carry["flag"]
    with pytest.raises(SystemExit) as stopped:
        runs.restore(run, like)
    first, *lines = str(stopped.value).splitlines()
    assert "step-00000030 does not contain the requested state" in first
    assert lines == [
        "  carry.flag: saved bool[], expected nothing",
        "  carry.new: saved nothing, expected float64[2]",
        "  key: saved key<threefry2x32>[], expected key<rbg>[]",
        "  params.b: saved float32[12], expected float64[12]",
        "  params.w_ih: saved float32[5, 12], expected float64[5, 16]",
    ]


def test_some_of_the_leaves_can_be_restored(run):
    newest = next(checkpoints.intact(run / "checkpoints"))
    like = {"params": jax.eval_shape(lambda: LSTM.init(jax.random.key(0), 5, 3))}
    restored = checkpoints.restore(newest, like, partial=True)
    assert bits(restored["params"]) == bits(make_state(30).params)
    like["carry"] = {"a/b": {"none": jax.ShapeDtypeStruct((0, 4), "float32")}}
    none = checkpoints.restore(newest, like, partial=True)
    assert none["carry"]["a/b"]["none"].tolist() == []
    with pytest.raises(checkpoints.Mismatch, match=r"params.w_ih: saved float32\[5, 12\], expected float32\[6, 12\]"):
        checkpoints.restore(
            newest, {"params": jax.eval_shape(lambda: LSTM.init(jax.random.key(0), 6, 3))}, partial=True
        )


def test_two_leaves_with_the_same_path_are_refused(tmp_path):
    with pytest.raises(OSError, match="two leaves of this tree have the same path"):
        checkpoints.save(tmp_path, {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}}, step=1, keep=1)
    assert not list(tmp_path.iterdir())


# Damage.


def files_of(folder):
    return {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}


def flip_a_bit(rng, folder):
    path = rng.choice([path for path in files_of(folder).values() if path.stat().st_size])
    content = bytearray(path.read_bytes())
    at = rng.integers(len(content))
    content[at] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def truncate(rng, folder):
    path = rng.choice([path for path in files_of(folder).values() if path.stat().st_size])
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def fill_with_zeros(rng, folder):
    path = rng.choice([path for path in files_of(folder).values() if path.read_bytes().strip(b"\0")])
    content = bytearray(path.read_bytes())
    first = rng.integers(len(content))
    while not any(content[first:]):
        first = rng.integers(len(content))
    content[first:] = bytes(len(content) - first)
    path.write_bytes(content)


def swap_two_files(rng, folder):
    """Swap two files of this checkpoint, or one of them with a file of the previous checkpoint."""
    here = list(files_of(folder).values())
    others = here if rng.random() < 0.5 else list(files_of(folder.with_name("step-00000020")).values())
    a = b = here[0]
    while a.read_bytes() == b.read_bytes():
        a, b = rng.choice(here), rng.choice(others)
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


def swap_two_checkpoints(rng, folder):
    other = folder.with_name(str(rng.choice(["step-00000010", "step-00000020"])))
    folder.rename(folder.with_name("aside"))
    other.rename(folder)
    folder.with_name("aside").rename(other)


def lose_the_manifest(rng, folder):
    (folder / "SHA256SUMS").unlink()


def lose_a_file(rng, folder):
    rng.choice(list(files_of(folder).values())).unlink()


def add_a_file(rng, folder):
    (rng.choice([folder, folder / "arrays"]) / os.fsdecode(rng.choice([b"notes.txt", b"caf\xe9.txt"]))).write_text(
        "mine"
    )


DAMAGES = [
    flip_a_bit, flip_a_bit, flip_a_bit, truncate, truncate, fill_with_zeros, fill_with_zeros, swap_two_files,
    swap_two_files, swap_two_checkpoints, lose_the_manifest, lose_a_file, add_a_file,
]  # fmt: skip


def contents(folder):
    return {name: path.read_bytes() for name, path in files_of(folder).items()}


@sweep("damaged checkpoints noticed", 500)
def test_damaged_checkpoints_are_named_and_skipped_for_the_newest_intact_one(trial, seed, run, pristine, caplog):
    rng = np.random.default_rng([seed, trial])
    DAMAGES[trial % len(DAMAGES)](rng, run / "checkpoints" / "step-00000030")
    # A comparison with the originals tells which checkpoints are damaged.
    whole = {
        step: contents(run / "checkpoints" / f"step-{step:08d}")
        == contents(pristine / "checkpoints" / f"step-{step:08d}")
        for step in (10, 20, 30)
    }
    assert not whole[30]
    expected = max(step for step in whole if whole[step])
    with caplog.at_level(logging.WARNING):
        restored = runs.restore(run, LIKE)
    assert bits(restored) == bits(make_state(expected))
    warned = [record.getMessage() for record in caplog.records]
    for message, step in zip(warned, range(30, expected, -10), strict=True):
        assert f"step-{step:08d} is damaged and was skipped: " in message and "\n" not in message


def test_a_warning_says_which_file_is_damaged_and_how(run, caplog):
    folder = run / "checkpoints" / "step-00000030"
    (folder / "about.json").write_text("{}")
    (folder / "arrays" / "manifest.ocdbt").unlink()
    (folder / "arrays" / "notes.txt").write_text("mine")
    runs.restore(run, LIKE)
    assert caplog.messages[0].endswith(
        "was skipped: 'about.json' has changed, 'arrays/manifest.ocdbt' is missing, 'arrays/notes.txt' was added."
    )


def test_a_run_without_an_intact_checkpoint_does_not_start_again(run, caplog):
    for step in (10, 20, 30):
        lose_the_manifest(None, run / "checkpoints" / f"step-{step:08d}")
    with pytest.raises(SystemExit, match=r"no checkpoint in .* is intact; move them away to start again from step 0"):
        runs.restore(run, LIKE)
    assert len(caplog.records) == 3


def test_restore_returns_the_given_state_before_the_first_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert runs.restore(tmp_path, LIKE) is LIKE


@pytest.mark.parametrize("fails", ["arrays", "sums", "sync"])
def test_a_failed_save_raises_one_oserror_and_leaves_older_checkpoints_untouched(fails, run, monkeypatch):
    def full(*args, **kwargs):
        raise (
            ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")
            if fails == "arrays"
            else OSError(28, "No space left on device")
        )

    before = contents(run)
    target = {
        "arrays": (checkpoints.ocp.StandardCheckpointer, "save"),
        "sums": (checkpoints, "_sums"),
        "sync": (checkpoints, "_sync"),
    }[fails]
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match=r"step-00000040 could not be saved: .*No space left on device") as failed:
        checkpoints.save(run / "checkpoints", make_state(40), step=40, keep=1)
    assert "\n" not in str(failed.value)
    assert contents(run) == before


# Folders that agree with themselves, and still are not what was saved.


def seal(path):
    """Make the checksums of a checkpoint agree with its files again."""
    (path / "SHA256SUMS").write_bytes(checkpoints._sums(path))


def replaced_by(text):
    return lambda path: (path / "about.json").write_text(text)


def a_pipe(name):
    def replace(path):
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return replace


def undecodable(path):
    for file in (path / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(b"nothing that Orbax knows")


UNREADABLE = {
    "an empty about.json": replaced_by(""),
    "no JSON": replaced_by("{"),
    "a list": replaced_by("[]"),
    "a number": replaced_by("7"),
    "no step": replaced_by('{"score": 1, "leaves": {}}'),
    "leaves that are a list": replaced_by('{"step": 30, "score": 1, "leaves": [1]}'),
    "a score that is text": replaced_by('{"step": 30, "score": "low", "leaves": {}}'),
    "no UTF-8": lambda path: (path / "about.json").write_bytes(b"\xff\xfe"),
    "arrays that cannot be decoded": undecodable,
    "no arrays": lambda path: shutil.rmtree(path / "arrays"),
    "a pipe for a manifest": a_pipe("SHA256SUMS"),
    "a pipe for about.json": a_pipe("about.json"),
    "a pipe more": a_pipe("arrays/more"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_checkpoint_that_agrees_with_its_checksums_and_cannot_be_read_is_named_and_skipped(name, run, caplog):
    newest = run / "checkpoints" / "step-00000030"
    UNREADABLE[name](newest)
    if "manifest" not in name:
        seal(newest)
    assert bits(runs.restore(run, LIKE)) == bits(make_state(20))
    assert "step-00000030 is damaged and was skipped: " in caplog.text
    checkpoints.save(run / "checkpoints", make_state(40), step=40, keep=9)
    assert bits(runs.restore(run, LIKE)) == bits(make_state(40))


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path, caplog):
    runs.write_json(run / "config.json", {"seed": 0, "keep": 3})
    folder = run / "checkpoints"
    for step, seed in ((50, 0), (60, 1)):
        other = tmp_path / str(seed)
        (other / "checkpoints").mkdir(parents=True)
        runs.write_json(other / "config.json", {"seed": seed, "keep": 9})
        name = runs.identity(other)
        checkpoints.save(other / "checkpoints", make_state(step), step=step, keep=1, run=name)
        shutil.copytree(other / "checkpoints" / f"step-{step:08d}", folder / f"step-{step:08d}")
    assert bits(runs.restore(run, LIKE)) == bits(make_state(50)), "another --keep makes no other run"
    assert "step-00000060 is of another run and was skipped: its run has other settings" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{}", "7", '"text"', "null", "{", ""])
def test_a_config_of_the_wrong_kind_is_called_damaged(content, run):
    (run / "config.json").write_text(content)
    with pytest.raises(SystemExit, match=r"does not contain a readable run: config.json: ") as stopped:
        runs.open_folder("test", str(run), {"seed": 0, "steps": 3}, resume=True)
    assert "\n" not in str(stopped.value) and "other settings" not in str(stopped.value)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_pipe_in_place_of_a_file_does_not_hang_the_run(name, run):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(SystemExit, match="is not a file"):
        if name == "config.json":
            runs.read_config(run)
        else:
            with runs.metrics_writer(run, after=0, tensorboard=False):
                pass
