"""The LSTM: parameters, state, equations (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000).

One step, in the papers' symbols:

    z_t = x_t W_ih + h_{t-1} W_hh + b
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

from jaxlstm.cell import Cell, glorot_orthogonal, per_gate
from jaxlstm.checks import check_init

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
    """One thing per gate: input i, forget f, candidate g, output o."""

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


def gates_jvp(params: LSTMParams, state: LSTMState, gates: LSTMGates[Float[Array, "*batch hidden"]]) -> Partial:
    """Return the linearisation of `gates` where the gates have these values: (d_state, d_z) -> (d_state, d_h)."""
    i, f, g, o = gates
    tanh_c = jnp.tanh(f * state.c + i * g)
    by_z = LSTMGates(i=g * i * (1 - i), f=state.c * f * (1 - f), g=i * (1 - g**2), o=tanh_c * o * (1 - o))
    return Partial(_push, f, o * (1 - tanh_c**2), by_z)


def _push(f: Array, by_c: Array, by_z: LSTMGates[Array], d_state: LSTMState, d_z: Array) -> tuple[LSTMState, Array]:
    d_z_i, d_z_f, d_z_g, d_z_o = jnp.split(d_z, 4, axis=-1)
    d_c = f * d_state.c + by_z.f * d_z_f + by_z.i * d_z_i + by_z.g * d_z_g
    d_h = by_c * d_c + by_z.o * d_z_o
    return LSTMState(d_h, d_c), d_h


def initial_carry(params: LSTMParams, batch_shape: tuple[int, ...] = ()) -> LSTMState:
    """Return h_0 = c_0 = 0, each [*batch, hidden]."""
    shape, dtype = (*batch_shape, params.w_hh.shape[0]), params.w_hh.dtype
    return LSTMState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))  # two buffers: a carry may be donated


# Initialisers: functions (key, input_size, hidden_size, *, dtype) -> LSTMParams, drawn in float32 and then cast.


def init_glorot_orthogonal(
    key: Key[Array, ""],
    input_size: int,
    hidden_size: int,
    *,
    forget_bias: float = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> LSTMParams:
    """Draw the default parameters: w_ih Glorot-uniform, w_hh orthogonal, both gate by gate; b = 0 but for b_f.

    The forget bias lives in `b` and is never added again (Jozefowicz, Zaremba & Sutskever, An empirical exploration of
    recurrent network architectures, 2015).

    Args:
      key: a typed key, `jax.random.key(seed)`.
      input_size: features of one input.
      hidden_size: units of the layer.
      forget_bias: the initial b_f.
      dtype: floating type of the parameters.

    Raises:
      TypeError: `key` is no typed key, or `dtype` is not floating.
      ValueError: a size is no positive integer.
    """
    check_init("init_glorot_orthogonal", key, input_size, hidden_size, dtype)
    w_ih, w_hh = glorot_orthogonal(key, input_size, hidden_size, 4, dtype)
    return LSTMParams(w_ih, w_hh, _bias(hidden_size, dtype, f=forget_bias))


def init_torch(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> LSTMParams:
    """Draw as `torch.nn.LSTM` does: everything U(−1/√H, 1/√H), b the sum of its two biases.

    Raises:
      TypeError, ValueError: as `init_glorot_orthogonal`.
    """
    check_init("init_torch", key, input_size, hidden_size, dtype)
    keys, bound = jax.random.split(key, 4), hidden_size**-0.5
    shapes = ((input_size, 4 * hidden_size), (hidden_size, 4 * hidden_size), (4 * hidden_size,), (4 * hidden_size,))
    w_ih, w_hh, b_ih, b_hh = (
        jax.random.uniform(k, shape, jnp.float32, -bound, bound) for k, shape in zip(keys, shapes, strict=True)
    )
    return LSTMParams(w_ih.astype(dtype), w_hh.astype(dtype), (b_ih + b_hh).astype(dtype))


def init_keras(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> LSTMParams:
    """Draw as `keras.layers.LSTM` does: Glorot-uniform and orthogonal over the four gates at once, forget bias 1.

    Raises:
      TypeError, ValueError: as `init_glorot_orthogonal`.
    """
    check_init("init_keras", key, input_size, hidden_size, dtype)
    key_ih, key_hh = jax.random.split(key)
    w_ih = jax.nn.initializers.glorot_uniform()(key_ih, (input_size, 4 * hidden_size), jnp.float32)
    w_hh = jax.nn.initializers.orthogonal()(key_hh, (hidden_size, 4 * hidden_size), jnp.float32)
    return LSTMParams(w_ih.astype(dtype), w_hh.astype(dtype), _bias(hidden_size, dtype, f=1.0))


def init_flax(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> LSTMParams:
    """Draw as Flax's LSTM cells do: LeCun-normal and orthogonal gate by gate, all biases 0 (the forget gate's too).

    Raises:
      TypeError, ValueError: as `init_glorot_orthogonal`.
    """
    check_init("init_flax", key, input_size, hidden_size, dtype)
    key_ih, key_hh = jax.random.split(key)
    w_ih = per_gate(jax.nn.initializers.lecun_normal(), key_ih, (input_size, hidden_size), 4, dtype)
    w_hh = per_gate(jax.nn.initializers.orthogonal(), key_hh, (hidden_size, hidden_size), 4, dtype)
    return LSTMParams(w_ih, w_hh, _bias(hidden_size, dtype))


def init_chrono(
    key: Key[Array, ""], input_size: int, hidden_size: int, *, max_lag: int, dtype: DTypeLike = jnp.float32
) -> LSTMParams:
    """Draw the default weights with the chrono bias: b_f ~ log U(1, max_lag − 1), b_i = −b_f.

    Tallec & Ollivier, Can recurrent neural networks warp time?, 2018.

    Args:
      key, input_size, hidden_size, dtype: as `init_glorot_orthogonal`.
      max_lag: the longest dependency to be expected, in steps (T_max in the paper); more than 2.

    Raises:
      TypeError, ValueError: as `init_glorot_orthogonal`; ValueError if `max_lag` is 2 or less.
    """
    check_init("init_chrono", key, input_size, hidden_size, dtype)
    if not isinstance(max_lag, int | float) or max_lag <= 2:
        raise ValueError(f"init_chrono: max_lag must be more than 2 steps, got {max_lag!r}.")
    key_weights, key_bias = jax.random.split(key)
    w_ih, w_hh = glorot_orthogonal(key_weights, input_size, hidden_size, 4, dtype)
    b_f = jnp.log(jax.random.uniform(key_bias, (hidden_size,), jnp.float32, 1.0, max_lag - 1.0))
    return LSTMParams(w_ih, w_hh, _bias(hidden_size, dtype, i=-b_f, f=b_f))


def _bias(
    hidden_size: int, dtype: DTypeLike, i: float | Array = 0.0, f: float | Array = 0.0, g: float = 0.0, o: float = 0.0
) -> Float[Array, "4*hidden"]:
    blocks = [jnp.broadcast_to(jnp.asarray(block, jnp.float32), hidden_size) for block in (i, f, g, o)]
    return jnp.concatenate(blocks).astype(dtype)


def split_gates(params: LSTMParams) -> LSTMGates[LSTMParams]:
    """Split parameters, or gradients, into one `LSTMParams` per gate, its leaves [..., hidden].

    Raises:
      TypeError: these are not `LSTMParams`.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> jaxlstm.split_gates(params).f.w_ih.shape
    (5, 7)
    """
    if not isinstance(params, LSTMParams):
        raise TypeError(f"split_gates: params must be LSTMParams, got {type(params).__name__}.")
    blocks = [jnp.split(leaf, 4, axis=-1) for leaf in params]
    return LSTMGates(*(LSTMParams(*gate) for gate in zip(*blocks, strict=True)))


def join_gates(gates: LSTMGates[LSTMParams]) -> LSTMParams:
    """Join what `split_gates` split."""
    return LSTMParams(*(jnp.concatenate(blocks, axis=-1) for blocks in zip(*gates, strict=True)))


LSTM: Cell[LSTMParams, LSTMState] = Cell(
    name="LSTM",
    init=init_glorot_orthogonal,
    initial_carry=initial_carry,
    gates=gates,
    activations=activations,
    gates_jvp=gates_jvp,
)
