"""Which character comes next? A language model of two LSTM layers, and a text that it writes.

The text is drawn from 1,024 sentences such as "the dogs at sea hear the owl. ". The verb agrees with the first noun, so
the model must remember that noun.

    python examples/language_model.py

Expect 0.36 bits per held-out character after about ten seconds, and 3.63 from the frequencies of the characters alone.
Choosing a sentence takes ten bits, which is 0.35 per character: no model can need fewer.
"""

import functools
import itertools
import math
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlstm import LSTM, fit, generate, init_stack, init_train_state, make_train_step, step_stack, unroll_stack

NOUNS, VERBS = ("cat", "dog", "owl", "hen", "cats", "dogs", "owls", "hens"), ("see", "hear", "like", "find")
SENTENCES = [
    f"the {subject}{place} {verb if subject.endswith('s') else verb + 's'} the {thing}. "
    for subject, place, verb, thing in itertools.product(NOUNS, ("", " at home", " at sea", " in bed"), VERBS, NOUNS)
]
SYMBOLS = "".join(sorted(set("".join(SENTENCES))))
NUM_SENTENCES, NUM_STREAMS, SEQ_LEN, NUM_EPOCHS = 2000, 8, 32, 5
EMBEDDING_SIZE, HIDDEN_SIZES, DROPOUT = 48, (48, 48), 0.1


def make_streams(rng: random.Random, num_sentences: int) -> jax.Array:
    """Write a text, and cut it into streams that are read side by side; return tokens [time, stream]."""
    text = "".join(rng.choices(SENTENCES, k=num_sentences))
    length = len(text) // NUM_STREAMS
    tokens = jnp.array([SYMBOLS.index(character) for character in text[: NUM_STREAMS * length]])
    return tokens.reshape(NUM_STREAMS, length).T


class Model(NamedTuple):
    embedding: jax.Array  # [symbol, features]
    layers: list[Any]  # one LSTMParams per layer
    w: jax.Array  # [hidden, symbol]


def initial_carries(model: Model, *batch_shape: int) -> list[Any]:
    return [LSTM.initial_carry(layer, batch_shape) for layer in model.layers]


def loss_fn(model: Model, tokens: jax.Array, carries: list[Any], key: Any, dropout: float = DROPOUT) -> Any:
    """Return the loss in nats of tokens [time + 1, stream], and the carries for the next batch."""
    xs = model.embedding[tokens[:-1]]
    carries, ys = unroll_stack(LSTM, model.layers, xs, carries, dropout=dropout, key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels(ys @ model.w, tokens[1:])
    return losses.mean(), (carries, {})


@functools.partial(jax.jit, static_argnames="num_steps")
def sample(model: Model, first: jax.Array, key: jax.Array, num_steps: int) -> jax.Array:
    def write_next(carries: list[Any], token: jax.Array, key: jax.Array) -> tuple[list[Any], jax.Array]:
        carries, y = step_stack(LSTM, model.layers, carries, model.embedding[token])
        return carries, jax.random.categorical(key, y @ model.w)

    return generate(write_next, initial_carries(model), first, key, num_steps)[1]


def main() -> dict[str, float]:
    rng = random.Random(0)
    train, held_out = make_streams(rng, NUM_SENTENCES), make_streams(rng, NUM_SENTENCES // 5)
    # A batch starts with the last token of the one before, which that batch predicted and did not read.
    starts = jnp.arange(0, len(train) - SEQ_LEN, SEQ_LEN)
    batches = train[starts[:, None] + jnp.arange(SEQ_LEN + 1)]

    embedding_key, layers_key, train_key, sample_key = jax.random.split(jax.random.key(0), 4)
    embedding = jax.random.normal(embedding_key, (len(SYMBOLS), EMBEDDING_SIZE))
    layers = init_stack(layers_key, LSTM, EMBEDDING_SIZE, HIDDEN_SIZES)
    model = Model(embedding, layers, jnp.zeros((HIDDEN_SIZES[-1], len(SYMBOLS))))
    carries = initial_carries(model, NUM_STREAMS)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, NUM_EPOCHS * len(batches)))
    train_epoch = jax.jit(functools.partial(fit, make_train_step(loss_fn, optimizer)))
    state = init_train_state(model, optimizer, train_key)
    for epoch in range(1, NUM_EPOCHS + 1):
        # `fit` passes the carries from batch to batch, but no gradient: truncated backpropagation through time.
        state, metrics = train_epoch(state._replace(carry=carries), batches)
        print(f"epoch {epoch}: {metrics['loss'].mean() / math.log(2):.3f} bits per character")

    held_out_loss, _ = jax.jit(functools.partial(loss_fn, dropout=0.0))(state.params, held_out, carries, None)
    bits = float(held_out_loss) / math.log(2)
    unigram = -float(jnp.log2(jnp.bincount(train.ravel()) / train.size)[held_out].mean())
    print(f"bits per held-out character: {bits:.3f}, by the frequencies of the characters {unigram:.3f}")
    written = sample(state.params, jnp.array(SYMBOLS.index(".")), sample_key, 300)
    print("".join(SYMBOLS[token] for token in written.tolist()))
    return {"bits": bits, "unigram": unigram}


if __name__ == "__main__":
    main()
