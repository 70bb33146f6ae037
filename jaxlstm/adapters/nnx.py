"""For `flax.nnx`: `Recurrent`, a layer that trains with the library's rule, and replacements for Flax's own cells.

    lstm = Recurrent(80, 64, num_layers=2, bidirectional=True, rngs=nnx.Rngs(0))
    outputs = lstm(inputs, seq_lengths=lengths)                        # [batch, time, features]

The cells have the same parameters as Flax's, so checkpoints load; `cell.params` returns them as `unroll` takes them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlstm import GRU, LSTM, Cell, GRUParams, LSTMParams
from jaxlstm.adapters import conventions, weights


class Recurrent(nnx.Module):
    """A stack of any cell, in one direction or both; `unroll_stack` as a module."""

    def __init__(
        self,
        in_features: int,
        features: int | Sequence[int],
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
        gradient: Any = "bulk",
        rngs: nnx.Rngs,
    ):
        """Draw the parameters.

        Args:
          in_features: features of the inputs.
          features: units of each layer, and of each direction; or a list with the units of every layer.
          num_layers: layers stacked on one another; leave it out if `features` is a list.
          bidirectional: every layer runs in both directions; outputs have 2·features.
          dropout: rate between layers.
          cell: a `Cell`, such as `LSTM`, `GRU`, or your own.
          dtype: of the outputs and of what matmuls read; sums, gates and carries keep `param_dtype`.
          param_dtype: of the parameters.
          time_major, return_carry: as in `nnx.RNN`.
          gradient: how to differentiate, as in `unroll`: `Bulk()`, `Scan()`, `Chunked()`.
          deterministic: no dropout; `model.eval()` sets it.
          rngs: the stream "params" draws the parameters, "dropout" the masks.
        """
        features = tuple(features) if isinstance(features, Sequence) else features  # a list cannot be hashed
        self.in_features, self.dropout, self.dtype = in_features, dropout, dtype
        self.time_major, self.return_carry, self.deterministic = time_major, return_carry, deterministic
        self.options = conventions.Options(cell, features, num_layers, bidirectional, param_dtype, dtype, gradient)
        tree = conventions.init_layers(rngs.params(), in_features, self.options)
        self.layers = nnx.data(jax.tree.map(nnx.Param, tree))
        self.rngs = rngs.dropout.fork() if dropout else nnx.data(None)

    @property
    def params(self) -> list[Any]:
        """The stack as `unroll_stack` takes it."""
        tree = nnx.to_pure_dict(nnx.state(self, nnx.Param))["layers"]
        return conventions.layers_of(tree, self.in_features, self.options)

    def load(self, layers: Sequence[Any]) -> None:
        """Replace the parameters by a stack, such as `jaxlstm.adapters.weights.from_torch` returns.

        Raises:
          ValueError: the stack has other shapes or another dtype.
        """
        tree = jax.tree.map(jnp.asarray, conventions.tree_of(layers))
        expected, got = (jax.tree.map(_described, t) for t in (nnx.to_pure_dict(nnx.state(self.layers)), tree))
        if got != expected:
            raise ValueError(f"Recurrent: layers must be {expected}, got {got}.")
        # In place: an optimizer may hold these very variables.
        nnx.update(self, {"layers": tree})

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
          initial_carry: a list of carries, one per layer, as an earlier call returned it.
          seq_lengths: [*batch] integers; later outputs are 0, and the carry returned is the last real one.
          mask: [*batch, time], True where a step is real.
          reset: [*batch, time], True where a new segment or episode starts.
          noise: for a regularized cell, the `noise` of its `Noisy` input, one per layer, [*batch, time, ...].
          return_carry, time_major, deterministic: override the attributes.
          rngs: for dropout; overrides the module's own.
        """
        drops = self.dropout and not conventions.either(deterministic, self.deterministic)
        stream = self.rngs if rngs is None else getattr(rngs, "dropout", rngs)
        call = conventions.Call(
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            mask=mask,
            reset=reset,
            noise=noise,
            dropout=self.dropout if drops else 0.0,
            key=stream() if drops else None,
            time_major=conventions.either(time_major, self.time_major),
            return_carry=conventions.either(return_carry, self.return_carry),
        )
        return conventions.run_layers(self.params, jnp.asarray(inputs), self.options, call)


def _described(leaf: Array) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


class LSTMCell(nnx.LSTMCell):
    """`nnx.LSTMCell` computed by jaxlstm: same arguments, parameters and carry (c, h)."""

    @property
    def params(self) -> LSTMParams:
        """The parameters as `unroll` takes them."""
        return weights.from_nnx(LSTM, nnx.state(self, nnx.Param))

    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """Return the carry (c, h) after one step, and the output."""
        return _step_lstm(self, carry, inputs)


class OptimizedLSTMCell(nnx.OptimizedLSTMCell):
    """`nnx.OptimizedLSTMCell` computed by jaxlstm: same arguments, parameters and carry (c, h)."""

    @property
    def params(self) -> LSTMParams:
        """The parameters as `unroll` takes them."""
        return weights.from_nnx(LSTM, nnx.state(self, nnx.Param))

    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """Return the carry (c, h) after one step, and the output."""
        return _step_lstm(self, carry, inputs)


class GRUCell(nnx.GRUCell):
    """`nnx.GRUCell` computed by jaxlstm: same arguments, parameters and carry; it has no b_hn.

    >>> cell = GRUCell(5, 7, rngs=nnx.Rngs(0))
    >>> cell(jnp.zeros((3, 7)), jnp.ones((3, 5)))[1].shape
    (3, 7)
    """

    @property
    def params(self) -> GRUParams:
        """The parameters as `unroll` takes them."""
        return weights.from_nnx(GRU, nnx.state(self, nnx.Param))

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Return the carry after one step, and the output."""
        h, x, *params = self.promote_dtype((carry, inputs, *self.params), dtype=self.dtype)
        return conventions.step_gru(self, carry, (GRUParams(*params), h, x))


def _step_lstm(cell: Any, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
    _, h = carry
    h, x, *params = cell.promote_dtype((h, inputs, *cell.params), dtype=cell.dtype)
    return conventions.step_lstm(cell, carry, (LSTMParams(*params), h, x))
