"""How much slower is the gradient than the objective, on the LSTM problem of ADBench and GradBench?

A diagonal LSTM: every unit reads one input and itself, so all its weights are vectors. Its forget and output gates read
the input, its input gate and candidate read h. A stack of them predicts the bits of the next character of a text. The
problem comes from the repository of ADBench (Microsoft). GradBench, its successor, has no JAX implementation of the
problem as of 2026. The objective is theirs, with its log(2 + Σ exp); so are the sizes, and float64.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from experiments import plots, text
from experiments.harness import rows, runs, timing
from jaxlstm import LSTM, Cell, LSTMState, unroll

BITS = 14  # of a character, and so the units of a layer

log = logging.getLogger("gradbench")


class Diagonal(NamedTuple):
    """The weights of a layer; the four blocks are the gates i, f, g, o."""

    w: Float[Array, "4 units"]
    b: Float[Array, "4 units"]


def project(params: Diagonal, xs: Float[Array, "*lead units"]) -> Float[Array, "*lead 4*units"]:
    """Return the part of z that does not depend on h; only f and o read the input."""
    _, w_f, _, w_o = params.w
    b_i, b_f, b_g, b_o = (jnp.broadcast_to(b, xs.shape) for b in params.b)
    return jnp.concatenate([b_i, w_f * xs + b_f, b_g, w_o * xs + b_o], axis=-1)


def recur(params: Diagonal, state: LSTMState) -> Float[Array, "*batch 4*units"]:
    """Return the part of z that depends on h; only i and g read it."""
    w_i, _, w_g, _ = params.w
    zero = jnp.zeros_like(state.h)
    return jnp.concatenate([w_i * state.h, zero, w_g * state.h, zero], axis=-1)


def init(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: Any = jnp.float64) -> Diagonal:
    """Draw weights from [0, 1), as the benchmark does."""
    if input_size != hidden_size:
        raise ValueError(f"a diagonal LSTM has one unit per input, got {input_size} inputs and {hidden_size} units.")
    return Diagonal(*jax.random.uniform(key, (2, 4, hidden_size), dtype))


def initial_carry(params: Diagonal, batch_shape: tuple[int, ...] = ()) -> LSTMState:
    """Return zeros; the problem brings its own initial states."""
    zero = jnp.zeros((*batch_shape, params.b.shape[1]), params.b.dtype)
    return LSTMState(zero, zero)


# The gates are the LSTM's, and so is their derivative in closed form.
DIAGONAL_LSTM: Cell[Any, LSTMState] = Cell(
    init,
    initial_carry,
    LSTM.gates,
    project,
    recur,
    activations=LSTM.activations,
    gates_jvp=LSTM.gates_jvp,
    name="diagonal LSTM",
)


class Params(NamedTuple):
    """What the gradient is taken with respect to."""

    layers: list[Diagonal]
    scale: Float[Array, "units"]  # of the input
    w: Float[Array, "units"]  # of the output
    b: Float[Array, "units"]


def by_layer(
    params: Params, carries: list[LSTMState], sequence: Float[Array, "time units"]
) -> Float[Array, "time-1 units"]:
    """Predict the next character at every step, one layer after another over the whole sequence."""
    hs = sequence[:-1] * params.scale
    for layer, carry in zip(params.layers, carries, strict=True):
        _, hs = unroll(DIAGONAL_LSTM, layer, hs, carry)
    return hs * params.w + params.b


def by_step(
    params: Params, carries: list[LSTMState], sequence: Float[Array, "time units"]
) -> Float[Array, "time-1 units"]:
    """The same, written down as the benchmark does: all layers at each step, with `lax.scan`."""

    def step(carries: list[LSTMState], x: Array) -> tuple[list[LSTMState], Array]:
        h, after = x * params.scale, []
        for (w, b), (before, c) in zip(params.layers, carries, strict=True):
            i = jax.nn.sigmoid(w[0] * before + b[0])
            f = jax.nn.sigmoid(w[1] * h + b[1])
            g = jnp.tanh(w[2] * before + b[2])
            o = jax.nn.sigmoid(w[3] * h + b[3])
            c = f * c + i * g
            h = o * jnp.tanh(c)
            after.append(LSTMState(h, c))
        return after, h * params.w + params.b

    return lax.scan(step, carries, sequence[:-1])[1]


def objective(
    predict: Callable[..., Array], params: Params, carries: list[LSTMState], sequence: Float[Array, "time units"]
) -> Float[Array, ""]:
    """Return the mean negative log-likelihood of the bits, as the benchmark defines it."""
    logits = predict(params, carries, sequence)
    normalizer = jnp.log(jnp.exp(logits).sum(-1, keepdims=True) + 2)
    return -(sequence[1:] * (logits - normalizer)).mean()


def problem(layers: int, num_steps: int) -> tuple[Params, list[LSTMState], Float[Array, "time units"]]:
    """Draw parameters and states from [0, 1), as the benchmark does, and read a text as bits."""
    *keys, key, key_carry = jax.random.split(jax.random.key(0), layers + 2)
    stack = [init(k, BITS, BITS) for k in keys]
    params = Params(stack, *jax.random.uniform(key, (3, BITS), jnp.float64))
    carries = [LSTMState(h, c) for h, c in jax.random.uniform(key_carry, (layers, 2, BITS), jnp.float64)]
    codes = np.array([ord(symbol) for symbol in text.load_corpus("python-docs").train[:num_steps]])
    return params, carries, jnp.array(codes[:, None] >> np.arange(BITS)[::-1] & 1, jnp.float64)


PREDICTIONS = {"jaxlstm": by_layer, "lax.scan": by_step}


def measure(layers: int, num_steps: int, rounds: int) -> dict[str, Any]:
    """Time objective and gradient, in turns; compare the gradients of both programs."""
    with jax.enable_x64(True):
        given = problem(layers, num_steps)
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, predict in PREDICTIONS.items():
            of_params = functools.partial(objective, predict)
            calls[name, "objective"] = functools.partial(jax.jit(of_params), *given)
            calls[name, "gradient"] = functools.partial(jax.jit(jax.value_and_grad(of_params)), *given)
        gradients = {name: calls[name, "gradient"]() for name in PREDICTIONS}
        times = timing.in_turns(calls, rounds)
        errors = jax.tree.map(lambda a, b: float(abs(a - b).max() / abs(b).max()), *gradients.values())
        found: dict[str, Any] = {
            name: {kind: times[name, kind] for kind in ("objective", "gradient")} for name in PREDICTIONS
        }
        return found | {"objective": float(gradients["jaxlstm"][0]), "difference": max(jax.tree.leaves(errors))}


def main(
    *,
    layers: tuple[int, ...] = (2, 4),
    lengths: tuple[int, ...] = (1024, 4096),
    rounds: int = 50,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Time the problem at every size, write the result and a picture, and log the table.

    Args:
      layers: numbers of layers.
      lengths: characters of the text.
      rounds: timed runs per program; the table shows medians.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    plans = [{"layers": number, "num_steps": length} for number in layers for length in lengths]
    measure_row = functools.partial(measure, rounds=rounds)
    folder, result = rows.collect("gradbench", config, plans, measure_row, workdir=workdir, resume=resume)
    picture = plots.gradbench(folder / "gradbench.png", result["rows"])
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: times in milliseconds, and the gradient's divided by the objective's."""
    lines = [
        "| layers | characters | objective | gradient | ratio | by `lax.scan`: objective | gradient | ratio |",
        "|---" * 8 + "|",
    ]
    for row in result["rows"]:
        cells = []
        for name in PREDICTIONS:
            times = row[name]
            cells += [f"{rows.shown(1e3 * times[kind])} ms" for kind in ("objective", "gradient")]
            cells.append(f"{times['gradient'] / times['objective']:.1f}")
        lines.append(f"| {row['layers']} | {row['num_steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("gradbench", main, quick={"layers": (2,), "lengths": (1024,), "rounds": 3})
