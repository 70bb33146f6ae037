"""The main job, small, as its user runs it; and its parts against NumPy."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import char_lm, text

ROOT = Path(__file__).parents[1]
SMALL = [
    "--learning-rate",
    "0.02",
    "--hidden-size",
    "16",
    "--batch-size",
    "8",
    "--seq-len",
    "12",
    "--steps",
    "110",
    "--dropout",
    "0.2",
]


def command(module, *args, **environment):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, args)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "naïve."], 4000)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(corpus_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = command(
        "char_lm", "--corpus", corpus_file, "--workdir", folder, "--tensorboard", *SMALL, JAX_LOG_COMPILES="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder, done


def test_it_prints_what_it_promises(run):
    out = run[1].stdout
    for pattern in (
        r"device: \d+ x cpu",
        r"corpus: .*corpus\.txt, [\d,]+ characters \(sha256 \w{12}\), \d+ symbols; held out: the last [\d,]+ char",
        r"layers\.1\.w_hh +\[16, 64\] +float32 +1,024",
        r"gradient check at the first batch: AGREE; .* \de-1\d in \S+ \(float64\); \de-0\d in \S+ \(float32\)",
        r"bits per held-out character: unigram [\d.]+, bigram [\d.]+, 5-gram [\d.]+, xz [\d.]+",
        r"step +50/110  train [\d.]+  held-out [\d.]+ bits/char  [\d,]+ characters/s  \| \"",
        r"step +110/110 ",
        r"gradient check at the trained weights: AGREE",
        r"(NOT )?LEARNED: [\d.]+ bits per held-out character; the 5-gram needs [\d.]+, xz [\d.]+",
        r"pictures: .*learning_curve\.png, .*gates\.png",
        r"go on: python\S* -m experiments\.sample .*small",
    ):
        assert re.search(pattern, out), pattern


def test_the_folder_holds_config_metrics_result_pictures_and_events(run, corpus_file):
    folder, _ = run
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["steps"], config["corpus"]) == (16, 110, str(corpus_file))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 111))
    assert all(row.keys() == {"step", "loss", "grad_norm", "learning_rate"} for row in steps)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    rates = [row["learning_rate"] for row in steps]
    assert rates[0] == 0 and max(rates) == pytest.approx(0.02) and rates[-1] < 1e-3
    assert [row["step"] for row in rows if "held_out_bits" in row] == [50, 100, 110]
    result = json.loads((folder / "result.json").read_text())
    assert result["held_out_bits"] == rows[-1]["held_out_bits"]
    assert result["learned"] == (
        result["held_out_bits"] < min(result["baselines"]["5-gram"], result["baselines"]["xz"])
    )
    for picture in ("learning_curve.png", "gates.png"):
        assert (folder / picture).read_bytes()[1:4] == b"PNG" and (folder / picture).stat().st_size > 20_000
    assert list(folder.glob("events.out.tfevents.*"))
    assert not list(folder.glob("*.part"))


def test_a_run_traces_its_step_once_for_each_block_length(run):
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", run[1].stdout + run[1].stderr)
    counts = Counter(name for name in compiled if name in ("fit", "evaluate", "sample", "gradient_errors"))
    assert counts == {"fit": 2, "evaluate": 1, "sample": 1, "gradient_errors": 2}  # 50 and 10 steps; 2 dtypes


def test_a_run_never_writes_into_another(run, corpus_file):
    done = command("char_lm", "--corpus", corpus_file, "--workdir", run[0], *SMALL)
    assert done.returncode == 1 and "is not empty; name a new folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_sample_writes_one_step_per_character_with_the_carry_kept(run):
    done = command("sample", run[0], "--prompt", "the ", "--num-characters", 50, "--temperature", 1e-4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the ") and len(done.stdout) == 4 + 50 + 1
    # At a temperature near 0 the text is the arg max of the whole sequence's logits.
    from experiments.sample import load

    model, symbols = load(run[0])
    tokens = text.encode(done.stdout[:-1], symbols)
    _, logits = char_lm.predict(model, char_lm.initial_carries(model), jnp.asarray(tokens))
    assert "".join(symbols[k] for k in np.argmax(logits, -1)[3:-1]) == done.stdout[4:-1]


def test_sample_names_what_is_wrong(run, tmp_path):
    for args, message in (
        ((tmp_path,), "holds no run"),
        ((run[0], "--prompt", "the #"), r"characters the model never saw: \['#'\]"),
        ((run[0], "--temperature", 0), "--temperature must be above 0"),
    ):
        done = command("sample", *args)
        assert done.returncode == 1 and re.search(message, done.stderr) and "Traceback" not in done.stderr


# The parts.


@pytest.fixture(scope="module")
def model():
    return char_lm.init_model(jax.random.key(0), 7, 6, 2)


def test_predict_without_a_batch_is_predict_next_step_by_step(model):
    tokens = jnp.array([3, 1, 6, 0, 2])
    _, logits = char_lm.predict(model, char_lm.initial_carries(model), tokens)
    carries = char_lm.initial_carries(model)
    for token, want in zip(tokens, logits, strict=True):
        carries, got = char_lm.predict_next(model, carries, token)
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_dropout_keeps_the_mean_and_needs_its_key(model):
    tokens = jnp.zeros((400, 50), int)
    ones = model._replace(embedding=jnp.ones_like(model.embedding), layers=[], w=jnp.eye(6, 7, dtype="float32"))
    _, logits = char_lm.predict(ones, [], tokens, dropout=0.25, key=jax.random.key(0))
    kept = np.asarray(logits[..., :6])
    np.testing.assert_allclose(np.unique(kept), [0, 4 / 3], rtol=1e-6)
    assert abs(kept.mean() - 1) < 4 * np.sqrt(0.25 / 0.75 / kept.size)
    _, without = char_lm.predict(ones, [], tokens, dropout=0.25)
    assert (without[..., :6] == 1).all()


def test_evaluate_counts_every_held_out_character_once(model):
    tokens = np.random.default_rng(0).integers(0, 7, 47).astype(np.int32)
    inputs, targets, lengths = text.streams(tokens, 10, 4)
    assert lengths.tolist() == [10, 9, 9, 9]
    nats, at = 0.0, 10
    for n, length in enumerate(lengths):
        np.testing.assert_array_equal(targets[:length, n], tokens[at : at + length])
        np.testing.assert_array_equal(inputs[:length, n], tokens[at - 1 : at + length - 1])
        _, logits = char_lm.predict(
            model, char_lm.initial_carries(model), jnp.asarray(tokens[at - 1 : at + length - 1])
        )
        logits = np.asarray(logits, np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= log_p[np.arange(length), tokens[at : at + length]].sum()
        at += length
    np.testing.assert_allclose(char_lm.evaluate(model, inputs, targets, lengths), nats / 37 / math.log(2), rtol=1e-6)


def test_batches_read_on_from_step_to_step_and_round_at_the_end():
    tokens = np.arange(100, dtype=np.int32)
    first, second = text.batches(tokens, range(2), batch_size=3, seq_len=10)
    assert first.shape == (11, 3)
    np.testing.assert_array_equal(first[:, 1], np.arange(33, 44))
    np.testing.assert_array_equal(second[0], first[-1])
    np.testing.assert_array_equal(text.batches(tokens, range(7, 8), 3, 10)[0][:, 1], np.arange(103, 114) % 100)


def test_ngrams_are_the_interpolation_they_say():
    corpus = text.Corpus("x", "abab", "ac", "abc")
    p_a = (2 + 2 / 3) / (4 + 2)  # seen 2 of 4 times, 2 distinct symbols, a third each below that
    p_c = (0 + 2 / 3) / (4 + 2)
    np.testing.assert_allclose(text.ngram_bits(corpus, 1), -(math.log2(p_a) + math.log2(p_c)) / 2)
    # After b came one a; after a came b twice, of one kind.
    bigram = ((1 + 1 * p_a) / (1 + 1), (0 + 1 * p_c) / (2 + 1))
    np.testing.assert_allclose(text.ngram_bits(corpus, 2), -sum(map(math.log2, bigram)) / 2)


def test_the_manual_is_cleared_of_repeated_paragraphs_before_the_split():
    corpus = text.load_corpus("python-docs")
    paragraphs = [p for p in corpus.text.split("\n\n") if p]
    assert len(paragraphs) == len(set(paragraphs))
    assert 350_000 < len(corpus.text) < 420_000
    assert len(corpus.held_out) == pytest.approx(0.05 * len(corpus.text), abs=1)
    assert "".join(corpus.symbols[k] for k in text.encode(corpus.held_out, corpus.symbols)) == corpus.held_out


def test_a_wrong_gradient_by_hand_is_noticed_and_named(model, monkeypatch):
    state = char_lm.init_train_state(
        model, char_lm.optax.sgd(0.1), jax.random.key(0), carry=char_lm.initial_carries(model, 3)
    )
    batch = np.random.default_rng(0).integers(0, 7, (5, 3)).astype(np.int32)
    assert all(row["agrees"] for row in char_lm.check_gradients(state, batch, 0.1).values())
    right = char_lm.lstm_bptt
    monkeypatch.setattr(
        char_lm, "lstm_bptt",
        lambda params, *rest: right(params._replace(w_hh=jax.lax.stop_gradient(params.w_hh)), *rest),
    )  # fmt: skip
    jax.clear_caches()
    found = char_lm.check_gradients(state, batch, 0.1)
    assert not any(row["agrees"] for row in found.values())
    assert found["float64"]["error"] == pytest.approx(1) and re.fullmatch(
        r"layers\.\d\.[ifgo]\.w_hh", found["float64"]["weight"]
    )
    jax.clear_caches()
