"""The LSTM: parameters, state, equations (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000).

One step, in today's usual notation. `jaxlstm/cell.py` computes z and a; `gates` below computes the rest:

    z = x_t W_ih + b   a = h_{t-1} W_hh                       the two matmuls
    [z_i, z_f, z_g, z_o] = z + a
    i = σ(z_i)   f = σ(z_f)   g = tanh(z_g)   o = σ(z_o)      input, forget, candidate, output
    c_t = f ⊙ c_{t-1} + i ⊙ g
    h_t = o ⊙ tanh(c_t)
"""

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxlstm.cell import Cell, glorot_orthogonal
from jaxlstm.checks import ArgumentTypeError, border, check_float, checked_init

Gate = TypeVar("Gate")


class LSTMParams(NamedTuple):
    """Parameters of one LSTM layer; the columns of every leaf are four blocks of `hidden`, in the order i, f, g, o."""

    w_ih: Float[Array, "input 4*hidden"]
    w_hh: Float[Array, "hidden 4*hidden"]
    b: Float[Array, "4*hidden"]


class LSTMState(NamedTuple):
    """The carry of an LSTM: its output h and its cell state c."""

    h: Float[Array, "*batch hidden"]
    c: Float[Array, "*batch hidden"]


class LSTMGates(NamedTuple, Generic[Gate]):
    """One value per gate: input i, forget f, candidate g, output o."""

    i: Gate
    f: Gate
    g: Gate
    o: Gate


def activations(
    params: LSTMParams, state: LSTMState, z: Float[Array, "*batch 4*hidden"], a: Float[Array, "*batch 4*hidden"]
) -> LSTMGates[Float[Array, "*batch hidden"]]:
    """Return the activated gates i, f, g, o of one step."""
    z_i, z_f, z_g, z_o = jnp.split(z + a, 4, axis=-1)
    i = jax.nn.sigmoid(z_i)
    f = jax.nn.sigmoid(z_f)
    g = jnp.tanh(z_g)
    o = jax.nn.sigmoid(z_o)
    return LSTMGates(i, f, g, o)


def gates(
    params: LSTMParams, state: LSTMState, z: Float[Array, "*batch 4*hidden"], a: Float[Array, "*batch 4*hidden"]
) -> tuple[LSTMState, Float[Array, "*batch hidden"]]:
    """Return the state after one step, and the step's output h."""
    i, f, g, o = activations(params, state, z, a)
    c = f * state.c + i * g
    h = o * jnp.tanh(c)
    return LSTMState(h, c), h


def gates_jvp(params: LSTMParams, state: LSTMState, values: LSTMGates[Float[Array, "*batch hidden"]]) -> Partial:
    """Return the derivative of `gates`, given their values: (d_state, d_z) -> (d_state, d_h); d_z: tangent of z + a."""
    i, f, g, o = values
    # Compute tanh(c) again: one tanh per step costs less than keeping another array for every step.
    tanh_c = jnp.tanh(f * state.c + i * g)
    by_z = LSTMGates(i=g * i * (1 - i), f=state.c * f * (1 - f), g=i * (1 - g**2), o=tanh_c * o * (1 - o))
    return Partial(_linear, f, o * (1 - tanh_c**2), by_z)


def _linear(f: Array, by_c: Array, by_z: LSTMGates[Array], d_state: LSTMState, d_z: Array) -> tuple[LSTMState, Array]:
    d_z_i, d_z_f, d_z_g, d_z_o = jnp.split(d_z, 4, axis=-1)
    d_c = f * d_state.c + by_z.f * d_z_f + by_z.i * d_z_i + by_z.g * d_z_g
    d_h = by_c * d_c + by_z.o * d_z_o
    return LSTMState(d_h, d_c), d_h


def initial_carry(params: LSTMParams, batch_shape: tuple[int, ...] = ()) -> LSTMState:
    """Return h_0 = c_0 = 0, each [*batch, hidden]."""
    shape, dtype = (*batch_shape, params.w_hh.shape[0]), params.w_hh.dtype
    # Two buffers, not one array twice: JAX refuses to donate the same buffer twice.
    return LSTMState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@border("LSTM.init")
def init(
    key: Key[Array, ""],
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> LSTMParams:
    """Draw w_ih Glorot-uniform and w_hh orthogonal, both gate by gate; b is 0, except b_f.

    The forget bias is part of `b`; the forward pass adds nothing else. Its default of 1 follows Jozefowicz, Zaremba &
    Sutskever, An empirical exploration of recurrent network architectures, 2015. For other initializers, see
    `jaxlstm.initializers`.

    Args:
      key: a JAX key, `jax.random.key(seed)`.
      input_size: features of one input.
      hidden_size: units of the layer.
      forget_bias: the initial b_f.
      dtype: floating type of the parameters. Weights are drawn in float32, then cast.

    Raises:
      TypeError: `key` is not a JAX key, or `dtype` is not floating.
      ValueError: a size is not a positive integer.
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    check_float("forget_bias", forget_bias)
    w_ih, w_hh = glorot_orthogonal(key, input_size, hidden_size, 4, dtype)
    return LSTMParams(w_ih, w_hh, gate_bias(hidden_size, dtype, f=forget_bias))


def gate_bias(
    hidden_size: int, dtype: DTypeLike, gates: str = "ifgo", **biases: float | Array
) -> Float[Array, "gates*hidden"]:
    """Return b with the given biases, such as `f=1.0`, of a cell with these gates; the others are 0."""
    # In float32 like the weights, so that every dtype starts from the same numbers.
    blocks = [jnp.broadcast_to(jnp.asarray(biases.get(gate, 0.0), jnp.float32), hidden_size) for gate in gates]
    return jnp.concatenate(blocks).astype(dtype)


@border("split_gates")
def split_gates(params: LSTMParams) -> LSTMGates[LSTMParams]:
    """Split parameters, or gradients, into one `LSTMParams` per gate, its leaves [..., hidden].

    Raises:
      TypeError: `params` are not `LSTMParams`.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> jaxlstm.split_gates(params).f.w_ih.shape
    (5, 7)
    """
    if not isinstance(params, LSTMParams):
        raise ArgumentTypeError(f"params must be LSTMParams, got {type(params).__name__}.")
    blocks = [jnp.split(leaf, 4, axis=-1) for leaf in params]
    return LSTMGates(*(LSTMParams(*gate) for gate in zip(*blocks, strict=True)))


LSTM: Cell[LSTMParams, LSTMState] = Cell(
    name="LSTM",
    init=init,
    initial_carry=initial_carry,
    gates=gates,
    activations=activations,
    gates_jvp=gates_jvp,
)
"""The LSTM with a forget gate (Gers, Schmidhuber & Cummins, Learning to forget, 2000).

`LSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws `LSTMParams`. The carry is an
`LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.LSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 28)
"""
