"""Can a net count, and far beyond the numbers it was trained on?

A net reads a word symbol by symbol and predicts at every step which symbols may come next; the end of the word is one
of them. A word is right if all these sets are. In aⁿbⁿ and aⁿbⁿcⁿ this takes a counter, in words of one kind of
brackets (Dyck-1) too; two kinds (Dyck-2) take a stack. Gers & Schmidhuber, LSTM recurrent networks learn simple
context-free and context-sensitive languages, 2001; Weiss, Goldberg & Yahav, On the practical computational power of
finite precision RNNs for language recognition, 2018; Suzgun et al., LSTM networks can perform dynamic counting, 2019.
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from experiments import plots
from experiments.harness import rows, runs
from jaxlstm import GRU, LSTM, RNN, Cell, fit, init_train_state, make_train_step, num_params, sweep, unroll
from jaxlstm.diagnostics import trace

CELLS: dict[str, Cell[Any, Any]] = {"RNN": RNN, "GRU": GRU, "LSTM": LSTM}

log = logging.getLogger("counting")


# The languages. Symbol 0 begins a word, and as an output it is the word's end.


class Words(NamedTuple):
    """Words of a language, and which symbols may follow each of theirs."""

    symbols: Int[Array, "time word"]
    allowed: Bool[Array, "time word symbol"]
    real: Bool[Array, "time word"]


def counted(letters: int, ns: range) -> Words:
    """Return aⁿbⁿ (2 letters) or aⁿbⁿcⁿ (3) for every n; after an a, another one may follow or the first b."""
    step = np.arange(1 + letters * ns[-1])[:, None]
    n = np.array(ns)
    symbols = np.minimum(-(-step // n), letters)  # 0 at step 0, then n times 1, n times 2, ...
    real = step <= letters * n
    last = (step % n == 0) & (step > 0)  # of its letter
    following = np.where(last, np.where(symbols == letters, 0, symbols + 1), np.maximum(symbols, 1))
    allowed = np.arange(1 + letters) == following[:, :, None]
    allowed[:, :, 1] |= symbols == 1
    allowed[:, :, 2] |= symbols == 1
    return Words(*map(jnp.asarray, (symbols, allowed, real)))


def brackets(kinds: int, rng: np.random.Generator, lengths: list[int]) -> Words:
    """Draw a word of balanced brackets of each length; all shapes of a length are equally likely."""
    time = 1 + max(lengths)
    symbols, real = np.zeros((time, len(lengths)), int), np.zeros((time, len(lengths)), bool)
    allowed = np.zeros((time, len(lengths), 1 + 2 * kinds), bool)
    allowed[:, :, 1 : 1 + kinds] = True  # any bracket may open at any step
    for word, length in enumerate(lengths):
        # Cycle lemma: exactly one rotation is a balanced word followed by the extra closing bracket.
        shuffled = rng.permutation([1] * (length // 2) + [-1] * (length // 2 + 1))
        depths = np.cumsum(shuffled)
        opens = np.roll(shuffled, -1 - int(np.argmin(depths)))[:-1] > 0
        stack: list[int] = []
        allowed[0, word, 0] = real[0, word] = True
        for at, is_open in enumerate(opens, 1):
            if is_open:
                stack.append(int(rng.integers(1, 1 + kinds)))
                symbols[at, word] = stack[-1]
            else:
                symbols[at, word] = kinds + stack.pop()
            allowed[at, word, kinds + stack[-1] if stack else 0] = real[at, word] = True
    return Words(*map(jnp.asarray, (symbols, allowed, real)))


class Language(NamedTuple):
    """A language, and the sizes at which nets learn it."""

    letters: int  # of counted words, or 0
    kinds: int  # of brackets, or 0
    units: int


LANGUAGES = {
    "aⁿbⁿ": Language(2, 0, 10),
    "aⁿbⁿcⁿ": Language(3, 0, 10),
    "Dyck-1": Language(0, 1, 1),
    "Dyck-2": Language(0, 2, 16),
}


# The net.


class Params(NamedTuple):
    """One layer and a readout."""

    cell: Any
    w: Float[Array, "units symbol"]
    b: Float[Array, "symbol"]


def logits(cell: Cell[Any, Any], params: Params, words: Words) -> Float[Array, "time word symbol"]:
    """Return a number for every symbol, positive if it may come next."""
    _, hs = unroll(cell, params.cell, jax.nn.one_hot(words.symbols, words.allowed.shape[-1]))
    return hs @ params.w + params.b


def right(cell: Cell[Any, Any], params: Params, words: Words) -> Bool[Array, "word"]:
    """Return for every word whether all sets are right."""
    same = ((logits(cell, params, words) > 0) == words.allowed).all(-1)
    return (same | ~words.real).all(0)


def train(
    cell: Cell[Any, Any], units: int, steps: int, learning_rate: float, batch: int, words: Words, key: Key[Array, ""]
) -> tuple[Params, Float[Array, "step"]]:
    """Train one net with Adam, each step on words drawn at random; return it and the loss of every step."""
    key_init, key_data = jax.random.split(key)
    num_words, num_symbols = words.allowed.shape[1:]
    cell_params = cell.init(key_init, num_symbols, units)
    w = 0.1 * jax.random.normal(jax.random.clone(key_init), (units, num_symbols))
    params = Params(cell_params, w, jnp.zeros(num_symbols))

    def loss_fn(params: Params, _: Any, carry: Any, key: Key[Array, ""]) -> Array:
        chosen = jax.random.choice(key, num_words, (min(batch, num_words),), replace=False)
        drawn = jax.tree.map(lambda leaf: leaf[:, chosen], words)
        of_symbols = optax.sigmoid_binary_cross_entropy(logits(cell, params, drawn), drawn.allowed)
        return of_symbols.sum(-1).mean(where=drawn.real)

    rate = optax.cosine_decay_schedule(learning_rate, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    state = init_train_state(params, optimizer, key_data)
    state, metrics = fit(make_train_step(loss_fn, optimizer), state, jnp.arange(steps))
    return state.params, metrics["loss"]


# The measures.


def reach(found: Bool[Array, "n"]) -> int:
    """Return the largest n such that the words for 1 to n are all right."""
    return len(found) if found.all() else int(found.argmin())


def measure(
    language: str, cell: str, *, trained_to: int, tested_to: int, seeds: int, steps: int, learning_rate: float
) -> dict[str, Any]:
    """Train all seeds of a cell on a language; return how far each one is right."""
    letters, kinds, units = LANGUAGES[language]
    words = counted(letters, range(1, trained_to + 1)) if letters else _trained_brackets(kinds, trained_to)
    run = functools.partial(train, CELLS[cell], units, steps, learning_rate, 16, words)
    nets, losses = jax.jit(functools.partial(sweep, run))(jax.random.split(jax.random.key(0), seeds))
    of_words = jax.jit(jax.vmap(functools.partial(right, CELLS[cell]), (0, None)))
    found = {"units": units, "parameters": num_params(nets) // seeds, "loss": rows.rounded(losses[:, -100:].mean(1))}
    if letters:
        flags = np.asarray(of_words(nets, counted(letters, range(1, tested_to + 1))))
        found["reach"] = [reach(row) for row in flags]
        if letters == 2:  # for the picture: the first net reads a word far longer than any in training
            first = jax.tree.map(lambda leaf: leaf[0], nets)
            shown = counted(letters, range(4 * trained_to, 4 * trained_to + 1))
            found["counter"] = _counter(CELLS[cell], first, shown)
        return found
    lengths = [trained_to, *(trained_to * k for k in (2, 4, 8, 16) if trained_to * k <= 2 * tested_to)]
    rng = np.random.default_rng(1)
    return found | {
        "lengths": lengths,
        "right": [rows.rounded(of_words(nets, brackets(kinds, rng, [length] * 200)).mean(1)) for length in lengths],
    }


def _trained_brackets(kinds: int, trained_to: int) -> Words:
    rng = np.random.default_rng(0)
    return brackets(kinds, rng, [int(length) for length in 2 * rng.integers(1, trained_to // 2 + 1, 2000)])


def _counter(cell: Cell[Any, Any], net: Params, words: Words) -> list[list[float]]:
    """Return the cell state (or h, if there is none) of every unit at every step of one word."""
    carry = trace(cell, net.cell, jax.nn.one_hot(words.symbols, words.allowed.shape[-1])).carry
    return rows.rounded(getattr(carry, "c", carry.h)[:, 0].T)


# The experiment.


def main(
    *,
    languages: tuple[str, ...] = tuple(LANGUAGES),
    trained_to: int = 50,
    tested_to: int = 1000,
    seeds: int = 10,
    steps: int = 15_000,
    learning_rate: float = 1e-2,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets, measure how far they count, write the result and a picture, and log the table.

    Args:
      languages: what the nets learn.
      trained_to: the largest n, and the longest word of brackets, in training.
      tested_to: the largest n of the test; words of brackets go up to twice this length.
      seeds: number of seeds per cell and language.
      steps: training steps of 16 words.
      learning_rate: of Adam at the start; it falls to 0.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    runs.check_names("languages", languages, LANGUAGES)
    plans = [{"language": language, "cell": cell} for language in languages for cell in CELLS]
    settings = {name: value for name, value in config.items() if name != "languages"}
    measure_row = functools.partial(measure, **settings)
    folder, result = rows.collect("counting", config, plans, measure_row, workdir=workdir, resume=resume)
    picture = plots.counting(folder / "counting.png", result)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return two Markdown tables: how far the nets count, and the share of words of brackets that are right."""
    config, lines = result["config"], []
    counts, bracketed = ([row for row in result["rows"] if name in row] for name in ("reach", "right"))
    if counts:
        head = f"right up to n: median (range) | seeds beyond n = {2 * config['trained_to']}"
        lines += [f"| language | cell | units | {head} |", "|---|---|---|---|---|"]
    for row in counts:
        far = sum(n > 2 * config["trained_to"] for n in row["reach"])
        spread = f"{np.median(row['reach']):.0f} ({min(row['reach'])} to {max(row['reach'])})"
        lines.append(f"| {row['language']} | {row['cell']} | {row['units']} | {spread} | {far}/{config['seeds']} |")
    for n, row in enumerate(bracketed):
        if not n:
            lines += ["", f"| language | cell | units | {' | '.join(f'length {at}' for at in row['lengths'])} |"]
            lines.append("|---" * (3 + len(row["lengths"])) + "|")
        cells = [f"{np.mean(share):.2f} ({min(share):.2f} to {max(share):.2f})" for share in row["right"]]
        lines.append(f"| {row['language']} | {row['cell']} | {row['units']} | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    runs.cli(
        "counting",
        main,
        quick={"languages": ("aⁿbⁿ", "Dyck-1"), "seeds": 2, "steps": 50, "trained_to": 10, "tested_to": 40},
    )
