"""For `flax.linen`: `Recurrent`, a layer that trains with the library's rule, and replacements for Flax's own cells.

    lstm = Recurrent(features=64, num_layers=2, bidirectional=True)
    variables = lstm.init(key, inputs)                                 # [batch, time, features]
    outputs = lstm.apply(variables, inputs, seq_lengths=lengths)

A checkpoint of `nn.LSTMCell`, `nn.OptimizedLSTMCell` or `nn.GRUCell` loads into the cells here, and `lstm_params` and
`gru_params` turn it into parameters for `unroll`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.recurrent import DenseParams
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlstm import LSTM, Cell, GRUParams, LSTMParams
from jaxlstm.adapters import conventions


class Recurrent(nn.Module):
    """A stack of any cell, in one direction or both; `unroll_stack` as a module.

    Attributes:
      features: units of each layer, and of each direction.
      num_layers: layers stacked on one another.
      bidirectional: every layer runs in both directions; outputs have 2·features.
      dropout: rate between layers; the key comes from the collection "dropout".
      cell: a `Cell`, such as `LSTM`, `GRU`, or your own.
      dtype: of the outputs and of what matmuls read; sums, gates and carries keep `param_dtype`.
      param_dtype: of the parameters.
      time_major, return_carry: as in `nn.RNN`.
      gradient: how to differentiate, as in `unroll`: `Bulk()`, `Scan()`, `Chunked()`.
      deterministic: no dropout.
    """

    features: int
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
        h, x, *params = promote_dtype(h, inputs, *lstm_params(tree), dtype=self.dtype)
        return conventions.step_lstm(self, carry, (LSTMParams(*params), h, x))


class GRUCell(nn.GRUCell):
    """`nn.GRUCell` computed by jaxlstm: same arguments, parameters and carry."""

    @nn.compact
    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Return the carry after one step, and the output."""
        tree = _dense_params(self, "rzn", inputs, carry, input_bias="rzn", hidden_bias="n")
        h, x, *params = promote_dtype(carry, inputs, *gru_params(tree), dtype=self.dtype)
        return conventions.step_gru(self, carry, (GRUParams(*params), h, x))


def lstm_params(tree: Mapping[str, Mapping[str, Any]]) -> LSTMParams:
    """Return the parameters of an `nn.LSTMCell` or `nn.OptimizedLSTMCell` as `unroll` takes them."""
    return LSTMParams(
        w_ih=_side_by_side(tree, "i", "ifgo", "kernel"),
        w_hh=_side_by_side(tree, "h", "ifgo", "kernel"),
        b=_side_by_side(tree, "h", "ifgo", "bias"),
    )


def gru_params(tree: Mapping[str, Mapping[str, Any]]) -> GRUParams:
    """Return the parameters of an `nn.GRUCell` as `unroll` takes them; Flax's z is u here."""
    return GRUParams(
        w_ih=_side_by_side(tree, "i", "rzn", "kernel"),
        w_hh=_side_by_side(tree, "h", "rzn", "kernel"),
        b=_side_by_side(tree, "i", "rzn", "bias"),
        b_hn=tree["hn"]["bias"],
    )


def _side_by_side(tree: Mapping[str, Mapping[str, Any]], side: str, gates: str, kind: str) -> Array:
    return jnp.concatenate([tree[side + gate][kind] for gate in gates], axis=-1)


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
            tree[side + gate] = {"kernel": kernel, "bias": bias}
    return tree
