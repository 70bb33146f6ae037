"""Do an RNN, a GRU and an LSTM carry number and gender from a subject to its verb, and which unit does it?

"the cats which already ate the king ... were full because they slept": the nets read two such clauses a text, with up
to twelve words between subject and verb, and are asked about up to sixty. The unit that carries number is found on one
half of the clauses, by the gradient and by trial, and held still on the other half. To expect: all three carry
number; gender comes later, and to the RNN hardly; one unit carries number.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from experiments import devices, grammar, plots, runs, trainer
from jaxlstm import GRU, LSTM, RNN, Cell, gradient_flow, init_train_state, make_train_step, trace, unroll

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}
MAX_DISTANCE = 12  # in training
DISTANCES = (2, 4, 8, 12, 16, 20, 30, 40, 50, 60)
NOUNS_BETWEEN, ATTRACTORS_AT = 4, 20
QUESTIONS = {"number": ("verb", "was", "were"), "gender": ("pronoun", "he", "she")}
NUM_TEXTS, EMBEDDING = 20_000, 32
NUM_QUESTIONS = 400
SHORTLIST, NUM_RANDOM = 16, 10  # units tried, and units held still for comparison

log = logging.getLogger("agreement")


class Net(NamedTuple):
    """Embedding -> one layer -> softmax over the next word."""

    embedding: Float[Array, "words features"]
    cell: Any
    w: Float[Array, "hidden words"]
    b: Float[Array, "words"]


def init_net(key: Key[Array, ""], cell: Cell[Any, Any], hidden_size: int) -> Net:
    """Draw a net."""
    embedding_key, cell_key, readout_key = jax.random.split(key, 3)
    num_words = len(grammar.WORDS)
    return Net(
        embedding=0.3 * jax.random.normal(embedding_key, (num_words, EMBEDDING)),
        cell=cell.init(cell_key, EMBEDDING, hidden_size),
        w=jax.nn.initializers.glorot_uniform()(readout_key, (hidden_size, num_words)),
        b=jnp.zeros(num_words),
    )


def loss_of(cell: Cell[Any, Any], net: Net, tokens: Int[Array, "time batch"], real: Bool[Array, "time batch"]) -> Array:
    """Return the mean loss of the next word, in nats."""
    _, ys = unroll(cell, net.cell, net.embedding[tokens[:-1]])
    losses = optax.softmax_cross_entropy_with_integer_labels(ys @ net.w + net.b, tokens[1:])
    return losses.mean(where=real[1:])


def loss_fn(nets: dict[str, Net], batch: Any, carry: Any, key: Key[Array, ""]) -> Any:
    """Return the sum of all nets' losses, so that each has its own gradient; each seed reads texts of its own."""
    losses = {name: jax.vmap(functools.partial(loss_of, CELLS[name]))(own, *batch) for name, own in nets.items()}
    return sum(own.sum() for own in losses.values()), (
        carry,
        {f"loss {name}": own.mean() for name, own in losses.items()},
    )


# Questions: what comes next, was or were, he or she?


class Questions(NamedTuple):
    """Words up to those that are asked for, and the right answer and the wrong one."""

    tokens: Int[np.ndarray, "time question"]
    last: Int[np.ndarray, "question"]  # the place before the answer
    right: Int[np.ndarray, "question"]
    wrong: Int[np.ndarray, "question"]


def ask(clauses: list[grammar.Clause], question: str, before: list[list[str]] | None = None) -> Questions:
    """Make questions of clauses, after other words if there are any."""
    where, *answers = QUESTIONS[question]
    texts = [[*earlier, *own.words] for earlier, own in zip(before or [[]] * len(clauses), clauses, strict=True)]
    at = np.array([len(text) - len(own.words) + getattr(own, where) for text, own in zip(texts, clauses, strict=True)])
    right = [text[place] for text, place in zip(texts, at, strict=True)]
    other = dict(zip(answers, answers[::-1], strict=True))
    tokens, _ = grammar.encode(texts, max(map(len, texts)))
    number = lambda words: np.array([grammar.NUMBER[word] for word in words])
    return Questions(tokens.T, at - 1, number(right), number([other[word] for word in right]))


def questions(question: str, distance: int, seed: int, attractors: int | None = None) -> Questions:
    """Draw questions at a distance; half of the answers are the one, half the other.

    With `attractors`, there are four nouns between, and so many of them have the other number than the subject.
    """
    rng = np.random.default_rng([seed, distance, len(question)])
    between = lambda number: (
        None if attractors is None else [number ^ 1] * attractors + [number] * (NOUNS_BETWEEN - attractors)
    )
    nouns = {answer: grammar.GENDERS[answer].split() for answer in ("he", "she")}
    draw = {
        "number": lambda n: grammar.clause(rng, distance, between(n % 2), number=n % 2),
        "gender": lambda n: grammar.clause(rng, distance, number=0, noun=str(rng.choice(nouns[("he", "she")[n % 2]]))),
    }[question]
    return ask([draw(n) for n in range(NUM_QUESTIONS)], question)


def second_subject(distance: int, seed: int) -> Questions:
    """Ask about the second subject of a text, whose number is not that of the first."""
    rng = np.random.default_rng([seed, distance])
    pairs = [[grammar.clause(rng, distance, number=(n + k) % 2) for k in range(2)] for n in range(NUM_QUESTIONS)]
    return ask([second for _, second in pairs], "number", [first.words for first, _ in pairs])


@functools.partial(jax.jit, static_argnums=0)
def accuracy(cell: Cell[Any, Any], nets: Net, asked: Questions) -> Float[Array, "seed"]:
    """Return, for every seed, how often the right answer is more probable than the wrong one."""

    def of_one(net: Net) -> Array:
        _, ys = unroll(cell, net.cell, net.embedding[asked.tokens], gradient="scan")
        each = jnp.arange(len(asked.last))
        logits = ys[asked.last, each] @ net.w + net.b
        return (logits[each, asked.right] > logits[each, asked.wrong]).mean()

    return jax.vmap(of_one)(nets)


# The unit that carries number.


def memory(carry: Any) -> Array:
    """Return what a cell remembers in: c of an LSTM, h of the others."""
    return carry.c if hasattr(carry, "c") else carry.h


@functools.partial(jax.jit, static_argnums=0)
def attribution(cell: Cell[Any, Any], net: Net, asked: Questions) -> tuple[Float[Array, "hidden"], Any]:
    """Return how much each unit has to do with the answer, and the mean carry, inside the relative clause.

    That is what moving it from one number's mean to the other's would change in the margin, to first order, the mean of
    all steps: |mean gradient of log P(was) / P(were) by the unit, times the difference of its means|.
    """
    was, were = grammar.NUMBER["was"], grammar.NUMBER["were"]
    xs = net.embedding[asked.tokens[: MAX_DISTANCE + 2]]  # up to the word before the verb

    def margin(ys: Array) -> Array:
        logits = ys[-1] @ net.w + net.b
        return (logits[:, was] - logits[:, were]).sum()

    carries, gradients = (
        jax.tree.map(lambda leaf: leaf[3 : MAX_DISTANCE + 1], carry)
        for carry in (trace(cell, net.cell, xs).carry, gradient_flow(cell, net.cell, xs, margin))
    )
    one = (asked.right == was)[None, :, None]
    values = memory(carries)
    difference = values.mean(axis=1, where=one) - values.mean(axis=1, where=~one)
    attributed = jnp.abs(memory(gradients).mean(axis=1) * difference).mean(axis=0)
    return attributed, jax.tree.map(lambda leaf: leaf.mean(axis=(0, 1)), carries)


class Clamped(NamedTuple):
    """A cell's parameters, and the units that are held still, h and c alike, from the first step on."""

    params: Any
    units: Bool[Array, "hidden"]
    to: Any  # a carry, [hidden]


@functools.cache
def clamp(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Make the cell whose parameters are `Clamped`: what is held is an input, so that all choices compile once."""

    def gates(clamped: Clamped, carry: Any, z: Any, a: Any) -> Any:
        new, _ = cell.gates(clamped.params, carry, z, a)
        held = jax.tree.map(lambda leaf, value: jnp.where(clamped.units, value, leaf), new, clamped.to)
        return held, held.h

    assert cell.recur
    recur = cell.recur
    return dataclasses.replace(
        cell,
        initial_carry=lambda clamped, batch_shape=(): cell.initial_carry(clamped.params, batch_shape),
        project=lambda clamped, xs: cell.project(clamped.params, xs),
        recur=lambda clamped, carry: recur(clamped.params, carry),
        gates=gates,
        gates_jvp=None,
        activations=None,
    )


def clamping(name: str, nets: Net, seed: int) -> list[dict[str, Any]]:
    """Find the units on one half of the clauses, and hold them still on the other; a row a seed.

    Of those that the gradient points at, the unit is taken without which the net is wrong most often; then the second,
    with the first held still. `rank` is its place by the gradient alone.
    """
    cell = CELLS[name]
    one_half, other_half = (questions("number", MAX_DISTANCE, seed + k) for k in range(2))

    @jax.jit
    def right(net: Net, held: Bool[Array, "choice hidden"], to: Any, asked: Questions) -> Float[Array, "choice"]:
        clamped = jax.vmap(lambda units: net._replace(cell=Clamped(net.cell, units, to)))(held)
        return accuracy(clamp(cell), clamped, asked)

    rows = []
    for n in range(len(nets.b)):
        net = jax.tree.map(lambda leaf, n=n: leaf[n], nets)
        attributed, to = attribution(cell, net, one_half)
        each, order = np.eye(attributed.size, dtype=bool), np.argsort(-np.asarray(attributed)).tolist()
        found: list[int] = []
        for _ in range(2):
            choice = [unit for unit in order[:SHORTLIST] if unit not in found]
            wrong = right(net, each[choice] | each[found].any(axis=0), to, one_half)
            found.append(choice[int(np.argmin(wrong))])
        others = np.random.default_rng(n).permutation(np.setdiff1d(order, found))[:NUM_RANDOM]
        held = np.stack([0 * each[0], each[found[0]], each[found[0]] | each[found[1]], *each[others]])
        free, without_one, without_two, *random = np.asarray(right(net, held, to, other_half), float).round(4).tolist()
        row = {"units": found, "rank": [1 + order.index(unit) for unit in found], "free": free}
        row |= {"without one": without_one, "without two": without_two, "random": random}
        rows.append(row | ({"inside": inside(net, found[0], other_half)} if cell is LSTM else {}))
    return rows


def inside(net: Net, unit: int, asked: Questions) -> dict[str, float]:
    """Return the mean gates of an LSTM's unit inside the relative clause."""
    gates = trace(LSTM, net.cell, net.embedding[asked.tokens[: MAX_DISTANCE + 2]]).gates
    return {name: float(value[3 : MAX_DISTANCE + 1, :, unit].mean()) for name, value in gates._asdict().items()}


def read_clause(net: Net, unit: int) -> dict[str, Any]:
    """Return the gates and the cell state of an LSTM's unit over the same clause with one subject and with many."""
    said = "which already ate the queen once saw the rat secretly".split()
    out: dict[str, Any] = {}
    for number, words in (
        ("one", ["the", "cat", *said, "was", "full"]),
        ("many", ["the", "cats", *said, "were", "full"]),
    ):
        recorded = trace(LSTM, net.cell, net.embedding[np.array([grammar.NUMBER[word] for word in words])])
        values = {**recorded.gates._asdict(), "c": recorded.carry.c}
        out[number] = {"words": words, **{k: np.asarray(v[:, unit], float).tolist() for k, v in values.items()}}
    return out


def main(
    *,
    hidden_size: int = 32,
    batch_size: int = 64,
    steps: int = 12_000,
    learning_rate: float = 5e-3,
    seeds: int = 5,
    block: int = 50,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets side by side, ask them, and find the unit.

    Args:
      hidden_size: units of a layer.
      batch_size: texts in a batch.
      steps: of Adam; gradients are clipped to norm 1, net by net.
      learning_rate: the peak of the schedule: linear warm-up, then a cosine to a hundredth.
      seeds: nets of each kind, each with texts of its own.
      block: steps in one compiled call; only between two can the run be stopped and saved.
      workdir: a new folder for the run; default runs/agreement/ and the time.
      resume: go on with the run in --workdir.
    """
    config = {k: v for k, v in locals().items() if k not in ("workdir", "resume")}
    folder = runs.open_folder("agreement", workdir, config, resume=resume)
    log.info("writing %d texts for each of %d seeds ...", NUM_TEXTS, seeds)
    texts, real = map(
        np.stack, zip(*(grammar.corpus(seed, NUM_TEXTS, MAX_DISTANCE) for seed in range(seeds)), strict=True)
    )

    def batches(steps: range) -> Any:
        chosen = np.stack([np.random.default_rng(step).integers(NUM_TEXTS, size=(seeds, batch_size)) for step in steps])
        cut = lambda v: np.moveaxis(v[np.arange(seeds)[:, None], chosen], -1, -2)  # [step, seed, time, batch]
        return cut(texts), cut(real)

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps, learning_rate / 100)
    optimizer = trainer.each_alone(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)))
    init = lambda cell: jax.vmap(lambda key: init_net(key, cell, hidden_size))(
        jax.random.split(jax.random.key(0), seeds)
    )
    nets = {name: init(cell) for name, cell in CELLS.items()}
    state = init_train_state(nets, optimizer, jax.random.key(1))
    checked = {f"{question} at {d}": questions(question, d, 1) for question in QUESTIONS for d in (MAX_DISTANCE, 30)}

    def examine(state: Any, metrics: trainer.Metrics, rate: float) -> runs.Row:
        row = {f"{name}, {what}": np.asarray(accuracy(CELLS[name], own, asked)).tolist()
               for name, own in state.params.items() for what, asked in checked.items()}  # fmt: skip
        log.info("step %5d: %s", state.step, ", ".join(f"{what} {np.mean(right):.2f}" for what, right in row.items()))
        return row

    state = trainer.train(
        "agreement", folder, make_train_step(loss_fn, optimizer), runs.restore(folder, state), batches, examine,
        score="", steps=steps, block=block, save_every=500, keep=2,
        evaluate_every=max(block, steps // 8 // block * block),
    )  # fmt: skip
    return report(folder, config, state.params)


def report(folder: Path, config: dict[str, Any], nets: dict[str, Net]) -> dict[str, Any]:
    """Ask the nets, write result.json and the pictures; say what came out."""
    of_all = lambda asked: {
        name: np.asarray(accuracy(CELLS[name], own, asked), float).tolist() for name, own in nets.items()
    }
    result: dict[str, Any] = {"config": config, "versions": runs.versions(), "device": devices.found()}
    for question in QUESTIONS:
        result[question] = {d: of_all(questions(question, d, 7)) for d in DISTANCES}
    result["attractors"] = {k: of_all(questions("number", ATTRACTORS_AT, 8, k)) for k in range(NOUNS_BETWEEN + 1)}
    result["second subject"] = {d: of_all(second_subject(d, 9)) for d in (MAX_DISTANCE, 30)}
    result["clamping"] = {name: clamping(name, own, 10) for name, own in nets.items()}
    sure = min(range(len(nets["LSTM"].b)), key=lambda n: result["clamping"]["LSTM"][n]["without one"])
    unit = result["clamping"]["LSTM"][sure]["units"][0]
    clause = read_clause(jax.tree.map(lambda leaf: leaf[sure], nets["LSTM"]), unit)
    result["clause"] = {"seed": sure, "unit": unit, **clause}
    runs.write_json(folder / "result.json", result)
    for name, rows in result["clamping"].items():
        column = lambda what, rows=rows: ", ".join(f"{np.median(row[what]):.2f}" for row in rows)
        log.info("%s, number at %d words: free %s; the unit found held still %s; two %s; a random one %s", name,
                 MAX_DISTANCE, *map(column, ("free", "without one", "without two", "random")))  # fmt: skip
    pictures = [
        plots.agreement(folder / "agreement.png", result, MAX_DISTANCE, ATTRACTORS_AT),
        plots.unit(
            folder / "unit.png",
            clause,
            f"The unit that carries the number of the subject (unit {unit} of the LSTM with seed {sure})",
        ),
    ]
    log.info("%s\n%s", folder / "result.json", "\n".join(map(str, pictures)))
    return result


if __name__ == "__main__":
    runs.cli("agreement", main)
