"""Split a gradient by where it comes from: the loss of every step, and every use of the weights before it.

The loss is E = Σ_t E_t, and the weights W are used at every step s. With one copy W_s of them per step,

    G[t, s] = ∂E_t / ∂W_s        dE_t/dW = Σ_s G[t, s]        dE/dW = Σ_t Σ_s G[t, s]

The gradient is therefore a sum over uses of the weights; it is not one chain that ends at the initial carry.
G[t, s] is 0 for s > t.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import as_arrays, border, check_sequence, check_step_loss, checked_flags, of_one_step
from jaxlstm.recurrence import unroll


class GradientSources(NamedTuple):
    """The parts of a gradient; every leaf has the axes named here, then the axes of the parameter."""

    losses: Float[Array, "time"]  # E_t
    by_loss: PyTree  # [t]: dE_t/dW, the part that comes from the loss of step t
    by_lag: PyTree  # [k]: Σ_t G[t, t−k], the part that comes from using W k steps before a loss
    norms: PyTree  # [t, s]: ‖G[t, s]‖, one number per leaf
    row: Callable[[Array], PyTree]  # t -> G[t, :], its leaves [s, ...]


@border("gradient_sources")
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
    """Split the gradient of Σ_t E_t with respect to the parameters: by loss, and by use of the weights.

    This takes T backward passes, and memory for twice T copies of the parameters. No [T, T, ...] array is stored.

    Args:
      cell, params, xs, carry, mask, reset: as in `unroll`. Without `carry`, the initial carry is computed from the
        weights of the first step.
      step_loss: (y_t, t) -> E_t, a number, summed over the batch; y_t is [*batch, hidden].

    Returns:
      A `GradientSources`.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if `step_loss` is not such a function.

    >>> import jax
    >>> from jaxlstm import LSTM
    >>> from jaxlstm.diagnostics import gradient_sources
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> found = gradient_sources(LSTM, params, jax.numpy.ones((11, 3, 5)), lambda y, t: (y**2).sum())
    >>> found.norms.w_hh.shape, found.by_lag.w_hh.shape
    ((11, 11), (11, 7, 28))
    """
    params, xs, carry = as_arrays(params=params, xs=xs, carry=carry)
    batch_shape = check_sequence(cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    mask, reset = checked_flags(mask, reset, num_steps, batch_shape)
    y = jax.eval_shape(cell.step, params, cell.initial_carry(params, batch_shape), of_one_step(xs))[1]
    check_step_loss(step_loss, y)
    times = jnp.arange(num_steps)

    def losses_of(copies: PyTree) -> Array:
        def step(carry: PyTree, inputs: Any) -> tuple[PyTree, PyTree]:
            params, *of_step = inputs
            x, mask, reset = jax.tree.map(functools.partial(jnp.expand_dims, axis=0), of_step)
            carry, ys = unroll(cell, params, x, carry, mask=mask, reset=reset)
            return carry, _first(ys)

        start = cell.initial_carry(_first(copies) if num_steps else params, batch_shape) if carry is None else carry
        ys = lax.scan(step, start, (copies, xs, mask, reset))[1]
        return jax.vmap(step_loss)(ys, times)

    copies = jax.tree.map(lambda w: jnp.broadcast_to(w, (num_steps, *w.shape)), params)
    losses, pull = jax.vjp(losses_of, copies)
    row = jax.tree_util.Partial(_row, pull, losses)

    def one_loss(by_lag: PyTree, t: Array) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        def add(total: Array, g: Array) -> Array:
            # Steps after t have negative lags. These count from the end of `total`, where adding their 0 is harmless.
            return total.at[t - times].add(g)

        of_t = row(t)
        by_loss = jax.tree.map(functools.partial(jnp.sum, axis=0), of_t)
        return jax.tree.map(add, by_lag, of_t), (by_loss, jax.tree.map(_norms, of_t))

    by_lag, (by_loss, norms) = lax.scan(one_loss, jax.tree.map(jnp.zeros_like, copies), times)
    return GradientSources(losses, by_loss, by_lag, norms, row)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(operator.itemgetter(0), tree)


def _row(pull: Callable[[Array], tuple[PyTree]], losses: Array, t: Array) -> PyTree:
    return pull((jnp.arange(losses.size) == t).astype(losses.dtype))[0]


def gradient_cosine(gradient: PyTree, reference: PyTree) -> Array:
    """Return the cosine of the angle between two gradients: 1 if they have the same direction; NaN if one is 0.

    `jax.vmap(gradient_cosine)` of two `GradientSources.by_lag`, one for a cell and one for `cut_recurrence(cell)`,
    shows up to which lag the truncated gradient has the direction of the exact one.

    Args:
      gradient, reference: two pytrees of the same shapes.

    >>> import jax.numpy as jnp
    >>> from jaxlstm.diagnostics import gradient_cosine
    >>> print(gradient_cosine([jnp.ones(2)], [jnp.array([2.0, 0.0])]).round(3))
    0.707
    """
    a, b = _scaled(gradient), _scaled(reference)
    cosine: Array = _dot(a, b) / (jnp.sqrt(_dot(a, a)) * jnp.sqrt(_dot(b, b)))
    return cosine


def _scaled(tree: PyTree) -> PyTree:
    """Divide by the largest entry, so that squares of small entries do not underflow to 0."""
    largest = functools.reduce(jnp.maximum, [jnp.abs(leaf).max(initial=0) for leaf in jax.tree.leaves(tree)])
    return jax.tree.map(lambda leaf: leaf / largest, tree)


def _dot(a: PyTree, b: PyTree) -> Any:
    return sum(product.sum() for product in jax.tree.leaves(jax.tree.map(jnp.multiply, a, b)))


def _norms(g: Float[Array, "time ..."]) -> Float[Array, "time"]:
    flat = g.reshape(len(g), math.prod(g.shape[1:]))
    # Scaled for the same reason as in `_scaled`.
    largest = jnp.abs(flat).max(axis=-1, initial=0.0)
    scaled = flat / jnp.where(largest == 0, 1, largest)[:, None]
    return largest * jnp.sqrt((scaled**2).sum(axis=-1))
