"""The LSTM family: the other cells that papers call an LSTM.

Every cell is a `Cell` with its own equations, in the order and the symbols of `jaxlstm/lstm.py`. A gate that a cell
lacks has no weights either.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jaxlstm.cell import Cell, glorot_orthogonal, matmul, orthogonal, per_gate
from jaxlstm.checks import ArgumentValueError, border, cached, check_count, check_float, check_function, checked_init
from jaxlstm.lstm import LSTM, LSTMGates, LSTMParams, LSTMState, activations, gate_bias, gates_jvp, initial_carry

sigmoid, tanh = jax.nn.sigmoid, jnp.tanh

__all__ = [  # noqa: RUF022
    "PeepholeLSTM", "PeepholeParams", "NoInputGateLSTM", "NoForgetGateLSTM", "NoOutputGateLSTM",
    "NoInputActivationLSTM", "NoOutputActivationLSTM",
    "FullGateRecurrenceLSTM", "FullGateRecurrenceParams", "FullGateRecurrenceState",
    "CoupledLSTM", "LayerNormLSTM", "LayerNormParams", "ProjectedLSTM", "ProjectedParams", "make_projected_lstm",
    "make_lstm_1997", "LSTM1997State", "SLSTM", "SLSTMGates", "SLSTMState", "make_lstm",
]  # fmt: skip


def _zeros(like: Array, batch_shape: tuple[int, ...], number: int) -> list[Array]:
    """Return separate buffers of zeros [*batch, rows of `like`]: JAX refuses to donate the same buffer twice."""
    return [jnp.zeros((*batch_shape, like.shape[0]), like.dtype) for _ in range(number)]


# The LSTM with peepholes (Gers & Schmidhuber, Recurrent nets that time and count, 2000) is the cell V of Greff et al.,
# LSTM: a search space odyssey, 2017; the six cells after it are the paper's ablations of V.


class PeepholeParams(NamedTuple):
    """Parameters of an LSTM with peepholes; columns in one block per gate, in the order i, f, g, o."""

    w_ih: Float[Array, "input gates*hidden"]
    w_hh: Float[Array, "hidden gates*hidden"]
    b: Float[Array, "gates*hidden"]
    p: Float[Array, "peepholes*hidden"]  # one block for each of i, f, o that the cell has


def _peephole_init(name: str, gates: str) -> Callable[..., PeepholeParams]:
    """Return the `init` of a cell with these gates; only one with a forget gate takes `forget_bias`."""

    def draw(
        key: Key[Array, ""], input_size: int, hidden_size: int, dtype: DTypeLike, forget_bias: float = 0.0
    ) -> PeepholeParams:
        key = checked_init(key, input_size, hidden_size, dtype)
        check_float("forget_bias", forget_bias)
        w_ih, w_hh = glorot_orthogonal(key, input_size, hidden_size, len(gates), dtype)
        num_peepholes = len(gates.replace("g", ""))
        b = gate_bias(hidden_size, dtype, gates, f=forget_bias)
        return PeepholeParams(w_ih, w_hh, b, jnp.zeros(num_peepholes * hidden_size, dtype))

    @border(f"{name}.init")
    def init(
        key: Key[Array, ""],
        input_size: int,
        hidden_size: int,
        *,
        forget_bias: float = 1.0,
        dtype: DTypeLike = jnp.float32,
    ) -> PeepholeParams:
        """Draw w_ih Glorot-uniform and w_hh orthogonal, both gate by gate; b_f is `forget_bias`; the rest is 0."""
        return draw(key, input_size, hidden_size, dtype, forget_bias)

    @border(f"{name}.init")
    def init_without_forget_gate(
        key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32
    ) -> PeepholeParams:
        """Draw w_ih Glorot-uniform and w_hh orthogonal, both gate by gate; b and p are 0."""
        return draw(key, input_size, hidden_size, dtype)

    return init if "f" in gates else init_without_forget_gate


def _peepholes(p: Float[Array, "peepholes*hidden"], c: Array) -> list[Array]:
    """Return one peephole per gate, each in the shape of c: some programs forbid implicit rank promotion."""
    return [jnp.broadcast_to(p_k, c.shape) for p_k in jnp.split(p, p.shape[0] // c.shape[-1])]


def _peephole_cell(name: str, gates: str, gates_of: Callable[..., LSTMGates[Array]]) -> Cell[PeepholeParams, LSTMState]:
    """Make the cell whose gates `gates_of` computes."""

    def step(params: PeepholeParams, state: LSTMState, z: Array, a: Array) -> tuple[LSTMState, Array]:
        i, f, g, o = gates_of(params, state, z, a)
        c = f * state.c + i * g
        h = o * tanh(c)
        return LSTMState(h, c), h

    return Cell(_peephole_init(name, gates), initial_carry, step, activations=gates_of, name=name)


def peephole_activations(params: PeepholeParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates of V: i and f see c_{t-1}, o sees c_t."""
    z_i, z_f, z_g, z_o = jnp.split(z + a, 4, axis=-1)
    p_i, p_f, p_o = _peepholes(params.p, state.c)
    i = sigmoid(z_i + p_i * state.c)
    f = sigmoid(z_f + p_f * state.c)
    g = tanh(z_g)
    c = f * state.c + i * g
    o = sigmoid(z_o + p_o * c)
    return LSTMGates(i, f, g, o)


def no_input_gate_activations(params: PeepholeParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates of NIG: i = 1."""
    z_f, z_g, z_o = jnp.split(z + a, 3, axis=-1)
    p_f, p_o = _peepholes(params.p, state.c)
    f = sigmoid(z_f + p_f * state.c)
    g = tanh(z_g)
    c = f * state.c + g
    o = sigmoid(z_o + p_o * c)
    return LSTMGates(jnp.ones_like(f), f, g, o)


def no_forget_gate_activations(params: PeepholeParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates of NFG: f = 1."""
    z_i, z_g, z_o = jnp.split(z + a, 3, axis=-1)
    p_i, p_o = _peepholes(params.p, state.c)
    i = sigmoid(z_i + p_i * state.c)
    g = tanh(z_g)
    c = state.c + i * g
    o = sigmoid(z_o + p_o * c)
    return LSTMGates(i, jnp.ones_like(i), g, o)


def no_output_gate_activations(params: PeepholeParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates of NOG: o = 1."""
    z_i, z_f, z_g = jnp.split(z + a, 3, axis=-1)
    p_i, p_f = _peepholes(params.p, state.c)
    i = sigmoid(z_i + p_i * state.c)
    f = sigmoid(z_f + p_f * state.c)
    g = tanh(z_g)
    return LSTMGates(i, f, g, jnp.ones_like(g))


def no_input_activation_activations(params: PeepholeParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates of NIAF: g = z_g, without tanh."""
    z_i, z_f, z_g, z_o = jnp.split(z + a, 4, axis=-1)
    p_i, p_f, p_o = _peepholes(params.p, state.c)
    i = sigmoid(z_i + p_i * state.c)
    f = sigmoid(z_f + p_f * state.c)
    g = z_g
    c = f * state.c + i * g
    o = sigmoid(z_o + p_o * c)
    return LSTMGates(i, f, g, o)


def no_output_activation_gates(
    params: PeepholeParams, state: LSTMState, z: Array, a: Array
) -> tuple[LSTMState, Float[Array, "*batch hidden"]]:
    """Take a step of NOAF: h = o ⊙ c, without tanh."""
    i, f, g, o = peephole_activations(params, state, z, a)
    c = f * state.c + i * g
    h = o * c
    return LSTMState(h, c), h


PeepholeLSTM = _peephole_cell("PeepholeLSTM", "ifgo", peephole_activations)
"""The LSTM with peepholes: i and f see the old cell state, o sees the new one (Gers & Schmidhuber 2000).

`PeepholeLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws `PeepholeParams`, its
peepholes 0. The carry is an `LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.PeepholeLSTM.init(jax.random.key(0), 5, 7).p.shape
(21,)
"""
NoInputGateLSTM = _peephole_cell("NoInputGateLSTM", "fgo", no_input_gate_activations)
"""The peephole LSTM without the input gate, NIG in Greff et al. 2017: i = 1.

`NoInputGateLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws `PeepholeParams`.
The carry is an `LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.NoInputGateLSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 21)
"""
NoForgetGateLSTM = _peephole_cell("NoForgetGateLSTM", "igo", no_forget_gate_activations)
"""The peephole LSTM without the forget gate, NFG in Greff et al. 2017: f = 1.

`NoForgetGateLSTM.init(key, input_size, hidden_size, *, dtype=jnp.float32)` draws `PeepholeParams`. The carry is an
`LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.NoForgetGateLSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 21)
"""
NoOutputGateLSTM = _peephole_cell("NoOutputGateLSTM", "ifg", no_output_gate_activations)
"""The peephole LSTM without the output gate, NOG in Greff et al. 2017: o = 1.

`NoOutputGateLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws `PeepholeParams`.
The carry is an `LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.NoOutputGateLSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 21)
"""
NoInputActivationLSTM = _peephole_cell("NoInputActivationLSTM", "ifgo", no_input_activation_activations)
"""The peephole LSTM without the input activation, NIAF in Greff et al. 2017: g = z_g.

`NoInputActivationLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws
`PeepholeParams`. The carry is an `LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.NoInputActivationLSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 28)
"""
NoOutputActivationLSTM: Cell[PeepholeParams, LSTMState] = Cell(
    _peephole_init("NoOutputActivationLSTM", "ifgo"),
    initial_carry,
    no_output_activation_gates,
    activations=peephole_activations,
    name="NoOutputActivationLSTM",
)
"""The peephole LSTM without the output activation, NOAF in Greff et al. 2017: h = o ⊙ c.

`NoOutputActivationLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws
`PeepholeParams`. The carry is an `LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.NoOutputActivationLSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 28)
"""


# Full gate recurrence, FGR: the gates i, f, o also see i, f, o of the step before, through nine matrices.


class FullGateRecurrenceParams(NamedTuple):
    """Parameters of a peephole LSTM whose gates see all gates of the step before."""

    w_ih: Float[Array, "input 4*hidden"]
    w_hh: Float[Array, "hidden 4*hidden"]
    w_gates: Float[Array, "3*hidden 3*hidden"]  # from i, f, o of t-1, to i, f, o
    b: Float[Array, "4*hidden"]
    p: Float[Array, "3*hidden"]


class FullGateRecurrenceState(NamedTuple):
    """The carry: output, cell state, and the three gates."""

    h: Float[Array, "*batch hidden"]
    c: Float[Array, "*batch hidden"]
    i: Float[Array, "*batch hidden"]
    f: Float[Array, "*batch hidden"]
    o: Float[Array, "*batch hidden"]


@border("FullGateRecurrenceLSTM.init")
def init_full_gate_recurrence(
    key: Key[Array, ""], input_size: int, hidden_size: int, *, forget_bias: float = 1.0, dtype: DTypeLike = jnp.float32
) -> FullGateRecurrenceParams:
    """Draw w_ih Glorot-uniform, w_hh and the nine blocks of w_gates orthogonal; b_f is `forget_bias`; the rest is 0."""
    key = checked_init(key, input_size, hidden_size, dtype)
    check_float("forget_bias", forget_bias)
    key, key_gates = jax.random.split(key)
    w_ih, w_hh = glorot_orthogonal(key, input_size, hidden_size, 4, dtype)
    square = (hidden_size, hidden_size)
    rows = [per_gate(orthogonal, row, square, 3, dtype) for row in jax.random.split(key_gates, 3)]
    b, p = gate_bias(hidden_size, dtype, f=forget_bias), jnp.zeros(3 * hidden_size, dtype)
    return FullGateRecurrenceParams(w_ih, w_hh, jnp.concatenate(rows), b, p)


def full_gate_recurrence_recur(params: FullGateRecurrenceParams, state: FullGateRecurrenceState) -> tuple[Array, Array]:
    """Return what the gates receive from h and from the gates of the step before."""
    of_gates = jnp.concatenate([state.i, state.f, state.o], axis=-1)
    return matmul(state.h, params.w_hh, params.b.dtype), matmul(of_gates, params.w_gates, params.b.dtype)


def full_gate_recurrence_activations(
    params: FullGateRecurrenceParams, state: FullGateRecurrenceState, z: Array, a: tuple[Array, Array]
) -> LSTMGates[Array]:
    """Return the gates of FGR."""
    from_h, from_gates = a
    z_i, z_f, z_g, z_o = jnp.split(z + from_h, 4, axis=-1)
    r_i, r_f, r_o = jnp.split(from_gates, 3, axis=-1)
    p_i, p_f, p_o = _peepholes(params.p, state.c)
    i = sigmoid(z_i + r_i + p_i * state.c)
    f = sigmoid(z_f + r_f + p_f * state.c)
    g = tanh(z_g)
    c = f * state.c + i * g
    o = sigmoid(z_o + r_o + p_o * c)
    return LSTMGates(i, f, g, o)


def full_gate_recurrence_gates(
    params: FullGateRecurrenceParams, state: FullGateRecurrenceState, z: Array, a: tuple[Array, Array]
) -> tuple[FullGateRecurrenceState, Float[Array, "*batch hidden"]]:
    """Take a step of FGR."""
    i, f, g, o = full_gate_recurrence_activations(params, state, z, a)
    c = f * state.c + i * g
    h = o * tanh(c)
    return FullGateRecurrenceState(h, c, i, f, o), h


FullGateRecurrenceLSTM: Cell[FullGateRecurrenceParams, FullGateRecurrenceState] = Cell(
    name="FullGateRecurrenceLSTM",
    init=init_full_gate_recurrence,
    initial_carry=lambda params, batch_shape=(): FullGateRecurrenceState(*_zeros(params.w_hh, batch_shape, 5)),
    gates=full_gate_recurrence_gates,
    recur=full_gate_recurrence_recur,
    activations=full_gate_recurrence_activations,
)
"""The peephole LSTM whose gates also see the gates of the step before, FGR in Greff et al. 2017.

`FullGateRecurrenceLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws
`FullGateRecurrenceParams`. The carry is a `FullGateRecurrenceState`: h, which is the output, c and the gates i, f, o,
all [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.FullGateRecurrenceLSTM.init(jax.random.key(0), 5, 7).w_gates.shape
(21, 21)
"""


# Coupled gates: f = 1 - i, without peepholes (CIFG; Greff et al. 2017).


@border("CoupledLSTM.init")
def init_coupled(
    key: Key[Array, ""], input_size: int, hidden_size: int, *, forget_bias: float = 1.0, dtype: DTypeLike = jnp.float32
) -> LSTMParams:
    """Draw w_ih Glorot-uniform and w_hh orthogonal, blocks i, g, o; b_i is -forget_bias, the rest of b is 0."""
    key = checked_init(key, input_size, hidden_size, dtype)
    check_float("forget_bias", forget_bias)
    w_ih, w_hh = glorot_orthogonal(key, input_size, hidden_size, 3, dtype)
    return LSTMParams(w_ih, w_hh, gate_bias(hidden_size, dtype, "igo", i=-forget_bias))  # σ(-x) = 1 - σ(x)


def coupled_activations(params: LSTMParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates, with f = 1 - i."""
    z_i, z_g, z_o = jnp.split(z + a, 3, axis=-1)
    i = sigmoid(z_i)
    g = tanh(z_g)
    o = sigmoid(z_o)
    return LSTMGates(i, 1 - i, g, o)


def coupled_gates(params: LSTMParams, state: LSTMState, z: Array, a: Array) -> tuple[LSTMState, Array]:
    """Take a step of the coupled LSTM."""
    i, f, g, o = coupled_activations(params, state, z, a)
    c = f * state.c + i * g
    h = o * tanh(c)
    return LSTMState(h, c), h


def coupled_gates_jvp(params: LSTMParams, state: LSTMState, values: LSTMGates[Array]) -> Partial:
    """Return the derivative of `coupled_gates`, given the gates: the LSTM's, since f = σ(-z_i)."""
    return Partial(_coupled_linear, gates_jvp(params, state, values))


def _coupled_linear(of_lstm: Partial, d_state: LSTMState, d_z: Array) -> tuple[LSTMState, Array]:
    d_z_i, d_z_g, d_z_o = jnp.split(d_z, 3, axis=-1)
    return of_lstm(d_state, jnp.concatenate([d_z_i, -d_z_i, d_z_g, d_z_o], axis=-1))


CoupledLSTM: Cell[LSTMParams, LSTMState] = Cell(
    name="CoupledLSTM",
    init=init_coupled,
    initial_carry=initial_carry,
    gates=coupled_gates,
    activations=coupled_activations,
    gates_jvp=coupled_gates_jvp,
)
"""The LSTM with coupled gates, f = 1 - i, and no peepholes (CIFG in Greff et al. 2017).

`CoupledLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws `LSTMParams` in blocks
i, g, o; the initial b_i is `-forget_bias`. The carry is an `LSTMState`: h, which is the output, and c, both [*batch,
hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.CoupledLSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 21)
"""


# Layer normalization of x W, of h W and of c (Ba, Kiros & Hinton, Layer normalization, 2016, supplement).


class LayerNormParams(NamedTuple):
    """Parameters of an LSTM with layer normalization; blocks i, f, g, o. The scales start at 1, the shifts at 0."""

    w_ih: Float[Array, "input 4*hidden"]
    w_hh: Float[Array, "hidden 4*hidden"]
    b: Float[Array, "4*hidden"]
    scale_x: Float[Array, "4*hidden"]
    scale_h: Float[Array, "4*hidden"]
    scale_c: Float[Array, "hidden"]
    shift_c: Float[Array, "hidden"]


@border("LayerNormLSTM.init")
def init_layer_norm(
    key: Key[Array, ""], input_size: int, hidden_size: int, *, forget_bias: float = 1.0, dtype: DTypeLike = jnp.float32
) -> LayerNormParams:
    """Draw the parameters of `LSTM`; the scales are 1, the shift is 0."""
    w_ih, w_hh, b = LSTM.init(key, input_size, hidden_size, forget_bias=forget_bias, dtype=dtype)
    # Separate buffers: JAX refuses to donate the same buffer twice.
    scale_x, scale_h, scale_c = jnp.ones_like(b), jnp.ones_like(b), jnp.ones(hidden_size, dtype)
    return LayerNormParams(w_ih, w_hh, b, scale_x, scale_h, scale_c, shift_c=jnp.zeros(hidden_size, dtype))


def layer_norm(x: Float[Array, "*batch n"], scale: Float[Array, "n"]) -> Float[Array, "*batch n"]:
    """Return scale ⊙ (x - mean) / sqrt(variance + 1e-5), over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    normal = x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return jnp.broadcast_to(scale, x.shape) * normal


def layer_norm_project(params: LayerNormParams, xs: Float[Array, "*lead input"]) -> Float[Array, "*lead 4*hidden"]:
    """Return LN(x W_ih) + b."""
    z = layer_norm(matmul(xs, params.w_ih, params.b.dtype), params.scale_x)
    return z + jnp.broadcast_to(params.b, z.shape)


def layer_norm_activations(params: LayerNormParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates, which see LN(h W_hh)."""
    return activations(LSTMParams(*params[:3]), state, z, layer_norm(a, params.scale_h))


def layer_norm_gates(params: LayerNormParams, state: LSTMState, z: Array, a: Array) -> tuple[LSTMState, Array]:
    """Take a step: h = o ⊙ tanh(LN(c))."""
    i, f, g, o = layer_norm_activations(params, state, z, a)
    c = f * state.c + i * g
    h = o * tanh(layer_norm(c, params.scale_c) + jnp.broadcast_to(params.shift_c, c.shape))
    return LSTMState(h, c), h


LayerNormLSTM: Cell[LayerNormParams, LSTMState] = Cell(
    name="LayerNormLSTM",
    init=init_layer_norm,
    initial_carry=initial_carry,
    gates=layer_norm_gates,
    project=layer_norm_project,
    activations=layer_norm_activations,
)
"""The LSTM with layer normalization of x W, of h W and of c (Ba, Kiros & Hinton 2016).

`LayerNormLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws `LayerNormParams`. The
carry is an `LSTMState`: h, which is the output, and c, both [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.LayerNormLSTM.init(jax.random.key(0), 5, 7).scale_c.shape
(7,)
"""


# A projected output (LSTMP; Sak, Senior & Beaufays 2014), as torch's `proj_size`.


class ProjectedParams(NamedTuple):
    """Parameters of an LSTM whose output has fewer numbers than its cell state; blocks i, f, g, o."""

    w_ih: Float[Array, "input 4*hidden"]
    w_hh: Float[Array, "projected 4*hidden"]
    b: Float[Array, "4*hidden"]
    w_hr: Float[Array, "hidden projected"]


@border("ProjectedLSTM.init")
def init_projected(
    key: Key[Array, ""],
    input_size: int,
    hidden_size: int,
    *,
    proj_size: int | None = None,
    forget_bias: float = 1.0,
    dtype: DTypeLike = jnp.float32,
) -> ProjectedParams:
    """Draw w_ih and w_hr Glorot-uniform, w_hh with orthogonal rows or columns; b_f is `forget_bias`, the rest of b 0.

    Args:
      key: a JAX key.
      input_size: features of one input.
      hidden_size: numbers in the cell state.
      proj_size: numbers in the output h; None: half of `hidden_size`, rounded up.
      forget_bias: the initial b_f.
      dtype: floating type of the parameters.

    Raises:
      TypeError: `key` is not a JAX key, or `dtype` is not floating.
      ValueError: a size is not a positive integer.
    """
    key = checked_init(key, input_size, hidden_size, dtype)
    check_float("forget_bias", forget_bias)
    proj_size = (hidden_size + 1) // 2 if proj_size is None else proj_size
    check_count("proj_size", proj_size, 1)
    key_ih, key_hh, key_hr = jax.random.split(key, 3)
    glorot = jax.nn.initializers.glorot_uniform()
    return ProjectedParams(
        w_ih=per_gate(glorot, key_ih, (input_size, hidden_size), 4, dtype),
        w_hh=per_gate(orthogonal, key_hh, (proj_size, hidden_size), 4, dtype),
        b=gate_bias(hidden_size, dtype, f=forget_bias),
        w_hr=per_gate(glorot, key_hr, (hidden_size, proj_size), 1, dtype),
    )


def initial_projected_carry(params: ProjectedParams, batch_shape: tuple[int, ...] = ()) -> LSTMState:
    """Return h_0 = 0, [*batch, projected], and c_0 = 0, [*batch, hidden]."""
    return LSTMState(*_zeros(params.w_hh, batch_shape, 1), *_zeros(params.w_hr, batch_shape, 1))


def projected_activations(params: ProjectedParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
    """Return the gates, which are the LSTM's."""
    return activations(LSTMParams(*params[:3]), state, z, a)


def projected_gates(params: ProjectedParams, state: LSTMState, z: Array, a: Array) -> tuple[LSTMState, Array]:
    """Take a step: h = (o ⊙ tanh(c)) W_hr."""
    i, f, g, o = projected_activations(params, state, z, a)
    c = f * state.c + i * g
    h = matmul(o * tanh(c), params.w_hr, c.dtype)
    return LSTMState(h, c), h


ProjectedLSTM: Cell[ProjectedParams, LSTMState] = Cell(
    name="ProjectedLSTM",
    init=init_projected,
    initial_carry=initial_projected_carry,
    gates=projected_gates,
    activations=projected_activations,
)
"""The LSTM with a projected output (Sak, Senior & Beaufays 2014), as torch's `proj_size`.

`ProjectedLSTM.init(key, input_size, hidden_size, *, proj_size=None, forget_bias=1.0, dtype=jnp.float32)` draws
`ProjectedParams`. The carry is an `LSTMState`: h, which is the output, [*batch, projection], and c, [*batch, hidden].

>>> import jax, jaxlstm
>>> jaxlstm.variants.ProjectedLSTM.init(jax.random.key(0), 5, 7).w_hr.shape
(7, 4)
"""


@cached
@border("make_projected_lstm")
def make_projected_lstm(proj_size: int) -> Cell[ProjectedParams, LSTMState]:
    """Make the `ProjectedLSTM` whose `init` draws outputs of `proj_size`: for stacks and layers, which call `init`.

    Raises:
      ValueError: `proj_size` is not a positive integer.

    >>> import jax, jaxlstm
    >>> cell = jaxlstm.variants.make_projected_lstm(3)
    >>> jaxlstm.init_stack(jax.random.key(0), cell, 5, [7, 7])[1].w_ih.shape
    (3, 28)
    """
    check_count("proj_size", proj_size, 1)

    init = functools.partial(init_projected, proj_size=proj_size)
    return dataclasses.replace(ProjectedLSTM, init=init, name=f"ProjectedLSTM({proj_size})")


# The original: memory blocks whose cells share their gates, no forget gate (Hochreiter & Schmidhuber 1997).


class LSTM1997State(NamedTuple):
    """The carry: outputs and states of the cells, and both gates of every block, which the gates see too."""

    h: Float[Array, "*batch hidden"]
    c: Float[Array, "*batch hidden"]
    i: Float[Array, "*batch blocks"]
    o: Float[Array, "*batch blocks"]


@cached
@border("make_lstm_1997")
def make_lstm_1997(block_size: int = 2, *, truncate: bool = False) -> Cell[LSTMParams, LSTM1997State]:
    """Make the LSTM of 1997: cells in blocks that share an input and an output gate, and no forget gate.

    All units of the layer (cells, input gates, output gates) receive the input and the outputs of all units at the step
    before. With units = hidden + 2*blocks, the parameters are w_ih [input, units], w_hh [units, units] and b [units],
    columns in blocks g, i, o. g lies in (-2, 2); c passes through a function into (-1, 1). With a readout of the cells,
    two blocks of two cells have the 93 weights of the paper's adding problem (two inputs, one output) and the 156 of
    its temporal order 6a (eight inputs, four outputs).

    Args:
      block_size: cells per memory block; it must divide `hidden_size`.
      truncate: cut the gradient where the paper does, at the outputs of all units; then only c carries it back in time.

    Raises:
      ValueError: `block_size` is not a positive integer, or does not divide `hidden_size`.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.variants.make_lstm_1997(2).init(jax.random.key(0), 2, 4)
    >>> jaxlstm.num_params(params) + 4 + 1   # the readout: 4 weights and a bias
    93
    """
    check_count("block_size", block_size, 1)

    @border("make_lstm_1997")
    def init(key: Key[Array, ""], input_size: int, hidden_size: int, *, dtype: DTypeLike = jnp.float32) -> LSTMParams:
        key = checked_init(key, input_size, hidden_size, dtype)
        if hidden_size % block_size:
            raise ArgumentValueError(f"hidden_size {hidden_size} must be a multiple of block_size {block_size}.")
        units = hidden_size + 2 * (hidden_size // block_size)
        uniform = lambda key, rows: jax.random.uniform(key, (rows, units), jnp.float32, -0.1, 0.1).astype(dtype)
        key_ih, key_hh = jax.random.split(key)
        return LSTMParams(uniform(key_ih, input_size), uniform(key_hh, units), jnp.zeros(units, dtype))

    def initial(params: LSTMParams, batch_shape: tuple[int, ...] = ()) -> LSTM1997State:
        num_blocks = params.w_hh.shape[0] // (block_size + 2)
        sizes = (num_blocks * block_size, num_blocks * block_size, num_blocks, num_blocks)
        # At net input 0 every gate is half open, but before the first step no unit has an output.
        return LSTM1997State(*(jnp.zeros((*batch_shape, size), params.b.dtype) for size in sizes))

    def recur(params: LSTMParams, state: LSTM1997State) -> Array:
        units = jnp.concatenate([state.h, state.i, state.o], axis=-1)
        return matmul(lax.stop_gradient(units) if truncate else units, params.w_hh, params.b.dtype)

    def activations(params: LSTMParams, state: LSTM1997State, z: Array, a: Array) -> LSTMGates[Array]:
        num_blocks, hidden_size = state.i.shape[-1], state.c.shape[-1]
        z_g, z_i, z_o = jnp.split(z + a, [hidden_size, hidden_size + num_blocks], axis=-1)
        i = sigmoid(z_i)
        g = 4 * sigmoid(z_g) - 2
        o = sigmoid(z_o)
        return LSTMGates(i, jnp.ones_like(i), g, o)

    def gates(params: LSTMParams, state: LSTM1997State, z: Array, a: Array) -> tuple[LSTM1997State, Array]:
        i, _, g, o = activations(params, state, z, a)
        c = state.c + of_cells(i) * g
        h = of_cells(o) * (2 * sigmoid(c) - 1)
        return LSTM1997State(h, c, i, o), h

    def gates_jvp(params: LSTMParams, state: LSTM1997State, values: LSTMGates[Array]) -> Partial:
        i, _, g, o = values
        squashed_c = 2 * sigmoid(state.c + of_cells(i) * g) - 1
        return Partial(linear, i, g, o, squashed_c)

    def linear(
        i: Array, g: Array, o: Array, squashed_c: Array, d_state: LSTM1997State, d_z: Array
    ) -> tuple[LSTM1997State, Array]:
        num_blocks, hidden_size = i.shape[-1], g.shape[-1]
        d_z_g, d_z_i, d_z_o = jnp.split(d_z, [hidden_size, hidden_size + num_blocks], axis=-1)
        d_i = i * (1 - i) * d_z_i
        d_g = (1 - g**2 / 4) * d_z_g
        d_o = o * (1 - o) * d_z_o
        d_c = d_state.c + g * of_cells(d_i) + of_cells(i) * d_g
        d_h = squashed_c * of_cells(d_o) + of_cells(o) * (1 - squashed_c**2) / 2 * d_c
        return LSTM1997State(d_h, d_c, d_i, d_o), d_h

    def of_cells(gate: Float[Array, "*batch blocks"]) -> Float[Array, "*batch hidden"]:
        return jnp.repeat(gate, block_size, axis=-1)

    name = f"LSTM 1997({block_size})"
    return Cell(init, initial, gates, recur=recur, activations=activations, gates_jvp=gates_jvp, name=name)


# sLSTM with one head: exponential gates, kept finite by m (Beck et al., xLSTM, 2024).


class SLSTMState(NamedTuple):
    """The carry: output h, cell state c and normalizer n, both divided by exp(m), and m."""

    h: Float[Array, "*batch hidden"]
    c: Float[Array, "*batch hidden"]
    n: Float[Array, "*batch hidden"]
    m: Float[Array, "*batch hidden"]


class SLSTMGates(NamedTuple):
    """The gates on the scale of m, and slope_f = σ(−z_f), the derivative of log σ(z_f).

    i is divided by exp(m_t), and f is multiplied by exp(m_{t−1} − m_t).
    """

    i: Float[Array, "*batch hidden"]
    f: Float[Array, "*batch hidden"]
    g: Float[Array, "*batch hidden"]
    o: Float[Array, "*batch hidden"]
    slope_f: Float[Array, "*batch hidden"]


@border("SLSTM.init")
def init_slstm(
    key: Key[Array, ""], input_size: int, hidden_size: int, *, forget_bias: float = 1.0, dtype: DTypeLike = jnp.float32
) -> LSTMParams:
    """Draw w_ih Glorot-uniform and w_hh orthogonal, both gate by gate; b is 0, except b_f."""
    return LSTM.init(key, input_size, hidden_size, forget_bias=forget_bias, dtype=dtype)


def _slstm_gates_and_m(state: SLSTMState, z: Array, a: Array) -> tuple[SLSTMGates, Array]:
    """Return the gates and m. At n = 0 nothing was stored yet: f is 0, and m is z_i."""
    z_i, z_f, z_g, z_o = jnp.split(z + a, 4, axis=-1)
    log_f = jax.nn.log_sigmoid(z_f) + jnp.where(state.n == 0, -jnp.inf, state.m)
    m = jnp.maximum(log_f, z_i)
    i = jnp.exp(z_i - m)
    f = jnp.exp(log_f - m)
    g = tanh(z_g)
    o = sigmoid(z_o)
    return SLSTMGates(i, f, g, o, slope_f=sigmoid(-z_f)), m  # where f is near 1, 1 - σ(z_f) would lose its digits


def slstm_activations(params: LSTMParams, state: SLSTMState, z: Array, a: Array) -> SLSTMGates:
    """Return the gates of the sLSTM."""
    return _slstm_gates_and_m(state, z, a)[0]


def slstm_gates(params: LSTMParams, state: SLSTMState, z: Array, a: Array) -> tuple[SLSTMState, Array]:
    """Take a step of the sLSTM."""
    (i, f, g, o, _), m = _slstm_gates_and_m(state, z, a)
    c = f * state.c + i * g
    n = f * state.n + i
    h = o * (c / n)
    return SLSTMState(h, c, n, m), h


def slstm_gates_jvp(params: LSTMParams, state: SLSTMState, values: SLSTMGates) -> Partial:
    """Return the derivative of `slstm_gates`, given its values."""
    i, f, g, *_ = values
    n = f * state.n + i
    return Partial(_slstm_linear, values, state.c, state.n, 1 / n, (f * state.c + i * g) / n)


def _slstm_linear(
    values: SLSTMGates, c: Array, n: Array, by_n: Array, ratio: Array, d_state: SLSTMState, d_z: Array
) -> tuple[SLSTMState, Array]:
    i, f, g, o, slope_f = values
    d_z_i, d_z_f, d_z_g, d_z_o = jnp.split(d_z, 4, axis=-1)
    d_log_f = slope_f * d_z_f + d_state.m
    d_m = jnp.where(f >= i, d_log_f, d_z_i)  # m is the larger exponent, so the larger of i and f is 1
    d_i = i * (d_z_i - d_m)
    d_f = f * (d_log_f - d_m)
    d_c = f * d_state.c + c * d_f + g * d_i + i * (1 - g**2) * d_z_g
    d_n = f * d_state.n + n * d_f + d_i
    d_h = o * by_n * (d_c - ratio * d_n) + ratio * o * (1 - o) * d_z_o
    return SLSTMState(d_h, d_c, d_n, d_m), d_h


SLSTM: Cell[LSTMParams, SLSTMState] = Cell(
    name="SLSTM",
    init=init_slstm,
    initial_carry=lambda params, batch_shape=(): SLSTMState(*_zeros(params.w_hh, batch_shape, 4)),
    gates=slstm_gates,
    activations=slstm_activations,
    gates_jvp=slstm_gates_jvp,
)
"""The sLSTM with one head: exponential gates and a normalizer (Beck et al., xLSTM, 2024).

`SLSTM.init(key, input_size, hidden_size, *, forget_bias=1.0, dtype=jnp.float32)` draws `LSTMParams`. The carry is an
`SLSTMState`: h, which is the output, c, n and m, all [*batch, hidden]. The gates of a trace are `SLSTMGates`.

>>> import jax, jaxlstm
>>> jaxlstm.variants.SLSTM.init(jax.random.key(0), 5, 7).w_ih.shape
(5, 28)
"""


# The LSTM with other activations, and with clipped numbers, as ONNX, Keras and TensorFlow offer them.


@cached
@border("make_lstm")
def make_lstm(
    *,
    gate: Callable[[Array], Array] = sigmoid,
    candidate: Callable[[Array], Array] = tanh,
    output: Callable[[Array], Array] = tanh,
    cell_clip: float | None = None,
    gate_clip: float | None = None,
) -> Cell[LSTMParams, LSTMState]:
    """Make an LSTM with other functions or clipping; equal arguments give the same cell, which compiles once.

    Args:
      gate: of z_i, z_f and z_o.
      candidate: of z_g.
      output: of c.
      cell_clip: clip c to [-cell_clip, cell_clip], as Sak et al. 2014.
      gate_clip: clip z + a likewise, as ONNX does.

    Raises:
      TypeError: a function is not callable.
      ValueError: a limit is not a positive number.

    >>> import jaxlstm
    >>> jaxlstm.variants.make_lstm() is jaxlstm.LSTM
    True
    """
    for name, function in (("gate", gate), ("candidate", candidate), ("output", output)):
        check_function(name, function)
    for name, limit in (("cell_clip", cell_clip), ("gate_clip", gate_clip)):
        if limit is not None and not limit > 0:
            raise ArgumentValueError(f"{name} must be a positive number or None, got {limit!r}.")
    if (gate, candidate, output, cell_clip, gate_clip) == (sigmoid, tanh, tanh, None, None):
        return LSTM

    def activations(params: LSTMParams, state: LSTMState, z: Array, a: Array) -> LSTMGates[Array]:
        z_i, z_f, z_g, z_o = jnp.split(_clipped(z + a, gate_clip), 4, axis=-1)
        return LSTMGates(gate(z_i), gate(z_f), candidate(z_g), gate(z_o))

    def gates(params: LSTMParams, state: LSTMState, z: Array, a: Array) -> tuple[LSTMState, Array]:
        i, f, g, o = activations(params, state, z, a)
        c = _clipped(f * state.c + i * g, cell_clip)
        h = o * output(c)
        return LSTMState(h, c), h

    return Cell(LSTM.init, initial_carry, gates, activations=activations, name="LSTM(variant)")


def _clipped(x: Array, limit: float | None) -> Array:
    return x if limit is None else jnp.clip(x, -limit, limit)
