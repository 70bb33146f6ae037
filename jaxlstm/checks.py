"""Check the arguments of public functions before anything is traced into a loop.

An error says which argument is wrong, what was expected, what it got, and the likely cure. The decorator `border` adds
the name of the public function: `unroll_stack, layer 1, backward: xs has 7 features, params.w_ih expects 8; ...`.
"""

import contextlib
import functools
import inspect
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from jaxlstm.cell import Cell, PyTree, leaf_path, project, recur

# The border.


class ArgumentError(Exception):
    """An argument is wrong; the message names the public function, where in it, and the argument."""

    function: str = ""
    places: tuple[str, ...] = ()
    from_callback: bool = False

    def __str__(self) -> str:
        where = ", ".join(filter(None, [self.function, *self.places]))
        return f"{where}: {self.args[0]}" if where else str(self.args[0])


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has the wrong type or dtype."""


class ArgumentValueError(ArgumentError, ValueError):
    """An argument has the wrong shape or value."""


@contextlib.contextmanager
def border(function: str) -> Iterator[None]:
    """Name a public function in the errors raised inside it; the outermost one wins, which is the one users called."""
    try:
        yield
    except ArgumentError as error:
        if not error.from_callback:
            error.function = function
        raise


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Name a place inside a public function, such as a layer, in the errors raised there."""
    try:
        yield
    except ArgumentError as error:
        if not error.from_callback:
            error.places = (place, *error.places)
        raise


@contextlib.contextmanager
def in_callback() -> Iterator[None]:
    """Keep the function name of an error from the caller's own code: decorate each function that a caller passes."""
    try:
        yield
    except ArgumentError as error:
        error.from_callback = True
        raise


# Values, functions, numbers.


def shown(value: Any) -> str:
    """Describe any value in one short line."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, type):
        return f"{value.dtype}[{_dims(value)}]"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_arrays(**trees: PyTree) -> list[Any]:
    """Turn the leaves of arguments into JAX arrays, or say which argument holds something else."""
    return [jax.tree.map(functools.partial(as_array, name), tree) for name, tree in trees.items()]


def as_array(name: str, leaf: Any) -> Array:
    """Turn one value into a JAX array, or say that it cannot be one."""
    # JAX would treat text as an object, and a `ShapeDtypeStruct` as an array.
    if not isinstance(leaf, str | bytes | jax.ShapeDtypeStruct):
        try:
            return jnp.asarray(leaf)
        except jax.errors.UnexpectedTracerError:
            raise  # JAX's own message explains best where an array escaped from
        except (TypeError, ValueError, OverflowError):
            pass
    raise ArgumentTypeError(f"{name} must hold arrays of numbers, got {shown(leaf)}.")


def check_function(name: str, function: Any) -> None:
    """Check that an argument can be called."""
    if not callable(function):
        raise ArgumentTypeError(f"{name} must be a function, got {shown(function)}.")


def check_optimizer(optimizer: Any) -> None:
    """Check that an argument is an Optax optimizer."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ArgumentTypeError(
            f"optimizer must be an Optax optimizer, such as optax.adam(1e-3), got {shown(optimizer)}."
        )


def check_count(name: str, value: Any, low: int = 0, high: float = math.inf) -> None:
    """Check that a number of things is an int in a range, or a symbolic dimension."""
    if jax.export.is_symbolic_dim(value) or (_is_int(value) and low <= operator.index(value) <= high):
        return
    expected = f"{low} to {high}" if high < math.inf else f"at least {low}"
    raise ArgumentValueError(f"{name} must be {'' if _is_int(value) else 'an int, '}{expected}, got {shown(value)}.")


def check_float(name: str, value: Any) -> None:
    """Check that an argument is one finite number, or one that `jit` traces."""
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    is_real = is_number and jnp.ndim(value) == 0 and not jnp.iscomplexobj(value)
    if not is_real or not (isinstance(value, jax.core.Tracer) or math.isfinite(value)):
        raise ArgumentValueError(f"{name} must be one finite number, got {shown(value)}.")


def check_flag(name: str, flag: Any) -> None:
    """Check that an argument is True or False."""
    if not isinstance(flag, bool | np.bool_):
        raise ArgumentValueError(f"{name} must be True or False, got {shown(flag)}.")


def checked_shape(name: str, shape: Any) -> tuple[Any, ...]:
    """Return a shape as a tuple of sizes."""
    if (
        not isinstance(shape, Sequence)
        or isinstance(shape, str | bytes)
        or not all(jax.export.is_symbolic_dim(n) or (_is_int(n) and n >= 0) for n in shape)
    ):
        raise ArgumentTypeError(f"{name} must be a shape, a tuple of sizes, got {shown(shape)}.")
    return tuple(size if jax.export.is_symbolic_dim(size) else operator.index(size) for size in shape)


def checked_dtype(dtype: Any, such_as: str = "") -> Any:
    """Check that `dtype` names a floating type, and return it."""
    got = shown(dtype)
    with contextlib.suppress(Exception):  # NumPy raises many types
        if dtype is not None and not isinstance(dtype, jax.Array | np.ndarray):
            got = got if such_as else jnp.dtype(dtype).name
            if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
                return jnp.dtype(dtype)
    raise ArgumentTypeError(f"dtype must be a floating type{such_as}, got {got}.")


def cached(function: Any) -> Any:
    """Do what `functools.cache` does, but pass unhashable arguments on to the function, whose checks refuse them."""
    remembered = functools.cache(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            hash((args, tuple(kwargs.values())))
        except TypeError:
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)

    return call


# Initializers, keys, rates.


def checked_init(key: Any, input_size: Any, hidden_size: Any, dtype: DTypeLike = jnp.float32) -> Key[Array, ""]:
    """Check the arguments of an initializer: one key, positive sizes, a floating dtype; return the key."""
    key = checked_key(key)
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if not _is_int(size) or size < 1:
            raise ArgumentValueError(f"{name} must be a positive int, got {shown(size)}.")
    checked_dtype(dtype)
    return key


def checked_key(key: Any) -> Key[Array, ""]:
    """Check that `key` is one key, and return it typed: `jax.random.PRNGKey` makes untyped ones."""
    if getattr(key, "dtype", None) == jnp.uint32 and jnp.ndim(key):
        with contextlib.suppress(TypeError, ValueError):  # it does not have the shape of a key
            key = jax.random.wrap_key_data(jnp.asarray(key))
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        got = shown(key) if hasattr(key, "dtype") else type(key).__name__
        raise ArgumentTypeError(f"key must be a JAX key, got {got}; make one with jax.random.key(seed).")
    if key.shape != ():
        raise ArgumentValueError(f"key must be one key, got {math.prod(key.shape)} of them; use jax.vmap for many.")
    return key


def checked_rate(name: str, rate: Any) -> Any:
    """Check that a dropout rate is in [0, 1); return it as a float, or unchanged if `jit` traces it."""
    if isinstance(rate, jax.core.Tracer):
        return rate
    # A Python float in the end, so that a NumPy rate gives the same cached cell and no second compilation.
    is_number = not isinstance(rate, bool | type) and hasattr(rate, "__float__") and getattr(rate, "ndim", 0) == 0
    if not is_number or not 0 <= float(rate) < 1:
        raise ArgumentValueError(f"{name} must lie in [0, 1), got {shown(rate)}.")
    return float(rate)


def check_size(name: str, size: Any) -> None:
    """Check that a number of steps is None or a positive integer."""
    if size is not None and not (_is_int(size) and size >= 1):
        raise ArgumentValueError(f"{name} must be a positive int or None, got {shown(size)}.")


def _is_int(value: Any) -> bool:
    if isinstance(value, bool | type | jax.core.Tracer):  # a traced array has no value
        return False
    is_array = isinstance(value, jax.Array | np.ndarray)
    return hasattr(value, "__index__") and (not is_array or (value.ndim == 0 and value.dtype.kind in "iu"))


# Sequences.


def check_cell(cell: Any) -> None:
    """Check that `cell` is a Cell."""
    if not isinstance(cell, Cell):
        raise ArgumentTypeError(f"cell must be a Cell, such as jaxlstm.LSTM, got {kind_of(cell)}.")
    try:
        hash(cell)
    except TypeError as error:
        raise ArgumentTypeError(f"the functions of {cell.name} must be hashable: {error}.") from error


def check_sequence(
    cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None, *, one_step: bool = False
) -> tuple[int, ...]:
    """Check that a cell, its parameters, a sequence and a carry fit together; return the batch shape.

    With `one_step`, the sequence has one step, which errors call x and describe without its time axis.
    """
    check_cell(cell)
    if _wrapped(cell.project) is project:
        _check_input(cell, params, xs, one_step)
    if _wrapped(cell.recur) is recur:
        _check_recurrent_weights(cell, params)
    leaves = jax.tree.leaves(xs)
    if not leaves or any(leaf.ndim < 1 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        raise ArgumentValueError(f"every array of xs must be [time, *batch, ...], got {describe(xs)}.")
    _check_dtype(params, xs)
    batch_shape, expected = _check_one_step(cell, params, xs)
    if carry is not None:
        check_carry("carry", cell, carry, expected)
    return batch_shape


def _check_one_step(cell: Cell[Any, Any], params: PyTree, xs: PyTree) -> tuple[tuple[int, ...], PyTree]:
    """Trace one step on shapes alone, so that whatever would fail inside the loop fails here.

    Return the batch shape, and the shapes and dtypes of the carry.
    """
    params_type, x_type = jax.tree.map(_struct, params), of_one_step(xs)
    given = f"params {describe(params)}; xs {describe(xs)}"
    try:
        z_type = jax.eval_shape(cell.project, params_type, x_type)
        batch_shape = jax.tree.leaves(z_type)[0].shape[:-1]
        expected = jax.eval_shape(lambda params: cell.initial_carry(params, batch_shape), params_type)
        stepped, _ = jax.eval_shape(cell.step, params_type, expected, x_type)
    except (jax.errors.ConcretizationTypeError, ArgumentError):
        raise  # JAX's own message explains best why a cell cannot branch on an array; an ArgumentError is already clear
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentValueError(
            f"one step of {cell.name} fails with {given}. Are these another cell's params? {reason}"
        ) from error
    if any(leaf.shape[: len(batch_shape)] != batch_shape for leaf in jax.tree.leaves(expected)):
        raise ArgumentValueError(
            f"the initial carry of {cell.name} is {describe(expected)}; every leaf must start with the "
            f"batch axes {list(batch_shape)}."
        )
    if not alike(stepped, expected):
        raise ArgumentValueError(
            f"one step of {cell.name} turns carry {kind_of(expected)}: {describe(expected)} into "
            f"{kind_of(stepped)}: {describe(stepped)}, with {given}. Are these another cell's params?"
        )
    return batch_shape, expected


def _wrapped(function: Any) -> Any:
    """Return the function whose arrays a wrapper reads: `low_precision` marks its wrappers."""
    while hasattr(function, "reads_as"):
        function = function.reads_as
    return function


def check_carry(name: str, cell: Cell[Any, Any], carry: PyTree, expected: PyTree) -> None:
    """Check leaf by leaf that a carry belongs to a cell."""
    if not same_structure(carry, expected):
        raise ArgumentTypeError(
            f"{name} of {cell.name} must be {kind_of(expected)}, got {kind_of(carry)}; "
            "cell.initial_carry(params, batch_shape) makes one."
        )
    for got, want in zip(*map(jax.tree.leaves, (carry, expected)), strict=True):
        message = f"{name} is {describe(carry)}, {cell.name} expects {describe(expected)}; "
        if got.shape != want.shape:
            raise ArgumentValueError(message + "every leaf is [*batch, ...] with the batch axes of xs.")
        if got.dtype != want.dtype:
            raise ArgumentTypeError(message + f"cast with jax.tree.map(lambda v: v.astype('{want.dtype}'), {name}).")


def checked_reset_carry(
    cell: Cell[Any, Any], reset: Any, reset_carry: PyTree | None, initial_carry: PyTree, num_steps: int | None
) -> tuple[PyTree, bool]:
    """Return the reset carry, by default the initial carry, and whether it holds one per step of `num_steps`."""
    if reset_carry is None:
        return None if reset is None else initial_carry, False
    if reset is None:
        raise ArgumentValueError("reset_carry is given without reset, which says where it applies; pass reset too.")
    pairs = zip(*map(jax.tree.leaves, (reset_carry, initial_carry)), strict=False)
    one_per_step = num_steps is not None and any(got.ndim > want.ndim for got, want in pairs)
    expected = initial_carry
    if one_per_step:
        expected = jax.tree.map(lambda c: jax.ShapeDtypeStruct((num_steps, *c.shape), c.dtype), initial_carry)
    check_carry("reset_carry", cell, reset_carry, expected)
    return reset_carry, one_per_step


def checked_flags(mask: Any, reset: Any, num_steps: int | None, batch_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Check and return a mask and resets: bool, one flag per batch element and, if `num_steps` is given, per step."""
    mask, reset = as_arrays(mask=mask, reset=reset)
    axes, shape = ("[*batch]", batch_shape) if num_steps is None else ("[time, *batch]", (num_steps, *batch_shape))
    for name, flags in (("mask", mask), ("reset", reset)):
        if flags is not None and not hasattr(flags, "dtype"):
            raise ArgumentTypeError(f"{name} must be one array {axes}, got {kind_of(flags)}.")
        if flags is not None and flags.dtype != jnp.bool_:
            lengths = name == "mask" and flags.shape == batch_shape and jnp.issubdtype(flags.dtype, jnp.integer)
            cure = "length_mask(lengths, num_steps) makes it from lengths" if lengths else f"write {name} != 0"
            raise ArgumentTypeError(f"{name} must be bool, got {flags.dtype}{list(flags.shape)}; {cure}.")
        if flags is not None and flags.shape != shape:
            raise ArgumentValueError(f"{name} must be {axes} = {list(shape)}, got {list(flags.shape)}.")
    return mask, reset


def check_sharding(params: PyTree, steps: PyTree, *, by_scan: bool) -> None:
    """Check that arrays sharded on Explicit axes are sharded in a way that JAX can differentiate."""
    leaves = jax.tree.leaves(steps)
    if any(is_sharded(x) and jax.typeof(x).sharding.spec[0] is not None for x in leaves):
        raise ArgumentValueError(
            "xs, mask or reset is sharded along its time axis, but a recurrence runs one step after another; shard a "
            "batch axis instead, with jax.sharding.reshard."
        )
    leaves = [leaf for leaf in [*leaves, *jax.tree.leaves(params)] if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    # Without the mesh, JAX would not know how to shard the gradient of the weights.
    if on_unknown_mesh(leaves) and (by_scan or any(jax.typeof(leaf).sharding.mesh.empty for leaf in leaves)):
        raise ArgumentValueError(
            "params and xs are sharded over a mesh that is not in use; call jax.set_mesh(mesh), or put all of them on "
            "the mesh and pass gradient=Bulk()."
        )


def on_unknown_mesh(arrays: PyTree) -> bool:
    """Return whether arrays are sharded along Explicit axes while no mesh is in use."""
    return jax.sharding.get_abstract_mesh().empty and any(map(is_sharded, jax.tree.leaves(arrays)))


def is_sharded(array: Any) -> bool:
    """Return whether the type of an array says that it is spread over devices, along Explicit axes of a mesh."""
    return any(jax.typeof(array).sharding.spec)


def check_initial_carry(cell: Cell[Any, Any], params: PyTree) -> None:
    """Check that a cell can make a carry from parameters."""
    try:
        jax.eval_shape(cell.initial_carry, params)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise ArgumentTypeError(
            f"{cell.name} makes no carry from params {kind_of(params)}; use its own params."
        ) from error


def as_sequence(x: PyTree) -> PyTree:
    """Return the shapes and dtypes of a sequence of one step."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct((1, *v.shape), v.dtype), x)


def of_one_step(xs: PyTree) -> PyTree:
    """Return the shapes and dtypes of one step of a sequence."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)


def _check_input(cell: Cell[Any, Any], params: Any, xs: Any, one_step: bool) -> None:
    name, axes = ("x", "[*batch, input]") if one_step else ("xs", "[time, *batch, input]")
    if not hasattr(xs, "ndim"):
        raise ArgumentTypeError(f"{name} must be one array {axes}, got {kind_of(xs)}.")
    shape = list(xs.shape[one_step:])
    _check_names(cell, params, "w_ih", "b")
    if not jnp.issubdtype(xs.dtype, jnp.inexact):
        raise ArgumentTypeError(
            f"{name} must be floating, got {xs.dtype}; embed symbols, or use jax.nn.one_hot({name}, num_symbols)."
        )
    if xs.ndim < 2:
        raise ArgumentValueError(f"{name} must be {axes}, got {shape}.")
    if params.w_ih.ndim != 2 or params.b.shape != params.w_ih.shape[1:]:
        raise ArgumentValueError(f"params must have w_ih [input, n] and b [n], got {describe(params)}.")
    if xs.shape[-1] != params.w_ih.shape[0]:
        raise ArgumentValueError(
            f"{name} has {xs.shape[-1]} features, params.w_ih expects {params.w_ih.shape[0]}; "
            f"{name} is {axes}, got {shape}."
        )


def _check_recurrent_weights(cell: Cell[Any, Any], params: Any) -> None:
    _check_names(cell, params, "w_hh")
    # Compare only w_hh with w_ih, and no rows: h may be narrower than the cell state, as in a projected LSTM.
    columns = {params.w_hh.shape[-1], getattr(params, "w_ih", params.w_hh).shape[-1]}
    # JAX would broadcast a single column over all units without an error.
    if params.w_hh.ndim != 2 or (1 in columns and len(columns) > 1):
        raise ArgumentValueError(f"params must have w_hh [hidden, n] and w_ih [input, n], got {describe(params)}.")


def _check_names(cell: Cell[Any, Any], params: Any, *names: str) -> None:
    if not all(hasattr(getattr(params, name, None), "shape") for name in names):
        expected = f"{cell.name} expects params with {' and '.join(names)}"
        raise ArgumentTypeError(f"{expected}, got {kind_of(params)}; cell.init makes them.")


def _check_dtype(params: PyTree, xs: PyTree) -> None:
    """Refuse mixed dtypes: JAX would promote them silently, and the carry would change its dtype inside the loop."""
    # Integers among the inputs, such as tokens for a cell that embeds them, have no dtype to share.
    own, other = _floating_dtypes(params), _floating_dtypes(xs)
    if len(own | other) > 1:
        wrong = "params" if len(own) > 1 else "xs"
        raise ArgumentTypeError(
            f"params ({describe(params)}) and xs ({describe(xs)}) must share one dtype; "
            f"cast with jax.tree.map(lambda v: v.astype('{min(own or other)}'), {wrong})."
        )


def _floating_dtypes(tree: PyTree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


# Layers.


def checked_layers(params: Any) -> int:
    """Check that the parameters of a stack are a list; return the number of layers."""
    if not isinstance(params, list | tuple) or hasattr(params, "_fields"):
        raise ArgumentTypeError(
            f"params must be a list with one entry per layer, from init_stack, got {type(params).__name__}."
        )
    return len(params)


def one_per_layer(name: str, entries: Any, num_layers: int) -> Sequence[Any]:
    """Check that an argument of a stack is a list with one entry per layer; None means None for each."""
    if entries is None:
        return [None] * num_layers
    if not isinstance(entries, list | tuple) or hasattr(entries, "_fields"):
        raise ArgumentTypeError(f"{name} must be a list with one entry per layer, got {type(entries).__name__}.")
    if len(entries) != num_layers:
        raise ArgumentValueError(f"{name} must have one entry per layer, {num_layers} in all, got {len(entries)}.")
    return entries


# Losses.


def check_step_loss(step_loss: Any, y: Any) -> None:
    """Check that a loss of one step is a function (y_t, t) -> E_t that returns one number."""
    check_function("step_loss", step_loss)
    # The dtype that a scan over `jnp.arange(T)` will pass, with x64 enabled or not.
    time = jax.ShapeDtypeStruct((), jnp.arange(0).dtype)
    try:
        inspect.signature(step_loss).bind(y, time)
    except TypeError as error:
        raise ArgumentValueError(f"step_loss must take (y_t, t), an output and its step: {error}.") from error
    check_number("step_loss", jax.eval_shape(step_loss, y, time), ", the loss of a step summed over the batch")


def check_number(name: str, out: Any, which: str = "") -> None:
    """Check that a loss returns one number, given its result or the shape of its result."""
    if getattr(out, "shape", None) != ():
        got = list(out.shape) if hasattr(out, "shape") else type(out).__name__
        raise ArgumentValueError(f"{name} must return one number{which}, got {got}.")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ArgumentTypeError(f"{name} must return a floating number{which}, got {out.dtype}.")


# Describing pytrees.


def describe(tree: PyTree) -> str:
    """Return dtype and shape of every leaf: `h float32[3,7], c float32[3,7]`."""
    return ", ".join(
        f"{leaf_path(path)} {leaf.dtype}[{_dims(leaf)}]".strip() for path, leaf in jax.tree.leaves_with_path(tree)
    )


def kind_of(tree: PyTree) -> str:
    """Return the name of a pytree's type, with its fields if it is a NamedTuple."""
    fields = getattr(type(tree), "_fields", None)
    return f"{type(tree).__name__}({', '.join(fields)})" if fields else type(tree).__name__


def same_structure(one: PyTree, other: PyTree) -> bool:
    """Return whether two pytrees differ at most in their leaves."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (one, other)]
    return bool(structures[0] == structures[1])


def alike(one: PyTree, other: PyTree) -> bool:
    """Return whether two pytrees have the same structure, shapes and dtypes."""
    types = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    return same_structure(one, other) and types[0] == types[1]


def _dims(leaf: Any) -> str:
    return ",".join(map(str, leaf.shape))
