"""The gradient of an LSTM by hand: backpropagation through time, written out (Werbos 1990; Greff et al. 2017).

An independent witness: it shares the equations with `unroll`, and none of the code that computes them. Forward lines
are numbered, and every backward line names the forward lines it differentiates; `docs/derivation.md` derives them under
the same numbers. `d_v` is the derivative of the loss by `v`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxlstm.cell import PyTree
from jaxlstm.checks import check_sequence, check_steps, describe, same_structure
from jaxlstm.lstm import LSTM, LSTMGates, LSTMParams, LSTMState


class LSTMResiduals(NamedTuple):
    """What the forward pass keeps for the backward pass; every field has a time axis in front."""

    xs: Float[Array, "time *batch input"]
    previous: LSTMState  # h_{t-1}, c_{t-1}
    gates: LSTMGates[Float[Array, "time *batch hidden"]]
    tanh_c: Float[Array, "time *batch hidden"]
    mask: Bool[Array, "time *batch 1"]


def lstm_forward(
    params: LSTMParams,
    xs: Float[Array, "time *batch input"],
    carry: LSTMState,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
) -> tuple[tuple[LSTMState, Float[Array, "time *batch hidden"]], LSTMResiduals]:
    """Run an LSTM and keep what its gradient needs.

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
    params, xs, carry, mask = _checked("lstm_forward", params, xs, carry, mask)
    w_ih, w_hh, b = params
    mask = mask[..., None]
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


def lstm_backward(
    params: LSTMParams, residuals: LSTMResiduals, cotangents: tuple[LSTMState, Float[Array, "time *batch hidden"]]
) -> tuple[LSTMParams, Float[Array, "time *batch input"], LSTMState]:
    """Go back through time.

    Args:
      params: as in the forward pass.
      residuals: from `lstm_forward`.
      cotangents: derivatives of the loss by the final state and by the outputs: (d_carry, d_ys).

    Returns:
      Derivatives by the parameters, the inputs and the initial state: (d_params, d_xs, d_carry).

    Raises:
      TypeError: the cotangents are not (d_carry, d_ys).
    """
    w_ih, w_hh, _ = params
    if len(cotangents) != 2 or not isinstance(cotangents[0], LSTMState):
        raise TypeError("lstm_backward: cotangents must be (d_carry, d_ys), with d_carry an LSTMState(h, c).")
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

    # fmt: off
    steps = tuple(range(d_zs.ndim - 1))  # time and batch: every use of the weights
    d_params = LSTMParams(
        w_ih=jnp.tensordot(xs, d_zs, (steps, steps)),           # (1)
        w_hh=jnp.tensordot(previous.h, d_zs, (steps, steps)),   # (1)
        b=d_zs.sum(steps),                                      # (1)
    )
    d_xs = jnp.where(mask, d_zs @ w_ih.T, 0)                    # (1)
    # fmt: on
    return d_params, d_xs, d_carry


def lstm_bptt(
    params: LSTMParams,
    xs: Float[Array, "time *batch input"],
    carry: LSTMState,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
) -> tuple[LSTMState, Float[Array, "time *batch hidden"]]:
    """Run an LSTM whose gradient, under `jax.grad`, is the hand-derived one.

    Equal to `unroll(LSTM, params, xs, carry, mask=mask)`, derivative included. For checking: it has reverse mode only,
    and no gradient under `shard_map` or on meshes with Explicit axes, where `unroll` has one.

    Args, Returns, Raises: as `lstm_forward`, without the residuals.
    """
    return _lstm_bptt(*_checked("lstm_bptt", params, xs, carry, mask))


def _checked(function: str, params: Any, xs: Any, carry: Any, mask: Any) -> Any:
    params, xs, carry = jax.tree.map(jnp.asarray, (params, xs, carry))
    if carry is None:
        raise TypeError(f"{function}: carry must be LSTMState(h, c), got None; LSTM.initial_carry(...) makes one.")
    batch_shape = check_sequence(function, LSTM, params, xs, carry)
    mask = jnp.ones(xs.shape[:-1], bool) if mask is None else jnp.asarray(mask)
    check_steps(function, "mask", mask, xs.shape[0], batch_shape)
    return params, xs, carry, mask


@jax.custom_vjp
def _lstm_bptt(params: LSTMParams, xs: Array, carry: LSTMState, mask: Array) -> tuple[LSTMState, Array]:
    return lstm_forward(params, xs, carry, mask=mask)[0]


def _forward(params: LSTMParams, xs: Array, carry: LSTMState, mask: Array) -> Any:
    outputs, residuals = lstm_forward(params, xs, carry, mask=mask)
    return outputs, (params, residuals)


def _backward(kept: tuple[LSTMParams, LSTMResiduals], cotangents: Any) -> Any:
    return *lstm_backward(*kept, cotangents), None  # a mask has no derivative


_lstm_bptt.defvjp(_forward, _backward)


def gradient_error(gradients: PyTree, reference: PyTree) -> PyTree:
    """Return ‖g − r‖₂ / ‖r‖₂ for every leaf, and ‖g‖₂ where r = 0.

    Args:
      gradients: any pytree of floating arrays.
      reference: the same pytree, of the gradients held to be right; may be of a wider dtype.

    Returns:
      The same pytree of scalars; NaN where a NaN is found.

    Raises:
      ValueError: the trees or the shapes differ.

    >>> import jax.numpy as jnp, jaxlstm
    >>> print(jaxlstm.gradient_error({"w": jnp.array([3.0, 4.1])}, {"w": jnp.array([3.0, 4.0])})["w"].round(4))
    0.02
    """
    gradients, reference = jax.tree.map(jnp.asarray, (gradients, reference))
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (gradients, reference)]
    if not same_structure(gradients, reference) or shapes[0] != shapes[1]:
        raise ValueError(
            f"gradient_error: gradients and reference must be alike, got {type(gradients).__name__} of "
            f"{describe(gradients)}; and {type(reference).__name__} of {describe(reference)}."
        )

    def error(g: Array, r: Array) -> Array:
        dtype = max(g.dtype, r.dtype, jnp.dtype("float32"), key=lambda dtype: jnp.finfo(dtype).bits)
        g, r = g.astype(dtype), r.astype(dtype)
        # Scaled to at most 1, so that squares of tiny gradients do not vanish in float32.
        scale = jnp.maximum(jnp.abs(g).max(initial=0), jnp.abs(r).max(initial=0))
        norm = lambda v: jnp.linalg.norm((v / jnp.where(scale == 0, 1, scale)).ravel())
        return jnp.where(norm(r) == 0, jnp.linalg.norm(g.ravel()), norm(g - r) / norm(r))

    return jax.tree.map(error, gradients, reference)
