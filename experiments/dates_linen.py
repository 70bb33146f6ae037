"""The date reader as a flax.linen module: the encoder is `Recurrent`, the decoder is `nn.RNN` over our cell."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from jaxlstm import generate
from jaxlstm.adapters.linen import LSTMCell, Recurrent


class Reader(nn.Module):
    """A bidirectional encoder, and a decoder with attention over the unpadded text."""

    num_symbols: int
    num_outputs: int
    hidden_size: int

    def setup(self) -> None:
        h, embedding = self.hidden_size, nn.initializers.normal(1.0)
        self.read = nn.Embed(self.num_symbols, h, embedding_init=embedding)
        self.written = nn.Embed(self.num_outputs + 1, h, embedding_init=embedding)
        self.encoder = Recurrent(h, bidirectional=True, return_carry=True)
        self.decoder = nn.RNN(LSTMCell(h))
        self.bridge, self.query, self.combine, self.readout = (
            nn.Dense(size, use_bias=False, kernel_init=nn.initializers.glorot_uniform())
            for size in (h, 2 * h, h, self.num_outputs)
        )

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

    def step(self, carry: Any, symbol: Array, ys: Array, real: Array) -> tuple[Any, Array]:
        """Write the most likely next symbol."""
        carry, h = self.decoder.cell(carry, self.written(symbol))
        return carry, self.attend(ys, real, h[:, None])[0][:, 0].argmax(axis=-1).astype(symbol.dtype)


def init(key: Key[Array, ""], num_symbols: int, num_outputs: int, hidden_size: int) -> Any:
    """Draw the initial parameters."""
    one = jnp.ones((1, 1), int)
    return Reader(num_symbols, num_outputs, hidden_size).init(key, one, one[0], one)["params"]


def predict(
    params: Any, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"], previous: Int[Array, "batch steps"]
) -> tuple[Float[Array, "batch steps outputs"], Float[Array, "batch steps time"]]:
    """Return the logits of every symbol given the symbols before it, and the attention weights."""
    return _reader(params).apply({"params": params}, chars, lengths, previous)


def write(
    params: Any, chars: Int[Array, "batch time"], lengths: Int[Array, "batch"], num_steps: int
) -> Int[Array, "batch steps"]:
    """Write greedily: the most likely symbol at every step."""
    reader = _reader(params).bind({"params": params})
    ys, real, start = reader.encode(chars, lengths)

    def step(carry: Any, symbol: Array, key: Any) -> tuple[Any, Array]:
        return reader.step(carry, symbol, ys, real)

    nothing = jnp.full(len(chars), reader.num_outputs)
    return generate(step, start, nothing, jax.random.key(0), num_steps)[1].T


def _reader(params: Any) -> Reader:
    (num_symbols, hidden_size), num_outputs = params["read"]["embedding"].shape, params["readout"]["kernel"].shape[1]
    return Reader(num_symbols, num_outputs, hidden_size)
