"""For `flax.nnx`: `Recurrent`, a layer that trains by the library's rule, and cells in place of Flax's own.

    lstm = Recurrent(80, 64, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
    outputs = lstm(inputs, seq_lengths=lengths)                        # [batch, time, features]

The cells have the parameters of Flax's, so its checkpoints load, and `cell.params` is what `unroll` takes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlstm import LSTM, Cell, GRUParams, LSTMParams
from jaxlstm.adapters import conventions


class Recurrent(nnx.Module):
    """A stack of any cell, in one direction or both; `unroll_stack` as a module."""

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        cell: Cell[Any, Any] = LSTM,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        time_major: bool = False,
        return_carry: bool = False,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        """Draw the parameters.

        Args:
          in_features: features of the inputs.
          features: units of each layer, and of each direction.
          num_layers: layers upon one another.
          bidirectional: every layer runs in both directions; outputs have 2·features.
          dropout: rate between layers.
          cell: a `Cell`, such as `LSTM`, `GRU`, or one of your own.
          dtype: what matmuls read, and of the outputs; sums, gates and carries keep `param_dtype`.
          param_dtype: of the parameters.
          time_major, return_carry: as in `nnx.RNN`.
          deterministic: no dropout; `model.eval()` sets it.
          rngs: the stream "params" draws the parameters, "dropout" the masks.
        """
        self.in_features, self.dropout, self.dtype = in_features, dropout, dtype
        self.time_major, self.return_carry, self.deterministic = time_major, return_carry, deterministic
        self.options = conventions.Options(cell, features, num_layers, bidirectional, param_dtype)
        tree = conventions.init_layers(rngs.params(), in_features, self.options)
        self.layers = nnx.data(jax.tree.map(nnx.Param, tree))
        self.rngs = rngs.dropout.fork() if dropout else nnx.data(None)

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
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Return the outputs, or with `return_carry` (carries, outputs).

        Args:
          inputs: [*batch, time, features], or [time, *batch, features] if `time_major`.
          initial_carry: a list of carries, one a layer, as it was returned.
          seq_lengths: [*batch] integers; outputs beyond are 0, and the carry is that after the last real step.
          mask: [*batch, time], True where a step is real.
          reset: [*batch, time], True where a new segment or episode starts.
          noise: for a regularised cell, one a layer, [*batch, time, ...]: what `Noisy` has beside x. None: evaluation.
          return_carry, time_major, deterministic: in place of the attributes.
          rngs: for dropout, in place of the module's own.
        """
        choose = lambda given, own: own if given is None else given
        tree = jax.tree.map(lambda p: p[...], self.layers, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
        drops = self.dropout and not choose(deterministic, self.deterministic)
        stream = self.rngs if rngs is None else getattr(rngs, "dropout", rngs)
        return conventions.run_layers(
            self.options.cell,
            conventions.layers_of(tree, self.in_features, self.options),
            jnp.asarray(inputs),
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            mask=mask,
            reset=reset,
            noise=noise,
            dropout=self.dropout if drops else 0.0,
            key=stream() if drops else None,
            time_major=choose(time_major, self.time_major),
            return_carry=choose(return_carry, self.return_carry),
            dtype=self.dtype,
        )


class LSTMCell(nnx.LSTMCell):
    """`nnx.LSTMCell` by jaxlstm's equations: same arguments, parameters and carry (c, h)."""

    @property
    def params(self) -> LSTMParams:
        """The parameters as `unroll` takes them."""
        inputs, hidden = (self.ii, self.if_, self.ig, self.io), (self.hi, self.hf, self.hg, self.ho)
        return LSTMParams(
            w_ih=jnp.concatenate([gate.kernel[...] for gate in inputs], axis=-1),
            w_hh=jnp.concatenate([gate.kernel[...] for gate in hidden], axis=-1),
            b=jnp.concatenate([gate.bias[...] for gate in hidden], axis=-1),
        )

    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """Return the carry (c, h) after one step, and the output."""
        return _step_lstm(self, carry, inputs)


class OptimizedLSTMCell(nnx.OptimizedLSTMCell):
    """`nnx.OptimizedLSTMCell` by jaxlstm's equations: same arguments, parameters and carry (c, h)."""

    @property
    def params(self) -> LSTMParams:
        """The parameters as `unroll` takes them."""
        return LSTMParams(self.dense_i.kernel[...], self.dense_h.kernel[...], self.dense_h.bias[...])

    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """Return the carry (c, h) after one step, and the output."""
        return _step_lstm(self, carry, inputs)


class GRUCell(nnx.GRUCell):
    """`nnx.GRUCell` by jaxlstm's equations: same arguments, parameters and carry; it has no b_hn."""

    @property
    def params(self) -> GRUParams:
        """The parameters as `unroll` takes them."""
        w_hh = self.dense_h.kernel[...]
        b_hn = jnp.zeros(w_hh.shape[0], w_hh.dtype)
        return GRUParams(self.dense_i.kernel[...], w_hh, self.dense_i.bias[...], b_hn)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Return the carry after one step, and the output."""
        h, x, *params = self.promote_dtype((carry, inputs, *self.params), dtype=self.dtype)
        return conventions.step_gru(self, carry, (GRUParams(*params), h, x))


def _step_lstm(cell: Any, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
    _, h = carry
    h, x, *params = cell.promote_dtype((h, inputs, *cell.params), dtype=cell.dtype)
    return conventions.step_lstm(cell, carry, (LSTMParams(*params), h, x))
