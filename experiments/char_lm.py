"""How well does a small LSTM predict the next character of real text?

Two layers of 128 units train on the standard library's manual for three to five minutes. Expect about 1.6 bits per
held-out character; an interpolated 5-gram needs 1.82, and xz, which also sees the training text, 1.73.

    python -m experiments.char_lm --corpus my.txt --steps 8000
"""

import functools
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from experiments import char_lm_report, gradient_check, text
from experiments.harness import devices, runs, trainer
from jaxlstm import (
    LSTM,
    LSTMParams,
    LSTMState,
    TrainState,
    generate,
    init_train_state,
    make_train_step,
    step_stack,
    summary,
    unroll_stack,
)
from jaxlstm.regularize import dropout_mask

EVALUATIONS = 10
Carries = list[LSTMState]  # one per layer

log = logging.getLogger("char_lm")


class Model(NamedTuple):
    """Embedding -> LSTM layers -> softmax."""

    embedding: Float[Array, "symbols hidden"]
    layers: list[LSTMParams]
    w: Float[Array, "hidden symbols"]
    b: Float[Array, "symbols"]


def init_model(key: Key[Array, ""], num_symbols: int, hidden_size: int, num_layers: int) -> Model:
    """Draw the initial parameters."""
    embedding_key, readout_key, *layer_keys = jax.random.split(key, 2 + num_layers)
    return Model(
        embedding=0.1 * jax.random.normal(embedding_key, (num_symbols, hidden_size), jnp.float32),
        layers=[LSTM.init(layer_key, hidden_size, hidden_size) for layer_key in layer_keys],
        w=jax.nn.initializers.glorot_uniform()(readout_key, (hidden_size, num_symbols), jnp.float32),
        b=jnp.zeros(num_symbols, jnp.float32),
    )


def initial_carries(model: Model, *batch_shape: int) -> Carries:
    """Return the zero state of every layer."""
    return [LSTM.initial_carry(layer, batch_shape) for layer in model.layers]


def predict(
    model: Model, carries: Carries, tokens: Int[Array, "time *batch"], *, dropout: float = 0.0, key: Any = None
) -> tuple[Carries, Float[Array, "time *batch symbols"]]:
    """Return the logits of the character after each token.

    Dropout acts on the input of each layer and on the last output (Zaremba et al. 2014); without a key there is none.
    """
    dropout = 0.0 if key is None else dropout

    def drop(xs: Array, depth: int) -> Array:
        return xs * dropout_mask(jax.random.fold_in(key, depth), dropout, xs.shape, xs.dtype) if dropout else xs

    xs = drop(model.embedding[tokens], 0)
    carries, ys = unroll_stack(LSTM, model.layers, xs, carries, dropout=dropout, key=key)
    return carries, drop(ys, len(model.layers)) @ model.w + model.b


def predict_next(model: Model, carries: Carries, token: Int[Array, ""]) -> tuple[Carries, Float[Array, "symbols"]]:
    """Read one character and return the logits of the next one."""
    carries, y = step_stack(LSTM, model.layers, carries, model.embedding[token])
    return carries, y @ model.w + model.b


def write_next(
    model: Model, carries: Carries, token: Int[Array, ""], key: Key[Array, ""], temperature: float
) -> tuple[Carries, Int[Array, ""]]:
    """Read one character and draw the next one."""
    carries, logits = predict_next(model, carries, token)
    return carries, jax.random.categorical(key, logits / temperature).astype(token.dtype)


@functools.partial(jax.jit, static_argnames="num_steps")
def sample(
    model: Model, token: Int[Array, ""], key: Key[Array, ""], temperature: float, num_steps: int
) -> Int[Array, "num_steps"]:
    """Write `num_steps` characters after a first one."""
    write = functools.partial(write_next, model, temperature=temperature)
    return generate(write, initial_carries(model), token, key, num_steps)[1]


def loss_fn(
    model: Model, batch: Int[Array, "time+1 batch"], carries: Carries, key: Key[Array, ""], *, dropout: float
) -> Any:
    """Return the mean loss in nats, and the carries for the next batch: truncated backpropagation through time."""
    carries, logits = predict(model, carries, batch[:-1], dropout=dropout, key=key)
    return cross_entropy(logits, batch[1:]).mean(), (carries, {})


@jax.jit
def evaluate(
    model: Model, inputs: Int[Array, "time batch"], targets: Int[Array, "time batch"], scored: Bool[Array, "time batch"]
) -> Float[Array, ""]:
    """Return bits per scored character."""
    _, logits = predict(model, initial_carries(model, inputs.shape[1]), inputs)
    return cross_entropy(logits, targets).mean(where=scored) / math.log(2)


def main(
    *,
    corpus: str = "python-docs",
    hidden_size: int = 128,
    num_layers: int = 2,
    batch_size: int = 64,
    seq_len: int = 64,
    steps: int = 1500,
    learning_rate: float = 1e-2,
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
    """Train a character language model and compare it with n-grams and xz.

    The exit code is 0 when the run ends, LEARNED or NOT LEARNED, and 130 or 143 if Ctrl-C or SIGTERM stopped it.

    Args:
      corpus: `python-docs`, the standard library's manual, or the path of a UTF-8 text file.
      hidden_size: units per layer, and features of the embedding.
      num_layers: number of LSTM layers.
      batch_size: number of places in the text that one batch reads in parallel.
      seq_len: characters between two updates: the length of truncated backpropagation through time.
      steps: number of optimizer steps.
      learning_rate: peak of the schedule: linear warm-up, then a cosine decay to a hundredth of the peak.
      clip: gradients with a larger norm are scaled down to this norm.
      dropout: fraction of units dropped before, between and after the layers.
      temperature: sampling temperature; values below 1 make likely characters more likely.
      seed: random seed of the parameters, the dropout and the samples.
      block: steps in one compiled call; a run can be saved or stopped only between two blocks.
      save_every: steps between two checkpoints.
      keep: how many of the newest checkpoints to keep; the best one is always kept.
      workdir: folder of the run; by default a new one, runs/char_lm/TIME.
      resume: continue the run in --workdir, with its flags.
      tensorboard: also write TensorBoard event files.
      mesh: `data=2` splits each batch over two devices.
      cluster: which of several processes this is: `auto` under Slurm or similar, or `HOST:PORT,K/N`.
    """
    config = dict(locals())
    check_flags(config)
    placed_on = devices.start("char_lm", mesh, cluster, batch_size=batch_size)
    data = text.load_or_exit("char_lm", corpus, batch_size * seq_len)
    config |= {"symbols": data.symbols, "sha256": data.sha256}
    folder = runs.open_folder("char_lm", workdir, config, resume=resume)
    baselines = char_lm_report.describe(data)
    state, checks = train(SimpleNamespace(**config), folder, data, placed_on)
    bits = float(evaluate(state.params, *text.held_out_streams(data)))
    return char_lm_report.write(folder, config, data, state.params, bits, baselines, checks)


def train(flags: SimpleNamespace, folder: Path, data: text.Corpus, mesh: Mesh | None) -> tuple[TrainState, runs.Row]:
    """Train until `flags.steps`; return the state, and the gradient checks before and after the training."""
    # One key per purpose, so that a change in the number of samples does not change the parameters.
    model_key, train_key, sample_key = jax.random.split(jax.random.key(flags.seed), 3)
    model = init_model(model_key, len(data.symbols), flags.hidden_size, flags.num_layers)
    log.info("model:\n%s", summary(model))
    optimizer = make_optimizer(flags.learning_rate, flags.steps, flags.clip)
    train_step = make_train_step(functools.partial(loss_fn, dropout=flags.dropout), optimizer)
    state = init_train_state(model, optimizer, train_key, carry=initial_carries(model, flags.batch_size))
    tokens, held_out = text.encode(data.train, data.symbols), text.held_out_streams(data)
    batches = functools.partial(text.batches, tokens, batch_size=flags.batch_size, seq_len=flags.seq_len)
    first_batch, last_batch = batches(range(1))[0], batches(range(flags.steps, flags.steps + 1))[0]
    checks = gradient_check.check("at the first batch", loss_fn, state, first_batch, flags.dropout)

    def placed_batches(steps: range) -> Any:
        return devices.place(batches(steps), mesh, batch_axis=2)

    def examine(state: TrainState, metrics: trainer.Metrics, steps_per_second: float) -> runs.Row:
        first = jnp.int32(data.symbols.index(text.first_symbol(data.symbols)))
        written = sample(state.params, first, jax.random.fold_in(sample_key, state.step), flags.temperature, 80)
        row = {
            "train_bits": float(metrics["loss"].mean()) / math.log(2),
            "held_out_bits": float(evaluate(state.params, *held_out)),
            "characters_per_second": steps_per_second * flags.batch_size * flags.seq_len,
            "sample": "".join(data.symbols[k] for k in written.tolist()),
        }
        char_lm_report.log_evaluation(int(state.step), flags.steps, row)
        return row

    state = devices.place(state, mesh)._replace(carry=devices.place(state.carry, mesh, batch_axis=0))
    evaluate_every = trainer.interval(flags.steps, flags.block, times=EVALUATIONS)
    schedule = trainer.Schedule(flags.steps, flags.block, evaluate_every, flags.save_every, flags.keep)
    state = trainer.train(
        "char_lm", folder, train_step, runs.restore(folder, state), placed_batches, examine, schedule,
        score="held_out_bits", tensorboard=flags.tensorboard, mesh=mesh,
    )  # fmt: skip
    state = devices.gather(state, mesh)
    checks |= gradient_check.check("at the trained weights", loss_fn, state, last_batch, flags.dropout)
    return state, checks


def make_optimizer(learning_rate: float, steps: int, clip: float) -> optax.GradientTransformation:
    """Return AdamW with linear warm-up, cosine decay and clipping by the gradient norm."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, steps // 10), steps, learning_rate / 100)
    return optax.chain(optax.clip_by_global_norm(clip), optax.inject_hyperparams(optax.adamw)(learning_rate=schedule))


def check_flags(flags: dict[str, Any]) -> None:
    """Exit with one line that names the flag out of range, before anything is written."""
    sizes = ("hidden_size", "num_layers", "batch_size", "seq_len", "steps", "block", "save_every", "keep")
    for name, is_valid, expected in (
        *((name, flags[name] >= 1, "at least 1") for name in sizes),
        *((name, flags[name] > 0, "above 0") for name in ("learning_rate", "clip", "temperature")),
        ("dropout", 0 <= flags["dropout"] < 1, "in [0, 1)"),
    ):
        if not is_valid:
            sys.exit(f"char_lm: --{name.replace('_', '-')} must be {expected}, got {flags[name]}.")


if __name__ == "__main__":
    runs.cli("char_lm", main, quick={"steps": 50, "hidden_size": 32, "num_layers": 1})
