"""Can a network learn from a stream without storing it? An LSTM that learns forward in time, after every letter.

The stream is from Elman, Finding structure in time, 1990: "ba", "dii" and "guuu" in random order. No network can
predict the consonants, but one with a memory can predict the vowels. Instead of the past, the learner keeps how the
carry depends on the weights: two numbers per weight (SnAp-1, Menick et al. 2021), updated after every letter.

    python examples/stream.py

Expect a loss of 0.38 nats per letter after about ten seconds. The best predictor that sees only the last letter has a
loss of 0.73, and one that knows the three words 0.37.
"""

import itertools
import math
import random
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlstm import LSTM, rtrl

WORDS, LETTERS = ("ba", "dii", "guuu"), "bdgaiu"
NUM_LETTERS, WINDOW, HIDDEN_SIZE = 8_000, 1_000, 16


class Readout(NamedTuple):
    w: jax.Array  # [hidden, letter]
    b: jax.Array  # [letter]


def loss_fn(readout: Readout, y: jax.Array, next_letter: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(y @ readout.w + readout.b, next_letter)


def memoryless_loss(text: str) -> float:
    """Return the loss of the best predictor that sees only the last letter: the conditional entropy, in nats."""
    pairs, singles = Counter(itertools.pairwise(text)), Counter(text[:-1])
    return -sum(count * math.log(count / singles[last]) for (last, _), count in pairs.items()) / (len(text) - 1)


def main() -> dict[str, float]:
    text = "".join(random.Random(0).choices(WORDS, k=NUM_LETTERS // 2))[: NUM_LETTERS + 1]
    letters = jnp.array([LETTERS.index(letter) for letter in text])
    xs = jax.nn.one_hot(letters, len(LETTERS))

    params = LSTM.init(jax.random.key(0), len(LETTERS), HIDDEN_SIZE)
    readout = Readout(jnp.zeros((HIDDEN_SIZE, len(LETTERS))), jnp.zeros(len(LETTERS)))
    optimizer = optax.adam(3e-3)
    pattern = rtrl.snap1_pattern(LSTM, params, xs[0])
    state = rtrl.OnlineState(
        (params, readout), optimizer.init((params, readout)), rtrl.init_rtrl(LSTM, params, pattern=pattern)
    )
    online_step = rtrl.make_online_step(LSTM, loss_fn, optimizer, pattern=pattern)

    @jax.jit
    def read(state: rtrl.OnlineState, pairs: tuple[jax.Array, jax.Array]) -> tuple[rtrl.OnlineState, jax.Array]:
        """Learn from a window as one scan; on a live stream, jit `online_step` and call it for every letter."""
        return jax.lax.scan(lambda state, pair: online_step(state, *pair), state, pairs)

    losses = []
    for start in range(0, NUM_LETTERS, WINDOW):
        stop = start + WINDOW
        state, loss = read(state, (xs[start:stop], letters[start + 1 : stop + 1]))
        losses.append(float(loss.mean()))
        print(f"letters {start:6,} to {stop:6,}: {losses[-1]:.3f} nats per letter")
    memoryless = memoryless_loss(text)
    print(f"the best predictor without memory: {memoryless:.3f}; one that knows the words: {math.log(3) / 3:.3f}")
    return {"first": losses[0], "last": losses[-1], "memoryless": memoryless}


if __name__ == "__main__":
    main()
