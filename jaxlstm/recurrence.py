"""Unroll a cell over time, with masks and resets."""

import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxlstm.bulk import How, run, run_in_bulk, scan_blocks
from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import (
    ArgumentValueError,
    as_arrays,
    border,
    check_cell,
    check_flag,
    check_sequence,
    check_sharding,
    checked_flags,
    checked_reset_carry,
)
from jaxlstm.gradients import Bulk, Chunked, Gradient, GradientOrName, Scan, checked_gradient
from jaxlstm.masks import Steps, hold, select, start_of, zeros_where_masked
from jaxlstm.tuning import Plan, known_plan, make_plans, size_without_remainder

Params = TypeVar("Params")
Carry = TypeVar("Carry")


class Options(NamedTuple):
    """The options of `unroll`, as they travel through layers and directions."""

    mask: Any = None
    reset: Any = None
    reset_carry: Any = None
    reverse: bool = False
    gradient: GradientOrName = "bulk"


@border("unroll")
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
    gradient: GradientOrName = "bulk",
) -> tuple[Carry, Array]:
    """Run a cell over a sequence. Time is axis 0; any number of batch axes may follow.

    A masked step (mask False) holds the carry and outputs 0; its input, even NaN, affects neither values nor gradients.
    A reset replaces the carry *before* the step, in the order of processing. At a masked step it does so too, and the
    step then holds the replacement.

    Args:
      cell: a `Cell`, such as `LSTM`.
      params: its parameters.
      xs: [time, *batch, input].
      carry: the carry before the first step, its leaves [*batch, ...]; default the cell's initial carry.
      mask: True where a step is real; any pattern. `length_mask` makes one.
      reset: True where a new segment or episode starts. `segment_resets` makes one.
      reset_carry: the carry after a reset: one carry, or one per step with leaves [time, *batch, ...]; default the
        cell's initial carry, never the `carry` argument.
      reverse: process from the last step to the first. Outputs stay at their own step, the carry returned is the one
        after step 0, and resets mark the *last* step of a segment.
      gradient: how to differentiate: `Bulk()` or "bulk", the library's own rule, is faster and uses less memory;
        `Scan()` or "scan" is plain backpropagation through time; `Chunked()` uses least memory, and can truncate. All
        give the same gradient, up to rounding, unless `Chunked` truncates.

    Returns:
      The carry after the last step, and the outputs ys [time, *batch, hidden].

    Raises:
      TypeError: dtypes differ, xs is not floating, mask or reset is not bool, or the carry belongs to another cell.
      ValueError: a shape is wrong, or `gradient` is unknown, or a size in it is not a positive integer.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> carry, ys = jaxlstm.unroll(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)))
    >>> ys.shape, carry.c.shape
    ((11, 3, 7), (3, 7))
    """
    return run_sequence(cell, params, xs, carry, Options(mask, reset, reset_carry, reverse, gradient))


def run_sequence(
    cell: Cell[Params, Carry], params: Params, xs: PyTree, carry: Carry | None, options: Options
) -> tuple[Carry, Array]:
    """Do what `unroll` does. Outside of `jit`, compile once per cell, shapes and options."""
    check_cell(cell)
    gradient = checked_gradient(options.gradient)
    check_flag("reverse", options.reverse)
    given = {"params": params, "xs": xs, "mask": options.mask, "reset": options.reset, "carry": carry}
    params, xs, mask, reset, carry, reset_carry = as_arrays(**given, reset_carry=options.reset_carry)
    # A compiled function must not remember arrays that JAX is tracing.
    call = _run_checked if _closes_over_tracers(cell) else _run_compiled
    return call(cell, gradient, bool(options.reverse), params, Steps(xs, mask, reset), carry, reset_carry)


def _closes_over_tracers(cell: Cell[Any, Any]) -> bool:
    """Return whether a function of a cell, or a function inside of one, closes over traced arrays."""
    seen: set[int] = set()

    def search(value: Any) -> bool:
        if id(value) in seen:
            return False
        seen.add(id(value))
        if isinstance(value, Cell):
            return any(map(search, vars(value).values()))
        if isinstance(value, functools.partial):
            return any(map(search, (value.func, value.args, value.keywords)))
        if not callable(value):
            return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))
        closure = getattr(value, "__closure__", None) or ()
        inside = [variable.cell_contents for variable in closure if variable != types.CellType()]  # not the unset ones
        return search(getattr(value, "__wrapped__", None)) or any(map(search, inside))

    return search(cell)


def _run_checked(
    cell: Cell[Params, Carry],
    gradient: Gradient,
    reverse: bool,
    params: Params,
    steps: Steps,
    carry: Carry | None,
    reset_carry: Carry | None,
) -> tuple[Carry, Array]:
    xs, mask, reset, _ = steps
    batch_shape = check_sequence(cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    mask, reset = checked_flags(mask, reset, num_steps, batch_shape)
    check_sharding(params, steps, by_scan=isinstance(getattr(gradient, "within", gradient), Scan))
    # Even with a carry given, a reset needs the initial one.
    initial_carry = cell.initial_carry(params, batch_shape)
    carry = initial_carry if carry is None else carry
    reset_carry, one_per_step = checked_reset_carry(cell, reset, reset_carry, initial_carry, num_steps)

    # Do this before the first matmul; afterwards it is too late to keep a NaN in padding out of the weights' gradient.
    xs = zeros_where_masked(mask, xs)
    steps = Steps(xs, mask, reset, reset_carry if one_per_step else None)
    reset_carry = None if one_per_step else reset_carry
    carry = _typed_for_scan(cell, params, steps, carry, reset_carry)
    if isinstance(gradient, Chunked):
        return _run_in_chunks(cell, params, steps, carry, reset_carry, gradient, reverse)
    return _run(cell, params, steps, carry, reset_carry, gradient, reverse)


# Calls outside of `jit` compile once per cell, shapes and options.
_run_compiled = jax.jit(_run_checked, static_argnums=(0, 1, 2))


def _run(
    cell: Cell[Params, Carry],
    params: Params,
    steps: Steps,
    carry: Carry,
    reset_carry: Carry | None,
    gradient: Bulk | Scan,
    reverse: bool,
) -> tuple[Carry, Array]:
    plans = make_plans(cell, params, steps, carry, gradient if isinstance(gradient, Bulk) else Bulk())
    if isinstance(gradient, Scan) or not plans.by_rule:  # the plain scan is the same program on every platform
        return run(How(cell, plans.on_a_cpu, reverse), params, steps, carry, reset_carry)[:2]

    def by_plan(plan: Plan) -> Callable[..., tuple[Carry, Array, None]]:
        return functools.partial(run_in_bulk, How(cell, plan, reverse))

    arguments = (params, steps, carry, reset_carry)
    if plan := known_plan(plans, arguments):
        return by_plan(plan)(*arguments)[:2]
    return lax.platform_dependent(*arguments, cpu=by_plan(plans.on_a_cpu), default=by_plan(plans.elsewhere))[:2]


def _run_in_chunks(
    cell: Cell[Params, Carry],
    params: Params,
    steps: Steps,
    carry: Carry,
    reset_carry: Carry | None,
    gradient: Chunked,
    reverse: bool,
) -> tuple[Carry, Array]:
    num_steps = jax.tree.leaves(steps.x)[0].shape[0]
    if not isinstance(num_steps, int):
        raise ArgumentValueError(f"gradient={gradient} needs a known number of steps, got {num_steps}.")
    # √T chunks of √T steps keep least: a carry per chunk, and the steps of one chunk at a time.
    near_root = size_without_remainder(num_steps, math.ceil(math.sqrt(max(num_steps, 1))))
    first = jnp.arange(num_steps) == (num_steps - 1 if reverse else 0)

    @jax.checkpoint
    def chunk(carry: PyTree, inputs: tuple[Steps, Array]) -> tuple[PyTree, PyTree]:
        steps, first = inputs
        if gradient.truncate:
            # The first chunk starts from the caller's carry, whose gradient is not cut.
            carry = select(first.any(), carry, jax.tree.map(lax.stop_gradient, carry))
        return _run(cell, params, steps, carry, reset_carry, gradient.within, reverse)

    return scan_blocks(chunk, carry, (steps, first), gradient.chunk_size or near_root, reverse)


def _typed_for_scan(
    cell: Cell[Any, Carry], params: Any, steps: Steps, carry: Carry, reset_carry: Carry | None
) -> Carry:
    """Give the carry the sharding type that it has after a step.

    A scan needs the same type before and after every step. On a mesh, a step returns values that differ by device as
    its inputs, noise and flags do, whereas a new carry of zeros is the same everywhere.
    """

    def after_a_step(carry: PyTree) -> PyTree:
        # Only the type of the result matters, so zeros will do if there are no steps.
        now = jax.tree.map(_first, steps)
        start = start_of(now, carry, reset_carry)
        return hold(now, start, *cell.step(params, start, now.x))[0]

    # Each turn passes types on from one leaf to others, so as many turns as leaves are enough.
    for _ in jax.tree.leaves(carry):
        closed = jax.make_jaxpr(after_a_step)(carry)
        if closed.out_avals == closed.in_avals:
            break
        carry = jax.tree.map(_with_type_of, after_a_step(carry), carry)
    return carry


def _first(v: Array) -> Array:
    return v[0] if v.shape[0] else v.sum(axis=0, dtype=v.dtype)


def _with_type_of(like: Array, value: Array) -> Array:
    """Return a value unchanged, even a −0, but with the sharding type of another array of its shape and dtype."""
    if jnp.issubdtype(value.dtype, jnp.number):
        return value - jnp.zeros_like(like)
    return jnp.where(jnp.ones_like(like, dtype=bool), value, value)
