"""How do an RNN, a GRU and an LSTM hold three bits, and how do they change one?

Each of three inputs is a pulse of +1 or −1 now and then, and the net shows the last pulse of each: three bits of
memory. A trained net should have a stable fixed point for each of the eight memories, and saddles between them through
which a pulse pushes it (Sussillo & Barak, Opening the black box, 2013). Expect 27 = 3³ points: each bit is −1,
undecided or +1.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments import plots
from experiments.harness import devices, rows, runs
from jaxlstm import GRU, LSTM, RNN, Cell, fit, init_train_state, make_train_step, unroll
from jaxlstm.diagnostics import fixed_points, linearize, principal_components, sample_carries, trace

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}
BITS, NUM_STEPS, BATCH = 3, 50, 64
PULSE_RATE = 0.15  # of each input, at each step
TEST_STEPS, SETTLED = 1000, 3  # steps of the test, and how many steps after a pulse the answer counts
EXACT, NOISE = 1e-26, 1.0  # the largest speed of a fixed point; noise of the starts, in standard deviations

log = logging.getLogger("flip_flop")


def pulses(key: Key[Array, ""], num_steps: int, batch: int) -> tuple[Array, Array]:
    """Draw inputs [time, batch, bits] of −1, 0 and 1, and the memories that they leave; the first step sets all."""
    key_when, key_sign = jax.random.split(key)
    when = jax.random.bernoulli(key_when, PULSE_RATE, (num_steps, batch, BITS)).at[0].set(True)
    signs = jax.random.rademacher(key_sign, (num_steps, batch, BITS), jnp.float32)
    xs = jnp.where(when, signs, 0)

    def remember(memory: Array, x: Array) -> tuple[Array, Array]:
        memory = jnp.where(x == 0, memory, x)
        return memory, memory

    return xs, lax.scan(remember, xs[0], xs)[1]


def outputs(cell: Cell[Any, Any], params: Any, xs: Array) -> Float[Array, "time batch bits"]:
    """Run the net: one layer and a linear readout."""
    return unroll(cell, params["cell"], xs)[1] @ params["readout"]


def train(cell: Cell[Any, Any], key: Key[Array, ""], hidden_size: int, steps: int) -> tuple[Any, Array]:
    """Train one net with Adam; return its parameters and the loss of every step."""
    key_init, key_data = jax.random.split(key)
    params = {"cell": cell.init(key_init, BITS, hidden_size), "readout": jnp.zeros((hidden_size, BITS))}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps)))

    def loss_fn(params: Any, batch: Key[Array, ""]) -> Array:  # a batch is the key that draws it
        xs, memories = pulses(batch, NUM_STEPS, BATCH)
        return ((outputs(cell, params, xs) - memories) ** 2).mean()

    state = init_train_state(params, optimizer, jax.random.key(0))  # its key is not used: the loss draws nothing else
    state, metrics = fit(make_train_step(loss_fn, optimizer), state, jax.random.split(key_data, steps))
    return state.params, metrics["loss"]


def share_right(cell: Cell[Any, Any], params: Any) -> float:
    """Return how often all three bits are right, three steps or more after the last pulse."""
    xs, memories = pulses(jax.random.key(1), TEST_STEPS, BATCH)
    right = (jnp.sign(outputs(cell, params, xs)) == memories).all(-1)
    quiet = (xs == 0).all(-1)
    settled = functools.reduce(jnp.logical_and, [quiet[SETTLED - k : len(quiet) - k] for k in range(SETTLED)])
    return float(right[SETTLED:].mean(where=settled))


def portrait(cell: Cell[Any, Any], params: Any, num_starts: int) -> dict[str, Any]:
    """Find the fixed points without input, and what a picture of them needs: coordinates and unstable directions."""
    xs, _ = pulses(jax.random.key(2), 200, BATCH)
    carries = trace(cell, params["cell"], xs).carry
    starts = sample_carries(jax.random.key(3), carries, num_starts, noise=NOISE)
    quiet = jnp.zeros(BITS)
    found = fixed_points(cell, params["cell"], starts, quiet, tolerance=EXACT)
    around = linearize(cell, params["cell"], found.carry, quiet)
    components = principal_components(carries, 3)
    stable = around.num_unstable == 0
    # The carry's h comes first, and the readout reads h.
    shown = np.sign(np.asarray(jax.tree.leaves(found.carry)[0]) @ np.asarray(params["readout"], np.float64))
    unstable = [
        np.asarray(components.axes, np.float64) @ right[:, :number].real
        for right, number in zip(around.right, around.num_unstable, strict=True)
    ]
    return {
        "points": len(found),
        "by_unstable": [int((around.num_unstable == k).sum()) for k in range(BITS + 1)],
        "more_unstable": int((around.num_unstable > BITS).sum()),
        "memories": len({tuple(map(int, bits)) for bits in shown[stable]}),
        "converged": int((found.of_start != -1).sum()),
        "outliers": int((found.of_start == -2).sum()),
        "largest_speed": float(found.speed.max(initial=0)),
        "slowest_stable": float(around.time_constants[stable, 0].max(initial=0)),
        "coordinates": rows.rounded(components.project(found.carry)),
        "num_unstable": around.num_unstable.tolist(),
        "unstable_directions": [rows.rounded(directions.T) for directions in unstable],
        "trajectories": rows.rounded(components.project(carries)[:, :4].swapaxes(0, 1)),
        "explained": rows.rounded(components.explained),
    }


def main(
    *,
    hidden_size: int = 16,
    steps: int = 5000,
    seeds: int = 5,
    starts: int = 2048,
    workdir: str | None = None,
) -> dict[str, Any]:
    """Train the nets, find their fixed points, write the result and a picture, and log the table.

    Args:
      hidden_size: units of each net.
      steps: training steps.
      seeds: nets of each cell.
      starts: carries from which the search for fixed points begins.
      workdir: folder of the results; by default a new one in runs/.
    """
    config = {k: v for k, v in locals().items() if k != "workdir"}
    folder = runs.open_folder("flip_flop", workdir, config)
    result: dict[str, Any] = {"config": config, "versions": runs.versions(), "device": devices.found(), "rows": []}
    for name, cell in CELLS.items():
        run = jax.jit(jax.vmap(functools.partial(train, cell, hidden_size=hidden_size, steps=steps)))
        nets, losses = run(jax.random.split(jax.random.key(0), seeds))
        for seed in tqdm(range(seeds), desc=name, unit="net"):
            params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], nets)
            row = {"cell": name, "seed": seed, "loss": float(losses[seed, -100:].mean())}
            row |= {"right": share_right(cell, params)} | portrait(cell, params, starts)
            if seed:  # the picture shows the first net of each cell
                del row["trajectories"], row["unstable_directions"], row["coordinates"], row["num_unstable"]
            result["rows"].append(row)
        runs.write_json(folder / "result.json", result)  # after every cell, so that Ctrl-C loses little
    picture = plots.flip_flop(folder / "flip_flop.png", result["rows"])
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table with a row for every net."""
    lines = [
        "| cell | seed | right | points | stable | 1 unstable | 2 | 3 | more | memories | starts that converged |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        counts = [*row["by_unstable"], row["more_unstable"]]
        cells = [row["cell"], row["seed"], f"{100 * row['right']:.2f} %", row["points"], *counts, row["memories"]]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['converged']}/{result['config']['starts']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("flip_flop", main, quick={"steps": 50, "seeds": 1, "starts": 64})
