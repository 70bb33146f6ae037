"""Does a net trained on the Lorenz system have the system's Lyapunov exponents when it runs on its own?

The system (Lorenz, Deterministic nonperiodic flow, 1963; σ = 10, ρ = 28, β = 8/3) has the exponents 0.906, 0 and −14.57
per unit of time. A net learns to predict the next state, first from true states and then from its own predictions.
`closed_loop` then makes it an autonomous system. One function computes the exponents of this system and of the true
map.
"""

import functools
import json
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments import plots
from experiments.harness import devices, rows, runs
from jaxlstm import GRU, LSTM, RNN, Cell, fit, init_train_state, make_train_step, unroll
from jaxlstm.diagnostics import ClosedLoopParams, closed_loop, lyapunov_exponents

NETS: dict[str, Cell[Any, Any]] = {"LSTM": LSTM, "GRU": GRU, "RNN": RNN}
PUBLISHED = (0.906, 0.0, -14.57)  # Sprott, Chaos and time-series analysis, 2003
DT = 0.02  # of one step of the map and of the net, in units of time
COEFFICIENTS = (10.0, 28.0, 8 / 3)  # σ, ρ, β
CENTER, SCALE = np.array([0.0, 0.0, 23.5]), np.array([8.0, 9.0, 8.6])  # about mean and deviation of x, y and z
TRAINING_STEPS = 50_000  # of the trajectory that the nets see
FORCED, FREE, BATCH = 20, 30, 32  # steps of a window read from the truth, then from the net's own predictions
NOISE = 0.02  # added to the true states that it reads, in deviations
NUM_EXPONENTS, WARMUP = 4, 2500  # exponents of each net; steps before their mean begins
READ, SHOWN = 100, 900  # steps that a trained net reads of the truth; steps of its own in the picture

log = logging.getLogger("lorenz")


# The system.


class State(NamedTuple):
    position: Float[Array, "*batch 3"]


def velocity(coefficients: Float[Array, "3"], position: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """Return d(x, y, z)/dt."""
    sigma, rho, beta = coefficients
    x, y, z = jnp.moveaxis(position, -1, 0)
    return jnp.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z], axis=-1)


def runge_kutta(params: Float[Array, "3"], state: State, z: Array, a: None) -> tuple[State, Float[Array, "*batch 3"]]:
    """Take one step of the classical method of order 4."""
    along = functools.partial(velocity, params)
    s = state.position
    k1 = along(s)
    k2 = along(s + DT / 2 * k1)
    k3 = along(s + DT / 2 * k2)
    k4 = along(s + DT * k3)
    s = s + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return State(s), s


def initial_position(params: Float[Array, "3"], batch_shape: tuple[int, ...] = ()) -> State:
    """Return a position near the attractor."""
    return State(jnp.broadcast_to(jnp.ones((), params.dtype), (*batch_shape, 3)))


def no_init(*_: Any) -> Array:
    """Return the coefficients."""
    return jnp.array(COEFFICIENTS)


def unchanged(params: Any, xs: Array) -> Array:
    """Project inputs without features to themselves."""
    return xs


def no_recurrence(params: Any, carry: Any) -> None:
    """Read nothing from the carry in advance."""


# The system as an autonomous cell, so that the tools for nets work on it too.
LORENZ = Cell(no_init, initial_position, runge_kutta, unchanged, no_recurrence, name="Lorenz")


def trajectory(start: Float[Array, "*batch 3"], num_steps: int) -> Float[Array, "time *batch 3"]:
    """Return true positions on the attractor, each coordinate centered and scaled, after a transient of 50 units."""
    skipped = round(50 / DT)
    xs = jnp.zeros((skipped + num_steps, *start.shape[:-1], 0))
    _, positions = unroll(LORENZ, jnp.array(COEFFICIENTS), xs, State(start))
    return (positions[skipped:] - CENTER) / SCALE


def in_pieces(truth: Float[Array, "time start 3"]) -> Float[Array, "piece_time pieces 3"]:
    """Cut the first 10,000 steps into pieces of 1000."""
    return jnp.concatenate([truth[first : first + 1000] for first in range(0, 10_000, 1000)], axis=1)


# The net.


class Readout(NamedTuple):
    w: Float[Array, "hidden 3"]
    b: Float[Array, "3"]


def next_state(readout: Readout, carry: Any) -> Float[Array, "*batch 3"]:
    """Predict the next position from the carry."""
    return carry.h @ readout.w + readout.b


def init_net(key: Key[Array, ""], cell: Cell[Any, Any], hidden_size: int) -> ClosedLoopParams:
    """Draw a net of one layer whose readout begins at 0."""
    return ClosedLoopParams(cell.init(key, 3, hidden_size), Readout(jnp.zeros((hidden_size, 3)), jnp.zeros(3)))


def train(
    cell: Cell[Any, Any], truth: Float[Array, "time 3"], steps: int, params: ClosedLoopParams, key: Key[Array, ""]
) -> tuple[ClosedLoopParams, Float[Array, "step"]]:
    """Train one net with Adam; return its parameters and the loss of every step.

    It reads `FORCED` true states with a little noise, then `FREE` predictions of its own. All its predictions count.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps)))

    def loss_fn(params: ClosedLoopParams, batch: Key[Array, ""]) -> Array:  # a batch is the key that draws it
        key_start, key_noise = jax.random.split(batch)
        starts = jax.random.randint(key_start, (BATCH,), 0, len(truth) - FORCED - FREE)
        window = truth[starts + jnp.arange(FORCED + FREE + 1)[:, None]]  # [time, batch, 3]
        noise = NOISE * jax.random.normal(key_noise, (FORCED, BATCH, 3))
        carry, hs = unroll(cell, params.cell, window[:FORCED] + noise)
        _, free = unroll(closed_loop(cell, next_state), params, jnp.zeros((FREE, BATCH, 0)), carry)
        predicted = jnp.concatenate([hs, free]) @ params.readout.w + params.readout.b
        return ((predicted - window[1:]) ** 2).mean()

    state = init_train_state(params, optimizer, key)  # its key is not used: the loss draws nothing else
    state, metrics = fit(make_train_step(loss_fn, optimizer), state, jax.random.split(key, steps))
    return state.params, metrics["loss"]


# The measurements, in float64.


def true_exponents(start: Float[Array, "batch 3"], num_steps: int) -> Float[Array, "batch 3"]:
    """Return all exponents of the true map, per unit of time."""
    xs = jnp.zeros((WARMUP + num_steps, len(start), 0))
    params = jnp.array(COEFFICIENTS)
    return lyapunov_exponents(LORENZ, params, xs, State(start), num_exponents=3, num_warmup=WARMUP) / DT


def measure(
    cell: Cell[Any, Any], truth: Float[Array, "time start 3"], num_steps: int, params: ClosedLoopParams
) -> dict[str, Float[Array, "..."]]:
    """Let a net read `READ` steps of the truth and then run on its own.

    Returns its leading exponents per unit of time, its run from the first start, and for every start how long it
    follows the truth: the units of time until its error exceeds 0.4 deviations.
    """
    loop = closed_loop(cell, next_state)
    carry, _ = unroll(cell, params.cell, truth[:READ])
    after = truth[READ:]
    _, hs = unroll(loop, params, jnp.zeros((*after.shape[:-1], 0)), carry)
    run = hs @ params.readout.w + params.readout.b
    # The loop's first output has read the prediction of after[0], so it predicts after[1].
    wrong = jnp.sqrt(((run[:-1] - after[1:]) ** 2).mean(-1)) > 0.4
    follows = jnp.where(wrong.any(axis=0), wrong.argmax(axis=0), len(wrong)) * DT
    first = jax.tree.map(lambda leaf: leaf[0], carry)
    xs = jnp.zeros((WARMUP + num_steps, 0))
    exponents = lyapunov_exponents(loop, params, xs, first, num_exponents=NUM_EXPONENTS, num_warmup=WARMUP) / DT
    return {"exponents": exponents, "follows": follows, "run": run[:, 0]}


# The experiment.


def main(
    *,
    hidden_size: int = 32,
    steps: int = 6000,
    seeds: int = 5,
    exponent_steps: int = 100_000,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the nets, measure them in closed loop, write the result and a picture, and log the table.

    Args:
      hidden_size: units of each net.
      steps: training steps.
      seeds: nets of each cell, trained in one program, and starts of the true system.
      exponent_steps: steps over which the exponents are means.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    folder = runs.open_folder("lorenz", workdir, config, resume=resume)
    path = folder / "result.json"
    with jax.enable_x64(True):
        starts = jax.random.uniform(jax.random.key(0), (1 + seeds, 3), jnp.float64, 1, 20)
        truth = jax.jit(trajectory, static_argnums=1)(starts, TRAINING_STEPS)
        seen, held_out = truth[:, 0].astype(jnp.float32), in_pieces(truth[:, 1:])
        true = {
            "exponents": rows.rounded(jax.jit(true_exponents, static_argnums=1)(starts[1:], exponent_steps)),
            "run": rows.rounded(_unscaled(truth[:SHOWN, 1])),
        }
    result: dict[str, Any] = {
        "config": config,
        "versions": runs.versions(),
        "device": devices.found(),
        "true": true,
        "rows": [],
    }
    if path.exists():
        result["rows"] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    keys = jax.random.split(jax.random.key(1), (2, seeds))
    with tqdm(NETS.items(), unit="cell", disable=None) as bar:
        for name, cell in bar:
            bar.set_postfix_str(name)
            if name in {row["net"] for row in result["rows"]}:
                continue
            nets = jax.jit(jax.vmap(functools.partial(init_net, cell=cell, hidden_size=hidden_size)))(keys[0])
            nets, losses = jax.jit(jax.vmap(functools.partial(train, cell, seen, steps)))(nets, keys[1])
            with jax.enable_x64(True):
                nets = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nets)
                run = jax.jit(jax.vmap(functools.partial(measure, cell, held_out, exponent_steps)))
                found = jax.tree.map(np.asarray, run(nets))
            for seed in range(seeds):
                row = {"net": name, "seed": seed, "loss": float(losses[seed, -100:].mean())}
                row |= {
                    "exponents": rows.rounded(found["exponents"][seed]),
                    "follows": rows.rounded(found["follows"][seed].mean()),
                }
                if not seed:  # the picture shows the first net of each cell
                    row["run"] = rows.rounded(_unscaled(found["run"][0, :SHOWN]))
                result["rows"].append(row)
            runs.write_json(path, result)  # after every cell, so that Ctrl-C loses little
    picture = plots.lorenz(folder / "lorenz.png", result, PUBLISHED)
    log.info("%s\n%s\n%s", table(result), path, picture)
    return result


def _unscaled(positions: Any) -> Any:
    return np.asarray(positions) * SCALE + CENTER


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: mean and range of the seeds."""
    lines = ["| system | λ₁ | λ₂ | λ₃ | λ₄ | follows the truth, in units of time |", "|---|---|---|---|---|---|"]
    lines.append(f"| published | {' | '.join(f'{value:g}' for value in PUBLISHED)} |  |  |")
    true = np.array(result["true"]["exponents"]).T
    lines.append(f"| the true map | {' | '.join(map(_span, true))} |  |  |")
    for net in NETS:
        own = [row for row in result["rows"] if row["net"] == net]
        cells = [_span(column) for column in np.array([row["exponents"] for row in own]).T]
        lines.append(f"| {net} | {' | '.join(cells)} | {_span([row['follows'] for row in own], 1)} |")
    return "\n".join(lines)


def _span(values: Any, digits: int = 3) -> str:
    shown = [f"{value:.{digits}f}" for value in (np.mean(values), np.min(values), np.max(values))]
    mean, low, high = ("0." + digits * "0" if float(text) == 0 else text for text in shown)  # no -0.000
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    runs.cli("lorenz", main, quick={"steps": 20, "seeds": 1, "exponent_steps": 500})
