"""Choices made for the compiler: how a recurrence is cut into blocks, and the shapes that XLA runs fast.

No choice changes the result. `benchmarks/choices.py` removes one choice at a time and divides the time without it by
the time with it, in one interleaved run: geometric means over the six shapes of the benchmark, on two cores of an AMD
EPYC (`benchmarks/results/choices.json`). Only pieces change the forward pass; the other rows there show the noise.

    time without, over time with  gradient     forward       (medians, minima)
    blocks                        1.04, 1.10   0.99, 0.97
    merged axes                   1.02, 1.04   0.99, 0.99
    kept gates                    1.02, 1.05   0.99, 1.00
    pieces of z                   0.96, 1.02   1.09, 1.04
    closed form and kept gates    1.25, 1.26   0.98, 0.99

The means hide what each choice is for: blocks for long sequences, kept gates for wide layers, pieces for few streams.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import is_sharded, of_one_step, on_unknown_mesh
from jaxlstm.gradients import Bulk
from jaxlstm.masks import Steps
from jaxlstm.structure import is_jaxpr

# A block of z of this size stays in cache while the rest of the block is computed from it.
BLOCK_BYTES = 3 << 20
# Up to here, z and the gates of all steps are worth keeping; above, allocating the memory costs as much as it saves.
SHORT_BYTES = 8 << 20
# From this many hidden units on, computing the gates again costs more than keeping them, however long the sequence.
LARGE_HIDDEN = 512


# Operations that keep `recur` or `gates` from being differentiated by the rule.
ONLY_BY_SCAN = {"custom_vjp_call", "custom_vjp_call_jaxpr", "pure_callback", "io_callback", "cond"}


class Plan(NamedTuple):
    """How a recurrence is run and differentiated; no choice changes the result."""

    block_size: int  # steps differentiated at once
    merged_axes: int = 0  # leading axes, time and batch, merged into one for the matmuls of a block; 0: none
    pieces: int = 0  # z is computed before the loop and cut into this many; 0: inside the loop
    closed_form: bool = True  # use the cell's `gates_jvp`
    keep_gates: bool = False  # for the backward pass, which otherwise computes them again
    checkpoint_step: bool = True  # compute all of a backward step in its loop; False: a part in a loop before it
    by_rule: bool = True  # differentiate by the rule; False: by the plain scan


def make_plan(cell: Cell[Any, Any], params: PyTree, steps: Steps, carry: PyTree, gradient: Bulk) -> Plan:
    """Decide how to run a recurrence.

    On a CPU, a block holds about `BLOCK_BYTES` of z, and a sequence of up to twice that is one block. Elsewhere, and
    where the batch is sharded over devices, all steps are one block: devices sum their weight gradients once.
    """
    project, z = jax.make_jaxpr(cell.project, return_shape=True)(params, steps.x)
    recur, a = jax.make_jaxpr(cell.recur, return_shape=True)(params, carry)
    gates = jax.make_jaxpr(cell.gates)(params, carry, of_one_step(z), a)
    num_steps, known, num_bytes = _size(z)
    hidden_size = max((leaf.shape[-1] for leaf in jax.tree.leaves(carry) if leaf.ndim), default=0)
    on_cpu = jax.default_backend() == "cpu"
    in_blocks = on_cpu and known and gradient.block_size is None and not _on_devices((params, steps, carry))
    is_short = known and num_bytes <= SHORT_BYTES

    # If the caller gives a block size or shards the batch, use that; do not merge axes or cut z.
    block_size = gradient.block_size if gradient.block_size and isinstance(num_steps, int) else num_steps
    if in_blocks and num_bytes > 2 * BLOCK_BYTES:
        block_size = size_without_remainder(num_steps, max(4, BLOCK_BYTES * num_steps // num_bytes))
    # Accelerators are fastest with one large matmul; a CPU would write z to memory and read it back.
    pieces = 0 if on_cpu else 1
    closed_form = cell.gates_jvp is not None and not _reads_any(gates.jaxpr, len(jax.tree.leaves(params)))
    if (
        in_blocks
        and is_short
        and closed_form
        and hidden_size
        and _have_one_shape(z, a)
        and z.shape[-1] % hidden_size == 0
    ):
        pieces = z.shape[-1] // hidden_size
    keep_gates = gradient.keep_gates
    if keep_gates is None:
        keep_gates = is_short or hidden_size >= LARGE_HIDDEN
    return Plan(
        block_size=block_size,
        merged_axes=jax.tree.leaves(z)[0].ndim - 1 if in_blocks else 0,
        pieces=pieces,
        closed_form=closed_form,
        keep_gates=keep_gates and closed_form,
        # JAX 0.12 loses the sharding types inside a checkpoint if no mesh is in use.
        checkpoint_step=not on_unknown_mesh((params, steps, carry)),
        by_rule=_rule_applies(project, recur, gates),
    )


def _size(z: PyTree) -> tuple[Any, bool, Any]:
    """Return the number of steps of z, whether its size is known, and its bytes; `jax.export` may leave it unknown."""
    leaves = jax.tree.leaves(z)
    known = all(isinstance(size, int) for leaf in leaves for size in leaf.shape)
    return leaves[0].shape[0], known, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _have_one_shape(z: Any, a: Any) -> bool:
    """Return whether z, of all steps, and a, of one step, are arrays that can be added and cut into pieces."""
    return hasattr(z, "shape") and hasattr(a, "shape") and z.shape[1:] == a.shape


def _reads_any(jaxpr: Any, number: int) -> bool:
    """Return whether the gates read a parameter themselves, such as a peephole, which no closed form covers.

    `dataclasses.replace(LSTM, gates=...)` keeps the LSTM's closed form even if the new gates read parameters.
    """
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return any(id(v) in read for v in jaxpr.invars[:number])


def _rule_applies(project: Any, recur: Any, gates: Any) -> bool:
    """Return whether the rule can differentiate the functions of a cell; where it cannot, the plain scan can.

    A `custom_vjp` in the loop has no forward derivative, from which JAX would make the backward pass. A callback may
    not be called for all steps at once, and JAX cannot transpose a `cond` that was mapped over all steps. What the
    functions close over is differentiated too, but the rule knows only the parameters.
    """
    closed_over = [const for closed in (project, recur, gates) for const in closed.consts]
    in_loop = {*_primitives(recur.jaxpr), *_primitives(gates.jaxpr)}
    return not in_loop & ONLY_BY_SCAN and not any(isinstance(const, jax.core.Tracer) for const in closed_over)


def _primitives(jaxpr: Any) -> Iterator[str]:
    """Yield the name of every operation of a jaxpr, also of those inside another operation."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from _primitives(getattr(inner, "jaxpr", inner))


def _on_devices(arrays: PyTree) -> bool:
    """Return whether arrays are, or may be, spread over several devices.

    Without a mesh in use, the arrays tell. In `shard_map`, where axes are manual, each device sees only its part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_use = any(kind != jax.sharding.AxisType.Manual for kind in mesh.axis_types)
    return in_use or any(map(is_sharded, jax.tree.leaves(arrays)))


# Blocks of time.


def size_without_remainder(num_steps: int, most: int) -> int:
    """Return the largest divisor of a number of steps between `most` / 2 and `most`; if there is none, `most`.

    A remainder is correct but slow: XLA then copies the inputs and outputs of every other block.
    """
    return next((size for size in range(most, most // 2, -1) if num_steps % size == 0), most)


def scan_blocks(
    block: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], carry: PyTree, steps: PyTree, size: int, reverse: bool
) -> tuple[PyTree, PyTree]:
    """Scan over blocks of time; if their size does not divide the sequence, the last block processed is shorter."""
    num_steps = jax.tree.leaves(steps)[0].shape[0]
    if size >= num_steps:
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


def in_bulk(cell: Cell[Any, Any], plan: Plan) -> Cell[Any, Any]:
    """Make the cell that projects and recurs on all steps of a block with time and batch merged into one axis.

    XLA's CPU backend multiplies two matrices faster than it contracts over two axes. Where the batch is sharded,
    merging would gather it on every device, so the plan merges nothing.
    """
    if plan.merged_axes < 2:
        return cell
    project, recur = (functools.partial(_merged, f, plan.merged_axes) for f in (cell.project, cell.recur))
    return dataclasses.replace(cell, project=project, recur=recur)


def _merged(function: Callable[..., PyTree], axes: int, params: PyTree, tree: PyTree) -> PyTree:
    lead = jax.tree.leaves(tree)[0].shape[:axes]
    merged = jax.tree.map(lambda v: v.reshape(math.prod(lead), *v.shape[axes:]), tree)
    return jax.tree.map(lambda v: v.reshape(*lead, *v.shape[1:]), function(params, merged))
