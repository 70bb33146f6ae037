"""How far back does the gradient of a simple RNN, a GRU and an LSTM reach, before, during and after training?

All read the standard library's manual, character by character; the gradient is that of the loss of the last character,
by the carry of every step before. Five seeds of every recurrent initialisation, input scale and forget bias. To expect:
at small inputs and a forget bias of 0 an LSTM's gradient vanishes sooner than an orthogonal RNN's; with a forget bias
of 3, or chrono, it reaches a hundred steps back.
"""

import functools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from experiments import devices, plots, runs, text, trainer
from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Cell,
    cell_state_terms,
    gradient_flow,
    init_chrono,
    init_train_state,
    make_train_step,
    term_shares,
    trace,
    unroll,
)

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
    """What a net is started with."""

    cell: str
    recurrent: str  # orthogonal, or uniform: U(±1/√H)
    scale: float  # standard deviation of the inputs
    forget: float | str | None  # an LSTM's bias, or chrono


SETTINGS = [
    Setting(cell, recurrent, scale, forget)
    for cell in CELLS
    for recurrent in RECURRENT
    for scale in SCALES
    for forget in (FORGET if cell == "LSTM" else (None,))
]


def init_net(key: Key[Array, ""], setting: Setting, num_symbols: int, hidden_size: int) -> Net:
    """Draw a net."""
    embedding_key, cell_key, recurrent_key, readout_key = jax.random.split(key, 4)
    if setting.forget == "chrono":
        params = init_chrono(cell_key, EMBEDDING, hidden_size, max_lag=LAGS)
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
    """Return the sum of all nets' losses, so that each has its own gradient; all read the same."""
    losses = {
        name: jax.vmap(lambda net, name=name: loss_of(CELLS[name], net, batch))(own) for name, own in nets.items()
    }
    return sum(own.sum() for own in losses.values()), (
        carry,
        {f"loss {name}": own.mean() for name, own in losses.items()},
    )


# What is measured.


def flow_by_lag(cell: Cell[Any, Any], net: Net, tokens: Int[Array, "time+1 batch"]) -> Float[Array, "lags"]:
    """Return the norm of the gradient of the last character's loss by the carry at every lag, that at lag 0 being 1."""

    def last_loss(ys: Array) -> Array:
        logits = ys[-1] @ net.w + net.b
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[-1]).sum()

    flow = gradient_flow(cell, net.cell, net.embedding[tokens[:-1]], last_loss)
    each = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(flow)], axis=-1)[::-1]
    largest = jnp.abs(each).max(axis=-1, keepdims=True)  # taken out, or squares of small ones would be 0
    norms = largest[:, 0] * jnp.linalg.norm(each / jnp.where(largest == 0, 1, largest), axis=-1)
    return norms[: LAGS + 1] / norms[0]


def gates_of(net: Net, tokens: Int[Array, "time+1 batch"]) -> dict[str, Any]:
    """Return the mean shares of the four terms of an LSTM, and how many of its gates are nearly shut or open."""
    xs = net.embedding[tokens[:-1]]
    terms = term_shares(cell_state_terms(net.cell, xs[:, :4]))
    gates = trace(LSTM, net.cell, xs).gates
    return {
        "shares": {name: share[1:].mean() for name, share in terms._asdict().items()},
        "shut": {name: (getattr(gates, name) < 0.1).mean() for name in "ifo"},
        "open": {name: (getattr(gates, name) > 0.9).mean() for name in "ifo"},
        "mean_f": gates.f.mean(),
        "histogram": {  # of all units, steps and texts, in twentieths
            name: jnp.histogram(getattr(gates, name), bins=20, range=(0.0, 1.0))[0] / gates.i.size for name in "ifo"
        },
    }


def measure(nets: dict[str, Net], tokens: Int[Array, "time+1 batch"]) -> list[dict[str, Any]]:
    """Return for every setting what its seeds have, rows [seed, ...]."""
    of = {
        name: jax.device_get(jax.jit(jax.vmap(functools.partial(flow_by_lag, CELLS[name]), (0, None)))(own, tokens))
        for name, own in nets.items()
    }
    losses = {
        name: jax.device_get(jax.jit(jax.vmap(functools.partial(loss_of, CELLS[name]), (0, None)))(own, tokens))
        for name, own in nets.items()
    }
    # One net after another: the terms of all at once are some gigabytes.
    gates = jax.device_get(jax.jit(lambda own: jax.lax.map(lambda net: gates_of(net, tokens), own))(nets["LSTM"]))
    rows, place = [], dict.fromkeys(CELLS, 0)
    for setting in SETTINGS:
        seeds = len(of[setting.cell]) // sum(other.cell == setting.cell for other in SETTINGS)
        own = slice(place[setting.cell], place[setting.cell] + seeds)
        place[setting.cell] += seeds
        row = {**setting._asdict(), "flow": of[setting.cell][own], "loss": losses[setting.cell][own]}
        rows.append(row | (jax.tree.map(lambda v, own=own: v[own], gates) if setting.cell == "LSTM" else {}))
    digits = np.vectorize(lambda v: float(f"{v:.4g}"))
    return jax.tree.map(lambda v: digits(v).tolist() if isinstance(v, np.ndarray) else v, rows)


def verdicts(rows: list[dict[str, Any]], lag: int) -> list[dict[str, Any]]:
    """Say of each GRU and LSTM whether its gradient at a lag is larger than the RNN's beside it, in all seeds."""
    out = []
    for row in rows:
        if row["cell"] == "RNN":
            continue
        (beside,) = (r for r in rows if r["cell"] == "RNN" and all(r[k] == row[k] for k in ("recurrent", "scale")))
        own, rnn = (np.array(r["flow"])[:, lag] for r in (row, beside))
        said = "larger" if own.min() > rnn.max() else "smaller" if own.max() < rnn.min() else "not told apart"
        out.append(
            {key: row[key] for key in Setting._fields}
            | {
                "lag": lag,
                "median": float(np.median(own)),
                "RNN's median": float(np.median(rnn)),
                "than the RNN's": said,
            }
        )
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
    """Train all nets side by side, and look where their gradients go.

    Args:
      hidden_size: units of a layer.
      batch_size: places in the text that are read at once.
      seq_len: characters between two updates, the carry beginning at 0.
      milestones: the steps after which the gradient is looked at, besides 0; the last ends the training.
      learning_rate: of Adam; gradients are clipped to norm 1, net by net.
      seeds: of every setting.
      workdir: a new folder for the run; default runs/gradient_flow/ and the time.
      resume: go on with the run in --workdir.
    """
    config = {k: v for k, v in locals().items() if k not in ("workdir", "resume")}
    folder = runs.open_folder("gradient_flow", workdir, config, resume=resume)
    corpus = text.load_corpus("python-docs")
    tokens = text.encode(corpus.text, corpus.symbols)
    held_out = jnp.asarray(text.batches(tokens[len(corpus.train) :], range(1), STREAMS, LAGS + 27)[0])

    def stack(cell: str) -> Net:
        draw = lambda setting: jax.vmap(lambda key: init_net(key, setting, len(corpus.symbols), hidden_size))(
            jax.random.split(jax.random.key(0), seeds)
        )
        drawn = [draw(setting) for setting in SETTINGS if setting.cell == cell]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *drawn)

    optimizer = trainer.each_alone(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate)))
    train_step = make_train_step(loss_fn, optimizer)
    state = runs.restore(folder, init_train_state({name: stack(name) for name in CELLS}, optimizer, jax.random.key(1)))
    batches = functools.partial(text.batches, tokens[: len(corpus.train)], batch_size=batch_size, seq_len=seq_len)
    measured: dict[str, Any] = {}
    for milestone in (0, *milestones):
        path = folder / f"measured-{milestone}.json"
        if not path.exists():
            state = trainer.train(
                "gradient_flow", folder, train_step, state, batches, lambda state, metrics, rate: {}, score="",
                steps=milestone, block=10, evaluate_every=milestone, save_every=100, keep=2,
            ) if milestone else state  # fmt: skip
            runs.write_json(path, measure(state.params, held_out))
        measured[str(milestone)] = json.loads(path.read_text(encoding="utf-8"))
    return report(folder, config, measured, read(state.params["LSTM"], corpus, seeds))


def read(nets: Net, corpus: text.Corpus, seeds: int) -> tuple[str, dict[str, Any]]:
    """Return a held-out line, and the gates of the LSTM with a forget bias of 1 and inputs of scale 1."""
    place = [setting for setting in SETTINGS if setting.cell == "LSTM"].index(Setting("LSTM", "orthogonal", 1.0, 1.0))
    net = jax.tree.map(lambda leaf: leaf[seeds * place], nets)
    line = max((line.strip() for line in corpus.held_out.splitlines() if len(line) <= 80), key=len)
    recorded = trace(LSTM, net.cell, net.embedding[text.encode(line, corpus.symbols)])
    return line, {**recorded.gates._asdict(), "c": recorded.carry.c}


def report(folder: Path, config: dict[str, Any], measured: dict[str, Any], gates: tuple[str, Any]) -> dict[str, Any]:
    """Write result.json and the pictures; say what came out."""
    lag = LAGS // 2
    said_of = {step: verdicts(rows, lag) for step, rows in measured.items()}
    result = {
        "config": config,
        "versions": runs.versions(),
        "device": devices.found(),
        "verdicts": said_of,
        "measured": measured,
    }
    runs.write_json(folder / "result.json", result)
    for step, said in said_of.items():
        counts = Counter(row["than the RNN's"] for row in said if row["cell"] == "LSTM")
        log.info("after %s steps, lag %d: LSTM against RNN in the same setting: %s", step, lag, dict(counts))
    pictures = [
        plots.gradient_flow(folder / "gradient_flow.png", measured, "orthogonal"),
        plots.gradient_flow(folder / "gradient_flow_uniform.png", measured, "uniform"),
        plots.flow_in_training(folder / "in_training.png", measured),
        plots.four_terms(folder / "four_terms.png", measured),
        plots.gate_histograms(folder / "gate_histograms.png", measured),
        plots.gate_maps(folder / "gates.png", *gates),
    ]
    log.info("%s\n%s", folder / "result.json", "\n".join(map(str, pictures)))
    return result


if __name__ == "__main__":
    runs.cli("gradient_flow", main)
