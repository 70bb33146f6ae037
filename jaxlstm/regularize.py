"""Regularizers: each turns a cell into a cell whose noise is an input.

Noise that stays the same for a whole sequence comes with the parameters, `Locked(params, x, h)`. Noise drawn anew at
every step comes with the input, `Noisy(xs, noise)`. Without noise the cell computes what evaluation needs. So a
regularized cell is as pure as any other: unroll, differentiate, stack and step it alike; the caller holds the keys.

A dropout mask holds 0 with probability `rate`, else 1 / (1 − rate). This keeps the mean during training, so evaluation
needs no factor.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from jaxlstm import baselines, lstm
from jaxlstm.baselines import GRUParams, GRUState
from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import (
    ArgumentTypeError,
    ArgumentValueError,
    as_arrays,
    border,
    cached,
    check_cell,
    check_count,
    check_function,
    checked_dtype,
    checked_key,
    checked_rate,
    checked_shape,
    kind_of,
    same_structure,
)
from jaxlstm.lstm import LSTMParams, LSTMState
from jaxlstm.masks import where

# fmt: off
__all__ = [  # noqa: RUF022
    "Locked", "dropout_mask", "variational_dropout", "weight_drop",
    "Noisy", "recurrent_dropout", "zoneout", "zoneout_noise",
]
# fmt: on

Params = TypeVar("Params")
Carry = TypeVar("Carry")


class Noisy(NamedTuple):
    """The input of a cell, with noise for every step."""

    x: PyTree  # [time, *batch, input], or whatever the inner cell takes
    noise: PyTree | None  # leaves [time, *batch, ...]; None: evaluation


class Locked(NamedTuple):
    """The parameters of a cell, with masks that stay for the whole sequence. None: no mask."""

    params: PyTree
    x: Float[Array, "*batch input"] | None = None
    h: Float[Array, "*batch hidden"] | None = None


@border("dropout_mask")
def dropout_mask(
    key: Key[Array, ""], rate: float, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Draw a dropout mask: 0 with probability `rate`, else 1 / (1 − rate).

    Srivastava et al., Dropout: a simple way to prevent neural networks from overfitting, 2014. To drop whole symbols
    from an embedding table (Gal & Ghahramani 2016), pass `shape=(len(embedding), 1)` and multiply the table by it.

    Args:
      key: a JAX key; the same key gives the same mask in any process.
      rate: probability of a 0, in [0, 1).
      shape: of the mask. Leave out the time axis to lock the mask over time.
      dtype: of the arrays that the mask multiplies.

    Raises:
      TypeError: `key` is not a JAX key.
      ValueError: `rate` is not in [0, 1).

    >>> import jax
    >>> from jaxlstm.regularize import dropout_mask
    >>> sorted(set(dropout_mask(jax.random.key(0), 0.75, (100,)).tolist()))
    [0.0, 4.0]
    """
    key = checked_key(key)
    rate = checked_rate("rate", rate)
    shape, dtype = checked_shape("shape", shape), checked_dtype(dtype)
    return _flags(key, 1 - rate, shape).astype(dtype) / jnp.asarray(1 - rate, dtype)


def _flags(key: Key[Array, ""], rate: float, shape: Sequence[int]) -> Bool[Array, "..."]:
    """Draw flags that are True with a probability; in float32, so that enabling x64 changes no flag."""
    return jax.random.bernoulli(key, jnp.asarray(rate, jnp.float32), tuple(shape))


# Masks that stay for the whole sequence.


@cached
@border("variational_dropout")
def variational_dropout(cell: Cell[Params, Carry]) -> Cell[Any, Carry]:
    """Make the cell that drops the same inputs and units of h at every step: x ⊙ m_x and h ⊙ m_h in its matmuls.

    Gal & Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, 2016; with one mask
    for all gates. Apply it first, other regularizers around it: `zoneout(variational_dropout(LSTM), 0.1)`.

    Args:
      cell: any cell whose `recur` reads `carry.h`.

    Returns:
      A cell whose parameters are `Locked(params, x, h)`; plain `params` mean evaluation.

    Raises:
      ValueError: when it runs, a mask does not have the batch axes of the sequence.

    >>> import jax, jaxlstm
    >>> from jaxlstm.regularize import Locked, dropout_mask, variational_dropout
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> h = dropout_mask(jax.random.key(1), 0.3, (3, 7))
    >>> _, ys = jaxlstm.unroll(variational_dropout(jaxlstm.LSTM), Locked(params, h=h), jax.numpy.ones((11, 3, 5)))
    """
    check_cell(cell)

    def initial_carry(params: Any, batch_shape: tuple[int, ...] = ()) -> Carry:
        params, x_mask, h_mask = _locked(params)
        carry = cell.initial_carry(params, batch_shape)
        if h_mask is not None and not jax.tree.leaves(jax.eval_shape(cell.recur, params, carry)):
            raise ArgumentValueError(f"Locked.h is given, but {cell.name} has no matmul that reads h.")
        _check_mask("x", x_mask, batch_shape)
        _check_mask("h", h_mask, batch_shape)
        return carry

    def project(params: Any, xs: Any) -> Any:
        params, mask, _ = _locked(params)
        return cell.project(params, _masked("x", xs, mask))

    def recur(params: Any, carry: Any) -> Any:
        params, _, mask = _locked(params)
        return cell.recur(params, carry if mask is None else carry._replace(h=_masked("h", carry.h, mask)))

    return dataclasses.replace(
        cell,
        initial_carry=initial_carry,
        project=project,
        recur=recur,
        gates=_of_locked(cell.gates),
        activations=_of_locked(cell.activations),
        gates_jvp=_of_locked(cell.gates_jvp),
        name=f"variational_dropout({cell.name})",
    )


def _locked(params: Any) -> Locked:
    return params if isinstance(params, Locked) else Locked(params)


def _of_locked(function: Any) -> Any:
    """Make a cell's function read the parameters inside `Locked`; None stays None."""
    return function and (lambda params, *rest: function(_locked(params).params, *rest))


def _check_mask(name: str, mask: Array | None, batch_shape: tuple[int, ...]) -> None:
    if mask is not None and mask.shape[:-1] != batch_shape:
        expected = [*batch_shape, *mask.shape[-1:]]
        raise ArgumentValueError(f"Locked.{name} must be [*batch, features] = {expected}, got {[*mask.shape]}.")


def _masked(name: str, value: Array, mask: Array | None) -> Array:
    """Multiply [..., *batch, features] by a mask [*batch, features]; the leading axes may be merged into one.

    A mask is noise, not a parameter: it has no gradient, so an optimizer never moves it.
    """
    if mask is None:
        return value
    if mask.shape[-1:] != value.shape[-1:] or (value.shape[-mask.ndim :] != mask.shape and value.size % mask.size):
        expected = list(value.shape[-mask.ndim :])
        raise ArgumentValueError(f"Locked.{name} must be [*batch, features] = {expected}, got {list(mask.shape)}.")
    mask = lax.stop_gradient(mask).astype(value.dtype)
    # The derivative rule merges time and batch, in that order, so the mask repeats once per step.
    merged = value.shape[-mask.ndim :] != mask.shape
    steps = value.reshape(value.size // mask.size, *mask.shape) if merged else value
    return (steps * jnp.broadcast_to(mask, steps.shape)).reshape(value.shape)


# Noise that is drawn anew at every step.


@cached
@border("recurrent_dropout")
def recurrent_dropout(cell: Cell[Params, Carry]) -> Cell[Params, Carry]:
    """Make the cell that drops units of the candidate, new information, never memory: m_t ⊙ g in place of g.

    Semeniuta, Severyn & Barth, Recurrent dropout without memory loss, 2016.

    Args:
      cell: `LSTM` or `GRU` itself; put other regularizers around the result.

    Returns:
      A cell whose input is `Noisy(xs, m)`, m [time, *batch, hidden] from `dropout_mask`; plain `xs` mean evaluation.

    Raises:
      ValueError: it is another cell.

    >>> import jax, jaxlstm
    >>> from jaxlstm.regularize import Noisy, dropout_mask, recurrent_dropout
    >>> params, xs = jaxlstm.LSTM.init(jax.random.key(0), 5, 7), jax.numpy.ones((11, 3, 5))
    >>> m = dropout_mask(jax.random.key(1), 0.25, (11, 3, 7))
    >>> _, ys = jaxlstm.unroll(recurrent_dropout(jaxlstm.LSTM), params, Noisy(xs, m))
    """
    check_cell(cell)
    # The candidate is inside `gates`, so only known equations can be rewritten.
    known: dict[Any, Any] = {lstm.gates: _lstm_gates, baselines.gru_gates: _gru_gates}
    if cell.gates not in known:
        raise ArgumentValueError(
            f"cell must be LSTM or GRU, because only their candidate is known, got {cell!r}; apply recurrent_dropout "
            "first, and other regularizers to the result."
        )
    return _with_noise(cell, known[cell.gates], f"recurrent_dropout({cell.name})")


def _lstm_gates(
    gates: Any, params: LSTMParams, state: LSTMState, z: Array, a: Array, mask: Array | None
) -> tuple[LSTMState, Array]:
    if mask is None:
        return gates(params, state, z, a)
    _check_noise(mask, state.h)
    i, f, g, o = lstm.activations(params, state, z, a)
    c = f * state.c + i * (mask * g)
    h = o * jnp.tanh(c)
    return LSTMState(h, c), h


def _gru_gates(
    gates: Any, params: GRUParams, state: GRUState, z: Array, a: Array, mask: Array | None
) -> tuple[GRUState, Array]:
    if mask is None:
        return gates(params, state, z, a)
    _check_noise(mask, state.h)
    _, u, n = baselines.gru_activations(params, state, z, a)
    h = (1 - u) * (mask * n) + u * state.h
    return GRUState(h), h


def output_h(carry: Any) -> Array:
    """Return `carry.h`, the output of most cells."""
    return carry.h


@border("zoneout")
def zoneout(cell: Cell[Params, Carry], rates: Any, *, output: Callable[[Carry], Any] = output_h) -> Cell[Params, Carry]:
    """Make the cell whose units keep their last value at random: s_t = d_t ⊙ s_{t-1} + (1 − d_t) ⊙ s̃_t.

    Without noise, d_t is its expectation, the rate. Krueger et al., Zoneout: regularizing RNNs by randomly preserving
    hidden activations, 2017.

    Args:
      cell: any cell.
      rates: for every leaf of the carry, in [0, 1): one number, or a carry of numbers, `LSTMState(h=0.05, c=0.5)`.
      output: computes a step's output from the carry after it, because the cell's own output ignores zoneout.

    Returns:
      A cell whose input is `Noisy(xs, d)`, d from `zoneout_noise`; plain `xs` mean evaluation.

    Raises:
      TypeError: rates are traced, or a dict.
      ValueError: a rate is not in [0, 1).

    >>> import jax, jaxlstm
    >>> from jaxlstm.regularize import Noisy, zoneout, zoneout_noise
    >>> params, xs = jaxlstm.LSTM.init(jax.random.key(0), 5, 7), jax.numpy.ones((11, 3, 5))
    >>> rates = jaxlstm.LSTMState(h=0.05, c=0.5)
    >>> d = zoneout_noise(jax.random.key(1), rates, jaxlstm.LSTM.initial_carry(params, (3,)), 11)
    >>> _, ys = jaxlstm.unroll(zoneout(jaxlstm.LSTM, rates), params, Noisy(xs, d))
    """
    check_cell(cell)
    check_function("output", output)
    if any(isinstance(rate, jax.core.Tracer) for rate in jax.tree.leaves(rates)):
        raise ArgumentTypeError("rates must be known before tracing, because they are part of the cell.")
    rates = jax.tree.map(functools.partial(checked_rate, "rates"), rates)
    try:
        return _zoneout(cell, rates, output)
    except TypeError as error:  # the cache cannot hash them
        raise ArgumentTypeError(
            f"rates must be one number or a NamedTuple of numbers, got {kind_of(rates)}."
        ) from error


@functools.cache
def _zoneout(cell: Cell[Params, Carry], rates: Any, output: Callable[[Carry], Any]) -> Cell[Params, Carry]:
    def gates(inner: Any, params: Params, carry: Carry, z: Any, a: Any, held: PyTree | None) -> tuple[Carry, Any]:
        new, _ = inner(params, carry, z, a)
        if held is None:
            expected = lambda rate, old, new: rate * old + (1 - rate) * new
            new = jax.tree.map(expected, _like(rates, carry), carry, new)
        else:
            jax.tree.map(functools.partial(_check_noise, is_bool=True), held, carry)
            new = jax.tree.map(where, held, carry, new)
        return new, output(new)

    return _with_noise(cell, gates, f"zoneout({cell.name})")


def _check_noise(noise: Array, leaf: Array, *, is_bool: bool = False) -> None:
    if is_bool and noise.dtype != jnp.bool_:
        raise ArgumentValueError("noise must be bool, True where a unit keeps its value; zoneout_noise draws it.")
    if noise.shape != leaf.shape:
        raise ArgumentValueError(f"noise of a step must be {list(leaf.shape)}, got {list(noise.shape)}.")


@border("zoneout_noise")
def zoneout_noise(
    key: Key[Array, ""], rates: Any, carry: Carry, num_steps: int
) -> Bool[Array, "time *batch hidden"] | Carry:
    """Draw which units keep their last value, for `zoneout`.

    Args:
      key: a JAX key.
      rates: as given to `zoneout`.
      carry: any carry of the cell, [*batch, ...]; only its shapes matter.
      num_steps: T.

    Returns:
      A tree like the carry, its leaves bool [time, *batch, ...].

    Raises:
      TypeError: `key` is not a JAX key.
      ValueError: a rate is not in [0, 1).
    """
    key = checked_key(key)
    check_count("num_steps", num_steps)
    rates = jax.tree.map(functools.partial(checked_rate, "rates"), rates)
    (carry,) = as_arrays(carry=carry)
    if not isinstance(rates, float) and not same_structure(rates, carry):
        raise ArgumentTypeError(f"rates must be one number or {kind_of(carry)}, like the carry, got {kind_of(rates)}.")
    # One key per leaf: h and c keep their values independently.
    treedef: Any = jax.tree.structure(carry)
    keys = treedef.unflatten(jax.random.split(key, treedef.num_leaves))
    draw = lambda key, rate, leaf: _flags(key, rate, (num_steps, *leaf.shape))
    return jax.tree.map(draw, keys, _like(rates, carry), carry)


def _like(rates: Any, carry: PyTree) -> PyTree:
    return jax.tree.map(lambda _: rates, carry) if isinstance(rates, float) else rates


def _with_noise(cell: Cell[Params, Carry], gates: Callable[..., Any], name: str) -> Cell[Params, Carry]:
    """Make the cell that passes the noise of each step to `gates(inner, params, carry, z, a, noise)`."""

    def project(params: Params, xs: Any) -> Any:
        x, noise = _noisy(xs)
        z = cell.project(params, x)
        return z if noise is None else Noisy(z, noise)

    def activations(params: Params, carry: Carry, z: Any, a: Any) -> Any:
        assert cell.activations is not None
        return cell.activations(params, carry, _noisy(z).x, a)

    def noisy_gates(params: Params, carry: Carry, z: Any, a: Any) -> tuple[Carry, Any]:
        z, noise = _noisy(z)
        return gates(cell.gates, params, carry, z, a, noise)

    return dataclasses.replace(
        cell,
        project=project,
        gates=noisy_gates,
        activations=cell.activations and activations,
        gates_jvp=None,  # the inner cell's closed form knows nothing of the noise
        name=name,
    )


def _noisy(x: Any) -> Noisy:
    return x if isinstance(x, Noisy) else Noisy(x, None)


# Dropping weights changes the parameters; the cell stays the same.


@border("weight_drop")
def weight_drop(key: Key[Array, ""], rate: float, params: Params) -> Params:
    """Drop entries of w_hh, the same ones at all steps and for the whole batch (DropConnect).

    Wan et al., Regularization of neural networks using DropConnect, 2013; Merity, Keskar & Socher, Regularizing and
    optimizing LSTM language models, 2018.

    Args:
      key: a JAX key.
      rate: probability of dropping an entry, in [0, 1).
      params: a NamedTuple with w_hh, such as `LSTMParams`.

    Raises:
      TypeError: `key` is not a JAX key, or `params` have no w_hh.
      ValueError: `rate` is not in [0, 1).

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> dropped = jaxlstm.regularize.weight_drop(jax.random.key(1), 0.5, params)
    >>> _, ys = jaxlstm.unroll(jaxlstm.LSTM, dropped, jax.numpy.ones((11, 3, 5)))
    """
    if not (hasattr(params, "w_hh") and hasattr(params, "_replace")):
        raise ArgumentTypeError(f"params must be a NamedTuple with w_hh, got {type(params).__name__}.")
    w_hh = params.w_hh
    return params._replace(w_hh=w_hh * dropout_mask(key, rate, w_hh.shape, w_hh.dtype))
