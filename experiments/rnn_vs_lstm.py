"""Does an LSTM overfit more than an RNN, and does it cost four times as much?

At equal width an LSTM has four times the recurrent parameters. So both are compared at equal width and at equal numbers
of parameters, on music (JSB Chorales), each with its own learning rate, chosen on the validation part. The gap is test
minus training loss, in nats per chord: at the epoch with the best validation loss and, without early stopping, after
the last epoch.
"""

import functools
import logging
import statistics
import time
from typing import Any

import jax
import optax

from experiments import chorales, plots
from experiments.harness import intervals, rows, runs
from jaxlstm import LSTM, RNN, Cell, init_train_state, make_train_step

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "LSTM": LSTM}
# Three widths; an RNN of 82 units has as many parameters as an LSTM of 36, one of 172 as many as one of 82.
NETS = (("RNN", 36), ("LSTM", 36), ("RNN", 82), ("LSTM", 82), ("RNN", 172))

log = logging.getLogger("rnn_vs_lstm")


def step_seconds(cell: Cell[Any, Any], units: int, data: chorales.Streams, rounds: int = 100) -> float:
    """Return the median time of a training step on one batch."""
    recipe = chorales.Recipe(units)
    batch = jax.tree.map(lambda leaf: leaf[: recipe.batch], data)
    optimizer = optax.adam(1e-3)

    def loss_fn(net: chorales.Params, batch: chorales.Streams) -> Any:
        nats, asked = chorales.losses(cell, net, batch)
        return nats.mean(where=asked)

    state = init_train_state(chorales.init_net(jax.random.key(0), cell, units), optimizer, jax.random.key(1))
    step, times = jax.jit(make_train_step(loss_fn, optimizer)), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(
    cell: str, units: int, *, parts: dict[str, chorales.Streams], learning_rates: Any, seeds: int, epochs: int
) -> dict[str, Any]:
    """Train a net with early stopping and without, and time its training step."""
    train = functools.partial(
        chorales.train_and_choose, CELLS[cell], data=parts, learning_rates=learning_rates, seeds=seeds
    )
    stopped = train([chorales.Recipe(units, epochs=epochs)])
    rate = stopped["tried"][stopped["chosen"]]["learning_rate"]
    to_the_end = chorales.train_and_choose(
        CELLS[cell], [chorales.Recipe(units, epochs=epochs, patience=epochs)], parts, [rate], seeds
    )["tried"][0]
    return {
        **stopped,
        "gap": [round(b - a, 4) for a, b in zip(stopped["train"], stopped["test"], strict=True)],
        "last gap": [
            round(b - a, 4) for a, b in zip(to_the_end["last training"], to_the_end["last validation"], strict=True)
        ],
        "step seconds": step_seconds(CELLS[cell], units, parts["train"]),
    }


def main(
    *,
    data: str = "JSB_Chorales.mat",
    learning_rates: tuple[float, ...] = (3e-3, 1e-2),
    seeds: int = 10,
    epochs: int = 150,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets, write the result and a picture, and log the table.

    Args:
      data: the file JSB_Chorales.mat; `experiments/chorales.py` says where to look for it.
      learning_rates: of Adam; the validation part chooses one for each net.
      seeds: nets of each kind and learning rate.
      epochs: the largest number of epochs, and the number without early stopping.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    of_row = functools.partial(
        measure, parts=chorales.load(data), learning_rates=learning_rates, seeds=seeds, epochs=epochs
    )
    config["sha256"] = chorales.hash_of(data)
    plans = [{"cell": cell, "units": units} for cell, units in NETS]
    folder, result = rows.collect("rnn_vs_lstm", config, plans, of_row, workdir=workdir, resume=resume)
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
