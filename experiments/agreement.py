"""Do an RNN, a GRU and an LSTM carry number and gender from a subject to its verb, and which unit does it?

"the cats which already ate the king ... were full because they slept": the nets train on texts of two such clauses,
with up to twelve words between subject and verb, and are tested with up to sixty. The experiment looks for the unit
that carries number: it searches on one half of the clauses, by gradient and by trial, and holds the unit fixed on the
other half. Expect all three nets to carry number, the RNN to have trouble with gender, and one unit to carry number.
"""

import dataclasses
import functools
import logging
import operator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from experiments import grammar, plots
from experiments.harness import devices, runs, trainer
from jaxlstm import GRU, LSTM, RNN, Cell, TrainState, init_train_state, make_train_step, unroll
from jaxlstm.diagnostics import gradient_flow, trace

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}
MAX_DISTANCE = 12  # words between subject and verb in training
DISTANCES = (2, 4, 8, 12, 16, 20, 30, 40, 50, 60)  # and in the tests
NOUNS_BETWEEN, ATTRACTORS_AT = 4, 20  # nouns between subject and verb when attractors are counted; the distance then
QUESTIONS = {"number": ("verb", "was", "were"), "gender": ("pronoun", "he", "she")}
NUM_TEXTS, EMBEDDING = 20_000, 32
NUM_QUESTIONS = 400
SHORTLIST, NUM_RANDOM = 16, 10  # candidate units to hold fixed; random units held fixed for comparison

log = logging.getLogger("agreement")


class Net(NamedTuple):
    """Embedding -> one layer -> softmax over the next word."""

    embedding: Float[Array, "words features"]
    cell: Any
    w: Float[Array, "hidden words"]
    b: Float[Array, "words"]


def init_net(key: Key[Array, ""], cell: Cell[Any, Any], hidden_size: int) -> Net:
    """Draw the initial parameters of a net."""
    embedding_key, cell_key, readout_key = jax.random.split(key, 3)
    num_words = len(grammar.WORDS)
    return Net(
        embedding=0.3 * jax.random.normal(embedding_key, (num_words, EMBEDDING)),
        cell=cell.init(cell_key, EMBEDDING, hidden_size),
        w=jax.nn.initializers.glorot_uniform()(readout_key, (hidden_size, num_words)),
        b=jnp.zeros(num_words),
    )


def init_nets(cell: Cell[Any, Any], seeds: int, hidden_size: int) -> Net:
    """Draw one net per seed, stacked along axis 0; all cells use the same keys."""
    draw = functools.partial(init_net, cell=cell, hidden_size=hidden_size)
    return jax.vmap(draw)(jax.random.split(jax.random.key(0), seeds))


def loss_of(cell: Cell[Any, Any], net: Net, tokens: Int[Array, "time batch"], real: Bool[Array, "time batch"]) -> Array:
    """Return the mean loss of the next word, in nats."""
    _, ys = unroll(cell, net.cell, net.embedding[tokens[:-1]])
    losses = optax.softmax_cross_entropy_with_integer_labels(ys @ net.w + net.b, tokens[1:])
    return losses.mean(where=real[1:])


def loss_fn(nets: dict[str, Net], batch: Any, carry: Any, key: Key[Array, ""]) -> Any:
    """Return the sum of the losses of all nets, which gives each net its own gradient; each seed has its own texts."""
    losses = {name: jax.vmap(functools.partial(loss_of, CELLS[name]))(stack, *batch) for name, stack in nets.items()}
    total = sum(stack.sum() for stack in losses.values())
    return total, (carry, {f"loss {name}": stack.mean() for name, stack in losses.items()})


# Questions: is the next word "was" or "were", "he" or "she"?


class Questions(NamedTuple):
    """Texts that contain the word in question, with the right and the wrong answer."""

    tokens: Int[np.ndarray, "time question"]
    last: Int[np.ndarray, "question"]  # index of the word before the answer
    right: Int[np.ndarray, "question"]
    wrong: Int[np.ndarray, "question"]


def ask(clauses: list[grammar.Clause], question: str, before: list[list[str]] | None = None) -> Questions:
    """Turn clauses into questions; `before` holds words that precede each clause."""
    where, *answers = QUESTIONS[question]
    texts = [[*earlier, *own.words] for earlier, own in zip(before or [[]] * len(clauses), clauses, strict=True)]
    at = np.array([len(text) - len(own.words) + getattr(own, where) for text, own in zip(texts, clauses, strict=True)])
    right = [text[place] for text, place in zip(texts, at, strict=True)]
    other = dict(zip(answers, answers[::-1], strict=True))
    wrong = [other[word] for word in right]
    tokens, _ = grammar.encode(texts, max(map(len, texts)))
    return Questions(tokens.T, at - 1, _numbers(right), _numbers(wrong))


def _numbers(words: list[str]) -> Int[np.ndarray, "words"]:
    return np.array([grammar.NUMBER[word] for word in words])


def questions(question: str, distance: int, seed: int, attractors: int | None = None) -> Questions:
    """Draw questions at one distance; each of the two answers is right in half of them.

    With `attractors`, four nouns stand between subject and verb, and that many of them differ from it in number.
    """
    rng = np.random.default_rng([seed, distance, len(question)])
    clauses = []
    for n in range(NUM_QUESTIONS):
        if question == "number":
            number = n % 2
            between = (
                None if attractors is None else [1 - number] * attractors + [number] * (NOUNS_BETWEEN - attractors)
            )
            clauses.append(grammar.clause(rng, distance, between, number=number))
        else:
            nouns = grammar.GENDERS[("he", "she")[n % 2]].split()
            clauses.append(grammar.clause(rng, distance, number=0, noun=str(rng.choice(nouns))))
    return ask(clauses, question)


def second_subject(distance: int, seed: int) -> Questions:
    """Ask about the second clause of a text, whose subject differs in number from the subject of the first."""
    rng = np.random.default_rng([seed, distance])
    pairs = [[grammar.clause(rng, distance, number=(n + k) % 2) for k in range(2)] for n in range(NUM_QUESTIONS)]
    return ask([second for _, second in pairs], "number", [first.words for first, _ in pairs])


@functools.partial(jax.jit, static_argnums=0)
def accuracy(cell: Cell[Any, Any], nets: Net, asked: Questions) -> Float[Array, "seed"]:
    """Return, for every seed, the fraction of questions whose right answer gets the higher probability."""

    def of_one(net: Net) -> Array:
        _, ys = unroll(cell, net.cell, net.embedding[asked.tokens], gradient="scan")
        each = jnp.arange(len(asked.last))
        logits = ys[asked.last, each] @ net.w + net.b
        return (logits[each, asked.right] > logits[each, asked.wrong]).mean()

    return jax.vmap(of_one)(nets)


# The unit that carries number.


def memory(carry: Any) -> Array:
    """Return the part of the carry that a cell remembers with: c for an LSTM, h for the others."""
    return carry.c if hasattr(carry, "c") else carry.h


@functools.partial(jax.jit, static_argnums=0)
def attribution(cell: Cell[Any, Any], net: Net, asked: Questions) -> tuple[Float[Array, "hidden"], Any]:
    """Return how much each unit affects the answer inside the relative clause, and the mean carry there.

    The effect is a first-order estimate: how much log P(was) / P(were) would change if the unit moved from its mean
    over singular clauses to its mean over plural ones: |mean gradient × difference of the means|, averaged over steps.
    """
    was, were = grammar.NUMBER["was"], grammar.NUMBER["were"]
    xs = net.embedding[asked.tokens[: MAX_DISTANCE + 2]]  # up to the word before the verb

    def margin(ys: Array) -> Array:
        logits = ys[-1] @ net.w + net.b
        return (logits[:, was] - logits[:, were]).sum()

    inside_clause = operator.itemgetter(slice(3, MAX_DISTANCE + 1))
    carries = jax.tree.map(inside_clause, trace(cell, net.cell, xs).carry)
    gradients = jax.tree.map(inside_clause, gradient_flow(cell, net.cell, xs, margin))
    one = (asked.right == was)[None, :, None]
    values = memory(carries)
    difference = values.mean(axis=1, where=one) - values.mean(axis=1, where=~one)
    attributed = jnp.abs(memory(gradients).mean(axis=1) * difference).mean(axis=0)
    return attributed, jax.tree.map(functools.partial(jnp.mean, axis=(0, 1)), carries)


class Clamped(NamedTuple):
    """A cell's parameters, and the units whose carry (h and c) is held at a fixed value from the first step on."""

    params: Any
    units: Bool[Array, "hidden"]
    to: Any  # the fixed value: a carry [hidden]


@functools.cache
def clamp(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Return the cell whose parameters are `Clamped`. The units are an input, so that any choice uses one program."""

    def initial_carry(clamped: Clamped, batch_shape: tuple[int, ...] = ()) -> Any:
        return cell.initial_carry(clamped.params, batch_shape)

    def project(clamped: Clamped, xs: Any) -> Any:
        return cell.project(clamped.params, xs)

    def recur(clamped: Clamped, carry: Any) -> Any:
        return cell.recur(clamped.params, carry)

    def gates(clamped: Clamped, carry: Any, z: Any, a: Any) -> Any:
        new, _ = cell.gates(clamped.params, carry, z, a)
        held = jax.tree.map(functools.partial(jnp.where, clamped.units), clamped.to, new)
        return held, held.h

    return dataclasses.replace(
        cell,
        initial_carry=initial_carry,
        project=project,
        recur=recur,
        gates=gates,
        gates_jvp=None,
        activations=None,
    )


def clamping(name: str, nets: Net, seed: int) -> list[dict[str, Any]]:
    """Find two units on one half of the clauses, and hold them fixed on the other half; return one row per seed.

    The first unit is the one on the gradient's shortlist that makes the net wrong most often when held fixed. The
    second is found in the same way with the first held fixed. `rank` is a unit's rank by the gradient alone.
    """
    cell = CELLS[name]
    one_half, other_half = (questions("number", MAX_DISTANCE, seed + k) for k in range(2))

    @jax.jit
    def right(net: Net, held: Bool[Array, "choice hidden"], to: Any, asked: Questions) -> Float[Array, "choice"]:
        def hold(units: Bool[Array, "hidden"]) -> Net:
            return net._replace(cell=Clamped(net.cell, units, to))

        return accuracy(clamp(cell), jax.vmap(hold)(held), asked)

    rows = []
    for n in range(len(nets.b)):
        net = jax.tree.map(operator.itemgetter(n), nets)
        attributed, to = attribution(cell, net, one_half)
        each, order = np.eye(attributed.size, dtype=bool), np.argsort(-np.asarray(attributed)).tolist()
        found: list[int] = []
        for _ in range(2):
            choice = [unit for unit in order[:SHORTLIST] if unit not in found]
            accuracies = right(net, each[choice] | each[found].any(axis=0), to, one_half)
            found.append(choice[int(np.argmin(accuracies))])
        others = np.random.default_rng(n).permutation(np.setdiff1d(order, found))[:NUM_RANDOM]
        held = np.stack([0 * each[0], each[found[0]], each[found[0]] | each[found[1]], *each[others]])
        free, without_one, without_two, *random = np.asarray(right(net, held, to, other_half), float).round(4).tolist()
        row = {"units": found, "rank": [1 + order.index(unit) for unit in found], "free": free}
        row |= {"without one": without_one, "without two": without_two, "random": random}
        rows.append(row | ({"inside": inside(net, found[0], other_half)} if cell is LSTM else {}))
    return rows


def inside(net: Net, unit: int, asked: Questions) -> dict[str, float]:
    """Return the mean gates of one unit of an LSTM inside the relative clause."""
    gates = trace(LSTM, net.cell, net.embedding[asked.tokens[: MAX_DISTANCE + 2]]).gates
    return {name: float(value[3 : MAX_DISTANCE + 1, :, unit].mean()) for name, value in gates._asdict().items()}


def read_clause(net: Net, unit: int) -> dict[str, Any]:
    """Return the gates and the cell state of one unit of an LSTM, over the same clause in singular and in plural."""
    relative = "which already ate the queen once saw the rat secretly".split()
    out: dict[str, Any] = {}
    for number, words in (
        ("one", ["the", "cat", *relative, "was", "full"]),
        ("many", ["the", "cats", *relative, "were", "full"]),
    ):
        recorded = trace(LSTM, net.cell, net.embedding[_numbers(words)])
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
    """Train all nets side by side, test them, and find the unit that carries number.

    Args:
      hidden_size: units per layer.
      batch_size: texts in a batch.
      steps: number of steps of Adam; the gradient of each net is clipped to norm 1.
      learning_rate: peak of the schedule: linear warm-up, then a cosine decay to a hundredth of the peak.
      seeds: number of nets of each kind; each one trains on different texts.
      block: steps in one compiled call; a run can be saved or stopped only between two blocks.
      workdir: folder of the run; by default a new one, runs/agreement/TIME.
      resume: continue the run in --workdir.
    """
    config = {k: v for k, v in locals().items() if k not in ("workdir", "resume")}
    folder = runs.open_folder("agreement", workdir, config, resume=resume)
    log.info("generating %d texts for each of %d seeds ...", NUM_TEXTS, seeds)
    texts, real = map(
        np.stack, zip(*(grammar.corpus(seed, NUM_TEXTS, MAX_DISTANCE) for seed in range(seeds)), strict=True)
    )

    def batches(steps: range) -> Any:
        chosen = np.stack([np.random.default_rng(step).integers(NUM_TEXTS, size=(seeds, batch_size)) for step in steps])
        each_seed = np.arange(seeds)[:, None]
        # [step, seed, batch, time] -> [step, seed, time, batch]
        return np.moveaxis(texts[each_seed, chosen], -1, -2), np.moveaxis(real[each_seed, chosen], -1, -2)

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps, learning_rate / 100)
    optimizer = trainer.each_alone(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)))
    nets = {name: init_nets(cell, seeds, hidden_size) for name, cell in CELLS.items()}
    state = init_train_state(nets, optimizer, jax.random.key(1))
    checked = {f"{question} at {d}": questions(question, d, 1) for question in QUESTIONS for d in (MAX_DISTANCE, 30)}

    def examine(state: TrainState, metrics: trainer.Metrics, steps_per_second: float) -> runs.Row:
        row = {
            f"{name}, {what}": np.asarray(accuracy(CELLS[name], stack, asked)).tolist()
            for name, stack in state.params.items()
            for what, asked in checked.items()
        }
        log.info("step %5d: %s", state.step, ", ".join(f"{what} {np.mean(right):.2f}" for what, right in row.items()))
        return row

    state = trainer.train(
        "agreement", folder, make_train_step(loss_fn, optimizer), runs.restore(folder, state), batches, examine,
        trainer.Schedule(steps, block, trainer.interval(steps, block, times=8), save_every=500, keep=2),
    )  # fmt: skip
    return report(folder, config, state.params)


def report(folder: Path, config: dict[str, Any], nets: dict[str, Net]) -> dict[str, Any]:
    """Test the nets, write result.json and the pictures, and log the outcome."""

    def accuracies(asked: Questions) -> dict[str, list[float]]:
        return {name: np.asarray(accuracy(CELLS[name], stack, asked), float).tolist() for name, stack in nets.items()}

    result: dict[str, Any] = {"config": config, "versions": runs.versions(), "device": devices.found()}
    for question in QUESTIONS:
        result[question] = {d: accuracies(questions(question, d, 7)) for d in DISTANCES}
    result["attractors"] = {k: accuracies(questions("number", ATTRACTORS_AT, 8, k)) for k in range(NOUNS_BETWEEN + 1)}
    result["second subject"] = {d: accuracies(second_subject(d, 9)) for d in (MAX_DISTANCE, 30)}
    result["clamping"] = {name: clamping(name, stack, 10) for name, stack in nets.items()}
    without_one = [row["without one"] for row in result["clamping"]["LSTM"]]
    clearest = without_one.index(min(without_one))  # the seed whose accuracy depends most on its unit
    unit = result["clamping"]["LSTM"][clearest]["units"][0]
    clause = read_clause(jax.tree.map(operator.itemgetter(clearest), nets["LSTM"]), unit)
    result["clause"] = {"seed": clearest, "unit": unit, **clause}
    runs.write_json(folder / "result.json", result)
    for name, rows in result["clamping"].items():
        columns = [[row[what] for row in rows] for what in ("free", "without one", "without two", "random")]
        log.info(
            "%s, accuracy on number at %d words: free %s; with the unit found held fixed %s; with two %s; "
            "with a random one %s", name, MAX_DISTANCE, *map(_medians, columns),
        )  # fmt: skip
    pictures = [
        plots.agreement(folder / "agreement.png", result, MAX_DISTANCE, ATTRACTORS_AT),
        plots.unit(
            folder / "unit.png",
            clause,
            f"The unit that carries the number of the subject (unit {unit} of the LSTM with seed {clearest})",
        ),
    ]
    log.info("%s\n%s", folder / "result.json", "\n".join(map(str, pictures)))
    return result


def _medians(column: list[Any]) -> str:
    return ", ".join(f"{np.median(values):.2f}" for values in column)


if __name__ == "__main__":
    runs.cli("agreement", main, quick={"steps": 50, "seeds": 1, "block": 25})
