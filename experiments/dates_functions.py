"""The date reader as pure functions: a bidirectional encoder, and a decoder with attention over the unpadded text."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlstm import (
    LSTM,
    Bidirectional,
    LSTMParams,
    LSTMState,
    generate,
    init_bidirectional,
    length_mask,
    unroll,
    unroll_bidirectional,
)


class Reader(NamedTuple):
    """The parameters. Input symbols and output symbols have embeddings of `hidden` features."""

    read: Float[Array, "symbols hidden"]
    encoder: Bidirectional[LSTMParams]
    bridge: Float[Array, "2*hidden hidden"]  # from the encoder's last states to the decoder's first
    written: Float[Array, "outputs+1 hidden"]  # the last row is for "nothing written yet"
    decoder: LSTMParams
    query: Float[Array, "hidden 2*hidden"]
    combine: Float[Array, "3*hidden hidden"]
    readout: Float[Array, "hidden outputs"]


class Memory(NamedTuple):
    """The encoder's result, which the decoder reads."""

    ys: Float[Array, "time batch 2*hidden"]
    real: Bool[Array, "time batch"]  # False at padding
    start: LSTMState  # the decoder's first carry


def init(key: Key[Array, ""], num_symbols: int, num_outputs: int, hidden_size: int) -> Reader:
    """Draw the initial parameters."""
    keys = jax.random.split(key, 8)
    glorot, h = jax.nn.initializers.glorot_uniform(), hidden_size
    return Reader(
        read=jax.random.normal(keys[0], (num_symbols, h)),
        encoder=init_bidirectional(keys[1], LSTM, h, h),
        bridge=glorot(keys[2], (2 * h, h)),
        written=jax.random.normal(keys[3], (num_outputs + 1, h)),
        decoder=LSTM.init(keys[4], h, h),
        query=glorot(keys[5], (h, 2 * h)),
        combine=glorot(keys[6], (3 * h, h)),
        readout=glorot(keys[7], (h, num_outputs)),
    )


def encode(reader: Reader, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"]) -> Memory:
    """Read texts in both directions."""
    real = length_mask(lengths, chars.shape[1])
    ends, ys = unroll_bidirectional(LSTM, reader.encoder, reader.read[chars.T], mask=real)
    h = jnp.tanh(jnp.concatenate([ends.forward.h, ends.backward.h], axis=-1) @ reader.bridge)
    return Memory(ys, real, LSTMState(h, jnp.zeros_like(h)))


def attend(reader: Reader, memory: Memory, h: Float[Array, "*steps batch hidden"]) -> tuple[Array, Array]:
    """Attend to the text; return the logits of the next symbol, and the attention weights [*steps, batch, time]."""
    scores = jnp.einsum("...bh,tbh->...bt", h @ reader.query, memory.ys)
    weights = jax.nn.softmax(scores, where=memory.real.T)
    seen = jnp.einsum("...bt,tbh->...bh", weights, memory.ys)
    return jnp.tanh(jnp.concatenate([h, seen], axis=-1) @ reader.combine) @ reader.readout, weights


def predict(
    reader: Reader, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"], previous: Int[Array, "batch steps"]
) -> tuple[Float[Array, "batch steps outputs"], Float[Array, "batch steps time"]]:
    """Return the logits of every symbol given the symbols before it, and the attention weights."""
    memory = encode(reader, chars, lengths)
    _, hs = unroll(LSTM, reader.decoder, reader.written[previous.T], memory.start)
    logits, weights = attend(reader, memory, hs)
    return logits.swapaxes(0, 1), weights.swapaxes(0, 1)


def write(
    reader: Reader, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"], num_steps: int
) -> Int[Array, "batch steps"]:
    """Write greedily: the most likely symbol at every step."""
    memory = encode(reader, chars, lengths)

    def step(state: LSTMState, symbol: Array, key: Any) -> tuple[LSTMState, Array]:
        state, h = LSTM.step(reader.decoder, state, reader.written[symbol])
        return state, attend(reader, memory, h)[0].argmax(axis=-1).astype(symbol.dtype)

    nothing = jnp.full(len(chars), len(reader.written) - 1)
    _, symbols = generate(step, memory.start, nothing, jax.random.key(0), num_steps)
    return symbols.T
