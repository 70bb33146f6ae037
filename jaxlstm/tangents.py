"""Trees of tangents in which a tangent may be absent.

Integers, keys and arrays that nobody differentiates have no tangent. Here such a tangent is None, and a None in place
of a subtree stands for all its leaves. Skipping them saves the derivative rule whole matmuls: the gradient with
respect to the parameters alone never computes how z changes with x.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm.cell import PyTree


def jvp(function: Callable[..., PyTree], primals: tuple[Any, ...], tangents: Any) -> tuple[PyTree, PyTree]:
    """Do what `jax.jvp` does, but only with respect to the primals that have a tangent."""
    leaves = jax.tree.leaves(primals)
    d_leaves = [d for p, t in zip(primals, tangents, strict=True) for d in leaves_like(p, t)]
    active = [n for n, d in enumerate(d_leaves) if d is not None]

    def of_active(*values: Any) -> PyTree:
        new = list(leaves)
        for n, value in zip(active, values, strict=True):
            new[n] = value
        return function(*jax.tree.unflatten(jax.tree.structure(primals), new))

    # `jax.jvp` would refuse an empty list of primals.
    if not active:
        out = of_active()
        return out, jax.tree.map(_absent, out)
    out, d_out = jax.jvp(of_active, [leaves[n] for n in active], [d_leaves[n] for n in active])
    return out, jax.tree.map(present, out, d_out)


def leaves_like(tree: PyTree, tangents: PyTree) -> list[Any]:
    """Return a tangent, or None, for every leaf of a tree."""
    treedef: Any = jax.tree.structure(tree)
    return [None] * treedef.num_leaves if tangents is None else list(treedef.flatten_up_to(tangents))


def present(value: Any, tangent: Any) -> Any:
    """Return a tangent, or None if it is a symbolic zero or its primal is not real."""
    return None if isinstance(tangent, jax.custom_derivatives.SymbolicZero) or not _is_real(value) else tangent


def as_custom_jvp_output(value: Any, tangent: Any) -> Any:
    """Return a tangent as `custom_jvp` expects it: zeros of type float0 where it is absent."""
    return np.zeros(value.shape, jax.dtypes.float0) if tangent is None else tangent


def filled(tree: PyTree, tangents: PyTree) -> PyTree:
    """Replace absent tangents of real leaves by zeros, as the carry of a loop needs."""
    pairs = zip(jax.tree.leaves(tree), leaves_like(tree, tangents), strict=True)
    full = [jnp.zeros_like(v) if d is None and _is_real(v) else d for v, d in pairs]
    return jax.tree.unflatten(jax.tree.structure(tree), full)


def add(tangents: PyTree, others: PyTree) -> PyTree:
    """Add two trees of tangents; None is 0."""
    return tangents if others is None else jax.tree.map(_plus, tangents, others, is_leaf=_is_none)


def _plus(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _is_none(tangent: Any) -> bool:
    return tangent is None


def _absent(_: Any) -> None:
    return None


def _is_real(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))
