"""Where a gradient comes from: the loss of every step, and every use of the weights that it goes back to.

The loss is E = Σ_t E_t, and the weights W are used at every step s. With a copy W_s of them for each step,

    G[t, s] = ∂E_t / ∂W_s        dE_t/dW = Σ_s G[t, s]        dE/dW = Σ_t Σ_s G[t, s]

so that a gradient is a sum over uses of the weights, and no chain that ends at the first state. G[t, s] is 0 for s > t.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import check_sequence, check_step_loss, checked_flags, of_one_step
from jaxlstm.recurrence import unroll


class GradientSources(NamedTuple):
    """A gradient taken apart; leaves like those of the parameters, with the axis named before their own."""

    losses: Float[Array, "time"]  # E_t
    by_loss: PyTree  # [t]: dE_t/dW, what the loss of step t adds to the gradient
    by_lag: PyTree  # [k]: Σ_t G[t, t−k], what the weights' use k steps before a loss adds
    norms: PyTree  # [t, s]: ‖G[t, s]‖ of every leaf
    row: Callable[[Array], PyTree]  # t -> G[t, :], its leaves [s, ...]


def gradient_sources(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    step_loss: Callable[[Array, Array], Array],
    carry: PyTree | None = None,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
) -> GradientSources:
    """Take the gradient of Σ_t E_t by the parameters apart, by loss and by use of the weights.

    Takes a backward pass for every step, and memory for two of T copies of the parameters: no [T, T, ...] array.

    Args:
      cell, params, xs, carry, mask, reset: as in `unroll`; without `carry`, the initial one belongs to the first step.
      step_loss: (y_t, t) -> E_t, a number, summed over the batch; y_t is [*batch, hidden].

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if `step_loss` is no such function.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> found = jaxlstm.gradient_sources(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)), lambda y, t: (y**2).sum())
    >>> found.norms.w_hh.shape, found.by_lag.w_hh.shape
    ((11, 11), (11, 7, 28))
    """
    params, xs, carry = jax.tree.map(jnp.asarray, (params, xs, carry))
    batch_shape = check_sequence("gradient_sources", cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    mask, reset = checked_flags("gradient_sources", mask, reset, num_steps, batch_shape)
    times = jnp.arange(num_steps)

    def losses_of(copies: PyTree) -> Array:
        def step(carry: PyTree, inputs: Any) -> tuple[PyTree, PyTree]:
            params, *of_step = inputs
            x, mask, reset = jax.tree.map(lambda v: v[None], of_step)
            return unroll(cell, params, x, carry, mask=mask, reset=reset)

        of_first = jax.tree.map(lambda v: v[0], copies) if num_steps else params
        start = cell.initial_carry(of_first, batch_shape) if carry is None else carry
        ys = lax.scan(step, start, (copies, xs, mask, reset))[1]
        return jax.vmap(step_loss)(jax.tree.map(lambda v: v[:, 0], ys), times)

    y = jax.eval_shape(cell.step, params, cell.initial_carry(params, batch_shape), of_one_step(xs))[1]
    check_step_loss("gradient_sources", step_loss, y)
    copies = jax.tree.map(lambda v: jnp.broadcast_to(v, (num_steps, *v.shape)), params)
    losses, pull = jax.vjp(losses_of, copies)
    row = jax.tree_util.Partial(_row, pull, losses)

    def one_loss(by_lag: PyTree, t: Array) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        of_t = row(t)
        # What lies after t is 0, so that it does not matter where a negative lag lands.
        by_lag = jax.tree.map(lambda total, g: total.at[t - times].add(g), by_lag, of_t)
        return by_lag, (jax.tree.map(lambda g: g.sum(axis=0), of_t), jax.tree.map(_norms, of_t))

    by_lag, (by_loss, norms) = lax.scan(one_loss, jax.tree.map(jnp.zeros_like, copies), times)
    return GradientSources(losses, by_loss, by_lag, norms, row)


def _row(pull: Callable[[Array], tuple[PyTree]], losses: Array, t: Array) -> PyTree:
    return pull((jnp.arange(losses.size) == t).astype(losses.dtype))[0]


def gradient_cosine(gradient: PyTree, reference: PyTree) -> Array:
    """Return the cosine of the angle between two gradients: 1 if they point the same way; NaN if one is 0.

    `jax.vmap(gradient_cosine)` of two `GradientSources.by_lag`, one of them of `cut_recurrence(cell)`, says at which
    lag the truncated gradient still points where the exact one does.

    Args:
      gradient, reference: two pytrees of the same shapes.

    >>> import jax.numpy as jnp, jaxlstm
    >>> print(jaxlstm.gradient_cosine([jnp.ones(2)], [jnp.array([2.0, 0.0])]).round(3))
    0.707
    """
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), a, b)))
    a, b = _scaled(gradient), _scaled(reference)
    cosine: Array = dot(a, b) / (jnp.sqrt(dot(a, a)) * jnp.sqrt(dot(b, b)))
    return cosine


def _scaled(tree: PyTree) -> PyTree:
    """Divide by the largest entry, so that squares of small ones are not 0."""
    largest = functools.reduce(jnp.maximum, [jnp.abs(leaf).max() for leaf in jax.tree.leaves(tree)])
    return jax.tree.map(lambda leaf: leaf / largest, tree)


def _norms(g: Float[Array, "time ..."]) -> Float[Array, "time"]:
    flat = g.reshape(len(g), math.prod(g.shape[1:]))
    largest = jnp.abs(flat).max(axis=-1, initial=0.0)
    scaled = flat / jnp.where(largest == 0, 1, largest)[:, None]
    return largest * jnp.sqrt((scaled**2).sum(axis=-1))
