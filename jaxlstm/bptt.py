"""The gradient of an LSTM derived by hand: backpropagation through time, written out (Werbos 1990; Greff et al. 2017).

It shares the equations with `unroll`, but none of the code that computes them. Forward lines are numbered, and every
backward line cites the forward lines it differentiates; `docs/derivation.md` derives them under the same numbers. `d_v`
is the derivative of the loss with respect to `v`. Here z is the whole pre-activation, which `unroll` calls z + a.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxlstm.checks import ArgumentTypeError, as_arrays, border, check_sequence, checked_flags
from jaxlstm.lstm import LSTM, LSTMGates, LSTMParams, LSTMState


class LSTMResiduals(NamedTuple):
    """What the forward pass keeps for the backward pass; every field starts with a time axis."""

    xs: Float[Array, "time *batch input"]
    previous: LSTMState  # h_{t-1}, c_{t-1}
    gates: LSTMGates[Float[Array, "time *batch hidden"]]
    tanh_c: Float[Array, "time *batch hidden"]
    mask: Bool[Array, "time *batch 1"]


@border("lstm_forward")
def lstm_forward(
    params: LSTMParams,
    xs: Float[Array, "time *batch input"],
    carry: LSTMState,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
) -> tuple[tuple[LSTMState, Float[Array, "time *batch hidden"]], LSTMResiduals]:
    """Run an LSTM and keep the values that its gradient needs.

    Args:
      params: of one layer.
      xs: [time, *batch, input].
      carry: h_0 and c_0, each [*batch, hidden].
      mask: True where a step is real; default everywhere.

    Returns:
      (final state, outputs [time, *batch, hidden]), and the residuals for `lstm_backward`.

    Raises:
      TypeError, ValueError: as `unroll`.
    """
    params, xs, carry, mask = _checked(params, xs, carry, mask)
    w_ih, w_hh, b = params
    b = jnp.broadcast_to(b, (*xs.shape[1:-1], b.size))
    mask = mask[..., None]
    # A NaN in padding must not be multiplied into the gradient of the weights.
    xs = jnp.where(mask, xs, 0)

    def step(state: LSTMState, inputs: Any) -> Any:
        x, m = inputs
        h_prev, c_prev = state
        # fmt: off
        z = x @ w_ih + h_prev @ w_hh + b                        # (1)
        z_i, z_f, z_g, z_o = jnp.split(z, 4, axis=-1)           # (2)
        i = jax.nn.sigmoid(z_i)                                 # (3)
        f = jax.nn.sigmoid(z_f)                                 # (4)
        g = jnp.tanh(z_g)                                       # (5)
        o = jax.nn.sigmoid(z_o)                                 # (6)
        c = f * c_prev + i * g                                  # (7)
        s = jnp.tanh(c)                                         # (8)
        h = o * s                                               # (9)
        y = jnp.where(m, h, 0)                                  # (10)
        h_t = jnp.where(m, h, h_prev)                           # (11)
        c_t = jnp.where(m, c, c_prev)                           # (12)
        # fmt: on
        return LSTMState(h_t, c_t), (y, state, LSTMGates(i, f, g, o), s)

    carry, (ys, previous, gates, tanh_c) = lax.scan(step, carry, (xs, mask))
    return (carry, ys), LSTMResiduals(xs, previous, gates, tanh_c, mask)


@border("lstm_backward")
def lstm_backward(
    params: LSTMParams, residuals: LSTMResiduals, cotangents: tuple[LSTMState, Float[Array, "time *batch hidden"]]
) -> tuple[LSTMParams, Float[Array, "time *batch input"], LSTMState]:
    """Go back through time and return the gradient.

    Args:
      params: as in the forward pass.
      residuals: from `lstm_forward`.
      cotangents: (d_carry, d_ys), derivatives of the loss with respect to the final state and the outputs.

    Returns:
      (d_params, d_xs, d_carry), derivatives with respect to the parameters, the inputs and the initial state.

    Raises:
      TypeError: the cotangents are not (d_carry, d_ys).
    """
    w_ih, w_hh, _ = params
    if len(cotangents) != 2 or not isinstance(cotangents[0], LSTMState):
        raise ArgumentTypeError("cotangents must be (d_carry, d_ys), with d_carry an LSTMState(h, c).")
    d_carry, d_ys = cotangents

    def step(d_state: LSTMState, inputs: Any) -> Any:
        d_h_t, d_c_t = d_state
        d_y, (_, c_prev), (i, f, g, o), s, m = inputs
        # fmt: off
        d_h = jnp.where(m, d_y + d_h_t, 0)                      # (10) (11)
        d_o = d_h * s                                           # (9)
        d_s = d_h * o                                           # (9)
        d_c = jnp.where(m, d_c_t, 0) + d_s * (1 - s**2)         # (12) (8)
        d_f = d_c * c_prev                                      # (7)
        d_i = d_c * g                                           # (7)
        d_g = d_c * i                                           # (7)
        d_z_o = d_o * o * (1 - o)                               # (6)
        d_z_g = d_g * (1 - g**2)                                # (5)
        d_z_f = d_f * f * (1 - f)                               # (4)
        d_z_i = d_i * i * (1 - i)                               # (3)
        d_z = jnp.concatenate([d_z_i, d_z_f, d_z_g, d_z_o], -1)  # (2)
        d_c_prev = d_c * f + jnp.where(m, 0, d_c_t)             # (7) (12)
        d_h_prev = d_z @ w_hh.T + jnp.where(m, 0, d_h_t)        # (1) (11)
        # fmt: on
        return LSTMState(d_h_prev, d_c_prev), d_z

    xs, previous, gates, tanh_c, mask = residuals
    d_carry, d_zs = lax.scan(step, d_carry, (d_ys, previous, gates, tanh_c, mask), reverse=True)

    # Weights are shared over time and batch, so their gradient sums over every use: one matmul after the loop.
    # fmt: off
    time_and_batch = tuple(range(d_zs.ndim - 1))
    d_params = LSTMParams(
        w_ih=jnp.tensordot(xs, d_zs, (time_and_batch, time_and_batch)),           # (1)
        w_hh=jnp.tensordot(previous.h, d_zs, (time_and_batch, time_and_batch)),   # (1)
        b=d_zs.sum(time_and_batch),                                      # (1)
    )
    d_xs = jnp.where(mask, d_zs @ w_ih.T, 0)                    # (1)
    # fmt: on
    return d_params, d_xs, d_carry


@border("lstm_bptt")
def lstm_bptt(
    params: LSTMParams,
    xs: Float[Array, "time *batch input"],
    carry: LSTMState,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
) -> tuple[LSTMState, Float[Array, "time *batch hidden"]]:
    """Run an LSTM whose gradient, under `jax.grad`, is the hand-derived one.

    It returns the same values and gradient as `unroll(LSTM, params, xs, carry, mask=mask)`. It is for checking: it
    supports only reverse mode, and cannot be differentiated under `shard_map` or on meshes with Explicit axes. `unroll`
    has neither limit.

    Args, Returns, Raises: as `lstm_forward`, without the residuals.

    >>> import jax
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> carry, ys = lstm_bptt(params, jax.numpy.ones((11, 3, 5)), LSTM.initial_carry(params, (3,)))
    >>> ys.shape
    (11, 3, 7)
    """
    return _compiled_bptt(*_checked(params, xs, carry, mask))


def _checked(params: Any, xs: Any, carry: Any, mask: Any) -> Any:
    params, xs, carry = as_arrays(params=params, xs=xs, carry=carry)
    if carry is None:
        raise ArgumentTypeError("carry must be LSTMState(h, c), got None; LSTM.initial_carry(...) makes one.")
    batch_shape = check_sequence(LSTM, params, xs, carry)
    mask, _ = checked_flags(mask, None, xs.shape[0], batch_shape)
    return params, xs, carry, jnp.ones(xs.shape[:-1], bool) if mask is None else mask


@jax.custom_vjp
def _lstm_bptt(params: LSTMParams, xs: Array, carry: LSTMState, mask: Array) -> tuple[LSTMState, Array]:
    return lstm_forward(params, xs, carry, mask=mask)[0]


def _forward(params: LSTMParams, xs: Array, carry: LSTMState, mask: Array) -> Any:
    outputs, residuals = lstm_forward(params, xs, carry, mask=mask)
    return outputs, (params, residuals)


def _backward(kept: tuple[LSTMParams, LSTMResiduals], cotangents: Any) -> Any:
    return *lstm_backward(*kept, cotangents), None  # a mask has no derivative


_lstm_bptt.defvjp(_forward, _backward)
# Calls outside of `jit` compile once per shape.
_compiled_bptt = jax.jit(_lstm_bptt)
