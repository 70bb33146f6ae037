"""Masks and resets: which steps are real, and where a new sequence starts.

A masked step holds the carry and outputs 0. A reset replaces the carry before the step. Both are linear in the carry,
so `start_of` and `hold` serve values and tangents alike; for a tangent, None means zero.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from jaxlstm.cell import PyTree
from jaxlstm.checks import ArgumentTypeError, ArgumentValueError, as_array, border, check_count, check_flag, shown
from jaxlstm.tangents import leaves_like


@border("length_mask")
def length_mask(lengths: ArrayLike | Sequence[int], num_steps: int) -> Bool[Array, "time *batch"]:
    """Make the mask of right-padded sequences from their lengths.

    Args:
      lengths: [*batch] integers, the number of real steps of each sequence.
      num_steps: T, the padded length.

    Returns:
      [time, *batch], True where t < length.

    Raises:
      TypeError: `lengths` are not integers.
      ValueError: a length is negative or greater than `num_steps`. Lengths traced by `jit` have no values to check: a
        negative one counts as 0, one that is too large as `num_steps`.

    >>> import jaxlstm
    >>> print(1 * jaxlstm.length_mask([3, 0, 1], 3))
    [[1 0 1]
     [1 0 0]
     [1 0 0]]
    """
    check_count("num_steps", num_steps)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(lengths))
    # NumPy's values, not JAX's: this must also work while `jit` traces something else.
    try:
        known = np.zeros(0, int) if traced else np.asarray(lengths)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"lengths must be an array of integers, got {shown(lengths)}.") from error
    if known.dtype.kind not in "biuf" or (known.dtype.kind == "f" and known.size):
        raise ArgumentTypeError(f"lengths must be integers, got {known.dtype}; cast with lengths.astype(int).")
    # An empty list has no integers that could tell its dtype.
    lengths = jnp.asarray(lengths, int if not traced and known.size == 0 else None)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ArgumentTypeError(f"lengths must be integers, got {lengths.dtype}; cast with lengths.astype(int).")
    if known.size and not 0 <= known.min() <= known.max() <= num_steps:
        got = f"lengths from {known.min()} to {known.max()}"
        raise ArgumentValueError(f"lengths must lie between 0 and num_steps = {num_steps}, got {got}.")
    steps = jnp.arange(num_steps).reshape(num_steps, *[1] * lengths.ndim)
    return steps < lengths[None]


@border("segment_resets")
def segment_resets(segment_ids: Int[Array, "time *batch"], *, reverse: bool = False) -> Bool[Array, "time *batch"]:
    """Make the resets of sequences packed one after another in a row.

    Args:
      segment_ids: [time, *batch] integers; a new segment starts where the number changes.
      reverse: mark the last step of each segment, for `unroll(..., reverse=True)`.

    Returns:
      [time, *batch]. The first step that `unroll` processes is False: the `carry` argument applies there, so a stream
      cut into pieces continues across the cut.

    Raises:
      TypeError: `segment_ids` are not integers.

    >>> import jax.numpy as jnp, jaxlstm
    >>> print(1 * jaxlstm.segment_resets(jnp.array([7, 7, 8, 8, 8])))
    [0 0 1 0 0]
    """
    check_flag("reverse", reverse)
    segment_ids = as_array("segment_ids", segment_ids)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer) or segment_ids.ndim < 1:
        got = f"{segment_ids.dtype}{list(segment_ids.shape)}"
        raise ArgumentTypeError(f"segment_ids must be integers [time, *batch], got {got}.")
    # The row may itself be one piece of a longer stream, so its first step starts no segment.
    changes = segment_ids[1:] != segment_ids[:-1]
    start = jnp.zeros_like(segment_ids[:1], dtype=bool)
    return jnp.concatenate([changes, start] if reverse else [start, changes])[: len(segment_ids)]


class Steps(NamedTuple):
    """The inputs of a sequence: every leaf [time, *batch, ...], or [*batch, ...] for one step. None: absent."""

    x: PyTree
    mask: Bool[Array, "..."] | None = None
    reset: Bool[Array, "..."] | None = None
    reset_carry: PyTree | None = None  # one per step; one for the whole sequence is passed separately


def start_of(now: Steps, carry: PyTree, reset_carry: PyTree) -> PyTree:
    """Return the carry that a step starts from: the carry before it, or the reset carry."""
    if now.reset is None:
        return carry
    return select(now.reset, reset_carry if now.reset_carry is None else now.reset_carry, carry)


def hold(now: Steps, carry: PyTree, new_carry: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    """Return the carry after a step and its output; where masked, the carry before the step and 0."""
    if now.mask is None:
        return new_carry, y
    return select(now.mask, new_carry, carry), select(~now.mask, None, y)


def select(flags: Bool[Array, "*lead"], new: PyTree, old: PyTree) -> PyTree:
    """Select leaf by leaf between two trees; the flags cover the leading axes. An absent leaf of `new` is 0."""
    pairs = zip(jax.tree.leaves(old), leaves_like(old, new), strict=True)
    selected = [where(flags, jnp.zeros_like(o) if n is None else n, o) for o, n in pairs]
    return jax.tree.unflatten(jax.tree.structure(old), selected)


def where(flags: Bool[Array, "*lead"], new: Array, old: Array) -> Array:
    """Select by flags that cover the leading axes."""
    return jnp.where(flags.reshape(*flags.shape, *[1] * (new.ndim - flags.ndim)), new, old)


def zeros_where_masked(mask: Bool[Array, "*lead"] | None, xs: PyTree) -> PyTree:
    """Replace masked inputs by 0, so that a NaN in padding is never multiplied into the gradient of the weights."""
    return xs if mask is None else select(~mask, None, xs)
