"""Cells to compare an LSTM with: the simple recurrent network (Elman 1990) and the GRU (Cho et al. 2014)."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxlstm.cell import Cell, glorot_orthogonal
from jaxlstm.checks import ArgumentValueError, border, cached, checked_init, shown


class RNNParams(NamedTuple):
    """Parameters of one simple recurrent layer."""

    w_ih: Float[Array, "input hidden"]
    w_hh: Float[Array, "hidden hidden"]
    b: Float[Array, "hidden"]


class RNNState(NamedTuple):
    """The carry of a simple recurrent layer: its output."""

    h: Float[Array, "*batch hidden"]


@border("RNN.init")
def init_rnn(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> RNNParams:
    """Draw w_ih Glorot-uniform, w_hh orthogonal, b zero.

    Raises:
      TypeError: `key` is not a JAX key, or `dtype` is not floating.
      ValueError: a size is not a positive integer.
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    w_ih, w_hh = glorot_orthogonal(key, input_size, hidden_size, 1, dtype)
    return RNNParams(w_ih, w_hh, jnp.zeros(hidden_size, dtype))


def initial_rnn_carry(params: RNNParams, batch_shape: tuple[int, ...] = ()) -> RNNState:
    """Return h_0 = 0, [*batch, hidden]."""
    return RNNState(jnp.zeros((*batch_shape, params.w_hh.shape[0]), params.w_hh.dtype))


# φ, and φ' as a function of φ.
NONLINEARITIES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "tanh": (jnp.tanh, lambda h: 1 - h**2),
    "relu": (jax.nn.relu, lambda h: (h > 0).astype(h.dtype)),
    "sigmoid": (jax.nn.sigmoid, lambda h: h * (1 - h)),
}


@cached
@border("make_rnn")
def make_rnn(nonlinearity: Literal["tanh", "relu", "sigmoid"] = "tanh") -> Cell[RNNParams, RNNState]:
    """Make the cell h_t = φ(x_t W_ih + h_{t-1} W_hh + b); equal φ give the same cell, which compiles once.

    Elman, Finding structure in time, 1990.

    Raises:
      ValueError: `nonlinearity` is not one of the three.

    >>> import jaxlstm
    >>> jaxlstm.make_rnn("tanh") is jaxlstm.make_rnn("tanh")
    True
    """
    if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
        raise ArgumentValueError(f"nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {shown(nonlinearity)}.")
    phi, slope = NONLINEARITIES[nonlinearity]

    def activations(
        params: RNNParams, state: RNNState, z: Float[Array, "*batch hidden"], a: Float[Array, "*batch hidden"]
    ) -> RNNState:
        return RNNState(phi(z + a))

    def gates(
        params: RNNParams, state: RNNState, z: Float[Array, "*batch hidden"], a: Float[Array, "*batch hidden"]
    ) -> tuple[RNNState, Float[Array, "*batch hidden"]]:
        state = activations(params, state, z, a)
        return state, state.h

    # The slope needs only φ itself, which is the activation that was kept.
    def gates_jvp(params: RNNParams, state: RNNState, activations: RNNState) -> Partial:
        return Partial(_linear, slope(activations.h))

    return Cell(
        name=f"RNN({nonlinearity})",
        init=init_rnn,
        initial_carry=initial_rnn_carry,
        gates=gates,
        activations=activations,
        gates_jvp=gates_jvp,
    )


def _linear(by_z: Array, d_state: RNNState, d_z: Array) -> tuple[RNNState, Array]:
    d_h = by_z * d_z
    return RNNState(d_h), d_h


RNN = make_rnn("tanh")
"""The simple recurrent network with tanh (Elman, Finding structure in time, 1990).

`RNN.init(key, input_size, hidden_size, *, dtype=jnp.float32)` draws `RNNParams`. The carry is an `RNNState`: h, which
is the output, [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.RNN.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 7)
"""


class GRUParams(NamedTuple):
    """Parameters of one GRU layer; columns in blocks r, u, n. b_hn is inside the product with the reset gate."""

    w_ih: Float[Array, "input 3*hidden"]
    w_hh: Float[Array, "hidden 3*hidden"]
    b: Float[Array, "3*hidden"]
    b_hn: Float[Array, "hidden"]


class GRUState(NamedTuple):
    """The carry of a GRU: its output."""

    h: Float[Array, "*batch hidden"]


class GRUGates(NamedTuple):
    """The activated gates of a GRU: reset r, update u, candidate n."""

    r: Float[Array, "*batch hidden"]
    u: Float[Array, "*batch hidden"]
    n: Float[Array, "*batch hidden"]


@border("GRU.init")
def init_gru(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> GRUParams:
    """Draw w_ih Glorot-uniform and w_hh orthogonal gate by gate, biases zero.

    Raises:
      TypeError: `key` is not a JAX key, or `dtype` is not floating.
      ValueError: a size is not a positive integer.
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    w_ih, w_hh = glorot_orthogonal(key, input_size, hidden_size, 3, dtype)
    return GRUParams(w_ih, w_hh, jnp.zeros(3 * hidden_size, dtype), jnp.zeros(hidden_size, dtype))


def initial_gru_carry(params: GRUParams, batch_shape: tuple[int, ...] = ()) -> GRUState:
    """Return h_0 = 0, [*batch, hidden]."""
    return GRUState(jnp.zeros((*batch_shape, params.w_hh.shape[0]), params.w_hh.dtype))


def gru_activations(
    params: GRUParams, state: GRUState, z: Float[Array, "*batch 3*hidden"], a: Float[Array, "*batch 3*hidden"]
) -> GRUGates:
    """Return the activated gates r, u, n of one step; the reset gate acts after the matmul, as in cuDNN and torch."""
    z_r, z_u, z_n = jnp.split(z, 3, axis=-1)
    a_r, a_u, a_n = jnp.split(a, 3, axis=-1)
    r = jax.nn.sigmoid(z_r + a_r)
    u = jax.nn.sigmoid(z_u + a_u)
    b_hn = jnp.broadcast_to(params.b_hn, a_n.shape)
    n = jnp.tanh(z_n + r * (a_n + b_hn))
    return GRUGates(r, u, n)


def gru_gates(
    params: GRUParams, state: GRUState, z: Float[Array, "*batch 3*hidden"], a: Float[Array, "*batch 3*hidden"]
) -> tuple[GRUState, Float[Array, "*batch hidden"]]:
    """Return the state after one step, and the step's output h."""
    _, u, n = gru_activations(params, state, z, a)
    h = (1 - u) * n + u * state.h
    return GRUState(h), h


GRU: Cell[GRUParams, GRUState] = Cell(
    name="GRU", init=init_gru, initial_carry=initial_gru_carry, gates=gru_gates, activations=gru_activations
)
"""The gated recurrent unit (Cho et al. 2014); the reset gate acts after the matmul, as in cuDNN and torch.

`GRU.init(key, input_size, hidden_size, *, dtype=jnp.float32)` draws `GRUParams`. The carry is a `GRUState`: h, which
is the output, [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.GRU.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 21)
"""
