"""Mixed precision: a cell whose matmuls read few digits, and whose sums, gates and gradients keep all of theirs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import border, check_cell, checked_dtype
from jaxlstm.tangents import jvp, present

Params = TypeVar("Params")
Carry = TypeVar("Carry")


@border("low_precision")
def low_precision(cell: Cell[Params, Carry], dtype: DTypeLike) -> Cell[Params, Carry]:
    """Make the cell whose matmuls read x, h and weights rounded to `dtype`; everything else keeps its dtype.

    That includes sums, biases, gates, carry, outputs and gradients. The derivative is taken at the rounded values, in
    the parameters' dtype: rounding has derivative 1, and no gradient is ever rounded.

    Args:
      cell: any cell. Matmuls are `project` and `recur`; weights are parameters of rank 2 and more.
      dtype: "bfloat16" or "float16".

    Returns:
      A cell; equal arguments give the same cell, which compiles once.

    Raises:
      TypeError: `dtype` is not a floating type.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> cell = jaxlstm.low_precision(jaxlstm.LSTM, "bfloat16")
    >>> jaxlstm.unroll(cell, params, jax.numpy.ones((11, 3, 5)))[1].dtype
    dtype('float32')
    """
    check_cell(cell)
    return _low_precision(cell, checked_dtype(dtype, ' such as "bfloat16"'))


@functools.cache
def _low_precision(cell: Cell[Params, Carry], dtype: jnp.dtype[Any]) -> Cell[Params, Carry]:
    return dataclasses.replace(
        cell,
        project=_rounded(cell.project, dtype),
        recur=_rounded(cell.recur, dtype),
        name=f"low_precision({cell.name}, {dtype.name})",
    )


def _rounded(function: Callable[[Any, Any], Any], dtype: jnp.dtype[Any]) -> Callable[[Any, Any], Any]:
    """Make the function that reads weights and inputs rounded to `dtype`."""

    @jax.custom_jvp
    def low(params: PyTree, inputs: PyTree) -> PyTree:
        (own,) = {v.dtype for v in jax.tree.leaves(params) if _is_float(v)}
        out = function(*_change_operands(functools.partial(_cast, dtype=dtype), params, inputs))
        return jax.tree.map(functools.partial(_cast, dtype=own), out)

    @functools.partial(low.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        # At the rounded values but in the wide dtype: otherwise tangents and gradients would be rounded as well.
        values = _change_operands(functools.partial(_round, dtype), *primals)
        _, d_out = jvp(function, values, jax.tree.map(present, primals, tangents))
        return low(*primals), d_out

    def rounded(params: PyTree, inputs: PyTree) -> PyTree:
        return low(params, inputs)

    # Tells the checks which arrays it reads, so that errors still name w_ih and the features.
    rounded.reads_as = function  # type: ignore[attr-defined]
    return rounded


def _change_operands(change: Callable[[Any], Any], params: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
    """Change what a matmul reads: weights and floating inputs, not biases and integers."""
    weights = jax.tree.map(lambda v: change(v) if v.ndim >= 2 and _is_float(v) else v, params)
    return weights, jax.tree.map(lambda v: change(v) if _is_float(v) else v, inputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _round(dtype: jnp.dtype[Any], value: Array) -> Array:
    return value.astype(dtype).astype(value.dtype)


@_round.defjvp
def _(dtype: jnp.dtype[Any], primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _round(dtype, *primals), *tangents


def _cast(value: Any, dtype: jnp.dtype[Any]) -> Any:
    return value.astype(dtype) if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))
