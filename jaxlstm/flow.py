"""Where the gradient flows: the derivative of a loss by the carry after every step, for any cell."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import check_number, check_sequence
from jaxlstm.recurrence import unroll


def gradient_flow(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    loss_fn: Callable[[Array], Array],
    carry: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """Return the derivative of a loss by the carry after every step, in one backward pass.

    These are the d_h and d_c of the derivation by hand, complete: h_t counts where it is the output and where it goes
    on, c_t also through the h_t that is made of it. They are had from probes, zeros added to each leaf of the carry
    where the cell computes it, so that any cell will do.

    Args:
      cell, params, xs, carry, options: as in `unroll`.
      loss_fn: of the outputs ys [time, *batch, hidden], a number. Of the last output alone, what is returned for step t
        is the gradient at lag T − t.

    Returns:
      A pytree like the carry, its leaves [time, *batch, ...]; 0 at masked steps.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if `loss_fn` returns no number, or the cell computes several leaves
        of its carry inside one `jax.checkpoint` or custom derivative, where no probe reaches.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> d = jaxlstm.gradient_flow(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)), lambda ys: ys[-1].sum())
    >>> d.c.shape
    (11, 3, 7)
    """
    xs, carry = jax.tree.map(jnp.asarray, (xs, carry))
    batch_shape = check_sequence("gradient_flow", cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    one = jax.eval_shape(lambda params: cell.initial_carry(params, batch_shape), params)
    probes = jax.tree.map(lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype), one)
    loss = lambda probes: loss_fn(unroll(_probed(cell), params, (xs, probes), carry, **options)[1])
    check_number("gradient_flow", "loss_fn", jax.eval_shape(loss, probes))
    return jax.grad(loss)(probes)


@functools.cache
def _probed(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Make the cell whose input has a probe for every leaf of the carry beside it."""

    def project(params: PyTree, inputs: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        x, probe = inputs
        return cell.project(params, x), probe

    def gates(params: PyTree, carry: PyTree, z: tuple[PyTree, PyTree], a: PyTree) -> tuple[PyTree, PyTree]:
        return _with_probes(cell.gates, (params, carry, z[0], a), z[1])

    return dataclasses.replace(cell, project=project, gates=gates, gates_jvp=None, activations=None)


def _with_probes(gates: Callable[..., tuple[PyTree, PyTree]], arguments: PyTree, probes: PyTree) -> Any:
    """Evaluate `gates` operation by operation, adding to each leaf of the new carry as soon as it is known.

    Whatever the step computes from it later, such as h from c, sees the sum.
    """
    closed, out = jax.make_jaxpr(gates, return_shape=True)(*arguments)
    added = [*jax.tree.leaves(probes), *[None] * len(jax.tree.leaves(out[1]))]
    return jax.tree.unflatten(jax.tree.structure(out), _evaluate(closed, jax.tree.leaves(arguments), added))


def _evaluate(closed: Any, arguments: list[Any], to_add: list[Any]) -> list[Any]:
    """Evaluate a jaxpr, with what is to be added to each of its results where it is computed; None for nothing."""
    jaxpr = closed.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    probes: dict[Any, Any] = {}
    late = []  # the probes of leaves that are handed on as they were, which nothing here reads as new
    for v, probe in zip(jaxpr.outvars, to_add, strict=True):
        if probe is not None and (isinstance(v, Literal) or v in probes or v in jaxpr.invars):
            late.append(probe)
        else:
            late.append(None)
            if probe is not None:
                probes[v] = probe
    read = lambda v: v.val if isinstance(v, Literal) else known[v]
    for equation in jaxpr.eqns:
        settings = equation.primitive.get_bind_params(equation.params)
        values = [read(v) for v in equation.invars]
        own = [probes.get(v) for v in equation.outvars]
        several = len(own) > 1 and any(probe is not None for probe in own)  # one may be made of another
        if several and equation.primitive.name in ("jit", "pjit"):
            results = _evaluate(equation.params["jaxpr"], values, own)
        elif several and any(map(_is_jaxpr, equation.params.values())):
            raise ValueError(
                f"gradient_flow: the cell computes its carry inside a {equation.primitive.name}, where a probe cannot "
                "reach what is made of it; take that away for this, or have it compute one leaf at a time."
            )
        else:
            results = equation.primitive.bind(*values, **settings)
            results = results if equation.primitive.multiple_results else [results]
            results = [r if probe is None else r + probe for r, probe in zip(results, own, strict=True)]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(v) if probe is None else read(v) + probe for v, probe in zip(jaxpr.outvars, late, strict=True)]


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
