"""Regularisers: each turns a cell into a cell, and its noise is an input.

What stays the same for a whole sequence comes with the parameters, `Locked(params, x, h)`; what is drawn anew at every
step comes with the input, `Noisy(xs, noise)`. Without it the cell is as it is for evaluation. So a regularised cell is
pure like any other: it is unrolled, differentiated, stacked and stepped alike, and the keys are the caller's.

A mask of dropout holds 0 with probability `rate`, else 1 / (1 − rate): what it multiplies keeps its mean in training,
and evaluation needs no factor.
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
from jaxlstm.checks import check_cell, check_key, checked_rate, kind_of
from jaxlstm.derivative import where
from jaxlstm.lstm import LSTMParams, LSTMState

Params = TypeVar("Params")
Carry = TypeVar("Carry")


class Noisy(NamedTuple):
    """The input of a cell with noise of its own at every step."""

    x: PyTree  # [time, *batch, input], or whatever the cell within takes
    noise: PyTree | None  # leaves [time, *batch, ...]; None: evaluation


class Locked(NamedTuple):
    """Parameters of a cell with masks that stay for the whole sequence. None: no mask."""

    params: PyTree
    x: Float[Array, "*batch input"] | None = None
    h: Float[Array, "*batch hidden"] | None = None


def dropout_mask(
    key: Key[Array, ""], rate: float, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Draw a mask of dropout: 0 with probability `rate`, else 1 / (1 − rate).

    Srivastava et al., Dropout: a simple way to prevent neural networks from overfitting, 2014.

    Args:
      key: a typed key; the same key is the same mask, in any process.
      rate: share that is dropped, in [0, 1).
      shape: of the mask. Leave out the time axis for one that is locked over time.
      dtype: that of what it multiplies.

    Raises:
      TypeError: `key` is no typed key.
      ValueError: `rate` lies outside [0, 1).

    >>> import jax, jaxlstm
    >>> sorted(set(jaxlstm.dropout_mask(jax.random.key(0), 0.75, (100,)).tolist()))
    [0.0, 4.0]
    """
    return draw_mask("dropout_mask", key, rate, shape, dtype)


def draw_mask(function: str, key: Any, rate: float, shape: Sequence[int], dtype: DTypeLike) -> Float[Array, "..."]:
    """Do what `dropout_mask` does, for a function that errors are to name."""
    check_key(function, key)
    rate = checked_rate(function, "rate", rate)
    return _flags(key, 1 - rate, shape).astype(dtype) / jnp.asarray(1 - rate, dtype)


def _flags(key: Key[Array, ""], rate: float, shape: Sequence[int]) -> Bool[Array, "..."]:
    """Draw flags that are True with a probability; in float32, so that they do not depend on whether x64 is enabled."""
    return jax.random.bernoulli(key, jnp.asarray(rate, jnp.float32), tuple(shape))


@functools.cache
def variational_dropout(cell: Cell[Params, Carry]) -> Cell[Any, Carry]:
    """Make the cell that drops the same inputs and the same units of h at every step: z = (x ⊙ m_x) W_ih + b,
    a = (h ⊙ m_h) W_hh.

    Gal & Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, 2016; with one mask
    for all gates. It goes next to the cell: `zoneout(variational_dropout(LSTM), 0.1)`.

    Args:
      cell: any cell whose `recur` reads `carry.h`.

    Returns:
      A cell whose parameters are `Locked(params, x, h)`; plain `params`: evaluation.

    Raises:
      ValueError: when it runs, if a mask does not have the batch axes of the sequence.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> h = jaxlstm.dropout_mask(jax.random.key(1), 0.3, (3, 7))
    >>> cell = jaxlstm.variational_dropout(jaxlstm.LSTM)
    >>> _, ys = jaxlstm.unroll(cell, jaxlstm.Locked(params, h=h), jax.numpy.ones((11, 3, 5)))
    """

    check_cell("variational_dropout", cell)

    def initial_carry(params: Any, batch_shape: tuple[int, ...] = ()) -> Carry:
        params, x_mask, h_mask = _locked(params)
        if h_mask is not None and cell.recur is None:
            raise ValueError(f"Locked.h is given, and {cell.name} has no matmul that reads h.")
        _check_mask("x", x_mask, batch_shape)
        _check_mask("h", h_mask, batch_shape)
        return cell.initial_carry(params, batch_shape)

    def project(params: Any, xs: Any) -> Any:
        params, mask, _ = _locked(params)
        return cell.project(params, _masked("x", xs, mask))

    def recur(params: Any, carry: Any) -> Any:
        params, _, mask = _locked(params)
        assert cell.recur is not None
        return cell.recur(params, carry._replace(h=_masked("h", carry.h, mask)))

    own = lambda function: function and (lambda params, *rest: function(_locked(params).params, *rest))
    return dataclasses.replace(
        cell,
        initial_carry=initial_carry,
        project=project,
        recur=cell.recur and recur,
        gates=own(cell.gates),
        activations=own(cell.activations),
        gates_jvp=own(cell.gates_jvp),
        name=f"variational_dropout({cell.name})",
    )


def _locked(params: Any) -> Locked:
    return params if isinstance(params, Locked) else Locked(params)


def _check_mask(name: str, mask: Array | None, batch_shape: tuple[int, ...]) -> None:
    if mask is not None and mask.shape[:-1] != batch_shape:
        expected = [*batch_shape, *mask.shape[-1:]]
        raise ValueError(f"Locked.{name} must be [*batch, features] = {expected}, got {[*mask.shape]}.")


def _masked(name: str, value: Array, mask: Array | None) -> Array:
    """Multiply by a mask [*batch, features] what is [..., *batch, features], its leading axes perhaps made into one.

    A mask is noise and no parameter: it has no gradient, so no optimiser moves it.
    """
    if mask is None:
        return value
    if mask.shape[-1:] != value.shape[-1:] or (value.shape[-mask.ndim :] != mask.shape and value.size % mask.size):
        expected = list(value.shape[-mask.ndim :] if mask.ndim <= value.ndim else value.shape)
        raise ValueError(f"Locked.{name} must be [*batch, features] = {expected}, got {list(mask.shape)}.")
    mask = lax.stop_gradient(mask).astype(value.dtype)
    if value.shape[-mask.ndim :] == mask.shape:
        return value * mask
    return (value.reshape(-1, *mask.shape) * mask).reshape(value.shape)


@functools.cache
def recurrent_dropout(cell: Cell[Params, Carry]) -> Cell[Params, Carry]:
    """Make the cell that drops units of the candidate, the news of each step, and never what is remembered.

    LSTM: c_t = f ⊙ c_{t-1} + i ⊙ (m_t ⊙ g); GRU: h_t = (1 − u) ⊙ (m_t ⊙ n) + u ⊙ h_{t-1}. Semeniuta, Severyn & Barth,
    Recurrent dropout without memory loss, 2016.

    Args:
      cell: `LSTM` or `GRU`; other regularisers go around it.

    Returns:
      A cell whose input is `Noisy(xs, m)`, m [time, *batch, hidden] from `dropout_mask`; plain `xs`: evaluation.

    Raises:
      ValueError: it is another cell.

    >>> import jax, jaxlstm
    >>> params, xs = jaxlstm.LSTM.init(jax.random.key(0), 5, 7), jax.numpy.ones((11, 3, 5))
    >>> m = jaxlstm.dropout_mask(jax.random.key(1), 0.25, (11, 3, 7))
    >>> _, ys = jaxlstm.unroll(jaxlstm.recurrent_dropout(jaxlstm.LSTM), params, jaxlstm.Noisy(xs, m))
    """
    check_cell("recurrent_dropout", cell)
    known: dict[Any, Any] = {lstm.gates: _lstm_gates, baselines.gru_gates: _gru_gates}
    if cell.gates not in known:
        raise ValueError(
            f"recurrent_dropout: cell must be LSTM or GRU, whose candidate it knows, got {cell!r}; put other "
            "regularisers around it, or give your cell's candidate z.noise as a factor."
        )
    return _with_noise(cell, known[cell.gates], f"recurrent_dropout({cell.name})")


def _lstm_gates(
    gates: Any, params: LSTMParams, state: LSTMState, z: Array, a: Array, mask: Array | None
) -> tuple[LSTMState, Array]:
    if mask is None:
        return gates(params, state, z, a)
    _check_noise("recurrent_dropout", mask, state.h)
    i, f, g, o = lstm.activations(params, state, z, a)
    c = f * state.c + i * (mask * g)
    h = o * jnp.tanh(c)
    return LSTMState(h, c), h


def _gru_gates(
    gates: Any, params: GRUParams, state: GRUState, z: Array, a: Array, mask: Array | None
) -> tuple[GRUState, Array]:
    if mask is None:
        return gates(params, state, z, a)
    _check_noise("recurrent_dropout", mask, state.h)
    _, u, n = baselines.gru_activations(params, state, z, a)
    h = (1 - u) * (mask * n) + u * state.h
    return GRUState(h), h


def output_h(carry: Any) -> Array:
    """Return `carry.h`: what most cells put out."""
    return carry.h


def zoneout(cell: Cell[Params, Carry], rates: Any, *, output: Callable[[Carry], Any] = output_h) -> Cell[Params, Carry]:
    """Make the cell whose units keep their last value with a probability: s_t = d_t ⊙ s_{t-1} + (1 − d_t) ⊙ s̃_t.

    Without noise, d_t is its expectation, the rate. Krueger et al., Zoneout: regularizing RNNs by randomly preserving
    hidden activations, 2017.

    Args:
      cell: any cell.
      rates: of every leaf of the carry, in [0, 1): one number, or a carry of them, `LSTMState(h=0.05, c=0.5)`.
      output: the step's output, by the carry after it; what the cell itself puts out knows nothing of zoneout.

    Returns:
      A cell whose input is `Noisy(xs, d)`, d from `zoneout_noise`; plain `xs`: evaluation.

    Raises:
      TypeError: rates are traced, or a dict.
      ValueError: a rate lies outside [0, 1).

    >>> import jax, jaxlstm
    >>> params, xs = jaxlstm.LSTM.init(jax.random.key(0), 5, 7), jax.numpy.ones((11, 3, 5))
    >>> rates = jaxlstm.LSTMState(h=0.05, c=0.5)
    >>> d = jaxlstm.zoneout_noise(jax.random.key(1), rates, jaxlstm.LSTM.initial_carry(params, (3,)), 11)
    >>> _, ys = jaxlstm.unroll(jaxlstm.zoneout(jaxlstm.LSTM, rates), params, jaxlstm.Noisy(xs, d))
    """
    check_cell("zoneout", cell)
    if any(isinstance(rate, jax.core.Tracer) for rate in jax.tree.leaves(rates)):
        raise TypeError("zoneout: rates must be known before anything is traced: they are part of the cell.")
    rates = jax.tree.map(functools.partial(checked_rate, "zoneout", "rates"), rates)
    try:
        return _zoneout(cell, rates, output)
    except TypeError as error:
        raise TypeError(f"zoneout: rates must be one number or a NamedTuple of them, got {kind_of(rates)}.") from error


@functools.cache
def _zoneout(cell: Cell[Params, Carry], rates: Any, output: Callable[[Carry], Any]) -> Cell[Params, Carry]:
    def gates(inner: Any, params: Params, carry: Carry, z: Any, a: Any, held: PyTree | None) -> tuple[Carry, Any]:
        new, _ = inner(params, carry, z, a)
        if held is None:
            expected = lambda rate, old, new: rate * old + (1 - rate) * new
            new = jax.tree.map(expected, _like(rates, carry), carry, new)
        else:
            jax.tree.map(functools.partial(_check_noise, "zoneout", is_bool=True), held, carry)
            new = jax.tree.map(where, held, carry, new)
        return new, output(new)

    return _with_noise(cell, gates, f"zoneout({cell.name})")


def _check_noise(function: str, noise: Array, leaf: Array, *, is_bool: bool = False) -> None:
    if is_bool and noise.dtype != jnp.bool_:
        raise ValueError(f"{function}: noise must be bool, True where a unit keeps its value; zoneout_noise draws it.")
    if noise.shape != leaf.shape:
        raise ValueError(f"{function}: noise of a step must be {list(leaf.shape)}, got {list(noise.shape)}.")


def zoneout_noise(
    key: Key[Array, ""], rates: Any, carry: Carry, num_steps: int
) -> Bool[Array, "time *batch hidden"] | Carry:
    """Draw which units keep their last value, for `zoneout`.

    Args:
      key: a typed key.
      rates: as given to `zoneout`.
      carry: any carry of the cell, [*batch, ...]; its shapes are what is read.
      num_steps: T.

    Returns:
      A tree like the carry, its leaves bool [time, *batch, ...].

    Raises:
      TypeError: `key` is no typed key.
      ValueError: a rate lies outside [0, 1).
    """
    check_key("zoneout_noise", key)
    rates = jax.tree.map(functools.partial(checked_rate, "zoneout_noise", "rates"), rates)
    treedef: Any = jax.tree.structure(carry)
    keys = treedef.unflatten(jax.random.split(key, treedef.num_leaves))
    draw = lambda key, rate, leaf: _flags(key, rate, (num_steps, *leaf.shape))
    return jax.tree.map(draw, keys, _like(rates, carry), carry)


def _like(rates: Any, carry: PyTree) -> PyTree:
    return jax.tree.map(lambda _: rates, carry) if isinstance(rates, float) else rates


def _with_noise(cell: Cell[Params, Carry], gates: Callable[..., Any], name: str) -> Cell[Params, Carry]:
    """Make the cell that hands the noise of each step to `gates(inner, params, carry, z, a, noise)`."""

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
        gates_jvp=None,  # that of the cell within is another function's
        name=name,
    )


def _noisy(x: Any) -> Noisy:
    return x if isinstance(x, Noisy) else Noisy(x, None)


# Dropout of weights makes other parameters of the same cell; there is nothing to unroll differently.


def weight_drop(key: Key[Array, ""], rate: float, params: Params) -> Params:
    """Drop entries of w_hh, the same at all steps and for the whole batch (DropConnect).

    Wan et al., Regularization of neural networks using DropConnect, 2013; Merity, Keskar & Socher, Regularizing and
    optimizing LSTM language models, 2018.

    Args:
      key: a typed key.
      rate: share that is dropped, in [0, 1).
      params: a NamedTuple with w_hh, such as `LSTMParams`.

    Raises:
      TypeError: `key` is no typed key, or `params` have no w_hh.
      ValueError: `rate` lies outside [0, 1).

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> dropped = jaxlstm.weight_drop(jax.random.key(1), 0.5, params)
    >>> _, ys = jaxlstm.unroll(jaxlstm.LSTM, dropped, jax.numpy.ones((11, 3, 5)))
    """
    if not (hasattr(params, "w_hh") and hasattr(params, "_replace")):
        raise TypeError(f"weight_drop: params must be a NamedTuple with w_hh, got {type(params).__name__}.")
    w_hh = params.w_hh
    return params._replace(w_hh=w_hh * draw_mask("weight_drop", key, rate, w_hh.shape, w_hh.dtype))


def embedding_dropout(
    key: Key[Array, ""], rate: float, embedding: Float[Array, "symbols features"]
) -> Float[Array, "symbols features"]:
    """Drop whole symbols, wherever they occur, from a table of embeddings.

    Gal & Ghahramani 2016; Merity, Keskar & Socher 2018.

    Raises:
      TypeError: `key` is no typed key.
      ValueError: `rate` lies outside [0, 1), or `embedding` is no table.

    >>> import jax, jaxlstm
    >>> jaxlstm.embedding_dropout(jax.random.key(0), 0.1, jax.numpy.ones((50, 8)))[jax.numpy.array([3, 1, 3])].shape
    (3, 8)
    """
    if embedding.ndim != 2:
        raise ValueError(f"embedding_dropout: embedding must be [symbols, features], got {list(embedding.shape)}.")
    return embedding * draw_mask("embedding_dropout", key, rate, (len(embedding), 1), embedding.dtype)
