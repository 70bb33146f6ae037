"""Choices made for the compiler: how a recurrence is cut into blocks, and the shapes that XLA runs fast.

No choice changes the result. `benchmarks/choices.py` removes one choice at a time and divides the time without it by
the time with it, in one interleaved run. On two cores of an AMD EPYC, geometric means over the six shapes of the
benchmark (`benchmarks/results/choices.json`); only pieces change the forward pass, so its other figures show the
noise:

    time without, over time with  gradient     forward       (medians, minima)
    blocks                        1.03, 1.02   0.97, 0.99
    merged axes                   1.07, 1.04   1.01, 1.00
    kept gates                    1.07, 1.05   1.00, 1.00
    pieces of z                   1.02, 0.99   1.07, 1.07
    closed form and kept gates    1.17, 1.15   0.99, 0.99

The means hide what each choice is for: blocks for long sequences and for memory, kept gates for wide layers, pieces for
few streams. On an NVIDIA H100, means over two shapes (`benchmarks/results/choices-gpu.json`); blocks are for memory,
and these two sequences are too short for them:

    time without, over time with  gradient     forward       (medians, minima)
    several steps at a time       1.56, 1.58   1.52, 1.51
    blocks                        0.98, 1.00   1.01, 0.99
    gates computed again          1.07, 1.09   1.01, 0.99
    z before the loop             1.04, 1.04   1.03, 1.02
    closed form                   1.07, 1.09   1.00, 1.00
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import is_sharded, of_one_step, on_unknown_mesh
from jaxlstm.gradients import Bulk
from jaxlstm.masks import Steps
from jaxlstm.structure import equations

# On a CPU, a block of z of this size stays in the cache while the rest of the block is computed from it ...
BLOCK_BYTES = 3 << 20
# ... unless it has fewer rows, in time and batch, than these: smaller matmuls are slow.
BLOCK_ROWS = 1024
# On an accelerator or a mesh, a sequence whose z takes at most ONE_BLOCK_BYTES is one block; its gradient takes five
# times as much memory. A larger one is cut into NUM_BLOCKS blocks, or into up to twice as many if that leaves no
# remainder. It takes less than half of a plain scan's memory; on a mesh, every block sums its weight gradient over the
# devices once.
ONE_BLOCK_BYTES = 64 << 20
NUM_BLOCKS = 8
# A GPU spends more time on starting the operations of a step than on running them, so its loops take up to this many
# steps at a time: more steps take longer to compile.
UNROLLED = 6
# Up to here, z is computed before the loop on a CPU too; above, it would be written to memory and read back.
SHORT_BYTES = 8 << 20
# Up to this size of z, keeping the gates, which take as much memory, costs less time than computing them again ...
KEPT_BYTES = 64 << 20
# ... and in layers of this many units, whose matmuls are slow, up to this size.
LARGE_HIDDEN = 512
LARGE_KEPT_BYTES = 256 << 20


# Operations that keep `recur` or `gates` from being differentiated by the rule.
ONLY_BY_SCAN = {"custom_vjp_call", "custom_vjp_call_jaxpr", "pure_callback", "io_callback", "cond"}


class Plan(NamedTuple):
    """How a recurrence is run and differentiated on one platform; no choice changes the result."""

    block_size: int | None = None  # steps differentiated at once; None: all
    merged_axes: int = 0  # leading axes, time and batch, merged into one for the matmuls of a block; 0: none
    pieces: int = 0  # z of a block is computed before its loop and cut into this many; 0: inside the loop
    closed_form: bool = True  # use the cell's `gates_jvp`
    keep_gates: bool = False  # for the backward pass, which otherwise computes them again
    checkpoint_step: bool = True  # compute all of a backward step in its loop; False: a part in a loop before it
    unroll: int = 1  # time steps in one pass of a loop


class Plans(NamedTuple):
    """The plan for each platform, and whether the rule can differentiate the cell."""

    on_a_cpu: Plan
    elsewhere: Plan
    by_rule: bool  # False: differentiate by the plain scan


def make_plans(cell: Cell[Any, Any], params: PyTree, steps: Steps, carry: PyTree, gradient: Bulk) -> Plans:
    """Decide how to run a recurrence.

    The plans depend on shapes and on whether a mesh is in use, but not on the platform: JAX does not know the platform
    when it traces a program, and `jax.export` lowers programs for other machines. JAX chooses one of the two plans when
    it lowers the program. Memory besides the outputs: the carry before every step, the gates of every step if they are
    kept, and about five times z of one block.
    """
    project, z = jax.make_jaxpr(cell.project, return_shape=True)(params, steps.x)
    recur, a = jax.make_jaxpr(cell.recur, return_shape=True)(params, carry)
    gates = jax.make_jaxpr(cell.gates)(params, carry, of_one_step(z), a)
    num_steps, known, num_bytes = _size(z)
    hidden_size = max((leaf.shape[-1] for leaf in jax.tree.leaves(carry) if leaf.ndim), default=0)
    spread = on_devices((params, steps, carry))
    reshapes = known and gradient.block_size is None and not spread
    closed_form = cell.gates_jvp is not None and not _reads_any(gates.jaxpr, len(jax.tree.leaves(params)))
    # JAX 0.12 loses the sharding types inside a checkpoint if no mesh is in use.
    common = {"closed_form": closed_form, "checkpoint_step": not on_unknown_mesh((params, steps, carry))}

    block_size = size_elsewhere = gradient.block_size if isinstance(num_steps, int) else None
    if block_size is None and known:
        block_size, size_elsewhere = _block_sizes(z, num_bytes, spread)
    pieces = _num_pieces(z, a, hidden_size) if reshapes and closed_form and num_bytes <= SHORT_BYTES else 0
    merged_axes = jax.tree.leaves(z)[0].ndim - 1 if reshapes else 0
    unroll = size_without_remainder(size_elsewhere or num_steps, UNROLLED) if isinstance(num_steps, int) else 1
    fits = known and num_bytes <= (LARGE_KEPT_BYTES if hidden_size >= LARGE_HIDDEN else KEPT_BYTES)
    keep, keep_elsewhere = (fits, False) if gradient.keep_gates is None else (gradient.keep_gates,) * 2
    on_a_cpu = Plan(block_size, merged_axes, pieces, keep_gates=keep and closed_form, **common)
    elsewhere = Plan(size_elsewhere, pieces=1, keep_gates=keep_elsewhere and closed_form, unroll=unroll, **common)
    # Where `jax.export` leaves a size unknown, one plan serves all platforms.
    return Plans(on_a_cpu, elsewhere if known else on_a_cpu, _rule_applies(project, recur, gates))


def _block_sizes(z: PyTree, num_bytes: int, spread: bool) -> list[int | None]:
    """Return how many steps fill a block on a CPU and elsewhere; None if the sequence is shorter than two blocks."""
    num_steps, *lead = jax.tree.leaves(z)[0].shape
    steps_of = lambda size, of_all: math.ceil(size * num_steps / max(1, of_all))
    on_a_cpu = max(4, steps_of(BLOCK_BYTES, num_bytes), steps_of(BLOCK_ROWS, num_steps * math.prod(lead[:-1])))
    elsewhere = num_steps if num_bytes <= ONE_BLOCK_BYTES else math.ceil(num_steps / NUM_BLOCKS)
    even = lambda size: size_without_remainder(num_steps, size) if 2 * size < num_steps else None
    return [even(elsewhere if spread else on_a_cpu), even(elsewhere)]


def _size(z: PyTree) -> tuple[Any, bool, Any]:
    """Return the number of steps of z, whether its size is known, and its bytes; `jax.export` may leave it unknown."""
    leaves = jax.tree.leaves(z)
    known = all(isinstance(size, int) for leaf in leaves for size in leaf.shape)
    return leaves[0].shape[0], known, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _num_pieces(z: Any, a: Any, hidden_size: int) -> int:
    """Return into how many gates z + a can be cut, for z of all steps and a of one; 0 if they are not such arrays."""
    if not (hidden_size and hasattr(z, "shape") and hasattr(a, "shape") and z.shape[1:] == a.shape):
        return 0
    num_gates, rest = divmod(z.shape[-1], hidden_size)
    return 0 if rest else num_gates


def _reads_any(jaxpr: Any, number: int) -> bool:
    """Return whether the gates read a parameter themselves, such as a peephole, which no closed form covers.

    `dataclasses.replace(LSTM, gates=...)` keeps the LSTM's closed form even if the new gates read parameters.
    """
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return any(id(v) in read for v in jaxpr.invars[:number])


def _rule_applies(project: Any, recur: Any, gates: Any) -> bool:
    """Return whether the rule can differentiate the functions of a cell; where it cannot, the plain scan can.

    A `custom_vjp` in the loop has no forward derivative, from which JAX would make the backward pass. A callback may
    not be called for all steps at once, and JAX cannot transpose a `cond` that was mapped over all steps, except one on
    the platform, such as an inner `unroll` has. What the functions close over is differentiated too, but the rule knows
    only the parameters.
    """
    closed_over = [const for closed in (project, recur, gates) for const in closed.consts]
    ops = [op for closed in (recur, gates) for op in equations(closed.jaxpr)]
    in_loop = {op.primitive.name for op in ops if op.params.get("branches_platforms") is None}
    return not in_loop & ONLY_BY_SCAN and not any(isinstance(const, jax.core.Tracer) for const in closed_over)


def on_devices(arrays: PyTree) -> bool:
    """Return whether arrays are, or may be, spread over several devices.

    Without a mesh in use, the arrays tell. In `shard_map`, where axes are manual, each device sees only its part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_use = any(kind != jax.sharding.AxisType.Manual for kind in mesh.axis_types)
    return in_use or any(map(is_sharded, jax.tree.leaves(arrays)))


def known_plan(plans: Plans, arrays: PyTree) -> Plan | None:
    """Return the plan if tracing can know it: if both plans are the same, or if a mesh names its platform; else None.

    The mesh is the one in use, or the one that the arrays are typed with. If there were a branch instead, XLA would
    keep it in the compiled program, around the sum over devices.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays))]
    device = next((mesh.abstract_device for mesh in meshes if mesh.abstract_device), None)
    if device is None:
        return plans.on_a_cpu if plans.on_a_cpu == plans.elsewhere else None
    return plans.on_a_cpu if device.platform == "cpu" else plans.elsewhere


def size_without_remainder(num_steps: int, most: int) -> int:
    """Return the largest divisor of a number of steps between `most` / 2 and `most`; if there is none, `most`.

    A remainder is correct but slow: XLA then copies the inputs and outputs of every other block.
    """
    return next((size for size in range(most, most // 2, -1) if num_steps % size == 0), most)


def in_bulk(cell: Cell[Any, Any], plan: Plan) -> Cell[Any, Any]:
    """Make the cell that projects and recurs on a block with time and batch merged into one axis.

    XLA's CPU backend multiplies two matrices faster than it contracts over two axes. Accelerators gain nothing, and
    where the batch is sharded, merging would gather it on every device.
    """
    if plan.merged_axes < 2:
        return cell
    merged = lambda function: functools.partial(_merged, function, plan.merged_axes)
    return dataclasses.replace(cell, project=merged(cell.project), recur=merged(cell.recur))


def _merged(function: Callable[..., PyTree], axes: int, params: PyTree, tree: PyTree) -> PyTree:
    leaves = jax.tree.leaves(tree)
    if not leaves:  # a cell without a carry recurs on nothing
        return function(params, tree)
    lead = leaves[0].shape[:axes]
    merged = jax.tree.map(lambda v: v.reshape(math.prod(lead), *v.shape[axes:]), tree)
    return jax.tree.map(lambda v: v.reshape(*lead, *v.shape[1:]), function(params, merged))
