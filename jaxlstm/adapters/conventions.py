"""Conventions that `linen` and `nnx` share: gate functions, the layout [batch, time, features], dtypes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import serialization
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jaxlstm import (
    GRU,
    Cell,
    GRUParams,
    GRUState,
    LSTMParams,
    LSTMState,
    init_stack,
    length_mask,
    low_precision,
    unroll_stack,
    variants,
)
from jaxlstm.adapters import weights

Function = Callable[[Array], Array]


# One step of Flax's cells; `low` holds parameters, h and x in the dtype of the matmuls.


def step_lstm(
    cell: Any, carry: tuple[Array, Array], low: tuple[LSTMParams, Array, Array]
) -> tuple[tuple[Array, Array], Array]:
    """Take one step with Flax's carry, (c, h)."""
    c, h = carry
    state, y = _step(_lstm(cell.gate_fn, cell.activation_fn), LSTMState(h, c), *low)
    return (state.c, state.h), y


def step_gru(cell: Any, h: Array, low: tuple[GRUParams, Array, Array]) -> tuple[Array, Array]:
    """Take one step with Flax's carry, h."""
    state, y = _step(_gru(cell.gate_fn, cell.activation_fn), GRUState(h), *low)
    return state.h, y


def _step(cell: Cell[Any, Any], state: Any, params: Any, h: Array, x: Array) -> tuple[Any, Array]:
    a = cell.recur(params, state._replace(h=h))
    return cell.gates(params, state, cell.project(params, x), a)


def _lstm(gate_fn: Function, activation_fn: Function) -> Cell[LSTMParams, LSTMState]:
    """Return the LSTM with these functions in place of σ and tanh."""
    return variants.make_lstm(gate=gate_fn, candidate=activation_fn, output=activation_fn)


@functools.cache
def _gru(gate_fn: Function, activation_fn: Function) -> Cell[GRUParams, GRUState]:
    """Return the GRU with these functions in place of σ and tanh."""
    # The usual functions keep the cell itself, and with it the names of its gates.
    if _are_usual(gate_fn, activation_fn):
        return GRU

    def gates(params: GRUParams, state: GRUState, z: Array, a: Array) -> tuple[GRUState, Array]:
        z_r, z_u, z_n = jnp.split(z, 3, axis=-1)
        a_r, a_u, a_n = jnp.split(a, 3, axis=-1)
        r, u, b_hn = gate_fn(z_r + a_r), gate_fn(z_u + a_u), jnp.broadcast_to(params.b_hn, a_n.shape)
        h = (1 - u) * activation_fn(z_n + r * (a_n + b_hn)) + u * state.h
        return GRUState(h), h

    return dataclasses.replace(GRU, gates=gates, activations=None)


def _are_usual(gate_fn: Function, activation_fn: Function) -> bool:
    return gate_fn is jax.nn.sigmoid and activation_fn in (jnp.tanh, jax.nn.tanh)


# A layer, as Flax's users call it.


class Options(NamedTuple):
    """The settings of a layer, apart from the number of features it reads."""

    cell: Cell[Any, Any]
    features: Any  # an int, or one for each layer
    num_layers: int
    bidirectional: bool
    param_dtype: DTypeLike
    dtype: DTypeLike | None
    gradient: Any


class Call(NamedTuple):
    """The arguments of one call of a layer, after its attributes have filled in what the caller left out."""

    initial_carry: list[Any] | None
    seq_lengths: Array | None
    mask: Array | None
    reset: Array | None
    noise: list[Any] | None
    dropout: float
    key: Key[Array, ""] | None
    time_major: bool
    return_carry: bool


def either(given: Any, own: Any) -> Any:
    """Return the argument of a call, or the layer's own attribute if it is None."""
    return own if given is None else given


def init_layers(key: Key[Array, ""], input_size: int, options: Options) -> dict[str, Any]:
    """Draw the parameters of a stack as nested dicts: `layer_0: {forward: {w_ih, ...}, ...}`."""
    return tree_of(_init_stack(key, input_size, options))


def tree_of(layers: Sequence[Any]) -> dict[str, Any]:
    """Return a stack as the nested dicts that Flax stores."""
    weights.check_list("Recurrent", layers)
    return {f"layer_{depth}": serialization.to_state_dict(layer) for depth, layer in enumerate(layers)}


def layers_of(tree: Any, input_size: int, options: Options) -> list[Any]:
    """Return the stack from parameters that `init_layers` made."""
    # Flax stores nested dicts. The shapes of a fresh stack say which NamedTuple each of them was.
    like = jax.eval_shape(lambda: _init_stack(jax.random.key(0), input_size, options))
    if len(tree) != len(like):
        raise ValueError(f"Recurrent: num_layers is {len(like)}, the parameters have {len(tree)} layers.")
    return [serialization.from_state_dict(layer, tree[f"layer_{depth}"]) for depth, layer in enumerate(like)]


def _init_stack(key: Key[Array, ""], input_size: int, options: Options) -> list[Any]:
    if not hasattr(options.num_layers, "__index__") or options.num_layers < 1:
        raise ValueError(f"Recurrent: num_layers must be a positive int, got {options.num_layers!r}.")
    hidden_sizes = options.features
    if not isinstance(hidden_sizes, Sequence):
        hidden_sizes = [hidden_sizes] * options.num_layers
    elif options.num_layers not in (1, len(hidden_sizes)):
        raise ValueError(f"Recurrent: num_layers is {options.num_layers}, features has {len(hidden_sizes)} sizes.")
    return init_stack(
        key,
        options.cell,
        input_size,
        hidden_sizes,
        bidirectional=options.bidirectional,
        dtype=options.param_dtype,
    )


def run_layers(layers: list[Any], inputs: Array, options: Options, call: Call) -> Any:
    """Run a stack on [*batch, time, features], or [time, *batch, features]."""
    time_major, dtype = call.time_major, options.dtype

    def to_time_major(v: Array) -> Array:
        return v if time_major else jnp.moveaxis(v, v.ndim - 2, 0)

    # Cast inputs of another precision, as Flax's layers do; `unroll` would refuse them.
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(jax.tree.leaves(layers)[0].dtype)
    xs = to_time_major(inputs)
    mask = _time_major_flags("mask", call.mask, inputs, time_major)
    if call.seq_lengths is not None:
        real = _checked_lengths(call.seq_lengths, xs)
        mask = real if mask is None else mask & real
    carries, ys = unroll_stack(
        options.cell if dtype is None else low_precision(options.cell, dtype),
        layers,
        xs,
        call.initial_carry,
        mask=mask,
        reset=_time_major_flags("reset", call.reset, inputs, time_major),
        noise=jax.tree.map(to_time_major, call.noise),
        dropout=call.dropout,
        key=call.key,
        gradient=options.gradient,
    )
    # Flax's layers return their own dtype; the core keeps the parameters' dtype.
    outputs = ys if time_major else jnp.moveaxis(ys, 0, -2)
    outputs = outputs if dtype is None else outputs.astype(dtype)
    return (carries, outputs) if call.return_carry else outputs


def _checked_lengths(seq_lengths: Any, xs: Array) -> Array:
    """Check lengths of [time, *batch, features]; return their mask."""
    batch_shape, got = list(xs.shape[1:-1]), list(jnp.asarray(seq_lengths).shape)
    if got != batch_shape:
        raise ValueError(f"Recurrent: seq_lengths must be [*batch] = {batch_shape}, got {got}.")
    return length_mask(seq_lengths, len(xs))


def _time_major_flags(name: str, flags: Any, inputs: Array, time_major: bool) -> Array | None:
    """Check a mask or resets in the layout of the inputs; return them as [time, *batch]."""
    if flags is None:
        return None
    flags, shape = jnp.asarray(flags), inputs.shape[:-1]
    if flags.dtype != jnp.bool_ or flags.shape != shape:
        axes = "[time, *batch]" if time_major else "[*batch, time]"
        got = f"{flags.dtype} {list(flags.shape)}"
        raise ValueError(f"Recurrent: {name} must be bool {axes} = {list(shape)}, got {got}.")
    return flags if time_major else jnp.moveaxis(flags, -1, 0)
