"""Mixed precision: a cell whose matmuls read few digits, and whose sums, gates and gradients keep all of theirs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlstm.cell import Cell, PyTree
from jaxlstm.derivative import jvp, present


@functools.cache
def in_compute_dtype(cell: Cell[Any, Any], dtype: DTypeLike) -> Cell[Any, Any]:
    """Make the cell whose `project` and `recur` read x, h and weights rounded to `dtype`.

    The derivative is that of the function at the rounded values, in the parameters' own dtype: rounding has derivative
    1, and no gradient is ever rounded. The same cell and dtype give the same cell, so it compiles once.
    """
    rounded = functools.partial(_rounded, dtype=jnp.dtype(dtype))
    return dataclasses.replace(
        cell, project=rounded(cell.project), recur=None if cell.recur is None else rounded(cell.recur)
    )


def _rounded(function: Callable[[PyTree, PyTree], PyTree], dtype: jnp.dtype[Any]) -> Callable[[PyTree, PyTree], PyTree]:
    def of_read(change: Callable[[Any], Any], params: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Change what a matmul reads: weights, not biases, and inputs; not the integers among them."""
        weights = jax.tree.map(lambda v: change(v) if v.ndim >= 2 and _is_float(v) else v, params)
        return weights, jax.tree.map(lambda v: change(v) if _is_float(v) else v, inputs)

    @jax.custom_jvp
    def low(params: PyTree, inputs: PyTree) -> PyTree:
        (own,) = {v.dtype for v in jax.tree.leaves(params) if _is_float(v)}
        out = function(*of_read(lambda v: v.astype(dtype), params, inputs))
        return jax.tree.map(lambda v: v.astype(own) if _is_float(v) else v, out)

    @functools.partial(low.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        values = of_read(lambda v: _round(v, dtype), *primals)
        _, d_out = jvp(function, values, jax.tree.map(present, primals, tangents))
        return low(*primals), d_out

    return low


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round(value: Array, dtype: jnp.dtype[Any]) -> Array:
    return value.astype(dtype).astype(value.dtype)


@_round.defjvp
def _(dtype: jnp.dtype[Any], primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _round(*primals, dtype), *tangents


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))
