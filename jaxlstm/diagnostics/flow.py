"""Show where the gradient flows: the gradient of a loss with respect to the carry after every step, for any cell."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import (
    ArgumentValueError,
    as_arrays,
    border,
    check_function,
    check_number,
    check_sequence,
    in_callback,
)
from jaxlstm.recurrence import unroll
from jaxlstm.structure import is_jaxpr


@border("gradient_flow")
def gradient_flow(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    loss_fn: Callable[[Array], Array],
    carry: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """Return the gradient of a loss with respect to the carry after every step, in one backward pass.

    For an LSTM these are the complete d_h and d_c of the hand-derived gradient: h_t counts as output and as input of
    the next step, and c_t counts also through h_t, which is computed from it. They are computed with probes: zeros
    that are added to each leaf of the carry where the cell computes it. This works for any cell.

    Args:
      cell, params, xs, carry, options: as in `unroll`.
      loss_fn: a function of the outputs ys [time, *batch, hidden] that returns a number. If it reads the last output
        alone, the last entry of the result is the gradient at lag 0, and entry t is the gradient at lag T − 1 − t.

    Returns:
      A pytree like the carry, its leaves [time, *batch, ...]; 0 at masked steps.

    Raises:
      TypeError: as `unroll`.
      ValueError: as `unroll`; or `loss_fn` does not return a number, or the cell computes several leaves of its carry
        inside one `jax.checkpoint` or custom derivative, where probes cannot be added.

    >>> import jax
    >>> from jaxlstm import LSTM
    >>> from jaxlstm.diagnostics import gradient_flow
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> d = gradient_flow(LSTM, params, jax.numpy.ones((11, 3, 5)), lambda ys: ys[-1].sum())
    >>> d.c.shape
    (11, 3, 7)
    """
    params, xs, carry = as_arrays(params=params, xs=xs, carry=carry)
    # Checked here, since `unroll` sees only the probed cell with its unusual inputs.
    batch_shape = check_sequence(cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    initial = cell.initial_carry(params, batch_shape)
    probes = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), initial)

    check_function("loss_fn", loss_fn)

    def loss(probes: PyTree) -> Array:
        return in_callback()(loss_fn)(unroll(_probed(cell), params, (xs, probes), carry, **options)[1])

    check_number("loss_fn", jax.eval_shape(loss, probes))
    return jax.grad(loss)(probes)


@functools.cache
def _probed(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Make the cell whose input also holds a probe for every leaf of the carry."""

    def project(params: PyTree, inputs: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        x, probe = inputs
        return cell.project(params, x), probe

    def gates(params: PyTree, carry: PyTree, z: tuple[PyTree, PyTree], a: PyTree) -> tuple[PyTree, PyTree]:
        return _with_probes(cell.gates, (params, carry, z[0], a), z[1])

    return dataclasses.replace(cell, project=project, gates=gates, gates_jvp=None, activations=None)


def _with_probes(gates: Callable[..., tuple[PyTree, PyTree]], arguments: PyTree, probes: PyTree) -> Any:
    """Evaluate `gates`, and add a probe to each leaf of the new carry as soon as it is computed.

    A probe added to the result of `gates` would come too late: h is already computed from c, and must see its probe.
    """
    closed, out = jax.make_jaxpr(gates, return_shape=True)(*arguments)
    added = [*jax.tree.leaves(probes), *[None] * len(jax.tree.leaves(out[1]))]
    return jax.tree.unflatten(jax.tree.structure(out), _evaluate(closed, jax.tree.leaves(arguments), added))


def _evaluate(closed: Any, arguments: list[Any], to_add: list[Any]) -> list[Any]:
    """Evaluate a jaxpr, and add to each of its results, where it is computed, a probe or None."""
    jaxpr = closed.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    probes: dict[Any, Any] = {}
    late = []  # probes of results that no operation here computes, such as a leaf that is passed on unchanged
    for v, probe in zip(jaxpr.outvars, to_add, strict=True):
        is_late = probe is not None and (isinstance(v, Literal) or v in probes or v in jaxpr.invars)
        late.append(probe if is_late else None)
        if probe is not None and not is_late:
            probes[v] = probe

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else known[v]

    for equation in jaxpr.eqns:
        values = [read(v) for v in equation.invars]
        own = [probes.get(v) for v in equation.outvars]
        # One result may be computed from another inside the operation, so that probes must be added in there.
        several = len(own) > 1 and any(probe is not None for probe in own)
        if several and equation.primitive.name in ("jit", "pjit"):
            results = _evaluate(equation.params["jaxpr"], values, own)
        elif several and any(map(is_jaxpr, equation.params.values())):
            raise ArgumentValueError(
                f"the cell computes its carry inside a {equation.primitive.name}, where no probe can be added; remove "
                "it for this analysis, or compute one leaf at a time in it."
            )
        else:
            settings = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*values, **settings)
            results = results if equation.primitive.multiple_results else [results]
            results = [r if probe is None else r + probe for r, probe in zip(results, own, strict=True)]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(v) if probe is None else read(v) + probe for v, probe in zip(jaxpr.outvars, late, strict=True)]
