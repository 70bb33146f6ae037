"""Unroll a cell over time, with masks and resets: whole, or in chunks that keep little for the backward pass."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Int

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import check_carry, check_compute_dtype, check_sequence, check_size, checked_flags
from jaxlstm.derivative import Steps, make_plan, run, run_in_bulk, scan_blocks, select, size_without_remainder, where
from jaxlstm.precision import in_compute_dtype

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
    gradient: Literal["bulk", "scan"] = "bulk",
    block_size: int | None = None,
    compute_dtype: DTypeLike | None = None,
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
      gradient: "bulk": the derivative rule of `jaxlstm.derivative`, which is faster and keeps less. "scan": JAX
        differentiates the scan, which is plain backpropagation through time. The gradients are equal, to rounding.
      block_size: steps of which "bulk" has the derivative at once; default some 3 MB of pre-activations on a CPU, all
        steps elsewhere. Where the batch is sharded over CPU devices, pass the number of steps.
      compute_dtype: "bfloat16" or "float16": x, h and weights are rounded to it for the matmuls. Their sums, biases,
        gates, carry, outputs and gradients keep the dtype of the parameters.

    Returns:
      The carry after the last step, and the outputs ys [time, *batch, hidden].

    Raises:
      TypeError: dtypes are mixed or integers, or the carry is another cell's.
      ValueError: a shape is wrong, or `gradient` unknown, or `block_size` no positive integer.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> carry, ys = jaxlstm.unroll(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)))
    >>> ys.shape, carry.c.shape
    ((11, 3, 7), (3, 7))
    """
    return run_sequence(
        "unroll",
        cell,
        params,
        xs,
        carry,
        mask=mask,
        reset=reset,
        reset_carry=reset_carry,
        reverse=reverse,
        gradient=gradient,
        block_size=block_size,
        compute_dtype=compute_dtype,
    )


def unroll_chunked(
    cell: Cell[Params, Carry],
    params: Params,
    xs: PyTree,
    carry: Carry | None = None,
    *,
    chunk_size: int | None = None,
    truncate: bool = False,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
    reset_carry: Carry | None = None,
    reverse: bool = False,
    gradient: Literal["bulk", "scan"] = "bulk",
    block_size: int | None = None,
    compute_dtype: DTypeLike | None = None,
) -> tuple[Carry, Array]:
    """Do what `unroll` does, and keep one carry a chunk for the backward pass, which runs each chunk again.

    Chen et al., Training deep nets with sublinear memory cost, 2016. With `truncate`, truncated backpropagation
    through time (Williams & Peng 1990): the carry goes on from chunk to chunk, its gradient does not.

    Args:
      chunk_size: steps of one chunk; default near the square root of their number. Where it does not divide them, the
        last chunk to be processed is shorter.
      truncate: cut the gradient where one chunk hands its carry to the next.
      cell, params, xs, carry, mask, reset, reset_carry, reverse, gradient, block_size, compute_dtype: as in `unroll`.

    Returns:
      As `unroll`, to the last bit the same with and without `truncate`.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if `chunk_size` is no positive integer.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> carry, ys = jaxlstm.unroll_chunked(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)), chunk_size=4)
    >>> ys.shape, carry.c.shape
    ((11, 3, 7), (3, 7))
    """
    cell, params, steps, carry, reset_carry = _checked(
        "unroll_chunked", cell, params, xs, carry, mask, reset, reset_carry, gradient, compute_dtype
    )
    check_size("unroll_chunked", "chunk_size", chunk_size)
    check_size("unroll_chunked", "block_size", block_size)
    num_steps = jax.tree.leaves(steps.x)[0].shape[0]
    if chunk_size is None:
        chunk_size = size_without_remainder(num_steps, math.ceil(math.sqrt(max(num_steps, 1))))
    first = jnp.arange(num_steps) == (num_steps - 1 if reverse else 0)

    @jax.checkpoint
    def chunk(carry: PyTree, inputs: tuple[Steps, Array]) -> tuple[PyTree, PyTree]:
        steps, first = inputs
        if truncate:
            carry = select(first.any(), carry, jax.tree.map(lax.stop_gradient, carry))
        return _run(cell, params, steps, carry, reset_carry, gradient, block_size, reverse)

    return scan_blocks(chunk, carry, (steps, first), chunk_size, reverse)


def _checked(
    function: str,
    cell: Cell[Params, Carry],
    params: Params,
    xs: PyTree,
    carry: Carry | None,
    mask: Any,
    reset: Any,
    reset_carry: Carry | None,
    gradient: str,
    compute_dtype: DTypeLike | None,
) -> tuple[Cell[Params, Carry], Params, Steps, Carry, Carry | None]:
    """Check what a recurrence is given; return it as `_run` wants it, the reset carry None where each step has one."""
    if gradient not in ("bulk", "scan"):
        raise ValueError(f'{function}: gradient must be "bulk" or "scan", got {gradient!r}.')
    params, xs, carry, reset_carry = jax.tree.map(jnp.asarray, (params, xs, carry, reset_carry))
    batch_shape = check_sequence(function, cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    mask, reset = checked_flags(function, mask, reset, num_steps, batch_shape)
    if compute_dtype is not None:
        check_compute_dtype(function, compute_dtype)
        cell = in_compute_dtype(cell, jnp.dtype(compute_dtype))

    initial_carry = cell.initial_carry(params, batch_shape)
    carry = initial_carry if carry is None else carry
    reset_carry, one_per_step = _checked_reset_carry(function, cell, reset, reset_carry, initial_carry, num_steps)
    if mask is not None:
        # The first of two `where`s: without it a NaN in padding is multiplied into the gradient of the weights.
        xs = jax.tree.map(lambda x: where(mask, x, jnp.zeros_like(x)), xs)
    carry = _typed_for_scan(cell, params, xs, carry)
    steps = Steps(xs, mask, reset, reset_carry if one_per_step else None)
    return cell, params, steps, carry, None if one_per_step else reset_carry


def run_sequence(
    function: str,
    cell: Cell[Params, Carry],
    params: Params,
    xs: PyTree,
    carry: Carry | None = None,
    *,
    mask: Any = None,
    reset: Any = None,
    reset_carry: Carry | None = None,
    reverse: bool = False,
    gradient: str = "bulk",
    block_size: int | None = None,
    compute_dtype: DTypeLike | None = None,
) -> tuple[Carry, Array]:
    """Do what `unroll` does, for a function that errors are to name."""
    cell, params, steps, carry, reset_carry = _checked(
        function, cell, params, xs, carry, mask, reset, reset_carry, gradient, compute_dtype
    )
    check_size(function, "block_size", block_size)
    return _run(cell, params, steps, carry, reset_carry, gradient, block_size, reverse)


def _run(
    cell: Cell[Params, Carry],
    params: Params,
    steps: Steps,
    carry: Carry,
    reset_carry: Carry | None,
    gradient: str,
    block_size: int | None,
    reverse: bool,
) -> tuple[Carry, Array]:
    plan = make_plan(cell, params, steps, carry, block_size=block_size, reverse=reverse)
    carry, ys, _ = (run_in_bulk if gradient == "bulk" else run)(plan, params, steps, carry, reset_carry)
    return carry, ys


def length_mask(lengths: ArrayLike | Sequence[int], num_steps: int) -> Bool[Array, "time *batch"]:
    """Make the mask of right-padded sequences from their lengths.

    Args:
      lengths: [*batch] integers, the number of real steps of each sequence.
      num_steps: T, the padded length.

    Returns:
      [time, *batch], True where t < length.

    Raises:
      TypeError: `lengths` are not integers.
      ValueError: a length is negative or beyond `num_steps`. Lengths that `jit`
        traces cannot be looked at: a negative one counts as 0, one beyond as `num_steps`.

    >>> import jaxlstm
    >>> print(1 * jaxlstm.length_mask([3, 0, 1], 3))
    [[1 0 1]
     [1 0 0]
     [1 0 0]]
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(lengths))
    known = np.zeros(0, int) if traced else np.asarray(lengths)
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"length_mask: lengths must be integers, got {lengths.dtype}; cast with lengths.astype(int).")
    if known.size and not 0 <= known.min() <= known.max() <= num_steps:
        got = f"lengths from {known.min()} to {known.max()}"
        raise ValueError(f"length_mask: lengths must lie between 0 and num_steps = {num_steps}, got {got}.")
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


def _typed_for_scan(cell: Cell[Any, Carry], params: Any, xs: PyTree, carry: Carry) -> Carry:
    """Give the carry the sharding type that z has, and so the carry after a step: in a scan it must not change.

    A carry of zeros knows nothing of the mesh; selecting it by flags cut from z tells it, and changes no bit.
    """
    first = jax.tree.map(lambda x: lax.slice_in_dim(x, 0, min(1, x.shape[0])).sum(axis=0, dtype=x.dtype), xs)
    z = jax.tree.leaves(cell.project(params, first))[0]
    return select(jnp.ones_like(z.sum(axis=-1), dtype=bool), carry, carry)


def _checked_reset_carry(
    function: str,
    cell: Cell[Any, Any],
    reset: Array | None,
    reset_carry: PyTree | None,
    initial_carry: PyTree,
    num_steps: int,
) -> tuple[PyTree, bool]:
    """Return the reset carry, by default the initial one, and whether it holds one per step."""
    if reset_carry is None:
        return None if reset is None else initial_carry, False
    if reset is None:
        raise ValueError(f"{function}: reset_carry is given without reset, which says where it applies.")
    pairs = zip(*map(jax.tree.leaves, (reset_carry, initial_carry)), strict=False)
    one_per_step = any(got.ndim > want.ndim for got, want in pairs)
    lead = (num_steps,) if one_per_step else ()
    expected = jax.tree.map(lambda c: jax.ShapeDtypeStruct((*lead, *c.shape), c.dtype), initial_carry)
    check_carry(function, "reset_carry", cell, reset_carry, expected)
    return reset_carry, one_per_step
