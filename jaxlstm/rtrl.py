"""Real-time recurrent learning: the gradient forward in time, for any cell (Williams & Zipser 1989).

With s the carry, θ the parameters and E_t the loss of a step, each step updates the influence M_t = ∂s_t/∂θ:

    M_t     = ∂s_t/∂s_{t−1} M_{t−1} + ∂s_t/∂θ
    ∂E_t/∂θ = ∂E_t/∂y_t (∂y_t/∂s_{t−1} M_{t−1} + ∂y_t/∂θ)

Only M remembers the past, and its size does not grow with T. But it is large: for an LSTM, 2·hidden numbers per
parameter and example. There are two approximations. SnAp-1 keeps only the entries of M that one step can fill, for an
LSTM 2 numbers per parameter (Menick et al. 2021): pass `pattern=snap1_pattern(cell, params, x)`. E-prop omits the path
through `recur` from ∂s_t/∂s_{t−1} (Bellec et al. 2020): pass `cut_recurrence(cell)` as the cell. For an LSTM, combine
the two: SnAp-1 is exact after the cut, so the result is e-prop itself, at 2 numbers per parameter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from jaxlstm.cell import Cell, PyTree, num_params
from jaxlstm.checks import (
    ArgumentValueError,
    as_arrays,
    as_sequence,
    border,
    cached,
    check_cell,
    check_initial_carry,
    check_sequence,
    check_step_loss,
    checked_flags,
    checked_shape,
    of_one_step,
    shown,
)
from jaxlstm.masks import Steps, hold, select
from jaxlstm.structure import dependence

# fmt: off
__all__ = [  # noqa: RUF022
    "RTRLState", "init_rtrl", "rtrl_step", "rtrl_gradient", "SnAp1Pattern", "snap1_pattern", "cut_recurrence",
    "OnlineState", "make_online_step",
]
# fmt: on

MAX_BYTES = 4 << 30


class RTRLState(NamedTuple):
    """The state that passes from step to step."""

    carry: PyTree  # its leaves [*batch, ...]
    influence: Float[Array, "*batch n p"]  # ∂carry/∂params: n numbers of a carry (SnAp-1: n leaves), p parameters


class SnAp1Pattern(NamedTuple):
    """For each parameter, the index of the number that it reaches within one step, in each leaf and in y; −1: none."""

    carry: Int[Array, "leaves p"]  # the index in the flat carry
    y: Int[Array, "p"]


@border("init_rtrl")
def init_rtrl(
    cell: Cell[Any, Any],
    params: PyTree,
    batch_shape: tuple[int, ...] = (),
    *,
    carry: PyTree | None = None,
    pattern: SnAp1Pattern | None = None,
    max_bytes: int = MAX_BYTES,
) -> RTRLState:
    """Return the state before the first step.

    Args:
      cell, params: as in `unroll`.
      batch_shape: the batch axes.
      carry: the carry to start from, its leaves [*batch, ...], assumed independent of the parameters; default the
        cell's initial carry.
      pattern: for SnAp-1; default exact.
      max_bytes: the most bytes that the influence may take; default 4 GiB.

    Raises:
      ValueError: the influence would take more.
    """
    check_cell(cell)
    batch_shape = checked_shape("batch_shape", batch_shape)
    if not isinstance(max_bytes, int | float) or not max_bytes >= 0:
        raise ArgumentValueError(f"max_bytes must be a number of bytes, got {shown(max_bytes)}.")
    check_initial_carry(cell, params)
    num_bytes = influence_bytes(cell, params, batch_shape, pattern)
    if num_bytes > max_bytes:
        raise ArgumentValueError(
            f"the influence of {num_params(params):,} parameters on the carry takes {num_bytes:,} bytes at batch shape "
            f"{list(batch_shape)}, more than max_bytes={max_bytes:,}; use fewer units or examples, "
            "pattern=snap1_pattern(...), or backpropagation through time."
        )
    (params,) = as_arrays(params=params)
    initial = _initial_state(cell, params, batch_shape, pattern)
    return initial if carry is None else RTRLState(carry, jnp.zeros_like(initial.influence))


def influence_bytes(
    cell: Cell[Any, Any], params: PyTree, batch_shape: tuple[int, ...], pattern: SnAp1Pattern | None = None
) -> int:
    """Return how many bytes the influence takes."""
    one = jax.tree.leaves(jax.eval_shape(cell.initial_carry, params))
    numbers = sum(leaf.size for leaf in one) if pattern is None else len(one)
    return math.prod(batch_shape) * numbers * num_params(params) * one[0].dtype.itemsize


def _initial_state(
    cell: Cell[Any, Any], params: PyTree, batch_shape: tuple[int, ...], pattern: SnAp1Pattern | None
) -> RTRLState:
    """Return the initial carry and its derivative with respect to the parameters: not 0 if the carry is learned."""
    flat, unravel = ravel_pytree(params)

    def initial_carry(flat: Array) -> Array:
        return ravel_pytree(cell.initial_carry(unravel(flat)))[0]

    if pattern is None:
        influence = jax.jacrev(initial_carry)(flat)
    else:
        sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.initial_carry, params))]
        influence = jnp.where(pattern.carry >= 0, _leaf_by_leaf(initial_carry, flat, sizes), 0)
    carry = cell.initial_carry(params, batch_shape)
    return RTRLState(carry, jnp.broadcast_to(influence, (*batch_shape, *influence.shape)))


def _leaf_by_leaf(function: Callable[[Array], Array], flat: Array, sizes: list[int]) -> Float[Array, "leaves p"]:
    """Return the derivative of the sum of each leaf, with one pullback per leaf.

    If a parameter reaches at most one number of a leaf, as SnAp-1 assumes, this is the derivative of that number.
    """
    out, pull = jax.vjp(function, flat)
    leaf_of = np.repeat(np.arange(len(sizes)), sizes)
    (gradients,) = jax.vmap(pull)(jax.nn.one_hot(leaf_of, len(sizes), dtype=out.dtype, axis=0))
    return gradients


def rtrl_step(
    cell: Cell[Any, Any],
    params: PyTree,
    state: RTRLState,
    x: PyTree,
    *,
    mask: Bool[Array, "*batch"] | None = None,
    reset: Bool[Array, "*batch"] | None = None,
    pattern: SnAp1Pattern | None = None,
) -> tuple[RTRLState, Array, Callable[[Array], PyTree]]:
    """Take one step; return also the map from the output's derivative to the parameters' gradient.

    That gradient includes all earlier uses of the parameters.

    Args:
      cell, params: as in `unroll`.
      state: from `init_rtrl` or the step before.
      x: [*batch, input].
      mask, reset: flags of this step, as in `unroll`; a reset replaces the carry by the cell's initial carry.
      pattern: for SnAp-1, the pattern that the state was initialized with; default exact.

    Returns:
      The state after the step, the output y [*batch, hidden], and d_y -> d_params, which sums over the batch.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> state = init_rtrl(jaxlstm.LSTM, params, (3,))
    >>> state, y, d_params = rtrl_step(jaxlstm.LSTM, params, state, jax.numpy.ones((3, 5)))
    >>> d_params(2 * y).w_hh.shape  # of the loss (y**2).sum()
    (7, 28)
    """
    batch_shape = state.influence.shape[:-2]
    unravel = ravel_pytree(params)[1]
    if reset is not None:
        state = select(reset, _initial_state(cell, params, batch_shape, pattern), state)
    advance = functools.partial(_advance, cell, params, pattern)
    for _ in batch_shape:
        advance = jax.vmap(advance)
    new_state, y, y_influence = advance(state, x)
    new_state, (y, y_influence) = hold(Steps(x, mask), state, new_state, (y, y_influence))
    return new_state, y, Partial(_pull, Partial(unravel), None if pattern is None else pattern.y, y_influence)


def _advance(
    cell: Cell[Any, Any], params: PyTree, pattern: SnAp1Pattern | None, state: RTRLState, x: PyTree
) -> tuple[RTRLState, Array, Array]:
    """Take a step of one example; return its state, its output, and ∂y/∂params (SnAp-1: one number per parameter)."""
    flat_params, unravel_params = ravel_pytree(params)
    flat_carry, unravel_carry = ravel_pytree(state.carry)

    def step(flat_params: Array, flat_carry: Array) -> tuple[Array, Any]:
        carry, y = cell.step(unravel_params(flat_params), unravel_carry(flat_carry), x)
        return jnp.concatenate([ravel_pytree(carry)[0], y]), (carry, y)

    def step_by_params(flat_params: Array) -> Array:
        return step(flat_params, flat_carry)[0]

    # Carry and y are one vector in here, and y has the last rows of its derivatives.
    if pattern is None:
        (by_params, by_carry), (carry, y) = jax.jacrev(step, (0, 1), has_aux=True)(flat_params, flat_carry)
        influence = by_carry @ state.influence + by_params
    else:
        by_carry, (carry, y) = jax.jacrev(step, 1, has_aux=True)(flat_params, flat_carry)
        sizes = [leaf.size for leaf in jax.tree.leaves(state.carry)]
        by_params = _leaf_by_leaf(step_by_params, flat_params, [*sizes, y.size])
        reached = jnp.concatenate([pattern.carry, jnp.where(pattern.y >= 0, pattern.y + sum(sizes), -1)[None]])
        through = by_carry[reached[:, None], pattern.carry[None]] * state.influence[None]
        influence = jnp.where(reached >= 0, through.sum(axis=1) + by_params, 0)
    num_kept = len(state.influence)
    y_influence = influence[num_kept:] if pattern is None else influence[num_kept]
    return RTRLState(carry, influence[:num_kept]), y, y_influence


def _pull(unravel: Any, reached: Array | None, y_influence: Array, d_y: Array) -> PyTree:
    if reached is None:
        return unravel(jnp.tensordot(d_y, y_influence, d_y.ndim))
    return unravel((d_y[..., reached] * y_influence).reshape(-1, reached.size).sum(axis=0))


@border("rtrl_gradient")
def rtrl_gradient(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    step_loss: Callable[[Array, Array], Array],
    carry: PyTree | None = None,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
    pattern: SnAp1Pattern | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[Array, PyTree]:
    """Return the loss of a sequence, Σ_t E_t, and its gradient with respect to `params`, computed forward in time.

    Without `pattern`, this equals the gradient of `unroll`.

    Args:
      cell, params, xs, carry, mask, reset: as in `unroll`.
      step_loss: (y_t, t) -> E_t, a number; y_t is [*batch, hidden].
      pattern: for SnAp-1; default exact.
      max_bytes: the most bytes that the influence may take; default 4 GiB.

    Raises:
      TypeError: as `unroll`.
      ValueError: as `unroll` and `init_rtrl`; or `step_loss` is not such a function.

    >>> import jax
    >>> from jaxlstm import LSTM
    >>> from jaxlstm.rtrl import rtrl_gradient
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> loss, gradient = rtrl_gradient(LSTM, params, jax.numpy.ones((11, 3, 5)), lambda y, t: (y**2).sum())
    >>> gradient.w_hh.shape
    (7, 28)
    """
    params, xs, carry = as_arrays(params=params, xs=xs, carry=carry)
    batch_shape = check_sequence(cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    mask, reset = checked_flags(mask, reset, num_steps, batch_shape)
    state = init_rtrl(cell, params, batch_shape, carry=carry, pattern=pattern, max_bytes=max_bytes)
    y = jax.eval_shape(cell.step, params, state.carry, of_one_step(xs))[1]
    check_step_loss(step_loss, y)

    def step(so_far: Any, inputs: Any) -> Any:
        (state, loss, gradient), (t, x, mask, reset) = so_far, inputs
        state, y, pull = rtrl_step(cell, params, state, x, mask=mask, reset=reset, pattern=pattern)
        e, d_y = jax.value_and_grad(step_loss)(y, t)
        return (state, loss + e, jax.tree.map(jnp.add, gradient, pull(d_y))), None

    times = jnp.arange(num_steps)
    # The loss may have a wider dtype than the net.
    loss_dtype = jax.eval_shape(step_loss, y, jax.ShapeDtypeStruct((), times.dtype)).dtype
    start = (state, jnp.zeros((), loss_dtype), jax.tree.map(jnp.zeros_like, params))
    (_, loss, gradient), _ = lax.scan(step, start, (times, xs, mask, reset))
    return loss, gradient


@border("snap1_pattern")
def snap1_pattern(cell: Cell[Any, Any], params: PyTree, x: PyTree) -> SnAp1Pattern:
    """Return which numbers of the carry and of y each parameter reaches within one step, for SnAp-1.

    In an LSTM, the weights into a unit reach its own h and c. The pattern is found by tracing, so it holds for all
    values: only the shapes of the arguments matter.

    Args:
      cell, params: as in `unroll`.
      x: one input without batch axes, [input].

    Raises:
      ValueError: a parameter reaches two numbers of one leaf, as a projection of h does, or only the initial carry.
    """
    check_cell(cell)
    params, x = as_arrays(params=params, x=x)
    if batch_shape := check_sequence(cell, params, as_sequence(x), None, one_step=True):
        raise ArgumentValueError(f"x must be one input without batch axes, got batch axes {list(batch_shape)}.")
    carry = cell.initial_carry(params)
    flat_params, unravel = ravel_pytree(params)

    def step(flat_params: Array) -> Array:
        return ravel_pytree(cell.step(unravel(flat_params), carry, x))[0]

    out, pull = jax.vjp(dependence(step, flat_params), jnp.ones_like(flat_params))
    sizes = [leaf.size for leaf in jax.tree.leaves(carry)]
    leaf_of = np.repeat(np.arange(len(sizes) + 1), [*sizes, out.size - sum(sizes)])

    def one_number(places: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        k, leaf = inputs
        (gradient,) = pull(jnp.zeros_like(out).at[k].set(1))
        twice = ((gradient != 0) & (places[leaf] >= 0)).any()
        return places.at[leaf].set(jnp.where(gradient != 0, k, places[leaf])), twice

    nowhere = jnp.full((len(sizes) + 1, flat_params.size), -1)
    places, twice = lax.scan(one_number, nowhere, (jnp.arange(out.size), jnp.asarray(leaf_of)))
    if twice.any():
        raise ArgumentValueError(
            f"a parameter of {cell.name} reaches two numbers of one leaf of the carry within one step, but SnAp-1 "
            "keeps only one; use exact RTRL (no pattern)."
        )

    def initial_carry(flat_params: Array) -> Array:
        return ravel_pytree(cell.initial_carry(unravel(flat_params)))[0]

    in_carry = jax.jacrev(dependence(initial_carry, flat_params))(flat_params).any(axis=0)
    if (in_carry & (places[:-1] < 0).all(axis=0)).any():
        raise ArgumentValueError(
            f"the initial carry of {cell.name} is learned from parameters that no step reads, and SnAp-1 would lose "
            "their gradient; use exact RTRL (no pattern)."
        )
    return SnAp1Pattern(places[:-1], jnp.where(places[-1] >= 0, places[-1] - sum(sizes), -1))


@cached
@border("cut_recurrence")
def cut_recurrence(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Make the cell whose gradient does not flow back in time through `recur`: for an LSTM, it flows along c alone.

    Any method then computes the truncated gradient of 1997 (Hochreiter & Schmidhuber, Long short-term memory).
    """
    check_cell(cell)

    def recur(params: PyTree, carry: PyTree) -> PyTree:
        return cell.recur(params, lax.stop_gradient(carry))

    return dataclasses.replace(cell, recur=recur)


class OnlineState(NamedTuple):
    """The state of an online learner between two steps of its stream."""

    params: tuple[PyTree, PyTree]  # of the cell and of the readout
    opt_state: optax.OptState
    rtrl: RTRLState


def make_online_step(
    cell: Cell[Any, Any],
    loss_fn: Callable[[PyTree, Array, PyTree], Array],
    optimizer: optax.GradientTransformation,
    *,
    pattern: SnAp1Pattern | None = None,
) -> Callable[[OnlineState, PyTree, PyTree], tuple[OnlineState, Array]]:
    """Make the step of a learner that updates its parameters after every step of a stream.

    The influence mixes derivatives at earlier parameters, so this is exact in the limit of small learning rates.

    Args:
      cell: as in `unroll`.
      loss_fn: (readout, y, target) -> loss of one step, a number.
      optimizer: updates (params, readout).
      pattern: for SnAp-1; default exact.

    Returns:
      (state, x, target) -> (state, loss), ready for `jax.jit`. Start with `OnlineState((params, readout),
      optimizer.init((params, readout)), init_rtrl(cell, params, batch_shape, pattern=pattern))`.
    """

    def online_step(state: OnlineState, x: PyTree, target: PyTree) -> tuple[OnlineState, Array]:
        params, readout = state.params
        rtrl, y, pull = rtrl_step(cell, params, state.rtrl, x, pattern=pattern)
        loss, (d_readout, d_y) = jax.value_and_grad(loss_fn, (0, 1))(readout, y, target)
        updates, opt_state = optimizer.update((pull(d_y), d_readout), state.opt_state, state.params)
        new_params: Any = optax.apply_updates(state.params, updates)
        return OnlineState(new_params, opt_state, rtrl), loss

    return online_step
