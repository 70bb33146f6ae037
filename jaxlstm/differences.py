"""Central differences of a loss: its gradient entry by entry, and any model's checked along random directions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key

from jaxlstm.cell import PyTree, leaf_path
from jaxlstm.checks import check_number, same_structure

# Relative errors allowed: of autodiff against differences, where they see so far; of a given gradient, by its dtype.
TOLERANCE = 1e-6
TOLERANCE_GIVEN = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}
STEP_SIZE = 1e-3
MAX_ENTRIES = 2048  # in which the worst is looked for
CHUNK = 256


def central_differences(loss: Callable[[Any], Array], variables: PyTree, step_size: float) -> Any:
    """Return the gradient by central differences of fourth order, entry by entry: right to O(ε⁴)."""
    flat, unravel = ravel_pytree(variables)
    along = lambda entry: _difference(lambda step: loss(unravel(flat.at[entry].add(step))), step_size, flat.dtype)
    return unravel(_in_chunks(along, np.arange(flat.size)))


def _in_chunks(function: Callable[[Array], Array], entries: np.ndarray) -> Array:
    """Map a function over integers, so many at a time that they are soon done and fit in memory."""
    num_chunks = -(-entries.size // CHUNK)
    chunks = np.resize(entries, (num_chunks, -(-entries.size // max(num_chunks, 1))))
    return jax.lax.map(jax.vmap(function), jnp.asarray(chunks)).ravel()[: entries.size]


def _difference(along: Callable[[Array], Array], step_size: float | Array, dtype: Any) -> Array:
    """Return the derivative at 0 of a function of a number."""
    two_back, back, ahead, two_ahead = jax.vmap(along)(jnp.array([-2, -1, 1, 2], dtype) * step_size)
    return (8 * (ahead - back) - (two_ahead - two_back)) / (12 * step_size)


class LeafCheck(NamedTuple):
    """How far the gradient by one leaf of the parameters can be trusted; all errors are relative."""

    error: float  # of autodiff against differences
    floor: float  # how far differences see: what two step sizes differ by
    given: float | None  # of the given gradient against autodiff; None if none is given


class Entry(NamedTuple):
    """One entry of the gradient, by every road."""

    leaf: str
    at: tuple[int, ...]
    autodiff: float
    differences: float
    given: float | None


class GradientCheck(NamedTuple):
    """What `check_gradients` found."""

    leaves: dict[str, LeafCheck]
    worst: Entry  # of the worst leaf, the entry that is farthest off
    wrong: tuple[str, ...]  # the leaves on which the gradients disagree

    @property
    def agree(self) -> bool:
        """Whether all gradients agree, as far as differences see."""
        return not self.wrong


def check_gradients(
    loss_fn: Callable[..., Array],
    params: PyTree,
    *args: Any,
    gradients: PyTree | None = None,
    num_directions: int = 8,
    key: Key[Array, ""],
) -> GradientCheck:
    """Check the gradient of any model's loss, autodiff's and one of the caller's, against central differences.

    Every leaf is moved along random directions; how much a gradient is wrong there says how much it is wrong at all.
    Everything is computed in float64, and the setting is restored; a model that computes in less of its own accord is
    checked as far as its rounding lets differences see.

    Args:
      loss_fn: (params, *args) -> loss, a number.
      params: any pytree; its floating leaves are checked.
      args: what else the loss takes.
      gradients: a pytree like `params`, of the caller.
      num_directions: for every leaf.
      key: that the directions are drawn with.

    Returns:
      A `GradientCheck`; `check_table` makes it a text.

    Raises:
      ValueError: the loss is no number, `gradients` are not like `params`, or no leaf of `params` is floating.

    >>> import jax, jax.numpy as jnp, jaxlstm
    >>> loss = lambda w, x: jnp.tanh(x @ w).sum()
    >>> found = jaxlstm.check_gradients(loss, jnp.ones((3, 2)), jnp.eye(3), key=jax.random.key(0))
    >>> found.agree
    True
    """
    if num_directions < 1:
        raise ValueError(f"check_gradients: num_directions must be at least 1, got {num_directions}.")
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        given = None if gradients is None else jax.tree.map(np.asarray, gradients)
        params, args = jax.tree.map(cast, (params, args))
        paths = [leaf_path(path) or "params" for path, _ in jax.tree.leaves_with_path(params)]
        leaves = jax.tree.leaves(params)
        treedef: Any = jax.tree.structure(params)
        active = [n for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        givens = _checked_given(given, params, leaves)
        if not active:
            raise ValueError("check_gradients: params have no floating leaf, so there is no gradient.")

        def loss(values: list[Array]) -> Array:
            new = dict(zip(active, values, strict=True))
            out = loss_fn(treedef.unflatten([new.get(n, leaf) for n, leaf in enumerate(leaves)]), *args)
            return cast(out)

        values = [leaves[n] for n in active]
        check_number("check_gradients", "loss_fn", jax.eval_shape(loss, values))
        autodiff = jax.jit(jax.grad(loss))(values)
        errors, floors = jax.jit(lambda key: _along_directions(loss, values, autodiff, key, num_directions))(key)
        checks, wrong = {}, []
        for k, n in enumerate(active):
            own = None if givens is None else _error_given(givens[n], autodiff[k], autodiff)
            checks[paths[n]] = LeafCheck(float(errors[k]), float(floors[k]), own)
            if _is_wrong(checks[paths[n]], None if givens is None else givens[n].dtype.name):
                wrong.append(paths[n])
        worst = max(range(len(active)), key=lambda k: _badness(checks[paths[active[k]]]))
        n = active[worst]
        entry = _worst_entry(loss, values, worst, autodiff[worst], None if givens is None else givens[n])
        return GradientCheck(checks, Entry(paths[n], *entry), tuple(wrong))


def check_table(check: GradientCheck) -> str:
    """Return what `check_gradients` found as text."""
    width = max(map(len, check.leaves))
    lines = [f"{'':{width}}  autodiff  floor    given"]
    for name, found in check.leaves.items():
        given = "" if found.given is None else f"{found.given:.0e}"
        lines.append(f"{name:{width}}  {found.error:8.0e}  {found.floor:5.0e}  {given:>7}")
    leaf, at, autodiff, differences, given_entry = check.worst
    text = "" if given_entry is None else f", given {given_entry:.9g}"
    lines.append(f"farthest off: {leaf}{list(at)}: autodiff {autodiff:.9g}, differences {differences:.9g}{text}")
    lines.append("AGREE" if check.agree else f"DISAGREE on {', '.join(check.wrong)}")
    return "\n".join(line.rstrip() for line in lines)


def cast(value: Any, dtype: str = "float64") -> Any:
    """Cast a leaf of a pytree to a floating type, if it is floating; what is no array stays."""
    if not hasattr(value, "dtype") and not isinstance(value, float):
        return value
    value = jnp.asarray(value)
    return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value


def _checked_given(given: Any, params: Any, leaves: list[Array]) -> list[np.ndarray] | None:
    if given is None:
        return None
    own = jax.tree.leaves(given)
    if not same_structure(given, params) or any(g.shape != v.shape for g, v in zip(own, leaves, strict=True)):
        raise ValueError(
            f"check_gradients: gradients must be like params, with leaves {[v.shape for v in leaves]}, got "
            f"{[v.shape for v in own]}."
        )
    return own


def _along_directions(
    loss: Callable[[list[Array]], Array], values: list[Array], autodiff: list[Array], key: Array, num_directions: int
) -> tuple[Array, Array]:
    """Return for every leaf the error of autodiff along random directions, and by how much differences differ."""
    # As far as a leaf's numbers are large, so are the steps.
    step_sizes = STEP_SIZE * jnp.stack([jnp.maximum(1.0, jnp.sqrt(jnp.mean(value**2))) for value in values])

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        k, key = inputs
        keys = jax.random.split(key, len(values))
        normal = [jax.random.normal(key, value.shape, value.dtype) for key, value in zip(keys, values, strict=True)]
        direction = [jnp.where(k == n, d, 0) for n, d in enumerate(normal)]
        along = lambda step: loss([value + step * d for value, d in zip(values, direction, strict=True)])
        coarse, fine = (_difference(along, step_sizes[k] * by, step_sizes.dtype) for by in (1.0, 0.5))
        by_autodiff = sum((jnp.vdot(d, g) for d, g in zip(direction, autodiff, strict=True)), jnp.zeros(()))
        return fine, fine - coarse, fine - by_autodiff

    each = jnp.repeat(jnp.arange(len(values)), num_directions)
    found = jax.lax.map(one, (each, jax.random.split(key, each.size)))
    scale, spread, error = (jnp.linalg.norm(v.reshape(len(values), num_directions), axis=-1) for v in found)
    scale = jnp.where(scale == 0, 1, scale)
    return error / scale, spread / scale


def _error_given(given: np.ndarray, autodiff: Array, of_all: list[Array]) -> float:
    """Return the relative error of a given leaf; one that is next to nothing is held to rounding in all of them."""
    total = np.linalg.norm([np.linalg.norm(np.ravel(leaf)) for leaf in of_all])
    rounding = float(jnp.finfo(given.dtype).eps) / TOLERANCE_GIVEN[given.dtype.name] * total
    off = np.linalg.norm(np.ravel(given.astype("float64") - np.asarray(autodiff)))
    return float(off / (np.linalg.norm(np.ravel(autodiff)) + rounding or 1))


def _is_wrong(leaf: LeafCheck, dtype: str | None) -> bool:
    by_differences = not leaf.error <= max(TOLERANCE, 3 * leaf.floor)
    return by_differences or (leaf.given is not None and not leaf.given <= TOLERANCE_GIVEN[str(dtype)])


def _badness(leaf: LeafCheck) -> float:
    worst = max(leaf.error - 3 * leaf.floor, leaf.given or 0.0)
    return math.inf if math.isnan(leaf.error + (leaf.given or 0.0)) else worst


def _worst_entry(
    loss: Callable[[list[Array]], Array], values: list[Array], k: int, autodiff: Array, given: np.ndarray | None
) -> tuple[tuple[int, ...], float, float, float | None]:
    """Return index and values of the entry that is farthest off, of those that promise most where they are many."""
    by_autodiff = np.ravel(autodiff)
    off = np.abs(by_autodiff) if given is None else np.abs(np.ravel(given).astype("float64") - by_autodiff)
    candidates = np.argsort(-np.nan_to_num(off, nan=np.inf), kind="stable")[:MAX_ENTRIES]
    flat = values[k].ravel()

    def entry(n: Array) -> Array:
        along = lambda step: loss([*values[:k], flat.at[n].add(step).reshape(values[k].shape), *values[k + 1 :]])
        return _difference(along, STEP_SIZE, flat.dtype)

    differences = np.asarray(jax.jit(lambda: _in_chunks(entry, candidates))())
    judged = by_autodiff if given is None else np.ravel(given).astype("float64")
    n = int(np.argmax(np.nan_to_num(np.abs(judged[candidates] - differences), nan=np.inf)))
    place = int(candidates[n])
    at = tuple(int(i) for i in np.unravel_index(place, values[k].shape))
    own = None if given is None else float(np.ravel(given)[place])
    return at, float(by_autodiff[place]), float(differences[n]), own
