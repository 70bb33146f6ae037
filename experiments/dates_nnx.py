"""The date reader as a flax.nnx module: the encoder is `Recurrent`, the decoder is `nnx.RNN` over our cell."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxlstm import generate
from jaxlstm.adapters.nnx import OptimizedLSTMCell, Recurrent


class Reader(nnx.Module):
    """A bidirectional encoder, and a decoder with attention over the unpadded text."""

    def __init__(self, num_symbols: int, num_outputs: int, hidden_size: int, *, rngs: nnx.Rngs):
        h, embedding = hidden_size, nnx.initializers.normal(1.0)
        dense = functools.partial(nnx.Linear, use_bias=False, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs)
        self.num_outputs = num_outputs
        self.read = nnx.Embed(num_symbols, h, embedding_init=embedding, rngs=rngs)
        self.encoder = Recurrent(h, h, bidirectional=True, return_carry=True, rngs=rngs)
        self.bridge = dense(2 * h, h)
        self.written = nnx.Embed(num_outputs + 1, h, embedding_init=embedding, rngs=rngs)
        self.decoder = nnx.RNN(OptimizedLSTMCell(h, h, rngs=rngs), rngs=False)
        self.query, self.combine, self.readout = dense(h, 2 * h), dense(3 * h, h), dense(h, num_outputs)

    def __call__(
        self, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"], previous: Int[Array, "batch steps"]
    ) -> tuple[Float[Array, "batch steps outputs"], Float[Array, "batch steps time"]]:
        """Return the logits of every symbol given the symbols before it, and the attention weights."""
        ys, real, start = self.encode(chars, lengths)
        return self.attend(ys, real, self.decoder(self.written(previous), initial_carry=start))

    def encode(self, chars: Array, lengths: Array) -> tuple[Array, Array, tuple[Array, Array]]:
        """Read texts in both directions."""
        (ends,), ys = self.encoder(self.read(chars), seq_lengths=lengths)
        h = jnp.tanh(self.bridge(jnp.concatenate([ends.forward.h, ends.backward.h], axis=-1)))
        return ys, jnp.arange(chars.shape[1]) < lengths[:, None], (jnp.zeros_like(h), h)  # Flax's carry is (c, h)

    def attend(self, ys: Array, real: Array, hs: Float[Array, "batch steps hidden"]) -> tuple[Array, Array]:
        """Attend to the text; return the logits of the next symbol, and the attention weights."""
        scores = jnp.einsum("bsh,bth->bst", self.query(hs), ys)
        weights = jax.nn.softmax(scores, where=real[:, None])
        seen = jnp.einsum("bst,bth->bsh", weights, ys)
        return self.readout(jnp.tanh(self.combine(jnp.concatenate([hs, seen], axis=-1)))), weights

    def write(self, chars: Array, lengths: Array, num_steps: int) -> Int[Array, "batch steps"]:
        """Write greedily: the most likely symbol at every step."""
        ys, real, start = self.encode(chars, lengths)

        def step(carry: Any, symbol: Array, key: Any) -> tuple[Any, Array]:
            carry, h = self.decoder.cell(carry, self.written(symbol))
            return carry, self.attend(ys, real, h[:, None])[0][:, 0].argmax(axis=-1).astype(symbol.dtype)

        nothing = jnp.full(len(chars), self.num_outputs)
        return generate(step, start, nothing, jax.random.key(0), num_steps)[1].T


def init(key: Key[Array, ""], num_symbols: int, num_outputs: int, hidden_size: int) -> Any:
    """Draw the initial parameters."""
    reader = Reader(num_symbols, num_outputs, hidden_size, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(reader, nnx.Param))


def predict(
    params: Any, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"], previous: Int[Array, "batch steps"]
) -> tuple[Float[Array, "batch steps outputs"], Float[Array, "batch steps time"]]:
    """Return the logits of every symbol given the symbols before it, and the attention weights."""
    return _reader(params)(chars, lengths, previous)


def write(
    params: Any, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"], num_steps: int
) -> Int[Array, "batch steps"]:
    """Write greedily: the most likely symbol at every step."""
    return _reader(params).write(chars, lengths, num_steps)


def _reader(params: Any) -> Reader:
    (num_symbols, hidden_size), num_outputs = params["read"]["embedding"].shape, params["readout"]["kernel"].shape[1]

    def abstract() -> Reader:
        return Reader(num_symbols, num_outputs, hidden_size, rngs=nnx.Rngs(0))

    reader = nnx.eval_shape(abstract)  # shapes only: the parameters replace its values
    graph, state = nnx.split(reader, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
