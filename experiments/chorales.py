"""How well does an RNN, a GRU or an LSTM predict the next chord of a piece of music?

A piece is a piano roll: at every step, which of 88 notes sound. The net reads the chords so far and gives each note the
probability that it sounds in the next one. The measure is the negative log-likelihood per chord in nats, summed over
the notes, on the split of Boulanger-Lewandowski, Bengio & Vincent, Modeling temporal dependencies in high-dimensional
sequences, 2012.

The data are not part of this repository: look for `JSB_Chorales.mat` and `Nottingham.mat` (piano rolls as MATLAB files;
the code of Bai et al. 2018, TCN, contains both) and pass the file with --data.
"""

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key
from scipy.io import loadmat

from experiments import plots
from experiments.harness import intervals, rows, runs
from jaxlstm import GRU, LSTM, RNN, Cell, init_train_state, make_train_step, num_params, sweep, unroll
from jaxlstm.epochs import evaluate, fit_epochs, shuffled_batches
from jaxlstm.regularize import Locked, dropout_mask, variational_dropout

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}
NOTES = 88


class Net(NamedTuple):
    """Units in each size, and what was published: nats per chord on the test part."""

    size: str
    cell: str
    units: int
    published: float | None
    source: str
    dropout: tuple[float, ...] = (0.0,)  # rates to choose from


NETS = {
    "JSB Chorales": [
        Net("20,000", "RNN", 100, 9.19, "Chung et al. 2014"),
        Net("20,000", "GRU", 46, 8.54, "Chung et al. 2014"),
        Net("20,000", "LSTM", 36, 8.67, "Chung et al. 2014"),
        Net("300,000", "RNN", 466, 8.91, "Bai et al. 2018"),
        Net("300,000", "GRU", 262, 8.43, "Bai et al. 2018"),
        Net("300,000", "LSTM", 224, 8.45, "Bai et al. 2018"),
        Net("300,000", "LSTM with dropout", 224, 8.45, "Bai et al. 2018", (0.4,)),
    ],
    "Nottingham": [
        Net("1,000,000", "LSTM", 436, 3.29, "Bai et al. 2018"),
        Net("1,000,000", "LSTM with dropout", 436, 3.29, "Bai et al. 2018", (0.2, 0.5)),
    ],
}

log = logging.getLogger("chorales")


# The data.


class Streams(NamedTuple):
    """Pieces of music, one after another in streams of equal length."""

    chords: Float[Array, "stream time 88"]
    reset: Bool[Array, "stream time"]  # a piece begins here
    asked: Bool[Array, "stream time"]  # the next chord belongs to the same piece, so it is to be predicted


def read(path: str | Path) -> dict[str, list[np.ndarray]]:
    """Return the pieces of the parts `train`, `valid` and `test`, each [time, 88] of 0 and 1."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--data {path} is not a file; experiments/chorales.py says where to look for the data")
    file = loadmat(path)
    return {part: [np.asarray(piece) for piece in file[f"{part}data"].ravel()] for part in ("train", "valid", "test")}


def hash_of(path: str | Path) -> str:
    """Return the start of a file's SHA-256, so that two machines can tell that they read the same data."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def streams(pieces: Sequence[np.ndarray], num_steps: int) -> Streams:
    """Pack pieces into streams of `num_steps` chords, the longest first; cut those that are longer.

    A cut loses what the net knew before it and one prediction, so only training data should be cut.
    """
    parts = [piece[at : at + num_steps] for piece in pieces for at in range(0, len(piece), num_steps)]
    packed: list[list[np.ndarray]] = []
    for part in sorted(parts, key=len, reverse=True):
        room = (stream for stream in packed if sum(map(len, stream)) + len(part) <= num_steps)
        if (stream := next(room, None)) is None:
            packed.append(stream := [])
        stream.append(part)
    chords = np.zeros((len(packed), num_steps, NOTES), np.float32)
    reset, asked = (np.zeros((len(packed), num_steps), bool) for _ in range(2))
    for n, stream in enumerate(packed):
        at = 0
        for part in stream:
            chords[n, at : at + len(part)], reset[n, at], asked[n, at : at + len(part) - 1] = part, True, True
            at += len(part)
    return Streams(*map(jnp.asarray, (chords, reset, asked)))


# The net and its loss.


class Params(NamedTuple):
    """One layer and a readout."""

    cell: Any
    w: Float[Array, "units 88"]
    b: Float[Array, "88"]


def init_net(key: Key[Array, ""], cell: Cell[Any, Any], units: int) -> Params:
    """Draw a net; its readout is zero, so that every note starts at probability ½."""
    return Params(cell.init(key, NOTES, units), jnp.zeros((units, NOTES)), jnp.zeros(NOTES))


class Masks(NamedTuple):
    """Dropout masks, each the same for all steps."""

    x: Float[Array, "stream 88"]
    h: Float[Array, "stream units"]
    y: Float[Array, "stream units"]


def losses(
    cell: Cell[Any, Any], net: Params, batch: Streams, masks: Masks | None = None
) -> tuple[Float[Array, "time stream"], Bool[Array, "time stream"]]:
    """Return −log p of the next chord at every step but the last, and which of them count."""
    chords, reset, asked = (jnp.moveaxis(leaf, 1, 0) for leaf in batch)
    if masks is None:
        _, hs = unroll(cell, net.cell, chords, reset=reset)
    else:
        _, hs = unroll(variational_dropout(cell), Locked(net.cell, masks.x, masks.h), chords, reset=reset)
        hs = hs * masks.y
    of_notes = optax.sigmoid_binary_cross_entropy(hs[:-1] @ net.w + net.b, chords[1:])
    return of_notes.sum(-1), asked[:-1]


def mean_loss(cell: Cell[Any, Any], net: Params, part: Streams) -> Float[Array, ""]:
    """Return nats per chord, averaged over all chords of a part."""
    return evaluate(functools.partial(losses, cell), net, part, min(len(part.chords), 16))


# Training.


class Recipe(NamedTuple):
    """How a net is trained; the learning rate comes with every run."""

    units: int
    dropout: float = 0.0
    epochs: int = 300
    patience: int = 15
    batch: int = 4  # streams


def train(
    cell: Cell[Any, Any], recipe: Recipe, data: dict[str, Streams], key: Key[Array, ""], learning_rate: float | Array
) -> tuple[Params, dict[str, Float[Array, "epoch"]]]:
    """Train one net with Adam; return it as it was after the epoch with the best validation loss, and the epochs."""
    key_init, key_noise, key_data = jax.random.split(key, 3)
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(learning_rate))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)

    def loss_fn(net: Params, batch: Streams, _: Any, key: Key[Array, ""]) -> Array:
        masks = None
        if recipe.dropout:
            sizes = (NOTES, recipe.units, recipe.units)
            masks = Masks(
                *(
                    dropout_mask(k, recipe.dropout, (recipe.batch, size))
                    for k, size in zip(jax.random.split(key, 3), sizes, strict=True)
                )
            )
        nats, asked = losses(cell, net, batch, masks)
        return nats.mean(where=asked)

    state, metrics = fit_epochs(
        make_train_step(loss_fn, optimizer),
        init_train_state(init_net(key_init, cell, recipe.units), optimizer, key_noise),
        lambda key: shuffled_batches(key, data["train"], recipe.batch),
        lambda net: mean_loss(cell, net, data["valid"]),
        key=key_data,
        num_epochs=recipe.epochs,
        patience=recipe.patience,
    )
    return state.params, metrics


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_all(
    cell: Cell[Any, Any], recipe: Recipe, data: dict[str, Streams], keys: Key[Array, "run"], rates: Float[Array, "run"]
) -> tuple[Params, dict[str, Float[Array, "run epoch"]]]:
    """Train one net for each run's key and learning rate, in one program."""
    return sweep(functools.partial(train, cell, recipe, data), keys, rates)


def train_and_choose(
    cell: Cell[Any, Any],
    recipes: Sequence[Recipe],
    data: dict[str, Streams],
    learning_rates: Sequence[float],
    seeds: int,
) -> dict[str, Any]:
    """Train all seeds with every recipe and learning rate, and test the choice with the lowest validation loss.

    The test part is read once, after the choice.
    """
    tried, nets = [], []
    for recipe in recipes:
        # Every recipe and learning rate has the same seeds.
        keys = jax.random.split(jax.random.key(0), seeds)
        keys = jnp.broadcast_to(keys, (len(learning_rates), seeds)).reshape(-1)
        rates = jnp.repeat(jnp.array(learning_rates), seeds)
        trained, epochs = train_all(cell, recipe, data, keys, rates)
        for n, rate in enumerate(learning_rates):
            own = slice(n * seeds, (n + 1) * seeds)
            nets.append(jax.tree.map(lambda leaf, own=own: leaf[own], trained))
            best_epochs = epochs["validation"][own].argmin(1)[:, None]
            tried.append(
                {
                    "learning_rate": rate,
                    "dropout": recipe.dropout,
                    "epochs": epochs["ran"][own].sum(1).tolist(),
                    "validation": rows.rounded(epochs["validation"][own].min(1)),
                    "training": rows.rounded(jnp.take_along_axis(epochs["loss"][own], best_epochs, 1)[:, 0]),
                    "last validation": rows.rounded(epochs["validation"][own, -1]),
                    "last training": rows.rounded(epochs["loss"][own, -1]),
                }
            )
    best = min(range(len(tried)), key=lambda n: float(np.mean(tried[n]["validation"])))
    of_part = jax.jit(jax.vmap(functools.partial(mean_loss, cell), (0, None)))
    found = {part: rows.rounded(of_part(nets[best], data[part])) for part in ("train", "test")}
    return {"parameters": num_params(nets[best]) // seeds, "tried": tried, "chosen": best, **found}


# The experiment.


def load(path: str | Path, num_steps: int = 256) -> dict[str, Streams]:
    """Read a data set into streams; only training pieces longer than `num_steps` are cut."""
    parts = read(path)
    longest = {part: max(map(len, pieces)) for part, pieces in parts.items()}
    return {
        part: streams(pieces, min(longest[part], num_steps) if part == "train" else longest[part])
        for part, pieces in parts.items()
    }


def main(
    *,
    data: str = "JSB_Chorales.mat",
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds: int = 5,
    epochs: int = 400,
    sizes: tuple[str, ...] = ("20,000", "300,000", "1,000,000"),
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets, write the result and a picture, and log the table.

    Args:
      data: the MATLAB file, JSB_Chorales.mat or Nottingham.mat.
      learning_rates: of Adam; the validation loss selects one for each net.
      seeds: number of seeds per net.
      epochs: the largest number of epochs; training stops after 15 without a better validation loss.
      sizes: numbers of parameters; a net of another size is left out.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    name = Path(data).stem.replace("_", " ")
    if name not in NETS:
        raise runs.FlagError(f"--data must be a file named JSB_Chorales.mat or Nottingham.mat, got {data}")
    plans = [{"size": net.size, "cell": net.cell} for net in NETS[name] if net.size in sizes]
    if not plans:
        known = dict.fromkeys(net.size for net in NETS[name])
        raise runs.FlagError(f"--sizes must contain a size of {name}, {' or '.join(known)}, got {' '.join(sizes)}")
    parts = load(data)
    config["sha256"] = hash_of(data)

    def measure(size: str, cell: str) -> dict[str, Any]:
        (net,) = (net for net in NETS[name] if (net.size, net.cell) == (size, cell))
        recipes = [Recipe(net.units, dropout, epochs) for dropout in net.dropout]
        found = train_and_choose(CELLS[cell.split()[0]], recipes, parts, learning_rates, seeds)
        return {"units": net.units, "published": net.published, "source": net.source, **found}

    folder, result = rows.collect("chorales", config, plans, measure, workdir=workdir, resume=resume)
    picture = plots.chorales(folder / "chorales.png", result["rows"], name)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: mean and 95 % interval of the seeds."""
    lines = [
        "| net | units | parameters | learning rate | dropout | validation | test | published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        chosen = row["tried"][row["chosen"]]
        lines.append(
            f"| {row['cell']} | {row['units']} | {row['parameters']:,} | {chosen['learning_rate']:g} "
            f"| {chosen['dropout']:g} | {intervals.shown(chosen['validation'])} | {intervals.shown(row['test'])} "
            f"| {row['published']:.2f} ({row['source']}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("chorales", main, quick={"learning_rates": (3e-3,), "seeds": 2, "epochs": 5, "sizes": ("20,000",)})
