"""How fast is a machine running at each moment? From NumPy recordings of different lengths to a tagger that is saved.

A recording is a noisy wave that changes between slow, medium and fast at random moments. A tag names the speed at every
sample. Each speed gives high and low samples alike, so a linear model of the last samples does no better than chance.
To use your own data, replace `make_recordings`. docs/your-own-data.md explains each step.

    python examples/own_data.py

Expect a test accuracy of 0.93 after about half a minute; always naming the most frequent tag gives 0.36. The model and
its learning curves are then in runs/own_data/. This example also needs the extras `plots` and `safetensors`.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxlstm
from jaxlstm import LSTM, LSTMParams, TrainState, length_mask
from jaxlstm.adapters.weights import read_safetensors, write_safetensors
from jaxlstm.epochs import evaluate, fit_epochs, shuffled_batches

FOLDER = Path("runs/own_data")
PERIODS, NUM_RECORDINGS, BATCH_SIZE, HIDDEN_SIZE = np.array([16, 9, 5]), 400, 32, 24
NUM_SEEDS, LEARNING_RATES, NUM_EPOCHS, PATIENCE = 3, np.array([0.003, 0.01, 0.03], np.float32), 60, 5


class Data(NamedTuple):
    signal: Any  # [recording, time, 1], padded
    length: Any  # [recording]
    tag: Any  # [recording, time], padded


def make_recordings(rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
    signals, tags = [], []
    for length in rng.integers(20, 81, NUM_RECORDINGS):
        speed = rng.integers(len(PERIODS), size=length)[np.cumsum(rng.random(length) < 0.05)]
        phase = rng.uniform(0, 2 * np.pi) + np.cumsum(2 * np.pi / PERIODS[speed])
        signals.append(rng.uniform(0.7, 1.4) * np.sin(phase) + 0.1 * rng.normal(size=length))
        tags.append(speed)
    return signals, tags


def pad(rows: list[np.ndarray], dtype: Any) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def make_data() -> list[Data]:
    """Return training, validation and test data: 70, 15 and 15 percent of the recordings, each whole in one part."""
    signals, tags = make_recordings(np.random.default_rng(0))
    lengths = np.array([len(signal) for signal in signals])
    data = Data(pad(signals, np.float32)[..., None], lengths, pad(tags, np.int32))
    cuts = 70 * len(signals) // 100, 85 * len(signals) // 100
    return [Data(*part) for part in zip(*(np.split(leaf, cuts) for leaf in data), strict=True)]


class Tagger(NamedTuple):
    lstm: LSTMParams
    w: jax.Array  # [hidden, tag]
    b: jax.Array  # [tag]


def init_tagger(key: jax.Array) -> Tagger:
    return Tagger(LSTM.init(key, 1, HIDDEN_SIZE), jnp.zeros((HIDDEN_SIZE, len(PERIODS))), jnp.zeros(len(PERIODS)))


def measure(model: Tagger, batch: Data) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return the loss and the hit of every sample, and which samples are real, all [time, recording]."""
    mask = length_mask(batch.length, batch.tag.shape[1])
    _, hs = jaxlstm.unroll(LSTM, model.lstm, batch.signal.swapaxes(0, 1), mask=mask)
    logits, tags = hs @ model.w + model.b, batch.tag.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tags)
    return {"loss": losses, "accuracy": logits.argmax(axis=-1) == tags}, mask


def loss_fn(model: Tagger, batch: Data) -> jax.Array:
    values, mask = measure(model, batch)
    return jnp.mean(values["loss"], where=mask)


def train(data: Data, validation: Data, key: jax.Array, learning_rate: jax.Array) -> tuple[TrainState, Any]:
    model_key, train_key, order_key = jax.random.split(key, 3)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    return fit_epochs(
        jaxlstm.make_train_step(loss_fn, optimizer),
        jaxlstm.init_train_state(init_tagger(model_key), optimizer, train_key),
        lambda key: shuffled_batches(key, data, BATCH_SIZE),
        lambda model: evaluate(measure, model, validation, BATCH_SIZE)["loss"],
        key=order_key, num_epochs=NUM_EPOCHS, patience=PATIENCE,
    )  # fmt: skip


def draw(metrics: dict[str, np.ndarray], best: int) -> None:
    size = len(LEARNING_RATES)
    figure, axes = plt.subplots(1, size, sharex=True, sharey=True, figsize=(8, 3), layout="constrained")
    for run, (loss, ran) in enumerate(zip(metrics["validation"], metrics["ran"], strict=True)):
        saved = run == best
        axes[run % size].plot(loss[ran], color="C3" if saved else "0.6", label="saved" if saved else None, zorder=saved)
        axes[run % size].plot(loss.argmin(), loss.min(), "o", color="C3" if saved else "0.6", zorder=saved)
        axes[run % size].set(title=f"learning rate {LEARNING_RATES[run % size]:g}", xlabel="epoch")
    axes[best % size].legend()
    axes[0].set(ylabel="validation loss", ylim=0)
    figure.savefig(FOLDER / "learning_curves.png", dpi=150)
    plt.close(figure)


def main() -> dict[str, float]:
    train_data, validation, test = make_data()
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    seed, rate = np.indices((NUM_SEEDS, len(LEARNING_RATES))).reshape(2, -1)  # one run for each pair
    run = functools.partial(train, train_data, validation)
    states, metrics = jax.jit(functools.partial(jaxlstm.sweep, run))(keys[seed], LEARNING_RATES[rate])
    lowest = metrics["validation"].min(axis=1)
    best = int(lowest.argmin())
    for n, ran in enumerate(metrics["ran"]):
        print(f"seed {seed[n]}, learning rate {LEARNING_RATES[rate[n]]:g}: loss {lowest[n]:.3f}, {ran.sum()} epochs")

    FOLDER.mkdir(parents=True, exist_ok=True)
    draw(jax.device_get(metrics), best)
    write_safetensors(FOLDER / "tagger.safetensors", jax.tree.map(lambda leaf: leaf[best], states.params))
    model = read_safetensors(FOLDER / "tagger.safetensors", like=jax.eval_shape(init_tagger, keys[0]))
    accuracy = float(evaluate(measure, model, test, BATCH_SIZE)["accuracy"])
    real = np.arange(test.tag.shape[1]) < test.length[:, None]
    majority = float(max(np.bincount(test.tag[real])) / real.sum())
    print(f"test accuracy {accuracy:.3f}, of the most frequent tag alone {majority:.3f}")
    return {"accuracy": accuracy, "majority": majority}


if __name__ == "__main__":
    main()
