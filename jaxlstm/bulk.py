"""The scan over time, and its derivative: one rule for every cell.

The recurrence, with s the carry and r the carry that a reset puts in its place:

    s'_t       = where(reset_t, r_t, s_{t-1})
    z_t        = project(params, x_t)
    a_t        = recur(params, s'_t)
    (s_t, y_t) = gates(params, s'_t, z_t, a_t)                           where masked: s held, y = 0

Its derivative, with d_z_t the tangent of z_t and R_t the linearization of `gates` at (params, s'_t, z_t, a_t):

    F_t            = R_t(d_params, 0, d_z_t, recur(d_params, s'_t))      the forcing: from parameters and input
    d_s'_t         = where(reset_t, d_r_t, d_s_{t-1})
    (d_s_t, d_y_t) = F_t + R_t(0, d_s'_t, 0, recur(params, d_s'_t))      where masked: s held, y = 0

Only the last two lines wait for the step before. The rest is computed for all steps of a block at once. JAX transposes
this rule: reverse mode is backpropagation through time with one weight-gradient matmul per block instead of one per
step. The rule is ordinary JAX, so it can itself be differentiated, vmapped and sharded.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial
from jaxtyping import Array

from jaxlstm.cell import Cell, PyTree, leaf_path
from jaxlstm.masks import Steps, hold, start_of
from jaxlstm.tangents import add, as_custom_jvp_output, filled, jvp, present
from jaxlstm.tuning import Plan, in_bulk


class Kept(NamedTuple):
    """The values that the forward pass keeps from every step, for the derivative."""

    carry: PyTree  # s'_t
    gates: PyTree | None  # the cell's `activations`; None: they are computed again


class How(NamedTuple):
    """What is fixed when a recurrence is compiled: the cell, the plan and the direction."""

    cell: Cell[Any, Any]
    plan: Plan
    reverse: bool = False
    returns_kept: bool = False


def run(how: How, params: PyTree, steps: Steps, carry: PyTree, reset_carry: PyTree) -> tuple[PyTree, PyTree, Any]:
    """Run a recurrence; return the last carry, the outputs and, if `how` says so, the values kept from each step."""
    cell, plan = how.cell, how.plan

    def step(carry: PyTree, inputs: tuple[Steps, Any]) -> tuple[PyTree, Any]:
        now, z = inputs
        start = start_of(now, carry, reset_carry)
        z = cell.project(params, now.x) if z is None else z
        a = cell.recur(params, start)
        if plan.pieces > 1:
            z, a = _sum_of_pieces(z, a)
        carry, y = hold(now, start, *cell.gates(params, start, z, a))
        if not how.returns_kept:  # nothing reads it unless a derivative is taken
            return carry, (y, None)
        return carry, (y, Kept(start, _activations(cell, params, start, z, a) if plan.keep_gates else None))

    def block(carry: PyTree, steps: Steps) -> tuple[PyTree, Any]:
        zs: Any = cell.project(params, steps.x) if plan.pieces else None
        if plan.pieces > 1:
            zs = jnp.split(zs, plan.pieces, axis=-1)
        return lax.scan(step, carry, (steps, zs), reverse=how.reverse, unroll=plan.unroll)

    # With z in the loop, there is nothing to compute for a block at once.
    carry, (ys, kept) = scan_blocks(block, carry, steps, plan.block_size if plan.pieces else None, how.reverse)
    return carry, ys, kept


def scan_blocks(
    block: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    steps: PyTree,
    size: int | None,
    reverse: bool,
) -> tuple[PyTree, PyTree]:
    """Scan over blocks of time; if their size does not divide the sequence, the last block processed is shorter."""
    num_steps = jax.tree.leaves(steps)[0].shape[0]
    if size is None or size >= num_steps:
        return block(carry, steps)
    num_blocks, rest = divmod(num_steps, size)
    whole, left = slice(0, num_steps - rest), slice(num_steps - rest, None)
    if reverse:
        whole, left = slice(rest, None), slice(0, rest)
    cut = lambda v: v[whole].reshape(num_blocks, size, *v.shape[1:])
    carry, outs = lax.scan(block, carry, jax.tree.map(cut, steps), reverse=reverse)
    outs = jax.tree.map(lambda v: v.reshape(num_blocks * size, *v.shape[2:]), outs)
    if not rest:
        return carry, outs
    carry, last = block(carry, jax.tree.map(lambda v: v[left], steps))
    join = lambda v, w: jnp.concatenate([w, v] if reverse else [v, w])
    return carry, jax.tree.map(join, outs, last)


def _sum_of_pieces(z: list[Array], a: Array) -> tuple[Array, Array]:
    """Return (z + a, 0) as z and a, for gates that read only their sum.

    XLA's CPU compiler does not vectorize a loop that takes several gates from one slice of z in time. It does if every
    gate is an array of its own; without the cut, computing z before the loop makes the forward pass slower, not faster.
    """
    pieces = [z_k + a_k for z_k, a_k in zip(z, jnp.split(a, len(z), axis=-1), strict=True)]
    return jnp.concatenate(pieces, axis=-1), jnp.zeros_like(a)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def run_in_bulk(how: How, params: PyTree, steps: Steps, carry: PyTree, reset_carry: PyTree) -> tuple[PyTree, Any, Any]:
    """Do what `run` does, differentiated by the rule below."""
    return run(how, params, steps, carry, reset_carry)


@functools.partial(run_in_bulk.defjvp, symbolic_zeros=True)
def _rule(how: How, primals: Any, tangents: Any) -> tuple[Any, Any]:
    params, steps, carry, _ = primals
    d_params, d_steps, d_carry, d_reset_carry = jax.tree.map(present, primals, tangents)
    # Call `run_in_bulk`, not `run`; otherwise a second derivative would differentiate a plain scan.
    last, ys, kept = run_in_bulk(how._replace(returns_kept=True), *primals)
    ys, kept = _named(ys, "y"), Kept(*map(_named, kept))

    def block(d_carry: PyTree, inputs: tuple[Steps, Steps, Kept]) -> tuple[PyTree, Any]:
        now, d_now, kept = inputs
        advance, forcing = _linearize(how, params, d_params, now.x, d_now.x, kept)

        # Linear in d_carry, so that JAX can transpose it into a step of the backward pass.
        def step(d_carry: PyTree, inputs: Any) -> tuple[PyTree, Any]:
            now, start, advance, forcing = inputs
            d_start = start_of(now, d_carry, d_reset_carry)
            _, d_a = jvp(how.cell.recur, (params, start), (None, d_start))
            d_carry, d_y = hold(now, d_start, *advance(d_start, d_a, forcing))
            return d_carry, (d_y, d_start if how.returns_kept else None)

        # Without this checkpoint, JAX would move whatever does not depend on d_carry into a third loop and store it for
        # all steps; for a mask, that is flags broadcast to [batch, hidden].
        if how.plan.checkpoint_step:
            step = jax.checkpoint(step, prevent_cse=False)
        each = (now._replace(x=None, reset_carry=d_now.reset_carry), kept.carry, advance, forcing)
        d_carry, (d_ys, d_starts) = lax.scan(step, d_carry, each, reverse=how.reverse, unroll=how.plan.unroll)
        d_kept = _kept_tangent(how, params, d_params, now.x, d_now.x, kept.carry, d_starts)
        return d_carry, (d_ys, d_kept)

    # The backward pass reads `steps` and `kept` and computes the rest of a block again. If XLA merged that work with
    # the forward pass, it would keep z for all steps. Loops over blocks prevent this, and so do kept gates.
    block = jax.checkpoint(block, prevent_cse=how.plan.block_size is None and not how.plan.keep_gates)
    blocks = (steps, d_steps, kept)
    d_last, (d_ys, d_kept) = scan_blocks(block, filled(carry, d_carry), blocks, how.plan.block_size, how.reverse)
    out = (last, ys, kept if how.returns_kept else None)
    return out, jax.tree.map(as_custom_jvp_output, out, (d_last, d_ys, d_kept))


def _linearize(
    how: How, params: PyTree, d_params: PyTree, x: PyTree, d_x: PyTree, kept: Kept
) -> tuple[Partial, PyTree]:
    """Linearize all steps of a block: return `advance`, (d_carry, d_a, forcing) -> (d_carry, d_y), and the forcing.

    With a closed form, the gates depend on z and a only through z + a, so the forcing is the tangent of z + a.
    Otherwise it is the tangent of the carry and the output.
    """
    cell, bulk, start = how.cell, in_bulk(how.cell, how.plan), kept.carry
    z, d_z = jvp(bulk.project, (params, x), (d_params, d_x))
    a, d_a = jvp(bulk.recur, (params, start), (d_params, None))
    if cell.gates_jvp is not None and how.plan.closed_form:
        # This takes a few products per step; JAX's derivative would go through every operation in `gates`.
        gates = _activations(cell, params, start, z, a) if kept.gates is None else kept.gates
        return Partial(_advance_in_closed_form, cell.gates_jvp(params, start, gates)), add(d_z, d_a)

    def forcing(start: PyTree, z: PyTree, a: PyTree, d_z: PyTree, d_a: PyTree) -> PyTree:
        return jvp(cell.gates, (params, start, z, a), (d_params, None, d_z, d_a))[1]

    # The parameters have no time axis for the scan to slice, so they are not among the arrays of the Partial.
    advance = Partial(functools.partial(_advance_by_jvp, cell.gates, params), (start, z, a))
    return advance, jax.vmap(forcing)(start, z, a, d_z, d_a)


def _advance_in_closed_form(linear: Partial, d_carry: PyTree, d_a: PyTree, forcing: PyTree) -> tuple[PyTree, PyTree]:
    return linear(d_carry, add(forcing, d_a))


def _advance_by_jvp(gates: Any, params: PyTree, at: PyTree, d_carry: PyTree, d_a: PyTree, forcing: PyTree) -> PyTree:
    return add(jvp(gates, (params, *at), (None, d_carry, None, d_a))[1], forcing)


def _kept_tangent(
    how: How, params: PyTree, d_params: PyTree, x: PyTree, d_x: PyTree, start: PyTree, d_start: PyTree
) -> Kept | None:
    """Return the tangent of the kept values, which second derivatives need."""
    if not how.returns_kept:
        return None
    if not how.plan.keep_gates:
        return Kept(d_start, None)
    # A second derivative differentiates the rule, which reads the gates that were kept.
    bulk = in_bulk(how.cell, how.plan)

    def gates(params: PyTree, x: PyTree, start: PyTree) -> PyTree:
        return _activations(how.cell, params, start, bulk.project(params, x), bulk.recur(params, start))

    return Kept(d_start, jvp(gates, (params, x, start), (d_params, d_x, d_start))[1])


def _activations(cell: Cell[Any, Any], *args: PyTree) -> PyTree:
    assert cell.activations is not None  # a cell with gates_jvp has them
    return cell.activations(*args)


def _named(tree: PyTree, name: str | None = None) -> PyTree:
    """Name every leaf after its field, `h`, `c`, `i`, ..., so that a custom `jax.checkpoint` policy can save it."""
    return jax.tree.map_with_path(lambda path, leaf: checkpoint_name(leaf, name or leaf_path(path)), tree)
