"""The main experiment: its parts against NumPy, and a small run as a user starts it."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import char_lm, gradient_check, sample, text
from experiments.harness import checkpoints, runs
from jaxlstm import Cell, init_train_state

from cells import worst_error
from jobs import ROOT, SMALL, UNCHECKED, arguments, command, outcome, said, start, write_corpus

pytestmark = pytest.mark.usefixtures("ranks_may_be_promoted")

# The parts.


@pytest.fixture(scope="module")
def model():
    return char_lm.init_model(jax.random.key(0), 7, 6, 2)


def test_predict_equals_predict_next_step_by_step(model):
    tokens = jnp.array([3, 1, 6, 0, 2])
    _, logits = char_lm.predict(model, char_lm.initial_carries(model), tokens)
    carries, predict_next = char_lm.initial_carries(model), jax.jit(char_lm.predict_next)
    for token, want in zip(tokens, logits, strict=True):
        carries, got = predict_next(model, carries, token)
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.fixture
def identity(model, monkeypatch):
    """Return a model that returns its input, 1 everywhere, so that its logits show the dropout masks."""

    def initial_carry(params, batch_shape=()):
        return {"nothing": jnp.zeros(batch_shape, "float32")}

    def project(params, xs):
        return xs

    def recur(params, carry):
        return None

    def gates(params, carry, z, a):
        return carry, z

    monkeypatch.setattr(char_lm, "LSTM", Cell(None, initial_carry, gates, project, recur, name="identity"))
    return model._replace(embedding=jnp.ones_like(model.embedding), w=jnp.eye(6, 7, dtype="float32"))


def test_dropout_keeps_the_mean_and_needs_a_key(identity):
    tokens, one_layer = jnp.zeros((400, 50), int), identity._replace(layers=identity.layers[:1])
    _, logits = char_lm.predict(one_layer, None, tokens, dropout=0.25, key=jax.random.key(0))
    kept = np.asarray(logits[..., :6])
    np.testing.assert_allclose(np.unique(kept), [0, (4 / 3) ** 2], rtol=1e-6)  # two masks, around the layer
    assert abs(kept.mean() - 1) < 4 * np.sqrt((0.75**-2 - 1) / kept.size)
    _, without = char_lm.predict(one_layer, None, tokens, dropout=0.25)
    assert (without[..., :6] == 1).all()


def test_dropout_draws_a_different_mask_for_each_layer(identity):
    _, logits = char_lm.predict(identity, None, jnp.zeros((400, 50), int), dropout=0.25, key=jax.random.key(0))
    kept = np.asarray(logits[..., :6]) > 0
    assert abs(kept.mean() - 0.75**3) < 4 * np.sqrt(0.25 / kept.size)  # three independent masks


def test_the_loss_is_the_cross_entropy_of_the_next_character(model):
    batch = np.random.default_rng(0).integers(0, 7, (9, 3)).astype(np.int32)
    carries = char_lm.initial_carries(model, 3)
    loss, _ = char_lm.loss_fn(model, batch, carries, jax.random.key(0), dropout=0.0)
    _, logits = char_lm.predict(model, carries, batch[:-1])
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    steps, rows = np.indices((8, 3))
    np.testing.assert_allclose(loss, -np.log(p[steps, rows, batch[1:]]).mean(), rtol=1e-6)


def test_evaluate_scores_every_held_out_character_once_and_in_context(model):
    tokens = np.random.default_rng(0).integers(0, 7, 47).astype(np.int32)
    inputs, targets, scored = text.streams(tokens, 10, num_streams=4, warm_up=5)
    assert scored.sum(0).tolist() == [10, 9, 9, 9] and not scored[:5].any()
    nats, at, predict = 0.0, 10, jax.jit(char_lm.predict)
    for n, length in enumerate(scored.sum(0)):
        np.testing.assert_array_equal(targets[scored[:, n], n], tokens[at : at + length])
        np.testing.assert_array_equal(inputs[: 5 + length, n], tokens[at - 6 : at + length - 1])
        read = jnp.asarray(tokens[at - 6 : at + length - 1])
        _, logits = predict(model, char_lm.initial_carries(model), read)
        logits = np.asarray(logits, np.float64)[5:]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= log_p[np.arange(length), tokens[at : at + length]].sum()
        at += length
    np.testing.assert_allclose(char_lm.evaluate(model, inputs, targets, scored), nats / 37 / math.log(2), rtol=1e-6)


def test_batches_continue_where_the_last_one_stopped_and_wrap_around():
    tokens = np.arange(100, dtype=np.int32)
    first, second = text.batches(tokens, range(2), batch_size=3, seq_len=10)
    assert first.shape == (11, 3)
    np.testing.assert_array_equal(first[:, 1], np.arange(33, 44))
    np.testing.assert_array_equal(second[0], first[-1])
    np.testing.assert_array_equal(text.batches(tokens, range(7, 8), 3, 10)[0][:, 1], np.arange(103, 114) % 100)


def test_ngrams_follow_their_formula():
    corpus = text.Corpus("x", "abab", "ac", "abc")
    p_a = (2 + 2 / 3) / (4 + 2)  # a: 2 of 4 symbols; 2 distinct symbols; uniform over 3 below that
    p_c = (0 + 2 / 3) / (4 + 2)
    np.testing.assert_allclose(text.ngram_bits(corpus, 1), -(math.log2(p_a) + math.log2(p_c)) / 2)
    # b is followed by a, once; a is followed by b, twice, so by one distinct symbol.
    bigram = ((1 + 1 * p_a) / (1 + 1), (0 + 1 * p_c) / (2 + 1))
    np.testing.assert_allclose(text.ngram_bits(corpus, 2), -sum(map(math.log2, bigram)) / 2)


def test_xz_counts_only_the_bits_of_the_held_out_text():
    rng = np.random.default_rng(0)
    noise = "".join(rng.choice(list("abcdefghijklmnop"), 40_000))  # four bits per character, and nothing to learn
    assert 4 < text.xz_bits(text.Corpus("x", noise[:20_000], noise[20_000:], "")) < 4.6
    assert text.xz_bits(text.Corpus("x", noise[:20_000], noise[:20_000], "")) < 0.1  # a copy


def test_repeated_paragraphs_of_the_manual_are_removed_before_the_split():
    corpus = text.load_corpus("python-docs")
    paragraphs = [p for p in corpus.text.split("\n\n") if p]
    assert len(paragraphs) == len(set(paragraphs))
    assert 350_000 < len(corpus.text) < 420_000
    assert len(corpus.held_out) == pytest.approx(0.05 * len(corpus.text), abs=1)
    assert "".join(corpus.symbols[k] for k in text.encode(corpus.held_out, corpus.symbols)) == corpus.held_out


@pytest.mark.slow
def test_a_wrong_hand_derived_gradient_is_detected_and_named(model, monkeypatch):
    state = init_train_state(model, optax.sgd(0.1), jax.random.key(0), carry=char_lm.initial_carries(model, 3))
    batch = np.random.default_rng(0).integers(0, 7, (5, 3)).astype(np.int32)

    def check():
        return gradient_check.check("here", char_lm.loss_fn, state, batch, 0.1)["here"]

    assert all(row["agrees"] for row in check().values())
    right = gradient_check.lstm_bptt

    def without_w_hh(params, xs, carry):
        return right(params._replace(w_hh=jax.lax.stop_gradient(params.w_hh)), xs, carry)

    monkeypatch.setattr(gradient_check, "lstm_bptt", without_w_hh)
    jax.clear_caches()
    found = check()
    assert not any(row["agrees"] for row in found.values())
    assert found["float64"]["error"] == pytest.approx(1) and re.fullmatch(
        r"layers\.\d\.[ifgo]\.w_hh", found["float64"]["weight"]
    )
    jax.clear_caches()


# A run, as a user starts it.


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


def error_line(main, *args, **flags):
    """Return the one line with which `main` exits, as `runs.cli` would print it."""
    with pytest.raises(SystemExit) as stopped:
        main(*args, **flags)
    line = stopped.value.code
    assert isinstance(line, str) and "\n" not in line
    return line


@pytest.fixture(scope="session")
def run(corpus_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = command(
        "char_lm", "--corpus", corpus_file, "--workdir", folder, "--tensorboard", *SMALL,
        environment={**UNCHECKED, "JAX_LOG_COMPILES": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder, done


def test_a_run_logs_its_progress_and_its_result(run):
    out = run[1].stdout
    for pattern in (
        r"device: \d+ x cpu",
        r"corpus: .*corpus\.txt, [\d,]+ characters \(sha256 \w{12}\), \d+ symbols; held out: the last [\d,]+ char",
        r"layers\.1\.w_hh +\[16, 64\] +float32 +1,024",
        r"gradient check at the first batch: AGREE; .* \de-1\d in \S+ \(float64\); \de-0\d in \S+ \(float32\)",
        r"bits per held-out character: unigram [\d.]+, bigram [\d.]+, 5-gram [\d.]+, xz [\d.]+",
        r"50 steps take \d+\.\d s on this machine: the 10 steps left take about \d+ s\n",
        r"step +50/110  train [\d.]+  held-out [\d.]+ bits/char  [\d,]+ characters/s  \| \"",
        r"step +110/110 ",
        r"gradient check at the trained weights: AGREE",
        r"(NOT )?LEARNED: [\d.]+ bits per held-out character; the 5-gram needs [\d.]+, xz [\d.]+",
        r"pictures: .*learning_curve\.png, .*gates\.png",
        r"write with this model: \S+ -m experiments\.sample .*small",
    ):
        assert re.search(pattern, out), pattern


@pytest.mark.ci
def test_the_logged_command_for_sampling_works(run):
    line = re.search(r"write with this model: (.*)", run[1].stdout)[1]
    done = subprocess.run(
        f"{line} --num-characters 3 | head -c 2", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert len(done.stdout) == 2 and done.stderr == ""


def test_the_folder_contains_config_metrics_result_pictures_and_events(run, corpus_file):
    folder, _ = run
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["steps"], config["corpus"]) == (16, 110, str(corpus_file))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 111))
    assert all(row.keys() == {"step", "loss", "grad_norm", "learning_rate"} for row in steps)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    rates = [row["learning_rate"] for row in steps]
    assert rates[0] == 0 and max(rates) == pytest.approx(0.02) and rates[-1] < 1e-3
    assert [row["step"] for row in rows if "held_out_bits" in row] == [50, 100, 110]
    assert any("\u2028" in row["sample"] for row in rows if "sample" in row)
    result = json.loads((folder / "result.json").read_text())
    assert result["held_out_bits"] == rows[-1]["held_out_bits"]
    assert result["learned"] == (
        result["held_out_bits"] < min(result["baselines"]["5-gram"], result["baselines"]["xz"])
    )
    for picture in ("learning_curve.png", "gates.png"):
        assert (folder / picture).read_bytes()[1:4] == b"PNG" and (folder / picture).stat().st_size > 20_000
    assert list(folder.glob("events.out.tfevents.*"))
    assert not list(folder.glob("*.part"))


def test_a_run_compiles_its_step_once_per_block_length(run):
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", run[1].stdout + run[1].stderr)
    counts = Counter(name for name in compiled if name in ("fit", "evaluate", "sample", "gradient_errors"))
    assert counts == {"fit": 2, "evaluate": 1, "sample": 1, "gradient_errors": 2}  # blocks of 50 and 10 steps; 2 dtypes


def test_a_run_never_writes_into_the_folder_of_another(run, corpus_file):
    line = error_line(char_lm.main, corpus=str(corpus_file), workdir=str(run[0]), batch_size=8, seq_len=12)
    assert "is not empty (it contains " in line


def test_sampled_text_equals_the_arg_max_of_the_whole_sequence(run, capsys):
    sample.main(workdir=run[0], prompt="the ", num_characters=50, temperature=1e-4)
    written = capsys.readouterr().out
    assert written.startswith("the ") and len(written) == 4 + 50 + 1
    # A temperature near 0 always draws the most likely character.
    model, symbols = sample.load(run[0])
    tokens = text.encode(written[:-1], symbols)
    _, logits = char_lm.predict(model, char_lm.initial_carries(model), jnp.asarray(tokens))
    assert "".join(symbols[k] for k in np.argmax(logits, -1)[3:-1]) == written[4:-1]


def test_sample_names_the_wrong_argument(run, tmp_path):
    for folder, flags, message in (
        (tmp_path, {}, "does not contain a readable run"),
        (run[0], {"prompt": "the #"}, r"characters that the model does not know: \['#'\]"),
        (run[0], {"temperature": 0.0}, "--temperature must be above 0"),
    ):
        assert re.search(message, error_line(sample.main, workdir=folder, **flags))


@pytest.mark.ci
def test_sample_skips_damaged_checkpoints_and_says_when_none_is_left(run, tmp_path):
    folder = Path(shutil.copytree(run[0], tmp_path / "copy"))
    args = ("--workdir", folder, "--num-characters", 20)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000050", "step-00000100", "step-00000110",
    ]  # fmt: skip
    for step, skipped in ((110, 1), (100, 2)):
        next((folder / "checkpoints" / f"step-{step:08d}" / "arrays" / "d").iterdir()).write_bytes(b"")
        done = command("sample", *args)
        assert done.returncode == 0 and done.stderr.count("is damaged and was skipped: 'arrays/d/") == skipped
        assert len(done.stdout) >= 20
    (folder / "checkpoints" / "step-00000050" / "SHA256SUMS").unlink()
    done = command("sample", *args)
    *warnings, last = done.stderr.splitlines()
    assert done.returncode == 1 and "has no intact checkpoint" in last
    assert len(warnings) == 3 and all("is damaged and was skipped" in line for line in warnings)


def test_sample_uses_the_best_checkpoint_if_asked(run):
    scores = {row["step"]: row["held_out_bits"] for row in runs.read_metrics(run[0]) if "held_out_bits" in row}
    best = sample.load(run[0], best=True)[0]
    (checkpoint,) = (
        c for c in checkpoints.intact(run[0] / "checkpoints") if c.step == min(scores, key=lambda k: scores[k])
    )
    assert worst_error(best, checkpoints.restore(checkpoint, {"params": best}, partial=True)["params"]) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--dropout", "1.0"], r"--dropout must be in \[0, 1\), got 1.0"),
        (["--clip", "0"], "--clip must be above 0, got 0"),
        (["--temperature", "nan"], "--temperature must be above 0, got nan"),
        (
            ["--batch-size", "5000"],
            r"corpus.txt is too short: it has \d+ characters for training .*one batch needs 60000",
        ),
        (["--corpus", "/nowhere"], "--corpus /nowhere cannot be read as UTF-8 text"),
    ],
)
def test_a_flag_out_of_range_exits_with_one_line_and_writes_nothing(flags, message, corpus_file, tmp_path):
    options = dict(zip(*[iter(["--corpus", str(corpus_file), "--seq-len", "12", *flags])] * 2, strict=True))
    kinds = {"corpus": str, "dropout": float, "clip": float, "temperature": float}
    names = {flag[2:].replace("-", "_"): value for flag, value in options.items()}
    keywords = {name: kinds.get(name, int)(value) for name, value in names.items()}
    assert re.search(message, error_line(char_lm.main, **keywords, workdir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty; there is nothing to predict"),
        (b"a" * 5000, "contains only one symbol, 'a'; there is nothing to predict"),
        (b"\x7fELF\xff\xfe" * 1000, "cannot be read as UTF-8 text: 'utf-8' codec can't decode byte 0xff"),
        (b"text\0\1\2" * 1000, "is not a text file: it contains NUL characters"),
        (b"ab" * 300, "has 570 characters for training and 30 held out; one batch needs 4096"),
        ("a folder", "cannot be read as UTF-8 text: .*Is a directory"),
        ("no permission", "cannot be read as UTF-8 text: .*Permission denied"),
    ],
    ids=["empty", "one symbol", "binary", "NUL", "short", "a folder", "no permission"],
)
def test_an_unusable_corpus_exits_with_one_line_and_writes_nothing(content, message, tmp_path):
    path = tmp_path / "corpus"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "a folder":
        path.mkdir()
    else:
        path.write_text("ab" * 5000)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    assert re.search(message, error_line(char_lm.main, corpus=str(path), workdir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# Interrupted runs, and disks that refuse a write.


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_resumes_and_is_bitwise_identical_to_an_uninterrupted_one(run, corpus_file, tmp_path):
    folder = tmp_path / "run"
    environment = {**os.environ, **UNCHECKED}
    started = start(
        "char_lm", "--corpus", corpus_file, "--workdir", folder, *SMALL,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (folder / "metrics.jsonl").exists():  # training has started
        time.sleep(0.01)
    started.terminate()
    out, _ = started.communicate()
    assert started.returncode == 128 + signal.SIGTERM, out
    line = re.search(r"stopped after step 50; the last good checkpoint is .*step-00000050; resume with: (.*)", out)[1]
    done = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"resuming from .*step-00000050", done.stdout)
    assert outcome(folder) == outcome(run[0])


@pytest.mark.ci
def test_ctrl_c_before_training_exits_with_one_line(corpus_file, tmp_path):
    for n in range(5):
        folder = tmp_path / str(n)
        started = start(
            "char_lm", "--corpus", corpus_file, "--workdir", folder, *SMALL,
            env={**os.environ, **UNCHECKED}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        while started.poll() is None and not (folder / "config.json").exists():
            time.sleep(0.01)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate()
        if started.returncode:
            break
        assert "KeyboardInterrupt" in err  # Python loses a signal that arrives during garbage collection; try again
    assert started.returncode == 128 + signal.SIGINT and err.endswith("char_lm: interrupted.\n")


@pytest.mark.ci
def test_ctrl_c_saves_the_run_even_if_the_reader_of_its_output_is_gone(corpus_file, tmp_path):
    # With `2>&1 | tee log`, the terminal sends the signal to both processes, and tee exits first.
    folder = tmp_path / "run"
    started = start(
        "char_lm", "--corpus", corpus_file, "--workdir", folder, *SMALL,
        env={**os.environ, **UNCHECKED}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    started.stdout.close()
    started.send_signal(signal.SIGINT)
    assert started.wait() == 128 + signal.SIGINT
    assert next(checkpoints.intact(folder / "checkpoints")).step == 50


# A mounted file system, which can have a limited size or be read-only.
TMPFS = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"']
needs_tmpfs = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*TMPFS, "size=1m", "/mnt", "true"], capture_output=True, check=False).returncode != 0,
    reason="this system does not allow mounting",
)


@pytest.mark.ci
@needs_tmpfs
def test_a_read_only_workdir_exits_with_one_line(corpus_file, tmp_path):
    done = command("char_lm", "--corpus", corpus_file, "--workdir", tmp_path, prefix=[*TMPFS, "ro", tmp_path])
    assert said(done) == (
        f"char_lm: --workdir {tmp_path} cannot be written: Read-only file system; choose another folder."
    )


@pytest.mark.slow
@needs_tmpfs
def test_a_full_disk_exits_with_one_line_and_the_run_resumes_when_there_is_room(run, corpus_file, tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    job = shlex.join(arguments("char_lm", "--workdir", disk / "run"))
    script = f"""
        {job} --corpus {corpus_file} {" ".join(SMALL)}; echo "rc $?"
        mount -o remount,size=64m {disk}
        {job} --resume && cp -r {disk}/run {copy}
    """
    done = subprocess.run(
        [*TMPFS, "size=480k", disk, "sh", "-c", script],
        cwd=ROOT, env={**os.environ, **UNCHECKED}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "\nrc 1\n" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert re.search(
        r"^char_lm: at step 100: \S*step-00000100 could not be saved: No space left on device; "
        r"the last good checkpoint is \S*step-00000050; resume with: .* --resume$", done.stderr, re.M,
    ), done.stderr  # fmt: skip
    assert outcome(copy) == outcome(run[0])
