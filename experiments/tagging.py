"""How well does a net label each character of a program, and how much does reading backward help?

The texts are the sources of Python's own standard library, and `tokenize` gives exact labels: keyword, name, number,
string, comment, operator or space. Files are split into training and test. An RNN, an LSTM and a bidirectional LSTM
have equal numbers of parameters. A net that reads from the left cannot tell whether `for` is a keyword or the start of
`format`.
"""

import functools
import io
import keyword
import logging
import os
import re
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from experiments import plots
from experiments.harness import intervals, rows, runs
from jaxlstm import (
    LSTM,
    RNN,
    Cell,
    fit,
    init_bidirectional,
    init_train_state,
    make_train_step,
    num_params,
    sweep,
    unroll_stack,
)
from jaxlstm.diagnostics import trace

CLASSES = ("keyword", "name", "number", "string", "comment", "operator", "space")
EMBEDDING, NUM_SYMBOLS = 16, 128
WINDOW, BATCH = 128, 64  # characters and windows of a training step
TEST_WINDOW = 512
AROUND = 10  # characters before and after a border
SNIPPET = """\
def mean(values, weights=None):  # or a weighted mean
    for item in values:
        total = format_number(item * 2.5)
    print("for each item: %s" % total)
    return None
"""

log = logging.getLogger("tagging")


# The data.


def label(source: str) -> Int[np.ndarray, "characters"]:
    """Return the class of every character, by Python's own tokenizer."""
    labels = np.full(len(source), CLASSES.index("space"))
    starts = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = class_of(token)
        if kind:
            (row, column), (last_row, last_column) = token.start, token.end
            labels[starts[row - 1] + column : starts[last_row - 1] + last_column] = CLASSES.index(kind)
    return labels


def class_of(token: tokenize.TokenInfo) -> str | None:
    """Return the class of a token; None for line ends and indents, which are space."""
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    name = tokenize.tok_name[token.type]  # Python 3.12 splits an f-string into several kinds of tokens
    kinds = {"NUMBER": "number", "STRING": "string", "COMMENT": "comment", "OP": "operator"}
    return "string" if name.startswith("FSTRING") else kinds.get(name)


class Text(NamedTuple):
    """Windows of programs."""

    symbols: Int[Array, "window time"]
    labels: Int[Array, "window time"]


def encode(source: str) -> Int[np.ndarray, "characters"]:
    """Return the characters' codes; all that are not ASCII share one."""
    return np.minimum([ord(character) for character in source], NUM_SYMBOLS - 1)


def load(files: int, max_chars: int = 30_000) -> tuple[Text, Text]:
    """Read some of the library's modules, at most `max_chars` characters of each; every fifth is for the test.

    Files that a program wrote are left out. One of them, a table, would hold two thirds of the test's numbers.
    """
    parts: tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]] = ([], [])
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    written = [source for source in sources if not re.search("generated", source[:300])]
    for n, at in enumerate(np.random.default_rng(0).permutation(len(written))[:files]):
        source = written[at]
        parts[n % 5 == 0].append((encode(source)[:max_chars], label(source)[:max_chars]))
    return _windows(parts[0], WINDOW), _windows(parts[1], TEST_WINDOW)


def _windows(files: list[tuple[Any, Any]], length: int) -> Text:
    cut = [leaf[: len(leaf) // length * length].reshape(-1, length) for file in files for leaf in file]
    return Text(*(jnp.asarray(np.concatenate(cut[k::2]), jnp.int32) for k in range(2)))


# The nets.


class Net(NamedTuple):
    """A cell, its width, and whether it also reads backward."""

    cell: Cell[Any, Any]
    units: int
    both: bool = False


NETS = {"RNN": Net(RNN, 136), "LSTM": Net(LSTM, 64), "bidirectional LSTM": Net(LSTM, 43, both=True)}


class Params(NamedTuple):
    """Embedding, one layer, readout."""

    embedding: Float[Array, "symbol embedding"]
    layer: Any
    w: Float[Array, "features class"]
    b: Float[Array, "class"]


def init_net(key: Key[Array, ""], net: Net) -> Params:
    """Draw a net."""
    key_embedding, key_layer = jax.random.split(key)
    if net.both:
        layer = init_bidirectional(key_layer, net.cell, EMBEDDING, net.units)
    else:
        layer = net.cell.init(key_layer, EMBEDDING, net.units)
    features = net.units * (1 + net.both)
    embedding = jax.random.normal(key_embedding, (NUM_SYMBOLS, EMBEDDING))
    return Params(embedding, layer, jnp.zeros((features, len(CLASSES))), jnp.zeros(len(CLASSES)))


def read(net: Net, params: Params, xs: Float[Array, "time *batch embedding"]) -> Float[Array, "time *batch class"]:
    """Return the logits of every step's class."""
    _, hs = unroll_stack(net.cell, [params.layer], xs)
    return hs @ params.w + params.b


def tag(net: Net, params: Params, symbols: Int[Array, "window time"]) -> Float[Array, "time window class"]:
    """Return the logits of every character's class."""
    return read(net, params, params.embedding[symbols.T])


def train(net: Net, steps: int, learning_rate: float, text: Text, key: Key[Array, ""]) -> Params:
    """Train one net with Adam on windows drawn at random."""
    key_init, key_data, key_loss = jax.random.split(key, 3)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss_fn(params: Params, chosen: Int[Array, "batch"]) -> Array:
        return cross_entropy(tag(net, params, text.symbols[chosen]), text.labels[chosen].T).mean()

    batches = jax.random.randint(key_data, (steps, BATCH), 0, len(text.symbols))
    state = init_train_state(init_net(key_init, net), optimizer, key_loss)
    return fit(make_train_step(loss_fn, optimizer), state, batches)[0].params


# The measures.


def f1(predicted: Int[np.ndarray, "*any"], labels: Int[np.ndarray, "*any"]) -> list[float]:
    """Return 2 · hits / (predicted + real) for every class."""
    hits = [((predicted == k) & (labels == k)).sum() for k in range(len(CLASSES))]
    both = [(predicted == k).sum() + (labels == k).sum() for k in range(len(CLASSES))]
    return [float(2 * hit / total) for hit, total in zip(hits, both, strict=True)]


def lone_borders(labels: Int[np.ndarray, "window time"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows and steps where the class changes and does not change within 10 steps before or after."""
    changes = np.diff(labels, axis=1) != 0  # at t: between t and t + 1
    near = np.lib.stride_tricks.sliding_window_view(changes, 2 * AROUND + 1, axis=1)
    windows, steps = np.nonzero(near[:, :, AROUND] & (near.sum(-1) == 1))
    return windows, steps + AROUND + 1  # the first step of the new segment


def around_borders(net: Net, params: Params, text: Text) -> dict[str, Any]:
    """Return f, i and ‖Δc‖ at −10 to +10 steps around the borders, averaged over units and borders."""
    recorded = jax.jit(functools.partial(trace, net.cell))(params.layer, params.embedding[text.symbols.T])
    change = jnp.linalg.norm(recorded.carry.c - recorded.start.c, axis=-1)
    measures = {"f": recorded.gates.f.mean(-1), "i": recorded.gates.i.mean(-1), "change of c": change}
    windows, steps = lone_borders(np.asarray(text.labels))
    at = steps[:, None] + np.arange(-AROUND, AROUND + 1)
    return {name: rows.rounded(np.asarray(values)[at, windows[:, None]].mean(0)) for name, values in measures.items()}


def sensitivity(net: Net, params: Params, source: str) -> list[list[float]]:
    """Return ‖∂y_t/∂x_s‖ for all t and s, y being the logits and x the embedded characters."""
    jacobian = jax.jit(jax.jacrev(functools.partial(read, net, params)))(params.embedding[encode(source)])
    return rows.rounded(jnp.sqrt((jacobian**2).sum((1, 3))))


def measure(name: str, *, seeds: int, steps: int, learning_rate: float, texts: tuple[Text, Text]) -> dict[str, Any]:
    """Train all seeds of a net and measure them."""
    net, (seen, held_out) = NETS[name], texts
    run = functools.partial(train, net, steps, learning_rate, seen)
    trained = jax.jit(functools.partial(sweep, run))(jax.random.split(jax.random.key(0), seeds))
    each = [jax.tree.map(lambda leaf, n=n: leaf[n], trained) for n in range(seeds)]
    classify = jax.jit(lambda params, symbols: tag(net, params, symbols).argmax(-1).T)
    labels = np.asarray(held_out.labels)
    found: dict[str, Any] = {
        "units": net.units,
        "parameters": num_params(each[0]),
        "f1": [rows.rounded(f1(np.asarray(classify(params, held_out.symbols)), labels)) for params in each],
        "snippet": classify(each[0], jnp.asarray(encode(SNIPPET))[None])[0].tolist(),
        "sensitivity": sensitivity(net, each[0], SNIPPET[:60]),
    }
    if name == "LSTM":
        found["around borders"] = [around_borders(net, params, held_out) for params in each]
        found["borders"] = len(lone_borders(labels)[0])
    return found


# The experiment.


def main(
    *,
    files: int = 1000,
    seeds: int = 5,
    steps: int = 3000,
    learning_rate: float = 1e-2,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets, measure them, write the result and the pictures, and log the table.

    Args:
      files: the maximum number of modules to read; the default reads all.
      seeds: number of seeds per net.
      steps: training steps of 64 windows of 128 characters.
      learning_rate: of Adam at its peak; it falls to 0.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    measure_row = functools.partial(measure, seeds=seeds, steps=steps, learning_rate=learning_rate, texts=load(files))
    plans = [{"name": name} for name in NETS]
    folder, result = rows.collect("tagging", config, plans, measure_row, workdir=workdir, resume=resume)
    pictures = plots.tagging(folder, result["rows"], CLASSES, SNIPPET, label(SNIPPET).tolist())
    log.info("%s\n%s\n%s", table(result), folder / "result.json", "\n".join(map(str, pictures)))
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: F1 of every class, mean and 95 % interval of the seeds."""
    lines = [f"| net | parameters | mean of the classes | {' | '.join(CLASSES)} |", "|---" * (3 + len(CLASSES)) + "|"]
    for row in result["rows"]:
        scores = np.array(row["f1"])
        cells = [intervals.shown(column, 3) for column in (scores.mean(1), *scores.T)]
        lines.append(f"| {row['name']} | {row['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("tagging", main, quick={"files": 20, "seeds": 2, "steps": 10})
