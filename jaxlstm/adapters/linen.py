"""For `flax.linen`: `Recurrent`, a layer that trains with the library's rule, and replacements for Flax's own cells.

    lstm = Recurrent(features=64, num_layers=2, bidirectional=True)
    variables = lstm.init(key, inputs)                                 # [batch, time, features]
    outputs = lstm.apply(variables, inputs, seq_lengths=lengths)

A checkpoint of `nn.LSTMCell`, `nn.OptimizedLSTMCell` or `nn.GRUCell` loads into the cells here. `from_rnn` turns a
checkpoint of `nn.RNN` into parameters of `Recurrent`. `recurrent_params` does the same for layers from any other
framework, as `jaxlstm.adapters.weights` reads them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.recurrent import DenseParams
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlstm import GRU, LSTM, Cell, GRUParams, LSTMParams
from jaxlstm.adapters import conventions, weights


class Recurrent(nn.Module):
    """A stack of any cell, in one direction or both; `unroll_stack` as a module.

    Attributes:
      features: units of each layer, and of each direction; or a list with the units of every layer.
      num_layers: layers stacked on one another; leave it out if `features` is a list.
      bidirectional: every layer runs in both directions; outputs have 2·features.
      dropout: rate between layers; the key comes from the collection "dropout".
      cell: a `Cell`, such as `LSTM`, `GRU`, or your own.
      dtype: of the outputs and of what matmuls read; sums, gates and carries keep `param_dtype`.
      param_dtype: of the parameters.
      time_major, return_carry: as in `nn.RNN`.
      gradient: how to differentiate, as in `unroll`: `Bulk()`, `Scan()`, `Chunked()`.
      deterministic: no dropout.
    """

    features: int | Sequence[int]
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    cell: Cell[Any, Any] = LSTM
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    time_major: bool = False
    return_carry: bool = False
    deterministic: bool | None = None
    gradient: Any = "bulk"

    def __post_init__(self) -> None:
        if isinstance(self.features, Sequence):
            self.features = tuple(self.features)  # a list cannot be hashed
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: list[Any] | None = None,
        seq_lengths: Array | None = None,
        mask: Array | None = None,
        reset: Array | None = None,
        noise: list[Any] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Return the outputs, or with `return_carry` (carries, outputs).

        Args:
          inputs: [*batch, time, features], or [time, *batch, features] if `time_major`.
          initial_carry: a list of carries, one per layer, as an earlier call returned it.
          seq_lengths: [*batch] integers; later outputs are 0, and the carry returned is the last real one.
          mask: [*batch, time], True where a step is real.
          reset: [*batch, time], True where a new segment or episode starts.
          noise: for a regularized cell, the `noise` of its `Noisy` input, one per layer, [*batch, time, ...].
          return_carry, time_major, deterministic: override the attributes.
        """
        inputs = jnp.asarray(inputs)
        options = conventions.Options(
            cell=self.cell,
            features=self.features,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            param_dtype=self.param_dtype,
            dtype=self.dtype,
            gradient=self.gradient,
        )
        layers = self.param("layers", lambda key: conventions.init_layers(key, inputs.shape[-1], options))
        drops = self.dropout and not conventions.either(deterministic, self.deterministic)
        call = conventions.Call(
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            mask=mask,
            reset=reset,
            noise=noise,
            dropout=self.dropout if drops else 0.0,
            key=self.make_rng("dropout") if drops else None,
            time_major=conventions.either(time_major, self.time_major),
            return_carry=conventions.either(return_carry, self.return_carry),
        )
        return conventions.run_layers(conventions.layers_of(layers, inputs.shape[-1], options), inputs, options, call)


class LSTMCell(nn.OptimizedLSTMCell):
    """`nn.LSTMCell` and `nn.OptimizedLSTMCell` computed by jaxlstm: same arguments, parameters and carry (c, h)."""

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """Return the carry (c, h) after one step, and the output."""
        _, h = carry
        tree = _dense_params(self, "ifgo", inputs, h, input_bias="", hidden_bias="ifgo")
        h, x, *params = promote_dtype(h, inputs, *weights.from_linen(LSTM, tree), dtype=self.dtype)
        return conventions.step_lstm(self, carry, (LSTMParams(*params), h, x))


class GRUCell(nn.GRUCell):
    """`nn.GRUCell` computed by jaxlstm: same arguments, parameters and carry.

    >>> import jax
    >>> xs = jnp.ones((3, 11, 5))  # [batch, time, features]
    >>> nn.RNN(GRUCell(7)).init_with_output(jax.random.key(0), xs)[0].shape
    (3, 11, 7)
    """

    @nn.compact
    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Return the carry after one step, and the output."""
        tree = _dense_params(self, "rzn", inputs, carry, input_bias="rzn", hidden_bias="n")
        h, x, *params = promote_dtype(carry, inputs, *weights.from_linen(GRU, tree), dtype=self.dtype)
        return conventions.step_gru(self, carry, (GRUParams(*params), h, x))


def recurrent_params(layers: Sequence[Any]) -> dict[str, Any]:
    """Return the parameters of a `Recurrent` from a list of layers, as `unroll_stack` takes them."""
    return {"layers": conventions.tree_of(layers)}


def from_rnn(cell: Cell[Any, Any], *trees: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the parameters of `nn.RNN` or `nn.Bidirectional`, one tree per layer, into those of a `Recurrent`.

    Args:
      cell: `LSTM` or `GRU`.
      *trees: as `jaxlstm.adapters.weights.from_linen` reads them.
    """
    return recurrent_params([weights.from_linen(cell, tree) for tree in trees])


def _dense_params(
    cell: Any, gates: str, inputs: Array, h: Array, *, input_bias: str, hidden_bias: str
) -> dict[str, dict[str, Any]]:
    """Make, or find, the parameters `ii`, `hi`, ... under the names and by the initializers of Flax's cells."""
    tree: dict[str, dict[str, Any]] = {}
    sides = {"i": (inputs, cell.kernel_init, input_bias), "h": (h, cell.recurrent_kernel_init, hidden_bias)}
    for gate in gates:
        for side, (value, kernel_init, biases) in sides.items():
            dense = DenseParams(
                features=h.shape[-1],
                use_bias=gate in biases,
                param_dtype=cell.param_dtype,
                kernel_init=kernel_init,
                bias_init=cell.bias_init,
                name=side + gate,
            )
            kernel, bias = dense(value)
            tree[side + gate] = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    return tree
