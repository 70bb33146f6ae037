"""Initial parameters of an LSTM as other libraries and papers draw them.

Each is a function (key, input_size, hidden_size, *, dtype) -> LSTMParams, like the default `LSTM.init`. `chrono` also
needs `max_lag`: bind it with `functools.partial`. To use one where a function takes a cell, replace the cell's `init`:
`dataclasses.replace(LSTM, init=initializers.torch)`.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jaxlstm.cell import glorot_orthogonal, orthogonal, per_gate
from jaxlstm.checks import ArgumentValueError, border, checked_init, shown
from jaxlstm.lstm import LSTMParams, gate_bias

__all__ = ["chrono", "flax", "keras", "torch"]


@border("initializers.torch")
def torch(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> LSTMParams:
    """Draw as `torch.nn.LSTM` does: everything from U(−1/√H, 1/√H); b is the sum of torch's two biases.

    Raises:
      TypeError, ValueError: as `LSTM.init`.

    >>> import dataclasses, jax, jaxlstm
    >>> cell = dataclasses.replace(jaxlstm.LSTM, init=jaxlstm.initializers.torch)
    >>> cell.init(jax.random.key(0), 5, 7).w_ih.shape
    (5, 28)
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    keys, bound = jax.random.split(key, 4), hidden_size**-0.5
    shapes = ((input_size, 4 * hidden_size), (hidden_size, 4 * hidden_size), (4 * hidden_size,), (4 * hidden_size,))
    w_ih, w_hh, b_ih, b_hh = (
        jax.random.uniform(k, shape, jnp.float32, -bound, bound) for k, shape in zip(keys, shapes, strict=True)
    )
    return LSTMParams(w_ih.astype(dtype), w_hh.astype(dtype), (b_ih + b_hh).astype(dtype))


@border("initializers.keras")
def keras(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> LSTMParams:
    """Draw as `keras.layers.LSTM` does: Glorot-uniform and orthogonal over all four gates at once; forget bias 1.

    Raises:
      TypeError, ValueError: as `LSTM.init`.

    >>> keras(jax.random.key(0), 5, 7).b[7].item()  # a forget gate's
    1.0
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    key_ih, key_hh = jax.random.split(key)
    w_ih = jax.nn.initializers.glorot_uniform()(key_ih, (input_size, 4 * hidden_size), jnp.float32)
    w_hh = orthogonal(key_hh, (hidden_size, 4 * hidden_size), jnp.float32)
    return LSTMParams(w_ih.astype(dtype), w_hh.astype(dtype), gate_bias(hidden_size, dtype, f=1.0))


@border("initializers.flax")
def flax(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> LSTMParams:
    """Draw as Flax's LSTM cells do: LeCun-normal and orthogonal, gate by gate; all biases 0, the forget gate's too.

    Raises:
      TypeError, ValueError: as `LSTM.init`.

    >>> flax(jax.random.key(0), 5, 7).b[7].item()  # a forget gate's
    0.0
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    key_ih, key_hh = jax.random.split(key)
    w_ih = per_gate(jax.nn.initializers.lecun_normal(), key_ih, (input_size, hidden_size), 4, dtype)
    w_hh = per_gate(orthogonal, key_hh, (hidden_size, hidden_size), 4, dtype)
    return LSTMParams(w_ih, w_hh, gate_bias(hidden_size, dtype))


@border("initializers.chrono")
def chrono(
    key: Key[Array, ""], input_size: int, hidden_size: int, *, max_lag: int, dtype: DTypeLike = jnp.float32
) -> LSTMParams:
    """Draw the default weights and the chrono bias: b_f ~ log U(1, max_lag − 1), b_i = −b_f.

    Tallec & Ollivier, Can recurrent neural networks warp time?, 2018.

    Args:
      key, input_size, hidden_size, dtype: as for `LSTM.init`.
      max_lag: the longest dependency expected, in steps (T_max in the paper); more than 2.

    Raises:
      TypeError, ValueError: as `LSTM.init`; ValueError if `max_lag` is 2 or less.

    >>> b = chrono(jax.random.key(0), 5, 7, max_lag=100).b
    >>> bool((b[:7] == -b[7:14]).all()), bool(b[7:14].max() < jnp.log(99))
    (True, True)
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    if not isinstance(max_lag, int | float) or isinstance(max_lag, bool) or not 2 < max_lag < math.inf:
        raise ArgumentValueError(f"max_lag must be more than 2 steps, got {shown(max_lag)}.")
    key_weights, key_bias = jax.random.split(key)
    w_ih, w_hh = glorot_orthogonal(key_weights, input_size, hidden_size, 4, dtype)
    b_f = jnp.log(jax.random.uniform(key_bias, (hidden_size,), jnp.float32, 1.0, max_lag - 1.0))
    return LSTMParams(w_ih, w_hh, gate_bias(hidden_size, dtype, i=-b_f, f=b_f))
