"""Measure how far gradients differ, and check the gradient of any model against central differences."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key

from jaxlstm.cell import PyTree, leaf_path
from jaxlstm.checks import (
    ArgumentValueError,
    as_arrays,
    border,
    check_count,
    check_function,
    check_number,
    checked_key,
    describe,
    in_callback,
    same_structure,
)

# Relative errors that pass: of autodiff against differences, and of a given gradient, by the gradient's dtype.
TOLERANCE = 1e-6
TOLERANCE_GIVEN = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}
STEP_SIZE = 1e-3
MAX_ENTRIES = 2048  # candidates for the worst entry of a leaf
CHUNK_SIZE = 256  # entries in one vmap: enough to be fast, few enough to fit in memory


@border("gradient_error")
def gradient_error(gradients: PyTree, reference: PyTree) -> PyTree:
    """Return the relative error of every leaf, ‖g − r‖₂ / ‖r‖₂, or ‖g‖₂ where r = 0.

    Args:
      gradients: any pytree of floating arrays.
      reference: a pytree with the same structure and shapes, which may have a wider dtype.

    Returns:
      A pytree of scalars with the same structure. A NaN in a leaf gives NaN.

    Raises:
      ValueError: the structures or the shapes differ.

    >>> import jax.numpy as jnp
    >>> from jaxlstm.diagnostics import gradient_error
    >>> print(gradient_error({"w": jnp.array([3.0, 4.1])}, {"w": jnp.array([3.0, 4.0])})["w"].round(4))
    0.02
    """
    gradients, reference = as_arrays(gradients=gradients, reference=reference)
    check_alike("gradients", gradients, "reference", reference)
    return jax.tree.map(_relative_error, gradients, reference)


@jax.jit
def _relative_error(g: Array, r: Array) -> Array:
    dtype = "float64" if "float64" in (g.dtype, r.dtype) else "float32"
    g, r = g.astype(dtype).ravel(), r.astype(dtype).ravel()
    # Scale both to at most 1: in float32, the squares of tiny gradients would underflow to 0.
    scale = jnp.abs(jnp.stack([g, r])).max(initial=jnp.finfo(dtype).tiny)
    size = jnp.linalg.norm(r / scale)
    return jnp.where(size == 0, jnp.linalg.norm(g), jnp.linalg.norm((g - r) / scale) / size)


def check_alike(name: str, tree: PyTree, other_name: str, other: PyTree) -> None:
    """Check that two pytrees of arrays have the same structure and the same shapes."""
    shapes, other_shapes = ([jnp.shape(leaf) for leaf in jax.tree.leaves(t)] for t in (tree, other))
    if not same_structure(tree, other) or shapes != other_shapes:
        raise ArgumentValueError(
            f"{name} and {other_name} must be alike, got {type(tree).__name__} of {describe(tree)}; and "
            f"{type(other).__name__} of {describe(other)}."
        )


def central_differences(loss: Callable[[Any], Array], variables: PyTree, step_size: float) -> Any:
    """Compute a gradient entry by entry, by central differences of fourth order.

    Args:
      loss: a function of the variables that returns a number; it is evaluated four times per entry.
      variables: any pytree of floating arrays of one dtype.
      step_size: ε; the error is O(ε⁴).

    Returns:
      The gradient, a pytree like the variables.

    >>> import jax.numpy as jnp
    >>> central_differences(lambda x: (x**3).sum(), jnp.array([1.0, 2.0]), 0.01).round(2)
    Array([ 3., 12.], dtype=float32)
    """
    return ravel_pytree(variables)[1](_flat_differences(loss, variables, step_size))


def _flat_differences(loss: Callable[[Any], Array], variables: PyTree, step_size: float | Array) -> Array:
    flat, unravel = ravel_pytree(variables)

    def loss_of_flat(flat: Array) -> Array:
        return loss(unravel(flat))

    return _entries(loss_of_flat, flat, np.arange(flat.size), step_size)


def adaptive_differences(loss: Callable[[Any], Array], variables: PyTree, step_size: float) -> tuple[Any, Any]:
    """Compute a gradient by central differences with the step size that suits each entry.

    Of three step sizes, the two whose differences agree best are trusted: a loss that bends within one step needs a
    smaller one.

    Args:
      loss, variables: as in `central_differences`; the loss is evaluated twelve times per entry.
      step_size: the largest ε.

    Returns:
      The gradient, and for every entry what differences cannot resolve: how far the two smallest step sizes disagree.
    """
    # In a loop, so that the loss compiles once.
    dtype = jax.tree.leaves(variables)[0].dtype
    # In float32, rounding leaves little room below the largest step.
    step_sizes = step_size / jnp.array([1, 8, 64] if dtype == "float64" else [1, 2, 4], dtype)
    by_step = jax.lax.map(functools.partial(_flat_differences, loss, variables), step_sizes)
    spreads = jnp.abs(by_step[1:] - by_step[:-1])
    coarse_is_best = ~(spreads[1] < spreads[0])
    unravel = ravel_pytree(variables)[1]
    return unravel(jnp.where(coarse_is_best, by_step[1], by_step[2])), unravel(spreads[1])


def _entries(loss: Callable[[Array], Array], flat: Array, entries: np.ndarray, step_size: float | Array) -> Array:
    """Return the derivative of a loss by some entries of a flat array."""

    def derivative(entry: Array) -> Array:
        def along(step: Array) -> Array:
            return loss(flat.at[entry].add(step))

        return _difference(along, step_size, flat.dtype)

    num_chunks = -(-entries.size // CHUNK_SIZE)
    chunks = np.resize(entries, (num_chunks, -(-entries.size // max(num_chunks, 1))))
    return jax.lax.map(jax.vmap(derivative), jnp.asarray(chunks)).ravel()[: entries.size]


def _difference(along: Callable[[Array], Array], step_size: float | Array, dtype: Any) -> Array:
    """Return the derivative at 0 of a function of a number."""
    two_back, back, ahead, two_ahead = jax.vmap(along)(jnp.array([-2, -1, 1, 2], dtype) * step_size)
    return (8 * (ahead - back) - (two_ahead - two_back)) / (12 * step_size)


class LeafCheck(NamedTuple):
    """Relative errors of the gradient by one leaf of the parameters."""

    error: float  # autodiff against differences
    floor: float  # resolution of the differences: how much two step sizes disagree
    given: float | None  # the given gradient against autodiff; None if there is none


class Entry(NamedTuple):
    """One entry of the gradient, by every method."""

    leaf: str
    at: tuple[int, ...]
    autodiff: float
    differences: float
    given: float | None


class GradientCheck(NamedTuple):
    """The result of `check_gradients`; `print` shows it as a table."""

    leaves: dict[str, LeafCheck]
    worst: Entry  # the entry with the largest error, in the worst leaf
    wrong: tuple[str, ...]  # the leaves on which the gradients disagree

    @property
    def agree(self) -> bool:
        """Whether the gradients agree on all leaves, up to the resolution of the differences."""
        return not self.wrong

    def __str__(self) -> str:
        """Return a table with a row per leaf, the worst entry, and the verdict."""
        width = max(map(len, self.leaves))
        lines = [f"{'':{width}}  autodiff  floor    given"]
        for name, found in self.leaves.items():
            given = "" if found.given is None else f"{found.given:.0e}"
            lines.append(f"{name:{width}}  {found.error:8.0e}  {found.floor:5.0e}  {given:>7}")
        leaf, at, autodiff, differences, given_entry = self.worst
        text = "" if given_entry is None else f", given {given_entry:.9g}"
        lines.append(f"worst entry: {leaf}{list(at)}: autodiff {autodiff:.9g}, differences {differences:.9g}{text}")
        lines.append("AGREE" if self.agree else f"DISAGREE on {', '.join(self.wrong)}")
        return "\n".join(line.rstrip() for line in lines)


@border("check_gradients")
def check_gradients(
    loss_fn: Callable[..., Array],
    params: PyTree,
    *args: Any,
    gradients: PyTree | None = None,
    num_directions: int = 8,
    key: Key[Array, ""],
) -> GradientCheck:
    """Check the gradient of any loss against central differences: autodiff's gradient, and yours if you pass it.

    Random directions through one leaf at a time show the error of autodiff in that leaf. Everything is computed in
    float64; JAX's x64 setting is restored afterwards. If the model itself rounds to a narrower dtype, the differences
    resolve less, and the check is as weak as `LeafCheck.floor` says.

    Args:
      loss_fn: (params, *args) -> loss, a number.
      params: any pytree; its floating leaves are checked.
      args: further arguments of the loss.
      gradients: a gradient to check, a pytree like `params`.
      num_directions: random directions per leaf.
      key: a JAX key that the directions are drawn with.

    Returns:
      A `GradientCheck`; `print` shows it as a table.

    Raises:
      ValueError: the loss does not return a number, `gradients` are not like `params`, or `params` have no floating
        leaf.

    >>> import jax, jax.numpy as jnp
    >>> from jaxlstm.diagnostics import check_gradients
    >>> def loss(w, x):
    ...     return jnp.tanh(x @ w).sum()
    >>> check_gradients(loss, jnp.ones((3, 2)), jnp.eye(3), key=jax.random.key(0)).agree
    True
    """
    check_function("loss_fn", loss_fn)
    check_count("num_directions", num_directions, low=1)
    key = checked_key(key)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        given = jax.tree.map(np.asarray, gradients)  # uncast: its dtype sets its tolerance
        params, args = cast((params, args))
        if given is not None:
            check_alike("gradients", given, "params", params)
        leaves, treedef = jax.tree.flatten(params)
        active = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if not active:
            raise ArgumentValueError("params have no floating leaf, so there is no gradient.")

        def loss(values: list[Array]) -> Array:
            new = list(leaves)
            for n, value in zip(active, values, strict=True):
                new[n] = value
            out: Array = cast(in_callback()(loss_fn)(jax.tree.unflatten(treedef, new), *args))
            return out

        paths = [leaf_path(path) or "params" for path, _ in jax.tree.leaves_with_path(params)]
        names, values = [paths[n] for n in active], [leaves[n] for n in active]
        given_leaves = jax.tree.leaves(given)
        givens = [given_leaves[n] if given_leaves else None for n in active]
        check_number("loss_fn", jax.eval_shape(loss, values))
        autodiff = jax.jit(jax.grad(loss))(values)
        errors, floors = jax.jit(functools.partial(_along_directions, loss, num_directions))(values, autodiff, key)
        checks = [
            LeafCheck(float(error), float(floor), _error_given(own, by_autodiff, autodiff))
            for error, floor, own, by_autodiff in zip(errors, floors, givens, autodiff, strict=True)
        ]
        wrong = [name for name, check, own in zip(names, checks, givens, strict=True) if _is_wrong(check, own)]
        worst = int(np.argmax([_badness(check) for check in checks]))
        entry = _worst_entry(loss, values, worst, autodiff[worst], givens[worst])
        return GradientCheck(dict(zip(names, checks, strict=True)), Entry(names[worst], *entry), tuple(wrong))


def cast(tree: PyTree, dtype: str = "float64") -> Any:
    """Cast the floating leaves of a pytree; all other leaves keep their values."""
    return jax.tree.map(functools.partial(_cast_leaf, dtype=dtype), tree)


def _cast_leaf(value: Any, dtype: str) -> Any:
    if not hasattr(value, "dtype") and not isinstance(value, float):
        return value
    value = jnp.asarray(value)
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _along_directions(
    loss: Callable[[list[Array]], Array], num_directions: int, values: list[Array], autodiff: list[Array], key: Array
) -> tuple[Array, Array]:
    """Return for every leaf the relative error of autodiff along random directions, and the floor of differences."""
    # Large numbers need large steps: the effect of small ones would drown in rounding.
    step_sizes = STEP_SIZE * jnp.stack([jnp.maximum(1.0, jnp.sqrt(jnp.mean(value**2))) for value in values])

    def one_direction(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        k, key = inputs
        keys = jax.random.split(key, len(values))
        normal = [jax.random.normal(key, value.shape, value.dtype) for key, value in zip(keys, values, strict=True)]
        direction = [jnp.where(k == n, d, 0) for n, d in enumerate(normal)]

        def along(step: Array) -> Array:
            return loss([value + step * d for value, d in zip(values, direction, strict=True)])

        coarse, fine = (_difference(along, step_sizes[k] * by, step_sizes.dtype) for by in (1.0, 0.5))
        by_autodiff = sum((jnp.vdot(d, g) for d, g in zip(direction, autodiff, strict=True)), jnp.zeros(()))
        return fine, fine - coarse, fine - by_autodiff

    each = jnp.repeat(jnp.arange(len(values)), num_directions)
    found = jax.lax.map(one_direction, (each, jax.random.split(key, each.size)))
    scale, spread, error = (jnp.linalg.norm(v.reshape(len(values), num_directions), axis=-1) for v in found)
    scale = jnp.where(scale == 0, 1, scale)
    return error / scale, spread / scale


def _error_given(given: np.ndarray | None, autodiff: Array, of_all: list[Array]) -> float | None:
    """Return the relative error of a given leaf."""
    if given is None:
        return None
    # A leaf whose gradient is almost 0 cannot be right relative to itself, only relative to rounding in all leaves.
    total = np.linalg.norm([np.linalg.norm(np.ravel(leaf)) for leaf in of_all])
    rounding = float(jnp.finfo(given.dtype).eps) / TOLERANCE_GIVEN[given.dtype.name] * total
    off = np.linalg.norm(np.ravel(given.astype("float64") - np.asarray(autodiff)))
    return float(off / (np.linalg.norm(np.ravel(autodiff)) + rounding or 1))


def _is_wrong(check: LeafCheck, given: np.ndarray | None) -> bool:
    tolerance_given = math.inf if given is None else TOLERANCE_GIVEN[given.dtype.name]
    # `not <=` instead of `>`, so that a NaN is wrong.
    return not check.error <= max(TOLERANCE, 3 * check.floor) or not (check.given or 0.0) <= tolerance_given


def _badness(check: LeafCheck) -> float:
    worst = max(check.error - 3 * check.floor, check.given or 0.0)
    return math.inf if math.isnan(check.error + (check.given or 0.0)) else worst


def _worst_entry(
    loss: Callable[[list[Array]], Array], values: list[Array], k: int, autodiff: Array, given: np.ndarray | None
) -> tuple[tuple[int, ...], float, float, float | None]:
    """Return the index and the values of the entry of leaf k with the largest error.

    Differences cost four losses per entry. In a large leaf, only the entries where a fault would be largest are tried.
    """
    by_autodiff = np.ravel(autodiff)
    judged = by_autodiff if given is None else np.ravel(given).astype("float64")
    suspicion = np.abs(by_autodiff if given is None else judged - by_autodiff)
    candidates = np.argsort(-np.nan_to_num(suspicion, nan=np.inf), kind="stable")[:MAX_ENTRIES]

    def loss_of_leaf(flat: Array) -> Array:
        return loss([*values[:k], flat.reshape(values[k].shape), *values[k + 1 :]])

    evaluate = jax.jit(functools.partial(_entries, loss_of_leaf, entries=candidates, step_size=STEP_SIZE))
    differences = np.asarray(evaluate(values[k].ravel()))
    n = int(np.argmax(np.nan_to_num(np.abs(judged[candidates] - differences), nan=np.inf)))
    place = int(candidates[n])
    at = tuple(int(i) for i in np.unravel_index(place, values[k].shape))
    return at, float(by_autodiff[place]), float(differences[n]), None if given is None else float(judged[place])
