"""How well does a small LSTM predict the next character of real text?

Two layers of 128 units read the standard library's manual for about five minutes. To expect: about 1.55 bits per
held-out character, where an interpolated 5-gram needs 1.82 and xz, given the training text, 1.73.

    python -m experiments.char_lm --corpus my.txt --steps 8000
"""

import functools
import json
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from experiments import devices, plots, runs, text, trainer
from jaxlstm import (
    LSTM,
    LSTMParams,
    LSTMState,
    TrainState,
    gradient_error,
    init_train_state,
    lstm_bptt,
    make_train_step,
    split_gates,
    summary,
    trace,
    unroll,
)

EVALUATIONS = 10
STREAMS, WARM_UP = 32, 256  # columns in which the held-out text is read; characters read before the first one scored
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}  # of the gradient by hand against autodiff

log = logging.getLogger("char_lm")


# The model.


class Model(NamedTuple):
    """Embedding -> LSTM layers -> softmax."""

    embedding: Float[Array, "symbols hidden"]
    layers: list[LSTMParams]
    w: Float[Array, "hidden symbols"]
    b: Float[Array, "symbols"]


Carries = list[LSTMState]
Layer = Callable[..., tuple[LSTMState, Array]]  # (params, xs, carry) -> (carry, ys)
scan: Layer = functools.partial(unroll, LSTM)
step: Layer = lambda params, x, carry: LSTM.step(params, carry, x)


def init_model(key: Key[Array, ""], num_symbols: int, hidden_size: int, num_layers: int) -> Model:
    """Draw the parameters."""
    embedding_key, readout_key, *layer_keys = jax.random.split(key, 2 + num_layers)
    return Model(
        embedding=0.1 * jax.random.normal(embedding_key, (num_symbols, hidden_size), jnp.float32),
        layers=[LSTM.init(layer_key, hidden_size, hidden_size) for layer_key in layer_keys],
        w=jax.nn.initializers.glorot_uniform()(readout_key, (hidden_size, num_symbols), jnp.float32),
        b=jnp.zeros(num_symbols, jnp.float32),
    )


def initial_carries(model: Model, *batch_shape: int) -> Carries:
    """Return every layer's zero state."""
    return [LSTM.initial_carry(layer, batch_shape) for layer in model.layers]


def predict(
    model: Model,
    carries: Carries,
    tokens: Int[Array, "*time_batch"],
    *,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    layer: Layer = scan,
) -> tuple[Carries, Float[Array, "*time_batch symbols"]]:
    """Return the logits of the character after each one; dropout between layers only (Zaremba et al. 2014)."""

    def drop(xs: Array, depth: int) -> Array:
        if key is None or dropout == 0:
            return xs
        keep = jax.random.bernoulli(jax.random.fold_in(key, depth), 1 - dropout, xs.shape)
        return jnp.where(keep, xs / (1 - dropout), 0)

    xs = drop(model.embedding[tokens], 0)
    new_carries = []
    for depth, (params, carry) in enumerate(zip(model.layers, carries, strict=True), 1):
        carry, ys = layer(params, xs, carry)
        new_carries.append(carry)
        xs = drop(ys, depth)
    return new_carries, xs @ model.w + model.b


def predict_next(model: Model, carries: Carries, token: Int[Array, ""]) -> tuple[Carries, Float[Array, "symbols"]]:
    """Read one character; return the logits of the next."""
    return predict(model, carries, token, layer=step)


def write_next(
    model: Model, carries: Carries, token: Int[Array, ""], key: Key[Array, ""], temperature: float
) -> tuple[Carries, Int[Array, ""]]:
    """Read one character; draw the next."""
    carries, logits = predict_next(model, carries, token)
    return carries, jax.random.categorical(key, logits / temperature)


# Loss, evaluation, sampling.


def cross_entropy(logits: Float[Array, "*n symbols"], targets: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Return −log ŷ of each target, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def loss_fn(
    model: Model,
    batch: Int[Array, "time+1 batch"],
    carries: Carries,
    key: Key[Array, ""],
    *,
    dropout: float,
    layer: Layer = scan,
) -> Any:
    """Return the mean loss in nats, and the carries for the next batch: truncated BPTT."""
    carries, logits = predict(model, carries, batch[:-1], dropout=dropout, key=key, layer=layer)
    return cross_entropy(logits, batch[1:]).mean(), (carries, {})


@jax.jit
def evaluate(
    model: Model,
    inputs: Int[Array, "time batch"],
    targets: Int[Array, "time batch"],
    scored: Bool[Array, "time batch"],
) -> Float[Array, ""]:
    """Return bits per scored character."""
    _, logits = predict(model, initial_carries(model, inputs.shape[1]), inputs)
    return cross_entropy(logits, targets).mean(where=scored) / math.log(2)


@functools.partial(jax.jit, static_argnames="num_steps")
def sample(
    model: Model, token: Int[Array, ""], key: Key[Array, ""], temperature: float, num_steps: int
) -> Int[Array, "num_steps"]:
    """Write `num_steps` characters after a first one."""

    def write(state: Any, key: Key[Array, ""]) -> Any:
        carries, token = state
        carries, token = write_next(model, carries, token, key, temperature)
        return (carries, token), token

    return jax.lax.scan(write, (initial_carries(model), token), jax.random.split(key, num_steps))[1]


# Is the gradient that trains the model right?


@functools.partial(jax.jit, static_argnames=("dropout",))
def gradient_errors(model: Model, batch: Array, carries: Carries, key: Key[Array, ""], dropout: float) -> Any:
    """Return the error of the hand-derived gradient against autodiff, per weight, and per gate within a layer."""
    by_hand, autodiff = (
        jax.grad(lambda m, layer=layer: loss_fn(m, batch, carries, key, dropout=dropout, layer=layer)[0])(model)
        for layer in (lstm_bptt, scan)
    )
    by_gate = lambda model: model._replace(layers=[split_gates(layer)._asdict() for layer in model.layers])
    return gradient_error(by_gate(by_hand), by_gate(autodiff))


def check_gradients(when: str, state: TrainState, batch: Array, dropout: float) -> dict[str, Any]:
    """Compare the gradient by hand with autodiff's on a batch; return, and log, the worst weight and gate per dtype."""
    worst = {}
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            model, carries = (
                jax.tree.map(functools.partial(np.asarray, dtype=dtype), jax.device_get(tree))
                for tree in (state.params, state.carry)
            )
            key = jax.random.fold_in(state.key, state.step)
            errors = jax.device_get(gradient_errors(model, batch, carries, key, dropout))
        named = [
            (float(error), jax.tree_util.keystr(path, simple=True, separator="."))
            for path, error in jax.tree.leaves_with_path(errors)
        ]
        error, name = max(named, key=lambda pair: (math.isnan(pair[0]), pair[0]))
        worst[dtype] = {"error": error, "weight": name, "agrees": error <= tolerance}
    log.info(
        "gradient check %s: %s; by hand against autodiff, worst weight and gate: %s",
        when,
        "AGREE" if all(row["agrees"] for row in worst.values()) else "DISAGREE",
        "; ".join(f"{row['error']:.0e} in {row['weight']} ({dtype})" for dtype, row in worst.items()),
    )
    return worst


# The run.


def main(
    *,
    corpus: str = "python-docs",
    hidden_size: int = 128,
    num_layers: int = 2,
    batch_size: int = 64,
    seq_len: int = 64,
    steps: int = 3000,
    learning_rate: float = 6e-3,
    clip: float = 1.0,
    dropout: float = 0.1,
    temperature: float = 0.7,
    seed: int = 0,
    block: int = 25,
    save_every: int = 100,
    keep: int = 3,
    workdir: str | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    mesh: str = "",
    cluster: str = "",
) -> dict[str, Any]:
    """Train a character language model and hold it against n-grams and xz.

    The exit code is 0 whenever the run has ended, LEARNED or not; 130 or 143 if Ctrl-C or SIGTERM stopped it.

    Args:
      corpus: `python-docs`, the manual in the standard library, or the path of a UTF-8 text file.
      hidden_size: units of a layer, and of the embedding.
      num_layers: LSTM layers.
      batch_size: places in the text that are read at once.
      seq_len: characters between two updates: the length of truncated BPTT.
      steps: optimiser steps.
      learning_rate: the peak of the schedule: linear warm-up, then a cosine to a hundredth.
      clip: the largest gradient norm let through.
      dropout: share of units dropped between layers.
      temperature: of the samples; below 1 is bolder than the model believes.
      seed: of the parameters, dropout and samples.
      block: steps in one compiled call; only between two can the run be stopped and saved.
      save_every: steps between two checkpoints.
      keep: how many of the last checkpoints stay; the best one always does.
      workdir: a new folder for the run; default runs/char_lm/ and the time.
      resume: go on with the run in --workdir, with the flags that it has.
      tensorboard: write event files as well.
      mesh: `data=2` spreads the batch over two devices.
      cluster: of several processes, which this one is: `auto` under Slurm and its like, or `HOST:PORT,K/N`.
    """
    config = dict(locals())
    check_flags(config)
    on = devices.start("char_lm", mesh, cluster, batch_size=batch_size)
    data = load(corpus, batch_size * seq_len)
    config |= {"symbols": data.symbols, "sha256": data.sha256}
    folder = runs.open_folder("char_lm", workdir, config, resume=resume)
    tokens = text.encode(data.text, data.symbols)
    log.info("device: %s", devices.found())
    log.info(
        "corpus: %s, %s characters (sha256 %s), %d symbols; held out: the last %s characters",
        data.name, f"{len(tokens):,}", data.sha256[:12], len(data.symbols), f"{len(data.held_out):,}",
    )  # fmt: skip

    # One key for every purpose, so that none changes when another is asked for more.
    model_key, train_key, sample_key = jax.random.split(jax.random.key(seed), 3)
    model = init_model(model_key, len(data.symbols), hidden_size, num_layers)
    log.info("model:\n%s", summary(model))
    optimizer = make_optimizer(learning_rate, steps, clip)
    whole = init_train_state(model, optimizer, train_key, carry=initial_carries(model, batch_size))
    state = devices.place(whole, on)._replace(carry=devices.place(whole.carry, on, batch_axis=0))
    train_step = make_train_step(functools.partial(loss_fn, dropout=dropout), optimizer)
    batches = functools.partial(text.batches, tokens[: len(data.train)], batch_size=batch_size, seq_len=seq_len)
    held_out = text.streams(tokens, len(data.train), STREAMS, WARM_UP)

    check = {"at the first batch": check_gradients("at the first batch", whole, batches(range(1))[0], dropout)}
    baselines = text.baselines(data)
    log.info("bits per held-out character: %s", ", ".join(f"{name} {bits:.3f}" for name, bits in baselines.items()))

    def examine(state: TrainState, metrics: trainer.Metrics, steps_per_second: float) -> runs.Row:
        first = jnp.asarray(text.encode(text.first_symbol(data.symbols), data.symbols)[0])
        written = sample(state.params, first, jax.random.fold_in(sample_key, state.step), temperature, 80)
        row = {
            "train_bits": float(metrics["loss"].mean()) / math.log(2),
            "held_out_bits": float(evaluate(state.params, *held_out)),
            "characters_per_second": steps_per_second * batch_size * seq_len,
            "sample": "".join(data.symbols[k] for k in np.asarray(written)),
        }
        log.info(
            "step %5d/%d  train %.3f  held-out %.3f bits/char  %s characters/s  | %s",
            state.step, steps, row["train_bits"], row["held_out_bits"], f"{row['characters_per_second']:,.0f}",
            json.dumps(row["sample"], ensure_ascii=False),
        )  # fmt: skip
        return row

    state = trainer.train(
        "char_lm", folder, train_step, runs.restore(folder, state),
        lambda steps: devices.place(batches(steps), on, batch_axis=2), examine, mesh=on,
        score="held_out_bits", steps=steps, block=block, save_every=save_every, keep=keep, tensorboard=tensorboard,
        evaluate_every=max(block, steps // EVALUATIONS // block * block),
    )  # fmt: skip
    state = devices.gather(state, on)

    last_batch = batches(range(steps, steps + 1))[0]
    check["at the trained weights"] = check_gradients("at the trained weights", state, last_batch, dropout)
    bits = float(evaluate(state.params, *held_out))
    sentence, gates = read_sentence(state.params, data)
    metrics = runs.read_metrics(folder)
    result = {
        "held_out_bits": bits,
        "learned": bits < baselines["5-gram"] and bits < baselines["xz"],
        "baselines": baselines,
        "gradient_check": check,
        "evaluations": [row for row in metrics if "held_out_bits" in row],
        "config": config,
        "corpus": {"characters": len(tokens), "held_out": len(data.held_out), "sha256": data.sha256},
        "versions": runs.versions(),
    }
    if devices.is_first():
        report(folder, result, metrics, sentence, gates)
    devices.wait("the report is written")
    return result


def make_optimizer(learning_rate: float, steps: int, clip: float) -> optax.GradientTransformation:
    """Make AdamW with a linear warm-up, a cosine, and gradients clipped by their norm."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, steps // 10), steps, learning_rate / 100)
    return optax.chain(optax.clip_by_global_norm(clip), optax.inject_hyperparams(optax.adamw)(learning_rate=schedule))


def report(
    folder: Path, result: dict[str, Any], metrics: list[runs.Row], sentence: str, gates: dict[str, Array]
) -> None:
    """Write result.json and the pictures; say what came out, and where it is."""
    runs.write_json(folder / "result.json", result)
    pictures = [
        plots.learning_curve(folder / "learning_curve.png", metrics, result["baselines"]),
        plots.gate_maps(folder / "gates.png", sentence, gates),
    ]
    log.info(
        "%s: %.3f bits per held-out character; the 5-gram needs %.3f, xz %.3f",
        "LEARNED" if result["learned"] else "NOT LEARNED",
        result["held_out_bits"], result["baselines"]["5-gram"], result["baselines"]["xz"],
    )  # fmt: skip
    log.info("pictures: %s", ", ".join(map(str, pictures)))
    log.info("result: %s", folder / "result.json")
    log.info("go on: %s", runs.command("experiments.sample", folder))


def check_flags(config: dict[str, Any]) -> None:
    """Say in one line which flag is out of its range, before anything is written."""
    sizes = ("hidden_size", "num_layers", "batch_size", "seq_len", "steps", "block", "save_every", "keep")
    for name, fine, expected in (
        *((name, config[name] >= 1, "at least 1") for name in sizes),
        *((name, config[name] > 0, "above 0") for name in ("learning_rate", "clip", "temperature")),
        ("dropout", 0 <= config["dropout"] < 1, "in [0, 1)"),
    ):
        if not fine:
            sys.exit(f"char_lm: --{name.replace('_', '-')} must be {expected}, got {config[name]}.")


def load(corpus: str, batch: int) -> text.Corpus:
    """Load the corpus, or say in one line why it will not do."""
    try:
        data = text.load_corpus(corpus)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"char_lm: --corpus {corpus} cannot be read as UTF-8 text: {error}")
    if "\0" in data.symbols:
        sys.exit(f"char_lm: --corpus {corpus} is no text: it holds NUL characters.")
    if len(data.symbols) < 2:
        said = f"holds one symbol only, {data.symbols!r}" if data.symbols else "is empty"
        sys.exit(f"char_lm: --corpus {corpus} {said}; there is nothing to predict.")
    if len(data.train) < batch or len(data.held_out) < STREAMS:
        sys.exit(
            f"char_lm: --corpus {corpus} has {len(data.train)} characters to train on, {len(data.held_out)} held out; "
            f"one batch takes {batch} (--batch-size times --seq-len), the evaluation {STREAMS}."
        )
    return data


def read_sentence(model: Model, data: text.Corpus, width: int = 80) -> tuple[str, dict[str, Array]]:
    """Return a held-out sentence, and the last layer's gates and cell state at each of its characters."""
    sentences = re.findall(r"(?<=[.!?]\s)[A-Z][^.!?]{30,400}[.!?](?=\s)", data.held_out) or [data.held_out]
    sentence = min((s for s in sentences if len(s) <= width), key=lambda s: -len(s), default=sentences[0][:width])
    tokens = text.encode(sentence, data.symbols)[:, None]
    *below, last = model.layers
    xs = model.embedding[tokens]
    for params in below:
        _, xs = unroll(LSTM, params, xs)

    recorded = trace(LSTM, last, xs)
    return sentence, {name: v[:, 0] for name, v in {**recorded.gates._asdict(), "c": recorded.carry.c}.items()}


if __name__ == "__main__":
    runs.cli("char_lm", main)
