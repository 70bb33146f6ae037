"""What the arguments of a sequence function must keep, checked before anything is traced into a loop.

One error, that names the function, the argument, what was expected, what came, and the likely cure.
"""

import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlstm.cell import Cell, PyTree, leaf_path, project, recur


def check_init(function: str, key: Any, input_size: Any, hidden_size: Any, dtype: DTypeLike) -> None:
    """Check the arguments of an initialiser.

    Raises:
      TypeError: `key` is no typed key, or `dtype` no floating type.
      ValueError: a size is no positive integer.
    """
    check_key(function, key)
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not _is_positive(size):
            raise ValueError(f"{function}: {name} must be a positive int, got {size!r}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{function}: dtype must be a floating type, got {jnp.dtype(dtype).name}.")


def check_key(function: str, key: Any) -> None:
    """Check that this is one typed key.

    Raises:
      TypeError: it is something else.
      ValueError: it is more than one.
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        got = f"{key.dtype}[{_dims(key)}]" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(f"{function}: key must be a typed key, got {got}; make one with jax.random.key(seed).")
    if key.shape != ():
        raise ValueError(f"{function}: key must be one key, got {key.shape[0]} of them; use jax.vmap for many.")


def checked_rate(function: str, name: str, rate: Any) -> Any:
    """Check a probability of dropping something; return it as a float, or as it is if it is traced, inside `jit`.

    Raises:
      ValueError: it is no number in [0, 1).
    """
    if isinstance(rate, jax.core.Tracer):
        return rate
    is_number = not isinstance(rate, bool) and hasattr(rate, "__float__") and getattr(rate, "ndim", 0) == 0
    if not is_number or not 0 <= float(rate) < 1:
        raise ValueError(f"{function}: {name} must lie in [0, 1), got {rate!r}.")
    return float(rate)


def check_cell(function: str, cell: Any) -> None:
    """Check that this is a cell.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(cell, Cell):
        raise TypeError(f"{function}: cell must be a Cell, such as jaxlstm.LSTM, got {kind_of(cell)}.")


def check_sequence(
    function: str, cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None, *, one_step: bool = False
) -> tuple[int, ...]:
    """Check that a cell, its parameters, a sequence and a carry belong together; return the batch shape.

    With `one_step`, the sequence is one step that a user knows as x, without a time axis.

    Raises:
      TypeError: dtypes are mixed, inputs are integers, or the carry is another cell's.
      ValueError: a shape is wrong.
    """
    check_cell(function, cell)
    if cell.project is project:
        _check_input(function, cell, params, xs, one_step)
    if cell.recur is recur:
        _check_recurrent_weights(function, cell, params)
    leaves = jax.tree.leaves(xs)
    if not leaves or any(leaf.ndim < 1 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        raise ValueError(f"{function}: every array of xs must be [time, *batch, ...], got {describe(xs)}.")
    _check_dtype(function, params, xs)

    # One step, traced on shapes alone, says the rest: whatever fails would fail inside the loop.
    params_type = jax.tree.map(_struct, params)
    x_type = of_one_step(xs)
    given = f"params {describe(params)}; xs {describe(xs)}"
    try:
        z_type = jax.eval_shape(cell.project, params_type, x_type)
        batch_shape = jax.tree.leaves(z_type)[0].shape[:-1]
        expected = jax.eval_shape(lambda p: cell.initial_carry(p, batch_shape), params_type)
        stepped, _ = jax.eval_shape(cell.step, params_type, expected, x_type)
    except jax.errors.ConcretizationTypeError:
        raise  # Python control flow on an array, in the cell itself: JAX says it best
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{function}: one step of {cell.name} fails with {given}. Are these another cell's params? {reason}"
        ) from error
    for leaf in jax.tree.leaves(expected):
        if leaf.shape[: len(batch_shape)] != batch_shape:
            raise ValueError(
                f"{function}: the initial carry of {cell.name} is {describe(expected)}; every leaf must start with the "
                f"batch axes {list(batch_shape)}."
            )
    if not alike(stepped, expected):
        raise ValueError(
            f"{function}: one step of {cell.name} turns carry {kind_of(expected)}: {describe(expected)} into "
            f"{kind_of(stepped)}: {describe(stepped)}, with {given}. Are these another cell's params?"
        )
    if carry is not None:
        check_carry(function, "carry", cell, carry, expected)
    return batch_shape


def check_carry(function: str, name: str, cell: Cell[Any, Any], carry: PyTree, expected: PyTree) -> None:
    """Check that a carry is the cell's own, leaf by leaf.

    Raises:
      TypeError: it is another kind of pytree, or a leaf has the wrong dtype.
      ValueError: a leaf has the wrong shape.
    """
    if not same_structure(carry, expected):
        raise TypeError(
            f"{function}: {name} of {cell.name} must be {kind_of(expected)}, got {kind_of(carry)}; "
            f"{cell.name}.initial_carry(params, batch_shape) makes one."
        )
    for got, want in zip(*map(jax.tree.leaves, (carry, expected)), strict=True):
        message = f"{function}: {name} is {describe(carry)}, {cell.name} expects {describe(expected)}; "
        if got.shape != want.shape:
            raise ValueError(message + "every leaf is [*batch, ...] with the batch axes of xs.")
        if got.dtype != want.dtype:
            raise TypeError(message + f"cast with jax.tree.map(lambda v: v.astype('{want.dtype}'), {name}).")


def check_steps(function: str, name: str, flags: Any, num_steps: int | None, batch_shape: tuple[int, ...]) -> None:
    """Check a mask or reset: bool, one flag per step and batch element; of a single step if `num_steps` is None.

    Raises:
      TypeError: it is not boolean.
      ValueError: it has the wrong shape.
    """
    if flags.dtype != jnp.bool_:
        raise TypeError(f"{function}: {name} must be bool, got {flags.dtype}; write {name} != 0.")
    axes, shape = ("[*batch]", batch_shape) if num_steps is None else ("[time, *batch]", (num_steps, *batch_shape))
    if flags.shape != shape:
        raise ValueError(f"{function}: {name} must be {axes} = {list(shape)}, got {list(flags.shape)}.")


def checked_flags(
    function: str, mask: Any, reset: Any, num_steps: int | None, batch_shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """Check a mask and resets, of a sequence or a single step, either of which may be None; return them as arrays.

    Raises:
      TypeError, ValueError: as `check_steps`.
    """
    mask, reset = (None if flags is None else jnp.asarray(flags) for flags in (mask, reset))
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None:
            check_steps(function, name, flags, num_steps, batch_shape)
    return mask, reset


def of_one_step(xs: PyTree) -> PyTree:
    """Return the shapes and dtypes of one step of a sequence."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)


def check_step_loss(function: str, step_loss: Any, y: Any) -> None:
    """Check that a loss is one of a single step: (y_t, t) -> E_t, a number.

    Raises:
      ValueError: it takes other arguments, or returns something else.
    """
    time = jax.ShapeDtypeStruct((), jnp.arange(0).dtype)
    try:
        inspect.signature(step_loss).bind(y, time)
    except TypeError as error:
        raise ValueError(
            f"{function}: step_loss must take (y_t, t), the output of one step and its number: {error}."
        ) from error
    check_number(
        function, "step_loss", jax.eval_shape(step_loss, y, time), ", the loss of a step summed over the batch"
    )


def check_number(function: str, name: str, out: Any, which: str = "") -> None:
    """Check that what a loss returns, or will return, is one number.

    Raises:
      ValueError: it is something else.
    """
    if getattr(out, "shape", None) != ():
        got = list(out.shape) if hasattr(out, "shape") else type(out).__name__
        raise ValueError(f"{function}: {name} must return one number{which}, got {got}.")


def check_size(function: str, name: str, size: Any) -> None:
    """Check a number of steps that may be None.

    Raises:
      ValueError: it is no positive integer.
    """
    if size is not None and not _is_positive(size):
        raise ValueError(f"{function}: {name} must be a positive int or None, got {size!r}.")


def check_num_steps(function: str, num_steps: Any) -> None:
    """Check how many steps are to be taken; none is a number too.

    Raises:
      ValueError: it is negative, or no integer.
    """
    if not hasattr(num_steps, "__index__") or operator.index(num_steps) < 0:
        raise ValueError(f"{function}: num_steps must be an int and not negative, got {num_steps!r}.")


def _is_positive(size: Any) -> bool:
    return not isinstance(size, bool) and hasattr(size, "__index__") and operator.index(size) >= 1


def check_compute_dtype(function: str, dtype: Any) -> None:
    """Check a dtype for matmuls.

    Raises:
      TypeError: it is not floating.
    """
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f'{function}: compute_dtype must be a floating type such as "bfloat16", got {dtype!r}.')


def describe(tree: PyTree) -> str:
    """Return dtype and shape of every leaf, as `h float32[3,7], c float32[3,7]`."""
    return ", ".join(
        f"{leaf_path(path)} {leaf.dtype}[{_dims(leaf)}]".strip() for path, leaf in jax.tree.leaves_with_path(tree)
    )


def same_structure(one: PyTree, other: PyTree) -> bool:
    """Say whether two pytrees differ in their leaves at most."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (one, other)]
    return bool(structures[0] == structures[1])


def alike(one: PyTree, other: PyTree) -> bool:
    """Say whether two pytrees have the same structure, shapes and dtypes."""
    types = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return same_structure(one, other) and types(one) == types(other)


def _check_input(function: str, cell: Cell[Any, Any], params: Any, xs: Any, one_step: bool) -> None:
    name, axes = ("x", "[*batch, input]") if one_step else ("xs", "[time, *batch, input]")
    if not hasattr(xs, "ndim"):
        raise TypeError(f"{function}: {name} must be one array {axes}, got {kind_of(xs)}.")
    shape = list(xs.shape[one_step:])
    _check_names(function, cell, params, "w_ih", "b")
    if not jnp.issubdtype(xs.dtype, jnp.inexact):
        raise TypeError(
            f"{function}: {name} must be floating, got {xs.dtype}; embed symbols, or use "
            f"jax.nn.one_hot({name}, num_symbols)."
        )
    if xs.ndim < 2:
        raise ValueError(f"{function}: {name} must be {axes}, got {shape}.")
    if params.w_ih.ndim != 2 or params.b.shape != params.w_ih.shape[1:]:
        raise ValueError(f"{function}: params must have w_ih [input, n] and b [n], got {describe(params)}.")
    if xs.shape[-1] != params.w_ih.shape[0]:
        raise ValueError(
            f"{function}: {name} has {xs.shape[-1]} features, params.w_ih expects {params.w_ih.shape[0]}; "
            f"{name} is {axes}, got {shape}."
        )


def _check_recurrent_weights(function: str, cell: Cell[Any, Any], params: Any) -> None:
    _check_names(function, cell, params, "w_hh")
    columns = {params.w_hh.shape[-1], getattr(params, "w_ih", params.w_hh).shape[-1]}
    # A single column would be broadcast over all units without a word.
    if params.w_hh.ndim != 2 or (1 in columns and len(columns) > 1):
        raise ValueError(f"{function}: params must have w_hh [hidden, n] and w_ih [input, n], got {describe(params)}.")


def _check_names(function: str, cell: Cell[Any, Any], params: Any, *names: str) -> None:
    if not all(hasattr(getattr(params, name, None), "shape") for name in names):
        raise TypeError(
            f"{function}: {cell.name} expects params with {' and '.join(names)}, got {kind_of(params)}; "
            f"{cell.name}.init makes them."
        )


def _check_dtype(function: str, params: PyTree, xs: PyTree) -> None:
    """A mixture would be promoted silently, and the carry would change its dtype inside the loop."""
    floats = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)}
    own, other = floats(params), floats(xs)
    if len(own | other) > 1:
        wrong = "params" if len(own) > 1 else "xs"
        raise TypeError(
            f"{function}: params ({describe(params)}) and xs ({describe(xs)}) must share one dtype; "
            f"cast with jax.tree.map(lambda v: v.astype('{min(own or other)}'), {wrong})."
        )


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def kind_of(tree: PyTree) -> str:
    """Return the name of a pytree's type, and of its fields."""
    fields = getattr(type(tree), "_fields", None)
    return f"{type(tree).__name__}({', '.join(fields)})" if fields else type(tree).__name__


def _dims(leaf: Any) -> str:
    return ",".join(map(str, leaf.shape))
