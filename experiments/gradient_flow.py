"""How far back does the gradient of a simple RNN, a GRU and an LSTM reach, before, during and after training?

All nets read the standard library's manual, character by character. The experiment measures the gradient of the last
character's loss with respect to the carry at every step before it, for five seeds of every recurrent initialization,
input scale and forget bias. Expect an LSTM with small inputs and a forget bias of 0 to lose its gradient sooner than an
orthogonal RNN; with a forget bias of 3, or chrono initialization, its gradient reaches a hundred steps back.
"""

import functools
import json
import logging
import operator
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from experiments import plots, text
from experiments.harness import devices, runs, trainer
from jaxlstm import GRU, LSTM, RNN, Cell, TrainState, init_train_state, initializers, make_train_step, unroll
from jaxlstm.diagnostics import cell_state_terms, gradient_flow, term_shares, trace

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}
RECURRENT = ("orthogonal", "uniform")
SCALES = (0.1, 1.0)
FORGET = (0.0, 1.0, 3.0, "chrono")
EMBEDDING, LAGS, STREAMS = 32, 100, 16

log = logging.getLogger("gradient_flow")


class Net(NamedTuple):
    """Embedding -> one layer -> softmax."""

    embedding: Float[Array, "symbols features"]
    cell: Any
    w: Float[Array, "hidden symbols"]
    b: Float[Array, "symbols"]


class Setting(NamedTuple):
    """How a net is initialized."""

    cell: str
    recurrent: str  # recurrent weights: "orthogonal", or "uniform", which is U(±1/√H)
    scale: float  # standard deviation of the inputs
    forget: float | str | None  # forget bias of an LSTM, or "chrono"


SETTINGS = [
    Setting(cell, recurrent, scale, forget)
    for cell in CELLS
    for recurrent in RECURRENT
    for scale in SCALES
    for forget in (FORGET if cell == "LSTM" else (None,))
]


def init_net(key: Key[Array, ""], setting: Setting, num_symbols: int, hidden_size: int) -> Net:
    """Draw the initial parameters of a net."""
    embedding_key, cell_key, recurrent_key, readout_key = jax.random.split(key, 4)
    if setting.forget == "chrono":
        params = initializers.chrono(cell_key, EMBEDDING, hidden_size, max_lag=LAGS)
    else:
        options = {} if setting.forget is None else {"forget_bias": setting.forget}
        params = CELLS[setting.cell].init(cell_key, EMBEDDING, hidden_size, **options)
    if setting.recurrent == "uniform":
        bound = hidden_size**-0.5
        params = params._replace(w_hh=jax.random.uniform(recurrent_key, params.w_hh.shape, minval=-bound, maxval=bound))
    return Net(
        embedding=setting.scale * jax.random.normal(embedding_key, (num_symbols, EMBEDDING)),
        cell=params,
        w=jax.nn.initializers.glorot_uniform()(readout_key, (hidden_size, num_symbols)),
        b=jnp.zeros(num_symbols),
    )


def loss_of(cell: Cell[Any, Any], net: Net, tokens: Int[Array, "time+1 batch"]) -> Float[Array, ""]:
    """Return the mean loss of the next character, in nats."""
    _, ys = unroll(cell, net.cell, net.embedding[tokens[:-1]])
    return optax.softmax_cross_entropy_with_integer_labels(ys @ net.w + net.b, tokens[1:]).mean()


def loss_fn(nets: dict[str, Net], batch: Int[Array, "time+1 batch"], carry: Any, key: Key[Array, ""]) -> Any:
    """Return the sum of the losses of all nets on the same batch; as a sum, it gives each net its own gradient."""
    losses = {
        name: jax.vmap(functools.partial(loss_of, CELLS[name]), (0, None))(stack, batch) for name, stack in nets.items()
    }
    total = sum(stack.sum() for stack in losses.values())
    return total, (carry, {f"loss {name}": stack.mean() for name, stack in losses.items()})


# The measurements.


def flow_by_lag(cell: Cell[Any, Any], net: Net, tokens: Int[Array, "time+1 batch"]) -> Float[Array, "lags"]:
    """Return the norm of the gradient of the last character's loss at every lag, relative to lag 0.

    The gradient is the one with respect to the whole carry, over all texts of the batch.
    """

    def last_loss(ys: Array) -> Array:
        logits = ys[-1] @ net.w + net.b
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[-1]).sum()

    flow = gradient_flow(cell, net.cell, net.embedding[tokens[:-1]], last_loss)
    by_lag = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(flow)], axis=-1)[::-1]
    # Scale by the largest entry first: the squares of small gradients underflow to 0.
    largest = jnp.abs(by_lag).max(axis=-1, keepdims=True)
    norms = largest[:, 0] * jnp.linalg.norm(by_lag / jnp.where(largest == 0, 1, largest), axis=-1)
    return norms[: LAGS + 1] / norms[0]


def measure_gates(net: Net, tokens: Int[Array, "time+1 batch"]) -> dict[str, Any]:
    """Return the mean shares of the four terms of dc_t/dc_{t−1} of an LSTM, and how open its gates are."""
    xs = net.embedding[tokens[:-1]]
    terms = term_shares(cell_state_terms(net.cell, xs[:, :4]))
    gates = trace(LSTM, net.cell, xs).gates
    return {
        "shares": {name: share[1:].mean() for name, share in terms._asdict().items()},
        "shut": {name: (getattr(gates, name) < 0.1).mean() for name in "ifo"},
        "open": {name: (getattr(gates, name) > 0.9).mean() for name in "ifo"},
        "mean_f": gates.f.mean(),
        "histogram": {  # over all units, steps and texts, in twenty bins
            name: jnp.histogram(getattr(gates, name), bins=20, range=(0.0, 1.0))[0] / gates.i.size for name in "ifo"
        },
    }


@jax.jit
def measure_gates_in_turn(nets: Net, tokens: Int[Array, "time+1 batch"]) -> dict[str, Any]:
    """Call `measure_gates` for one net after another: the terms of all nets at once would take gigabytes."""

    def of_one(net: Net) -> dict[str, Any]:
        return measure_gates(net, tokens)

    return jax.lax.map(of_one, nets)


def measure(nets: dict[str, Net], tokens: Int[Array, "time+1 batch"]) -> list[dict[str, Any]]:
    """Return one row per setting; its values are lists over the seeds."""

    def for_every_net(function: Any, name: str) -> Any:
        return jax.jit(jax.vmap(functools.partial(function, CELLS[name]), (0, None)))(nets[name], tokens)

    flows = {name: np.asarray(for_every_net(flow_by_lag, name)) for name in nets}
    losses = {name: np.asarray(for_every_net(loss_of, name)) for name in nets}
    gates = jax.device_get(measure_gates_in_turn(nets["LSTM"], tokens))
    rows, place = [], dict.fromkeys(CELLS, 0)
    for setting in SETTINGS:
        seeds = len(flows[setting.cell]) // sum(other.cell == setting.cell for other in SETTINGS)
        own = slice(place[setting.cell], place[setting.cell] + seeds)
        place[setting.cell] += seeds
        row = {**setting._asdict(), "flow": flows[setting.cell][own], "loss": losses[setting.cell][own]}
        if setting.cell == "LSTM":
            row |= jax.tree.map(operator.itemgetter(own), gates)
        rows.append(row)
    return jax.tree.map(_rounded, rows)


def _rounded(value: Any) -> Any:
    """Return arrays as lists of numbers of four digits, and anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return np.vectorize(_four_digits)(value).tolist()


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def verdicts(rows: list[dict[str, Any]], lag: int) -> list[dict[str, Any]]:
    """Compare the gradient of each GRU and LSTM at one lag with the RNN in the same setting.

    It is "larger" or "smaller" if that holds for every seed of the one against every seed of the other.
    """
    out = []
    for row in rows:
        if row["cell"] == "RNN":
            continue
        (rnn_row,) = (r for r in rows if r["cell"] == "RNN" and all(r[k] == row[k] for k in ("recurrent", "scale")))
        own, rnn = (np.array(r["flow"])[:, lag] for r in (row, rnn_row))
        verdict = "larger" if own.min() > rnn.max() else "smaller" if own.max() < rnn.min() else "not told apart"
        medians = {"median": float(np.median(own)), "RNN's median": float(np.median(rnn))}
        setting = {key: row[key] for key in Setting._fields}
        out.append({**setting, "lag": lag, **medians, "than the RNN's": verdict})
    return out


def main(
    *,
    hidden_size: int = 48,
    batch_size: int = 16,
    seq_len: int = 64,
    milestones: tuple[int, ...] = (10, 100, 600),
    learning_rate: float = 3e-3,
    seeds: int = 5,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets side by side, and measure how far back their gradients reach.

    Args:
      hidden_size: units per layer.
      batch_size: number of places in the text that one batch reads in parallel.
      seq_len: characters between two updates; the carry starts at 0.
      milestones: steps after which the gradient is measured, besides 0; training ends at the last one.
      learning_rate: learning rate of Adam; the gradient of each net is clipped to norm 1.
      seeds: number of nets per setting.
      workdir: folder of the run; by default a new one, runs/gradient_flow/TIME.
      resume: continue the run in --workdir.
    """
    config = {k: v for k, v in locals().items() if k not in ("workdir", "resume")}
    folder = runs.open_folder("gradient_flow", workdir, config, resume=resume)
    corpus = text.load_corpus("python-docs")
    tokens = text.encode(corpus.text, corpus.symbols)
    held_out = jnp.asarray(text.batches(tokens[len(corpus.train) :], range(1), STREAMS, LAGS + 27)[0])

    optimizer = trainer.each_alone(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate)))
    train_step = make_train_step(loss_fn, optimizer)
    nets = {name: init_nets(name, seeds, len(corpus.symbols), hidden_size) for name in CELLS}
    state = runs.restore(folder, init_train_state(nets, optimizer, jax.random.key(1)))
    batches = functools.partial(text.batches, tokens[: len(corpus.train)], batch_size=batch_size, seq_len=seq_len)
    measured: dict[str, Any] = {}
    for milestone in (0, *milestones):
        path = folder / f"measured-{milestone}.json"
        if not path.exists():
            if milestone:
                schedule = trainer.Schedule(milestone, block=10, evaluate_every=milestone, save_every=100, keep=2)
                state = trainer.train("gradient_flow", folder, train_step, state, batches, no_evaluation, schedule)
            runs.write_json(path, measure(state.params, held_out))
        measured[str(milestone)] = json.loads(path.read_text(encoding="utf-8"))
    return report(folder, config, measured, read_line(state.params["LSTM"], corpus, seeds))


def init_nets(cell: str, seeds: int, num_symbols: int, hidden_size: int) -> Net:
    """Draw the nets of every setting of a cell, stacked: first all seeds of the first setting, then of the second.

    All settings use the same keys.
    """
    drawn = []
    for setting in SETTINGS:
        if setting.cell == cell:
            draw = functools.partial(init_net, setting=setting, num_symbols=num_symbols, hidden_size=hidden_size)
            drawn.append(jax.vmap(draw)(jax.random.split(jax.random.key(0), seeds)))
    return jax.tree.map(concatenate, *drawn)


def concatenate(*leaves: Array) -> Array:
    """Concatenate along the first axis."""
    return jnp.concatenate(leaves)


def no_evaluation(state: TrainState, metrics: trainer.Metrics, steps_per_second: float) -> runs.Row:
    """Evaluate nothing: the gradients are measured between two calls of `trainer.train`."""
    return {}


def read_line(nets: Net, corpus: text.Corpus, seeds: int) -> dict[str, Any]:
    """Return a held-out line, and the gates of an LSTM with forget bias 1 and inputs of scale 1 that reads it."""
    place = [setting for setting in SETTINGS if setting.cell == "LSTM"].index(Setting("LSTM", "orthogonal", 1.0, 1.0))
    net = jax.tree.map(operator.itemgetter(seeds * place), nets)  # the first seed
    line = max((line.strip() for line in corpus.held_out.splitlines() if len(line) <= 60), key=len)
    return plots.read_aloud(line, trace(LSTM, net.cell, net.embedding[text.encode(line, corpus.symbols)]))


def report(folder: Path, config: dict[str, Any], measured: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Write result.json and the pictures, and log the outcome."""
    lag = LAGS // 2
    compared = {step: verdicts(rows, lag) for step, rows in measured.items()}
    result = {
        "config": config,
        "versions": runs.versions(),
        "device": devices.found(),
        "verdicts": compared,
        "measured": measured,
        "read": read,
    }
    runs.write_json(folder / "result.json", result)
    for step, rows in compared.items():
        counts = Counter(row["than the RNN's"] for row in rows if row["cell"] == "LSTM")
        log.info(
            "after %s steps, at lag %d: the gradient of the LSTM, relative to the RNN in the same setting: %s",
            step, lag, dict(counts),
        )  # fmt: skip
    pictures = [
        plots.gradient_flow(folder / "gradient_flow.png", measured, "orthogonal"),
        plots.gradient_flow(folder / "gradient_flow_uniform.png", measured, "uniform"),
        plots.flow_in_training(folder / "in_training.png", measured),
        plots.four_terms(folder / "four_terms.png", measured),
        plots.gate_histograms(folder / "gate_histograms.png", measured),
        plots.gate_maps(folder / "gates.png", read),
    ]
    log.info("%s\n%s", folder / "result.json", "\n".join(map(str, pictures)))
    return result


if __name__ == "__main__":
    runs.cli("gradient_flow", main, quick={"milestones": (10,), "seeds": 1, "hidden_size": 16})
