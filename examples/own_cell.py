"""How do I write my own cell, and is its gradient right? A leaky integrator that learns how fast it forgets.

    h_t = (1 − α) ⊙ h_{t−1} + α ⊙ tanh(x_t W_ih + h_{t−1} W_hh + b),    α = σ(r)

A unit with a small α remembers for about 1/α steps. The task: which of four symbols came first, 20 steps ago?

    python examples/own_cell.py

Expect all gradients to agree, and an accuracy of 1.00 (chance is 0.25) after about ten seconds.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlstm import Cell, diagnostics, fit, init_train_state, make_train_step, unroll

NUM_SYMBOLS, NUM_STEPS, BATCH_SIZE, HIDDEN_SIZE, NUM_UPDATES = 4, 20, 32, 32, 400


class LeakyParams(NamedTuple):
    w_ih: jax.Array  # [input, hidden]
    w_hh: jax.Array  # [hidden, hidden]
    b: jax.Array  # [hidden]
    r: jax.Array  # [hidden]


class LeakyState(NamedTuple):
    h: jax.Array  # [*batch, hidden]


def init(key: jax.Array, input_size: int, hidden_size: int, *, dtype: Any = jnp.float32) -> LeakyParams:
    key_ih, key_hh = jax.random.split(key)
    return LeakyParams(
        w_ih=jax.nn.initializers.glorot_uniform()(key_ih, (input_size, hidden_size), jnp.float32).astype(dtype),
        w_hh=jax.nn.initializers.orthogonal()(key_hh, (hidden_size, hidden_size), jnp.float32).astype(dtype),
        b=jnp.zeros(hidden_size, dtype),
        r=-jnp.log(jnp.geomspace(2.0, 50.0, hidden_size) - 1).astype(dtype),  # 1/α from 2 to 50
    )


def initial_carry(params: LeakyParams, batch_shape: tuple[int, ...] = ()) -> LeakyState:
    return LeakyState(jnp.zeros((*batch_shape, *params.b.shape), params.b.dtype))


def gates(params: LeakyParams, state: LeakyState, z: jax.Array, a: jax.Array) -> tuple[LeakyState, jax.Array]:
    """Read z = x_t W_ih + b and a = h_{t−1} W_hh, which `Cell` computes; another cell may replace both."""
    alpha = jax.nn.sigmoid(params.r)
    h = (1 - alpha) * state.h + alpha * jnp.tanh(z + a)
    return LeakyState(h), h


Leaky = Cell(init, initial_carry, gates, name="leaky integrator")


def squared(y: jax.Array, t: jax.Array) -> jax.Array:
    return (y**2).sum()


def gradients_agree(cell: Cell[LeakyParams, LeakyState]) -> bool:
    """Compare the gradient of `unroll`, which relies on what a cell promises, with methods that do not."""
    params = cell.init(jax.random.key(0), 3, 5)
    xs = jax.random.normal(jax.random.key(1), (7, 2, 3))  # [time, batch, input]
    comparison = diagnostics.compare_gradients(cell, params, xs, squared)
    print(comparison)
    return comparison.agree


class Model(NamedTuple):
    layer: LeakyParams
    w: jax.Array  # [hidden, symbol]


def loss_fn(model: Model, batch: jax.Array, carry: Any, _: jax.Array) -> tuple[jax.Array, Any]:
    # A batch is a key here, and the symbols are drawn from it.
    symbols = jax.random.randint(batch, (NUM_STEPS + 1, BATCH_SIZE), 0, NUM_SYMBOLS)
    final, _ = unroll(Leaky, model.layer, jax.nn.one_hot(symbols, NUM_SYMBOLS))
    logits = final.h @ model.w
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, symbols[0]).mean()
    return loss, (carry, {"accuracy": (logits.argmax(axis=-1) == symbols[0]).mean()})


def main() -> dict[str, float]:
    agree = gradients_agree(Leaky)
    layer_key, train_key, data_key = jax.random.split(jax.random.key(0), 3)
    model = Model(Leaky.init(layer_key, NUM_SYMBOLS, HIDDEN_SIZE), jnp.zeros((HIDDEN_SIZE, NUM_SYMBOLS)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    train = jax.jit(functools.partial(fit, make_train_step(loss_fn, optimizer)))
    state, metrics = train(init_train_state(model, optimizer, train_key), jax.random.split(data_key, NUM_UPDATES))
    accuracy, chance = float(metrics["accuracy"][-10:].mean()), 1 / NUM_SYMBOLS
    slowest = [float(1 / jax.nn.sigmoid(params.r).min()) for params in (model.layer, state.params.layer)]
    print(f"accuracy {accuracy:.2f}, by chance {chance:.2f}; largest 1/α {slowest[0]:.0f}, learned {slowest[1]:.0f}")
    return {"agree": agree, "accuracy": accuracy, "chance": chance}


if __name__ == "__main__":
    main()
