"""Unroll a cell over time: the scan, with masks and resets inside it.

One step, with s the carry and r the carry a reset puts in its place:

    s'_t       = where(reset_t, r_t, s_{t-1})
    (s_t, y_t) = step(params, s'_t, x_t)           held where masked
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import check_carry, check_sequence, check_steps

Params = TypeVar("Params")
Carry = TypeVar("Carry")


def unroll(
    cell: Cell[Params, Carry],
    params: Params,
    xs: PyTree,
    carry: Carry | None = None,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
    reset_carry: Carry | None = None,
    reverse: bool = False,
    gradient: Literal["scan"] = "scan",
) -> tuple[Carry, Array]:
    """Run a cell over a sequence; time is axis 0, any number of batch axes follows.

    A masked step holds the carry and its output is 0; whatever stands in its input, NaN included, reaches neither
    values nor gradients. A reset replaces the carry *before* the step, in the order of processing, also at a masked
    step, which then holds the replacement.

    Args:
      cell: a `Cell`, such as `LSTM`.
      params: its parameters.
      xs: [time, *batch, input].
      carry: the carry before the first step, its leaves [*batch, ...]; default the cell's initial carry.
      mask: True where a step is real; any pattern. `length_mask` makes one.
      reset: True where a new segment or episode starts. `segment_resets` makes one.
      reset_carry: what a reset puts in place of the carry: one carry, or one per step, its leaves [time, *batch, ...];
        default the cell's initial carry, never the `carry` argument.
      reverse: process from the last step to the first; outputs stay at their own step, the carry returned is the one
        after step 0, and resets mark the *last* step of a segment.
      gradient: "scan": JAX differentiates the scan, which is plain backpropagation through time.

    Returns:
      The carry after the last step, and the outputs ys [time, *batch, hidden].

    Raises:
      TypeError: dtypes are mixed or integers, or the carry is another cell's.
      ValueError: a shape is wrong, or `gradient` unknown.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> carry, ys = jaxlstm.unroll(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)))
    >>> ys.shape, carry.c.shape
    ((11, 3, 7), (3, 7))
    """
    if gradient != "scan":
        raise ValueError(f'unroll: gradient must be "scan", got {gradient!r}.')
    params, xs, carry, reset_carry = jax.tree.map(jnp.asarray, (params, xs, carry, reset_carry))
    mask, reset = (None if flags is None else jnp.asarray(flags) for flags in (mask, reset))
    batch_shape = check_sequence("unroll", cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None:
            check_steps("unroll", name, flags, num_steps, batch_shape)

    initial_carry = cell.initial_carry(params, batch_shape)
    carry = initial_carry if carry is None else carry
    reset_carry, one_per_step = _checked_reset_carry(cell, reset, reset_carry, initial_carry, num_steps)
    if mask is not None:
        # The first of two `where`s: without it a NaN in padding is multiplied into the gradient of the weights.
        xs = jax.tree.map(lambda x: _where(mask, x, jnp.zeros_like(x)), xs)
    carry = _typed_for_scan(cell, params, xs, carry)

    def step(carry: Carry, inputs: Any) -> tuple[Carry, Array]:
        x, mask_t, reset_t, reset_carry_t = inputs
        if reset_t is not None:
            carry = _select(reset_t, reset_carry_t if one_per_step else reset_carry, carry)
        new_carry, y = cell.step(params, carry, x)
        if mask_t is not None:
            new_carry = _select(mask_t, new_carry, carry)
            y = _select(mask_t, y, jax.tree.map(jnp.zeros_like, y))
        return new_carry, y

    steps = (xs, mask, reset, reset_carry if one_per_step else None)
    return lax.scan(step, carry, steps, length=num_steps, reverse=reverse)


def length_mask(lengths: ArrayLike | Sequence[int], num_steps: int) -> Bool[Array, "time *batch"]:
    """Make the mask of right-padded sequences from their lengths.

    Args:
      lengths: [*batch] integers, the number of real steps of each sequence.
      num_steps: T, the padded length.

    Returns:
      [time, *batch], True where t < length.

    Raises:
      TypeError: `lengths` are not integers.

    >>> import jaxlstm
    >>> print(1 * jaxlstm.length_mask([3, 0, 1], 3))
    [[1 0 1]
     [1 0 0]
     [1 0 0]]
    """
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"length_mask: lengths must be integers, got {lengths.dtype}; cast with lengths.astype(int).")
    steps = jnp.arange(num_steps).reshape(num_steps, *[1] * lengths.ndim)
    return steps < lengths


def segment_resets(segment_ids: Int[Array, "time *batch"], *, reverse: bool = False) -> Bool[Array, "time *batch"]:
    """Make the resets of sequences packed one after another in a row.

    Args:
      segment_ids: [time, *batch] integers; a new segment starts where the number changes.
      reverse: mark the last step of each segment, for `unroll(..., reverse=True)`.

    Returns:
      [time, *batch]. The step at which `unroll` starts is False: there the `carry` argument applies, so a stream cut
      into pieces goes on across the cut.

    Raises:
      TypeError: `segment_ids` are not integers.

    >>> import jax.numpy as jnp, jaxlstm
    >>> print(1 * jaxlstm.segment_resets(jnp.array([7, 7, 8, 8, 8])))
    [0 0 1 0 0]
    """
    segment_ids = jnp.asarray(segment_ids)
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer) or segment_ids.ndim < 1:
        raise TypeError(
            f"segment_resets: segment_ids must be integers [time, *batch], got {segment_ids.dtype}"
            f"{list(segment_ids.shape)}."
        )
    changes = segment_ids[1:] != segment_ids[:-1]
    start = jnp.zeros_like(segment_ids[:1], dtype=bool)
    return jnp.concatenate([changes, start] if reverse else [start, changes])[: len(segment_ids)]


def _where(flags: Bool[Array, "*lead"], new: Array, old: Array) -> Array:
    """Select by flags that cover the leading axes."""
    return jnp.where(flags.reshape(*flags.shape, *[1] * (new.ndim - flags.ndim)), new, old)


def _select(flags: Bool[Array, "*batch"], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: _where(flags, n, o), new, old)


def _typed_for_scan(cell: Cell[Any, Carry], params: Any, xs: PyTree, carry: Carry) -> Carry:
    """Give the carry the sharding type that z has, and so the carry after a step: in a scan it must not change.

    A carry of zeros knows nothing of the mesh; selecting it by flags cut from z tells it, and changes no bit.
    """
    first = jax.tree.map(lambda x: lax.slice_in_dim(x, 0, min(1, x.shape[0])).sum(axis=0, dtype=x.dtype), xs)
    z = jax.tree.leaves(cell.project(params, first))[0]
    return _select(jnp.ones_like(z.sum(axis=-1), dtype=bool), carry, carry)


def _checked_reset_carry(
    cell: Cell[Any, Any], reset: Array | None, reset_carry: PyTree | None, initial_carry: PyTree, num_steps: int
) -> tuple[PyTree, bool]:
    """Return the reset carry, by default the initial one, and whether it holds one per step."""
    if reset_carry is None:
        return initial_carry, False
    if reset is None:
        raise ValueError("unroll: reset_carry is given without reset, which says where it applies.")
    pairs = zip(*map(jax.tree.leaves, (reset_carry, initial_carry)), strict=False)
    one_per_step = any(got.ndim > want.ndim for got, want in pairs)
    lead = (num_steps,) if one_per_step else ()
    expected = jax.tree.map(lambda c: jax.ShapeDtypeStruct((*lead, *c.shape), c.dtype), initial_carry)
    check_carry("unroll", "reset_carry", cell, reset_carry, expected)
    return reset_carry, one_per_step
