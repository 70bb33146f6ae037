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
from jaxlstm.checks import border, check_cell, check_flag, checked_dtype
from jaxlstm.tangents import add, jvp, present

Params = TypeVar("Params")
Carry = TypeVar("Carry")


@border("low_precision")
def low_precision(cell: Cell[Params, Carry], dtype: DTypeLike, *, round_gradients: bool = False) -> Cell[Params, Carry]:
    """Make the cell whose matmuls read x, h and weights rounded to `dtype`; everything else keeps its dtype.

    That includes sums, biases, gates, carry, outputs and gradients. The derivative is taken at the rounded values, in
    the parameters' dtype: rounding has derivative 1, and no gradient is rounded unless you ask for it.

    Args:
      cell: any cell. Matmuls are `project` and `recur`; weights are parameters of rank 2 and more.
      dtype: "bfloat16" or "float16".
      round_gradients: round what enters and leaves the matmuls of the backward pass too, for hardware that multiplies
        `dtype` faster. The weights' gradient is still summed over blocks of time in the parameters' dtype. Small
        gradients underflow in float16, so scale the loss.

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
    check_flag("round_gradients", round_gradients)
    return _low_precision(cell, checked_dtype(dtype, ' such as "bfloat16"'), bool(round_gradients))


@functools.cache
def _low_precision(cell: Cell[Params, Carry], dtype: jnp.dtype[Any], round_gradients: bool) -> Cell[Params, Carry]:
    return dataclasses.replace(
        cell,
        project=_rounded(cell.project, dtype, round_gradients),
        recur=_rounded(cell.recur, dtype, round_gradients),
        name=f"low_precision({cell.name}, {dtype.name}{', round_gradients' * round_gradients})",
    )


def _rounded(
    function: Callable[[Any, Any], Any], dtype: jnp.dtype[Any], round_gradients: bool
) -> Callable[[Any, Any], Any]:
    """Make the function that reads weights and inputs rounded to `dtype`."""

    @jax.custom_jvp
    def low(params: PyTree, inputs: PyTree) -> PyTree:
        out = function(*_change_operands(functools.partial(_cast, dtype=dtype), params, inputs))
        return _cast_all(out, _dtype_of(params))

    @functools.partial(low.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        tangents = jax.tree.map(present, primals, tangents)
        if round_gradients:
            # All in `dtype`: JAX then makes matmuls of the backward pass that read and return it. A bias needs none.
            d_biases, tangents = _split(primals, tangents)
            _, d_out = jvp(function, *_cast_all((primals, tangents), dtype))
            _, d_by_biases = jvp(function, primals, d_biases)
            return low(*primals), add(_cast_all(d_out, _dtype_of(primals[0])), d_by_biases)
        # At the rounded values but in the wide dtype: otherwise tangents and gradients would be rounded as well.
        values = _change_operands(functools.partial(_round, dtype), *primals)
        _, d_out = jvp(function, values, tangents)
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


def _split(primals: tuple[PyTree, PyTree], tangents: tuple[PyTree, PyTree]) -> Any:
    """Split the tangents: first those of the biases, then those of the weights and inputs; None for the others."""
    (params, inputs), (d_params, d_inputs) = primals, tangents
    biases = jax.tree.map(lambda v, d: d if v.ndim < 2 else None, params, d_params)
    weights = jax.tree.map(lambda v, d: d if v.ndim >= 2 else None, params, d_params)
    return (biases, jax.tree.map(lambda v: None, inputs)), (weights, d_inputs)


def _dtype_of(params: PyTree) -> jnp.dtype[Any]:
    (dtype,) = {v.dtype for v in jax.tree.leaves(params) if _is_float(v)}
    return dtype


def _cast_all(tree: PyTree, dtype: jnp.dtype[Any]) -> PyTree:
    return jax.tree.map(functools.partial(_cast, dtype=dtype), tree)


def _cast(value: Any, dtype: jnp.dtype[Any]) -> Any:
    return value.astype(dtype) if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))
