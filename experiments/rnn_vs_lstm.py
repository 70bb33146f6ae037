"""Does an LSTM overfit more than an RNN, and does a training step take four times as long?

At equal width an LSTM has four times the recurrent parameters. So both are compared at equal width and at equal numbers
of parameters, on music (JSB Chorales), each with its own learning rate, selected by the validation loss. The gap, in
nats per chord, is the validation loss after an epoch minus the mean loss of the epoch's training steps: at the epoch
with the best validation loss and, without early stopping, at the last one.
"""

import functools
import logging
from typing import Any

import jax
import optax

from experiments import chorales, plots
from experiments.harness import intervals, rows, runs, timing
from jaxlstm import LSTM, RNN, Cell, init_train_state, make_train_step

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "LSTM": LSTM}
# Three widths; an RNN of 82 units has as many parameters as an LSTM of 36, one of 178 as many as one of 82.
NETS = (("RNN", 36), ("LSTM", 36), ("RNN", 82), ("LSTM", 82), ("RNN", 178))

log = logging.getLogger("rnn_vs_lstm")


def step_seconds(data: chorales.Streams, rounds: int = 50) -> dict[tuple[str, int], float]:
    """Return the median time of a training step on one batch, for every net; the nets take turns."""
    batch = jax.tree.map(lambda leaf: leaf[: chorales.Recipe(1).batch], data)
    optimizer, calls = optax.adam(1e-3), {}
    for name, units in NETS:

        def loss_fn(net: chorales.Params, batch: chorales.Streams, cell: Cell[Any, Any] = CELLS[name]) -> Any:
            nats, asked = chorales.losses(cell, net, batch)
            return nats.mean(where=asked)

        params = chorales.init_net(jax.random.key(0), CELLS[name], units)
        state = init_train_state(params, optimizer, jax.random.key(1))
        calls[name, units] = functools.partial(jax.jit(make_train_step(loss_fn, optimizer)), state, batch)
    return timing.in_turns(calls, rounds)


def measure(
    cell: str, units: int, *, parts: dict[str, chorales.Streams], learning_rates: Any, seeds: int, epochs: int
) -> dict[str, Any]:
    """Train a net with early stopping, and without it at the learning rate chosen."""
    stopped = chorales.train_and_choose(
        CELLS[cell], [chorales.Recipe(units, epochs=epochs)], parts, learning_rates, seeds
    )
    tried = stopped["tried"][stopped["chosen"]]
    to_the_end = chorales.Recipe(units, epochs=epochs, patience=epochs)
    last = chorales.train_and_choose(CELLS[cell], [to_the_end], parts, [tried["learning_rate"]], seeds)["tried"][0]
    return {
        **stopped,
        "gap": differences(tried["validation"], tried["training"]),
        "last gap": differences(last["last validation"], last["last training"]),
    }


def differences(a: list[float], b: list[float]) -> list[float]:
    """Return a − b for every seed."""
    return [round(x - y, 4) for x, y in zip(a, b, strict=True)]


def main(
    *,
    data: str = "JSB_Chorales.mat",
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds: int = 10,
    epochs: int = 150,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets, write the result and a picture, and log the table.

    Args:
      data: the file JSB_Chorales.mat; `experiments/chorales.py` says where to look for it.
      learning_rates: of Adam; the validation loss selects one for each net.
      seeds: number of seeds per net and learning rate.
      epochs: the maximum with early stopping; runs without it use all of them.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    parts = chorales.load(data)
    times = step_seconds(parts["train"])
    train = functools.partial(measure, parts=parts, learning_rates=learning_rates, seeds=seeds, epochs=epochs)

    def measure_row(cell: str, units: int) -> dict[str, Any]:
        return {**train(cell, units), "step seconds": times[cell, units]}

    config["sha256"] = chorales.hash_of(data)
    plans = [{"cell": cell, "units": units} for cell, units in NETS]
    folder, result = rows.collect("rnn_vs_lstm", config, plans, measure_row, workdir=workdir, resume=resume)
    picture = plots.rnn_vs_lstm(folder / "rnn_vs_lstm.png", result["rows"])
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: mean and 95 % interval of the seeds."""
    lines = [
        "| net | units | parameters | step, ms | training | test | gap | gap without early stopping |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [intervals.shown(row[name]) for name in ("train", "test", "gap", "last gap")]
        lines.append(
            f"| {row['cell']} | {row['units']} | {row['parameters']:,} | {1e3 * row['step seconds']:.1f} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("rnn_vs_lstm", main, quick={"learning_rates": (3e-3,), "seeds": 2, "epochs": 2})
