"""The derivative of a recurrence, written once for every cell and had in blocks of time.

The recurrence, with s the carry and r the carry a reset puts in its place:

    s'_t       = where(reset_t, r_t, s_{t-1})
    z_t        = project(params, x_t)
    a_t        = recur(params, s'_t)
    (s_t, y_t) = gates(params, s'_t, z_t, a_t)                          held where masked

Its derivative, with R_t the linearisation of `gates` at (params, s'_t, z_t, a_t):

    F_t            = R_t(d_params, 0, d_z_t, recur(d_params, s'_t))     what the parameters and the input add
    d_s'_t         = where(reset_t, d_r_t, d_s_{t-1})
    (d_s_t, d_y_t) = F_t + R_t(0, d_s'_t, 0, recur(params, d_s'_t))     held where masked

Only the last two lines wait for the step before: the rest is had for all steps of a block at once. JAX transposes this
rule, so reverse mode is backpropagation through time whose weight gradient is one matmul a block, and not one a step.
The rule is itself ordinary JAX: it can be differentiated again, mapped and sharded.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import Partial
from jaxtyping import Array, Bool

from jaxlstm.cell import Cell, PyTree, leaf_path
from jaxlstm.cell import recur as default_recur


class Steps(NamedTuple):
    """What the steps are given: every leaf [time, *batch, ...], or [*batch, ...] for one step. None: absent."""

    x: PyTree
    mask: Bool[Array, "..."] | None = None
    reset: Bool[Array, "..."] | None = None
    reset_carry: PyTree | None = None  # one per step; one for all of them is an argument of its own


class Kept(NamedTuple):
    """What the forward pass keeps of every step for the derivative."""

    carry: PyTree  # s'_t
    gates: PyTree | None  # the cell's `activations`; None: they are computed again


class Plan(NamedTuple):
    """How a recurrence is run and differentiated. It decides what is fast and what is kept, never what comes out."""

    cell: Cell[Any, Any]
    reverse: bool
    block_size: int
    merged_axes: int = 0  # so many leading axes, time and batch, are one in the matmuls of a block
    project_first: bool = False  # z of all steps in one matmul, before the loop
    num_gates: int = 0  # then z enters the loop in so many pieces
    keep_gates: bool = False
    transposed: Literal["forward", "backward", None] = None  # the pass whose loop reads matrices stored transposed
    returns_kept: bool = False


BLOCK_BYTES = 3 << 20
SHORT_BYTES = 8 << 20
LARGE_HIDDEN = 512
LARGE_ROWS = 32


def make_plan(
    cell: Cell[Any, Any], params: PyTree, steps: Steps, carry: PyTree, *, block_size: int | None, reverse: bool
) -> Plan:
    """Decide how to run a recurrence.

    On a CPU, z of a block takes some `BLOCK_BYTES`, so that what is computed of it stays in cache; a sequence of twice
    that is one block. Elsewhere all steps are one block, and so they are where a mesh is in use: then the gradient of
    the weights is summed over devices once. Where z of all steps takes no more than `SHORT_BYTES`, the gates are kept
    for the backward pass, and z of a cell with `gates_jvp` is had before the loop, unless a mesh or a block size is
    given; with more, fresh memory costs as much as it saves, but for layers of `LARGE_HIDDEN` units, whose gates cost
    more to compute again.
    """
    z = jax.eval_shape(cell.project, params, steps.x)
    zs = jax.tree.leaves(z)
    num_steps, num_bytes = zs[0].shape[0], sum(z.size * z.dtype.itemsize for z in zs)
    on_cpu = jax.default_backend() == "cpu"
    in_blocks = on_cpu and block_size is None and not _is_sharded()
    if block_size is None:
        block_size = num_steps
        if in_blocks and num_bytes > 2 * BLOCK_BYTES:
            block_size = size_without_remainder(num_steps, max(4, BLOCK_BYTES * num_steps // num_bytes))
    hidden_size = max((leaf.shape[-1] for leaf in jax.tree.leaves(carry) if leaf.ndim), default=0)
    num_rows = math.prod(zs[0].shape[1:-1])
    is_short = num_bytes <= SHORT_BYTES
    reads_sum = cell.gates_jvp and cell.recur and z is zs[0] and hidden_size and z.shape[-1] % hidden_size == 0
    num_gates = z.shape[-1] // hidden_size if in_blocks and is_short and reads_sum else 0
    return Plan(
        cell=cell,
        reverse=reverse,
        block_size=block_size,
        merged_axes=zs[0].ndim - 1 if in_blocks else 0,
        project_first=not on_cpu or num_gates > 0,
        num_gates=num_gates,
        keep_gates=cell.gates_jvp is not None and (is_short or hidden_size >= LARGE_HIDDEN),
        transposed=_which_transposed(num_rows, hidden_size, is_short) if on_cpu else None,
    )


def size_without_remainder(num_steps: int, most: int) -> int:
    """Return the largest divisor of a number of steps that is at most `most`, or `most` if that is below half of it.

    A remainder is right, and slow: it has what all other blocks take and make copied.
    """
    return next((size for size in range(most, most // 2, -1) if num_steps % size == 0), most)


def _which_transposed(num_rows: int, hidden_size: int, is_short: bool) -> Literal["forward", "backward", None]:
    """Say which pass has its matrices transposed before its loop, on a CPU, so that both loops have the faster matmul.

    That is x W for few rows or a small matrix, x W^T for many rows and a large one. A step forward is the former as it
    stands, a step backward the latter. For one row both are as fast, and a short sequence does not repay the copy of a
    large matrix.
    """
    if num_rows >= LARGE_ROWS and hidden_size >= LARGE_HIDDEN:
        return None if is_short else "forward"
    return "backward" if num_rows > 1 else None


def _is_sharded() -> bool:
    """Say whether a mesh is in use whose axes are not all manual (inside `shard_map` each device sees its own part)."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(kind != jax.sharding.AxisType.Manual for kind in mesh.axis_types) if not mesh.empty else False


def run(plan: Plan, params: PyTree, steps: Steps, carry: PyTree, reset_carry: PyTree) -> tuple[PyTree, PyTree, Any]:
    """Run a recurrence; return the last carry, the outputs, and what `plan` says is to be kept."""
    cell, recur = plan.cell, plan.cell.recur or _no_recur
    zs: Any = cell.project(params, steps.x) if plan.project_first else None
    if plan.num_gates:
        zs = jnp.split(zs, plan.num_gates, axis=-1)

    transpose = _transpose if plan.transposed == "forward" else lambda params: params
    stored = transpose(params)

    def step(carry: PyTree, inputs: tuple[Steps, Any]) -> tuple[PyTree, Any]:
        now, z = inputs
        params, start = transpose(stored), start_of(now, carry, reset_carry)
        z = cell.project(params, now.x) if z is None else z
        a = recur(params, start)
        if plan.num_gates:
            z, a = _gate_by_gate(z, a)
        carry, y = hold(now, start, *cell.gates(params, start, z, a))
        if not plan.returns_kept:
            return carry, (y, None)
        gates = _activations(cell, params, start, z, a) if plan.keep_gates else None
        return carry, (y, Kept(start, gates))

    carry, (ys, kept) = lax.scan(step, carry, (steps, zs), reverse=plan.reverse)
    return carry, ys, kept


def _transpose(params: PyTree) -> PyTree:
    """Transpose the matrices among parameters; done before a loop and again in it, it changes how they are stored."""
    return jax.tree.map(lambda w: w.T if w.ndim == 2 else w, params)


def _gate_by_gate(z: list[Array], a: Any) -> tuple[Array, Array]:
    """Return z + a, and 0, for gates that read their sum alone.

    XLA's CPU compiler does not vectorise a loop that takes several gates from one slice of z in time; of z cut into
    gates before, it does.
    """
    pieces = [z_k + a_k for z_k, a_k in zip(z, jnp.split(a, len(z), axis=-1), strict=True)]
    return jnp.concatenate(pieces, axis=-1), jnp.zeros_like(a)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def run_in_bulk(
    plan: Plan, params: PyTree, steps: Steps, carry: PyTree, reset_carry: PyTree
) -> tuple[PyTree, PyTree, Any]:
    """Do what `run` does, with the derivative that this module is about."""
    return run(plan, params, steps, carry, reset_carry)


@functools.partial(run_in_bulk.defjvp, symbolic_zeros=True)
def _derivative(plan: Plan, primals: Any, tangents: Any) -> tuple[Any, Any]:
    params, steps, carry, _ = primals
    d_params, d_steps, d_carry, d_reset_carry = jax.tree.map(present, primals, tangents)
    push_a = _recur_tangent(plan, params)
    # Not `run`: a second derivative would differentiate a plain scan.
    last, ys, kept = run_in_bulk(plan._replace(returns_kept=True), *primals)
    ys, kept = jax.tree.map(lambda y: checkpoint_name(y, "y"), ys), Kept(*map(_named, kept))

    def block(d_carry: PyTree, inputs: tuple[Steps, Steps, Kept]) -> tuple[PyTree, Any]:
        now, d_now, kept = inputs
        advance, forcing = _linearize(plan, params, d_params, now.x, d_now.x, kept)

        def step(d_carry: PyTree, inputs: Any) -> tuple[PyTree, Any]:
            now, start, advance, forcing = inputs
            d_start = start_of(now, d_carry, d_reset_carry)
            d_carry, d_y = hold(now, d_start, *advance(d_start, push_a(start, d_start), forcing))
            return d_carry, (d_y, d_start if plan.returns_kept else None)

        each = (now._replace(x=None, reset_carry=d_now.reset_carry), kept.carry, advance, forcing)
        d_carry, (d_ys, d_starts) = lax.scan(step, d_carry, each, reverse=plan.reverse)
        d_kept = _kept_tangent(plan, params, d_params, now.x, d_now.x, kept.carry, d_starts)
        return d_carry, (d_ys, d_kept)

    # The backward pass finds `steps` and `kept`, and makes the rest of a block again. Blocks in a loop need no barrier
    # against being merged with the forward pass, and where the gates are kept there is little to make.
    block = jax.checkpoint(block, prevent_cse=plan.project_first and not plan.keep_gates)
    blocks = (steps, d_steps, kept)
    d_last, (d_ys, d_kept) = scan_blocks(block, _filled(carry, d_carry), blocks, plan.block_size, plan.reverse)
    out = (last, ys, kept if plan.returns_kept else None)
    return out, jax.tree.map(_tangent, out, (d_last, d_ys, d_kept))


def _linearize(
    plan: Plan, params: PyTree, d_params: PyTree, x: PyTree, d_x: PyTree, kept: Kept
) -> tuple[Partial, PyTree]:
    """Linearise all steps of a block: return (d_carry, d_a, forcing) -> (d_carry, d_y) of each, and its forcing."""
    cell, start = plan.cell, kept.carry
    project, recur = _at_once(plan)
    z, d_z = jvp(project, (params, x), (d_params, d_x))
    a, d_a = jvp(recur, (params, start), (d_params, None))
    d_z, d_a = _filled(z, d_z), _filled(a, d_a)
    from_params = _from_own_params(cell, params, d_params, start, z, a)
    if cell.gates_jvp is not None and from_params is None:
        gates = _activations(cell, params, start, z, a) if kept.gates is None else kept.gates
        return Partial(_advance_closed, cell.gates_jvp(params, start, gates)), _add(d_z, d_a)
    push = functools.partial(_gates_tangent, cell, params)
    forcing = _add(jax.vmap(push)((start, z, a), (_filled(start, None), d_z, d_a)), from_params)
    return Partial(functools.partial(_advance_open, push), (start, z, a)), forcing


def _recur_tangent(plan: Plan, params: PyTree) -> Callable[[PyTree, PyTree], PyTree]:
    """Return (carry, d_carry) -> d_a, how `recur` changes with its carry."""
    recur = plan.cell.recur or _no_recur
    if recur is not default_recur or plan.transposed != "backward":
        return lambda carry, d_carry: jvp(recur, (params, carry), (None, d_carry))[1]
    # Written out, since JAX takes out of the loop what `_transpose` does in it.
    w_t = params.w_hh.T
    last = lambda d_h: (((d_h.ndim - 1,), (1,)), ((), ()))
    return lambda _, d: lax.dot_general(d.h, w_t, last(d.h), preferred_element_type=params.b.dtype)


def _advance_closed(linear: Partial, d_carry: PyTree, d_a: PyTree, forcing: PyTree) -> tuple[PyTree, PyTree]:
    """Take one step of the tangent where z and a are read by their sum, so that the forcing may go in with a."""
    return linear(d_carry, _add(forcing, d_a))


def _advance_open(push: Any, at: PyTree, d_carry: PyTree, d_a: PyTree, forcing: PyTree) -> tuple[PyTree, PyTree]:
    """Take one step of the tangent of any cell."""
    d_z = _filled(at[1], None)
    return _add(push(at, (d_carry, d_z, d_a)), forcing)


def _gates_tangent(cell: Cell[Any, Any], params: PyTree, at: PyTree, tangents: PyTree) -> tuple[PyTree, PyTree]:
    """Return R: how `gates` changes with its carry, z and a."""
    return jvp(functools.partial(cell.gates, params), at, tangents)[1]


def _from_own_params(
    cell: Cell[Any, Any], params: PyTree, d_params: PyTree, start: PyTree, z: PyTree, a: PyTree
) -> PyTree | None:
    """Return how `gates` changes with the parameters it reads itself, such as peepholes; None if it reads none."""
    one = lambda tree: jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), tree)
    jaxpr = jax.make_jaxpr(cell.gates)(params, one(start), one(z), one(a)).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    own = [d if id(v) in read else None for d, v in zip(_leaves_like(params, d_params), jaxpr.invars, strict=False)]
    if all(d is None for d in own):
        return None
    gates = lambda params: jax.vmap(functools.partial(cell.gates, params))(start, z, a)
    return jvp(gates, (params,), (jax.tree.unflatten(jax.tree.structure(params), own),))[1]


def _kept_tangent(
    plan: Plan, params: PyTree, d_params: PyTree, x: PyTree, d_x: PyTree, start: PyTree, d_start: PyTree
) -> Kept | None:
    """Return the tangent of what is kept, which second derivatives need."""
    if not plan.returns_kept:
        return None
    if not plan.keep_gates:
        return Kept(d_start, None)
    project, recur = _at_once(plan)
    gates = lambda params, x, start: _activations(plan.cell, params, start, project(params, x), recur(params, start))
    return Kept(d_start, jvp(gates, (params, x, start), (d_params, d_x, d_start))[1])


def _activations(cell: Cell[Any, Any], *args: PyTree) -> PyTree:
    if cell.activations is None:
        raise ValueError(f"unroll: {cell.name} has gates_jvp, which needs activations as well.")
    return cell.activations(*args)


def _no_recur(params: PyTree, carry: PyTree) -> None:
    """Stand in for the `recur` of a cell without it."""


def _named(kept: PyTree) -> PyTree:
    """Name every leaf after its field, `h`, `c`, `i`, ..., for the policy of a user's own `jax.checkpoint`."""
    return jax.tree.map_with_path(lambda path, leaf: checkpoint_name(leaf, leaf_path(path)), kept)


def scan_blocks(
    block: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    steps: PyTree,
    block_size: int,
    reverse: bool,
) -> tuple[PyTree, PyTree]:
    """Scan over blocks of time; where they do not divide it, the last to be done is shorter."""
    num_steps = jax.tree.leaves(steps)[0].shape[0]
    if block_size >= num_steps:
        return block(carry, steps)
    num_blocks, rest = divmod(num_steps, block_size)
    whole = slice(rest, None) if reverse else slice(0, num_steps - rest)
    cut = lambda v: v[whole].reshape(num_blocks, block_size, *v.shape[1:])
    carry, outs = lax.scan(block, carry, jax.tree.map(cut, steps), reverse=reverse)
    outs = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), outs)
    if not rest:
        return carry, outs
    left = slice(0, rest) if reverse else slice(num_steps - rest, None)
    carry, last = block(carry, jax.tree.map(lambda v: v[left], steps))
    join = lambda v, w: jnp.concatenate([w, v] if reverse else [v, w])
    return carry, jax.tree.map(join, outs, last)


def _at_once(plan: Plan) -> tuple[Callable[..., PyTree], Callable[..., PyTree]]:
    """Return project and recur for all steps of a block, time and batch as one axis: on a CPU a faster matmul."""
    axes, functions = plan.merged_axes, (plan.cell.project, plan.cell.recur or _no_recur)

    def merged(function: Callable[..., PyTree], params: PyTree, tree: PyTree) -> PyTree:
        lead = jax.tree.leaves(tree)[0].shape[:axes]
        flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[axes:]), tree)
        return jax.tree.map(lambda v: v.reshape(*lead, *v.shape[1:]), function(params, flat))

    project, recur = (functools.partial(merged, function) if axes > 1 else function for function in functions)
    return project, recur


# Masks and resets, of values and of tangents alike; None where a tangent is zero.


def start_of(now: Steps, carry: PyTree, reset_carry: PyTree) -> PyTree:
    """Return the carry that a step starts from."""
    if now.reset is None:
        return carry
    return select(now.reset, reset_carry if now.reset_carry is None else now.reset_carry, carry)


def hold(now: Steps, carry: PyTree, new_carry: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    """Return the carry after a step and its output; where masked, the carry before it and 0."""
    if now.mask is None:
        return new_carry, y
    return select(now.mask, new_carry, carry), select(~now.mask, None, y)


def select(flags: Bool[Array, "*lead"], new: PyTree, old: PyTree) -> PyTree:
    """Select every leaf by flags that cover the leading axes; None is 0."""
    new = _leaves_like(old, new)
    selected = [
        where(flags, jnp.zeros_like(o) if n is None else n, o) for o, n in zip(jax.tree.leaves(old), new, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(old), selected)


def where(flags: Bool[Array, "*lead"], new: Array, old: Array) -> Array:
    """Select by flags that cover the leading axes."""
    return jnp.where(flags.reshape(*flags.shape, *[1] * (new.ndim - flags.ndim)), new, old)


# Tangents: trees like their primals, with None where there is none: integers, keys, and what is not differentiated.


def jvp(function: Callable[..., PyTree], primals: tuple[Any, ...], tangents: Any) -> tuple[PyTree, PyTree]:
    """Do what `jax.jvp` does, and differentiate nothing that has no tangent."""
    leaves = jax.tree.leaves(primals)
    treedef: Any = jax.tree.structure(primals)
    d_leaves = [d for p, t in zip(primals, tangents, strict=True) for d in _leaves_like(p, t)]
    active = [n for n, d in enumerate(d_leaves) if d is not None]

    def of_active(*values: Array) -> PyTree:
        new = dict(zip(active, values, strict=True))
        return function(*treedef.unflatten([new.get(n, leaf) for n, leaf in enumerate(leaves)]))

    if not active:
        out = of_active()
        return out, jax.tree.map(lambda _: None, out)
    out, d_out = jax.jvp(of_active, [leaves[n] for n in active], [d_leaves[n] for n in active])
    return out, jax.tree.map(present, out, d_out)


def _leaves_like(tree: PyTree, tangents: PyTree) -> list[Any]:
    treedef: Any = jax.tree.structure(tree)
    return [None] * treedef.num_leaves if tangents is None else list(treedef.flatten_up_to(tangents))


def present(value: Any, tangent: Any) -> Any:
    """Return a tangent, or None for a symbolic zero and for what is not real."""
    is_real = jnp.issubdtype(value.dtype, jnp.inexact)
    return tangent if is_real and not isinstance(tangent, jax.custom_derivatives.SymbolicZero) else None


def _tangent(value: Any, tangent: Any) -> Any:
    return np.zeros(value.shape, jax.dtypes.float0) if tangent is None else tangent


def _filled(tree: PyTree, tangents: PyTree) -> PyTree:
    zeros = lambda v, d: jnp.zeros_like(v) if d is None and jnp.issubdtype(v.dtype, jnp.inexact) else d
    filled = map(zeros, jax.tree.leaves(tree), _leaves_like(tree, tangents))
    return jax.tree.unflatten(jax.tree.structure(tree), filled)


def _add(tangents: PyTree, others: PyTree) -> PyTree:
    if others is None:
        return tangents
    plus = lambda d, e: e if d is None else d if e is None else d + e
    return jax.tree.map(plus, tangents, others, is_leaf=lambda d: d is None)
