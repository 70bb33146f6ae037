"""Can a small model write any date, "the 3rd of May, '79" or "5/3/1979", as 1979-05-03?

A bidirectional LSTM reads the characters, and an LSTM with attention writes ten symbols. The same model is written as
pure functions, in flax.linen and in flax.nnx (`dates_functions.py`, `dates_linen.py`, `dates_nnx.py`). Expect it to
write more than 99 % of the held-out strings without any error after less than a minute of training. None of the
held-out days occurs in training, in any format.

    python -m experiments.dates --form linen
"""

import datetime
import functools
import logging
import operator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key

from experiments import dates_functions, dates_linen, dates_nnx, plots
from experiments.harness import devices, runs, trainer
from jaxlstm import TrainState, init_train_state, make_train_step, num_params

FORMS: dict[str, Any] = {"functions": dates_functions, "linen": dates_linen, "nnx": dates_nnx}
FIRST, LAST = (
    datetime.date(1970, 1, 1),
    datetime.date(2029, 12, 31),
)  # sixty years, so that a two-digit year is unambiguous
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FORMATS = (
    "{day} {month} {year}", "{day}{th} {month} {year}", "the {day}{th} of {month}, {year}", "{day} of {month} '{yy}",
    "{month} {day}, {year}", "{month} {day}{th}, {year}", "{mon} {day} {year}", "{mon}. {day}, '{yy}",
    "{weekday}, {day} {month} {year}", "{weekday} {month} {day} {year}", "{wd} {day} {mon} {yy}", "{day}-{mon}-{yy}",
    "{day}.{m}.{year}", "{dd}.{mm}.{yy}", "{m}/{day}/{year}", "{mm}/{dd}/{yy}", "{year}/{mm}/{dd}",
    "{year} {month} {day}",
)  # fmt: skip
SYMBOLS = "\0 '-,./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # \0 is padding
OUTPUTS = "0123456789-"
WIDTH, STEPS = 32, 10
NUM_STRINGS, NUM_HELD_OUT = 60_000, 5_000
SHOWN = ("Wednesday, 3 May 1989", "the 21st of October, 2015", "Dec. 1, '99", "1997 August 8", "2/11/1990", "11.2.1990")
DRAWN = (SHOWN[0], SHOWN[5])

log = logging.getLogger("dates")


# The strings.


def say(date: datetime.date, rng: np.random.Generator) -> str:
    """Write a date in a random format, as a person might."""
    month, weekday = MONTHS[date.month - 1], WEEKDAYS[date.weekday()]
    text = str(rng.choice(FORMATS)).format(
        day=date.day, dd=f"{date.day:02}", m=date.month, mm=f"{date.month:02}",
        year=date.year, yy=f"{date.year % 100:02}",
        month=month, mon=month[:3], weekday=weekday, wd=weekday[:3],
        th="th" if date.day // 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th"),
    )  # fmt: skip
    return (text, text, text.lower(), text.upper())[rng.integers(4)]


def days(held_out: bool) -> list[datetime.date]:
    """Return the held-out days, about a tenth of all days, or the other ones, for training."""
    out = np.random.default_rng(0).random((LAST - FIRST).days + 1) < 0.1
    return [FIRST + datetime.timedelta(int(n)) for n in np.flatnonzero(out == held_out)]


def strings(seed: int, number: int, *, held_out: bool) -> tuple[list[str], list[str]]:
    """Draw random strings; return them and their dates in ISO format."""
    rng, choice = np.random.default_rng([seed, held_out]), days(held_out)
    drawn = [choice[n] for n in rng.integers(len(choice), size=number)]
    return [say(date, rng) for date in drawn], [date.isoformat() for date in drawn]


def encode(texts: list[str]) -> tuple[Int[np.ndarray, "text time"], Int[np.ndarray, "text"]]:
    """Return the symbols of each text, padded, and the lengths."""
    chars = [[SYMBOLS.index(char) for char in text] for text in texts]
    padded = np.array([[*row, *[0] * (WIDTH - len(row))] for row in chars], np.int32)
    return padded, np.array([len(row) for row in chars], np.int32)


def encode_written(texts: list[str]) -> Int[np.ndarray, "text steps"]:
    """Return the symbols of texts that the model should write."""
    return np.array([[OUTPUTS.index(char) for char in text] for text in texts], np.int32)


# The loss and the score.


def shifted(written: Int[Array, "text steps"]) -> Int[Array, "text steps"]:
    """Return the symbol before each one; before the first there is a symbol for "nothing written yet"."""
    nothing = jnp.full_like(written[:, :1], len(OUTPUTS))
    return jnp.concatenate([nothing, written[:, :-1]], axis=1)


def loss_fn(params: Any, batch: Any, carry: Any, key: Key[Array, ""], *, form: str) -> Any:
    """Return the mean loss per symbol, in nats; the decoder reads the correct previous symbols (teacher forcing)."""
    chars, lengths, targets = batch
    logits, _ = FORMS[form].predict(params, chars, lengths, shifted(targets))
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), (carry, {})


@functools.partial(jax.jit, static_argnames="form")
def read(params: Any, chars: Array, lengths: Array, *, form: str) -> tuple[Array, Array]:
    """Return the symbols that the model writes, and its attention weights at each of them."""
    written = FORMS[form].write(params, chars, lengths, STEPS)
    _, weights = FORMS[form].predict(params, chars, lengths, shifted(written))
    return written, weights


def main(
    *,
    form: Literal["functions", "linen", "nnx"] = "functions",
    hidden_size: int = 64,
    batch_size: int = 128,
    steps: int = 1_000,
    learning_rate: float = 5e-3,
    seed: int = 0,
    block: int = 50,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a model to read dates, and test it on held-out days.

    Args:
      form: the code of the model; all three compute the same function.
      hidden_size: units of the decoder, and of each direction of the encoder.
      batch_size: strings in a batch.
      steps: number of steps of Adam; gradients are clipped to norm 1.
      learning_rate: peak of the schedule: linear warm-up, then a cosine decay to a hundredth of the peak.
      seed: random seed of the parameters and of the order of the strings.
      block: steps in one compiled call; a run can be saved or stopped only between two blocks.
      workdir: folder of the run; by default a new one, runs/dates/TIME.
      resume: continue the run in --workdir.
    """
    config = {k: v for k, v in locals().items() if k not in ("workdir", "resume")}
    folder = runs.open_folder("dates", workdir, config, resume=resume)
    texts, answers = strings(seed, NUM_STRINGS, held_out=False)
    data = (*encode(texts), encode_written(answers))
    held_out, right = strings(1, NUM_HELD_OUT, held_out=True)
    assert not set(held_out) & set(texts)

    def batches(steps: range) -> Any:
        chosen = np.stack([np.random.default_rng([seed, n]).integers(len(texts), size=batch_size) for n in steps])
        return jax.tree.map(operator.itemgetter(chosen), data)

    learning_rates = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, steps // 10), steps, learning_rate / 100
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rates))
    params_key, key = jax.random.split(jax.random.key(seed))
    params = FORMS[form].init(params_key, len(SYMBOLS), len(OUTPUTS), hidden_size)
    state = init_train_state(params, optimizer, key)
    log.info("%s: %d parameters, %d strings, e.g. %s", form, num_params(params), len(texts), ", ".join(texts[:3]))

    def examine(state: TrainState, metrics: trainer.Metrics, steps_per_second: float) -> runs.Row:
        written, _ = read(state.params, *encode(held_out), form=form)
        row = {"exact match": float((written == encode_written(right)).all(axis=1).mean())}
        log.info(
            "step %5d: %.1f steps/s, %.2f %% of the held-out strings exactly right",
            state.step, steps_per_second, 100 * row["exact match"],
        )  # fmt: skip
        return {**row, "error": 1 - row["exact match"]}

    train_step = make_train_step(functools.partial(loss_fn, form=form), optimizer)
    state = runs.restore(folder, state)
    schedule = trainer.Schedule(steps, block, trainer.interval(steps, block, times=6), save_every=500, keep=2)
    state = trainer.train("dates", folder, train_step, state, batches, examine, schedule, score="error")
    return report(folder, config, state.params, held_out, right)


def report(folder: Path, config: dict[str, Any], params: Any, texts: list[str], right: list[str]) -> dict[str, Any]:
    """Test the model on the held-out strings and on a few more; write result.json and the picture."""
    answers = spell(read(params, *encode(texts), form=config["form"])[0])
    wrong = [(text, answer) for text, answer, want in zip(texts, answers, right, strict=True) if answer != want]
    written, weights = read(params, *encode(list(SHOWN)), form=config["form"])
    result: dict[str, Any] = {
        "config": config,
        "versions": runs.versions(),
        "device": devices.found(),
        "held-out strings": len(texts),
        "exact match": 1 - len(wrong) / len(texts),
        "wrong": wrong[:10],
        "shown": dict(zip(SHOWN, spell(written), strict=True)),
        "attended": {
            text: {"written": answer, "weights": np.asarray(own, float)[:, : len(text)].round(3).tolist()}
            for text, answer, own in zip(SHOWN, spell(written), weights, strict=True)
            if text in DRAWN
        },
    }
    runs.write_json(folder / "result.json", result)
    picture = plots.attention(folder / "attention.png", result["attended"], result["exact match"])
    for text, answer in result["shown"].items():
        log.info("%-26s %s", text, answer)
    log.info("%.2f %% of %d held-out strings exactly right", 100 * result["exact match"], len(texts))
    log.info("written: %s", ", ".join(map(str, [folder / "result.json", picture])))
    return result


def spell(rows: Array) -> list[str]:
    """Return the texts that rows of output symbols stand for."""
    return ["".join(OUTPUTS[n] for n in row) for row in np.asarray(rows)]


if __name__ == "__main__":
    runs.cli("dates", main, quick={"steps": 50})
