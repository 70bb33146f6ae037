"""What a trained net does: fixed points, the dynamics around them, nets that feed themselves, principal components.

    trained = trace(cell, params, xs)
    starts = sample_carries(key, trained.carry, 1000, noise=0.1)
    points = fixed_points(cell, params, starts, x)                 # where the net rests while it reads x
    around = linearize(cell, params, points.carry, x)              # stable, saddle, how fast, in which directions

These functions run on arrays, not under `jit`: how many points there are depends on the data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import (
    ArgumentTypeError,
    ArgumentValueError,
    as_arrays,
    as_sequence,
    border,
    cached,
    check_cell,
    check_count,
    check_float,
    check_function,
    check_sequence,
    checked_key,
    describe,
    in_callback,
)
from jaxlstm.diagnostics.differences import cast
from jaxlstm.diagnostics.dynamics import step_of_flat


class FixedPoints(NamedTuple):
    """The carries that one step maps to themselves, and where every start ended. NumPy arrays, float64."""

    carry: PyTree  # leaves [points, ...]; the points that most starts reached come first
    speed: np.ndarray  # [points]: q = |F(s) − s|² / 2
    num_starts: np.ndarray  # [points]: how many starts reached it
    of_start: np.ndarray  # [starts]: the point that a start reached; -1: it did not converge; -2: an outlier
    final_speed: np.ndarray  # [starts]: q where a start ended

    def __len__(self) -> int:
        return len(self.speed)


@border("fixed_points")
def fixed_points(
    cell: Cell[Any, Any],
    params: PyTree,
    starts: PyTree,
    x: PyTree,
    *,
    tolerance: float = 1e-24,
    max_iterations: int = 200,
    merge_distance: float = 1e-5,
    outlier_scale: float = 10.0,
) -> FixedPoints:
    """Find the carries s with F(s) = s, where F is one step that reads x.

    Every start runs the Levenberg-Marquardt method on the speed q = |F(s) − s|² / 2, in float64, all of them in one
    program (Sussillo & Barak, Opening the black box, 2013; Golub & Sussillo, FixedPointFinder, 2018).

    Args:
      cell, params: as in `unroll`. For a stack, pass `stacked(cell)`.
      starts: carries, leaves [starts, ...], such as `sample_carries` draws from a `trace`.
      x: the input at every step, [input], constant; for a net that feeds itself, see `closed_loop`.
      tolerance: the largest speed of a fixed point. A larger one also finds slow points, where the net almost rests.
      max_iterations: of this method, for each start.
      merge_distance: points that are closer to one another are one point.
      outlier_scale: drop points further from the mean of the starts than this many times the mean distance of a start.

    Returns:
      `FixedPoints`. If nothing was found, its `carry` has no rows.

    Raises:
      TypeError: a leaf of the carry is not floating; else as `unroll`.
      ValueError: `starts` is not [starts, ...], or a limit is not positive.
    """
    for name, limit in (("tolerance", tolerance), ("merge_distance", merge_distance), ("outlier_scale", outlier_scale)):
        _check_positive(name, limit)
    check_count("max_iterations", max_iterations, 1)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params, starts, x = cast(as_arrays(params=params, starts=starts, x=x))
        flat_starts, step, unravel = _flat_step(cell, params, starts, x, "starts")
        solve = functools.partial(_newton, step, tolerance=tolerance, max_iterations=max_iterations)
        # Each start holds a Jacobian: at most 2**24 numbers of them at a time.
        at_once = max(1, 2**24 // max(1, flat_starts.shape[1] ** 2))
        run = jax.jit(lambda starts: lax.map(solve, starts, batch_size=at_once))
        rows = np.asarray(flat_starts)
        ends, speeds = map(np.asarray, run(flat_starts)) if len(rows) else (rows, np.zeros(0))
        of_start, kept = _merged(ends, speeds, rows, tolerance, merge_distance, outlier_scale)
        counts = np.bincount(of_start[of_start >= 0], minlength=len(kept)).astype(int)
        carry = jax.tree.map(np.asarray, jax.vmap(unravel)(jnp.asarray(ends[kept])))
    return FixedPoints(carry, speeds[kept], counts, of_start, speeds)


def _newton(
    step: Callable[[Array], Array], start: Float[Array, "n"], *, tolerance: float, max_iterations: int
) -> tuple[Float[Array, "n"], Float[Array, ""]]:
    """Minimize |step(s) − s|² / 2: solve (JᵀJ + λ I) d = −Jᵀ r, and change λ by whether the speed fell."""

    def residual(s: Array) -> Array:
        return step(s) - s

    def speed_of(s: Array) -> Array:
        return (residual(s) ** 2).sum() / 2

    def iterate(state: Any) -> Any:
        s, speed, damping, count = state
        r, jacobian = residual(s), jax.jacfwd(residual)(s)
        # Relative to the size of JᵀJ, so that one damping suits every net.
        normal = jacobian.T @ jacobian
        lam = damping * jnp.trace(normal) / len(s)
        d = jnp.linalg.solve(normal + lam * jnp.eye(len(s)), -jacobian.T @ r)
        new_speed = speed_of(s + d)
        better = new_speed < speed  # False for NaN
        damping = jnp.where(better, damping / 10, jnp.minimum(damping * 10, 1e6))
        return jnp.where(better, s + d, s), jnp.where(better, new_speed, speed), damping, count + 1

    def goes_on(state: Any) -> Array:
        _, speed, damping, count = state
        # Go on below the tolerance: the last iterations are cheap and gain many digits.
        return (count < max_iterations) & (damping < 1e6) & (speed > tolerance * 1e-8)

    s, speed, _, _ = lax.while_loop(goes_on, iterate, (start, speed_of(start), jnp.array(1e-3), 0))
    return s, speed


def _merged(
    ends: np.ndarray,
    speeds: np.ndarray,
    starts: np.ndarray,
    tolerance: float,
    merge_distance: float,
    outlier_scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the point of every start, and the ends to keep as points, most frequent first."""
    of_start = np.full(len(ends), -1)
    starts = starts[np.isfinite(starts).all(axis=-1)]  # one NaN would make the center and the spread NaN
    center = starts.mean(axis=0) if len(starts) else starts.sum(axis=0)
    spread = np.linalg.norm(starts - center, axis=-1).mean() if len(starts) else 0.0
    kept: list[int] = []
    for n in np.argsort(speeds):  # the most exact end of a cluster becomes its point
        if not speeds[n] <= tolerance:  # NaN too
            continue
        if spread and np.linalg.norm(ends[n] - center) > outlier_scale * spread:
            of_start[n] = -2
            continue
        distances = np.linalg.norm(ends[kept] - ends[n], axis=-1)
        if kept and distances.min() < merge_distance:
            of_start[n] = distances.argmin()
        else:
            of_start[n] = len(kept)
            kept.append(int(n))
    counts = np.bincount(of_start[of_start >= 0], minlength=len(kept))
    order = np.argsort(-counts, kind="stable")
    rank = np.argsort(order)
    if kept:
        of_start = np.where(of_start >= 0, rank[np.maximum(of_start, 0)], of_start)
    return of_start, np.array(kept, int)[order]


class Linearization(NamedTuple):
    """One step around a point, `s' − s* ≈ J (s − s*) + B (x' − x)`. Eigenvalues λ are sorted, the largest |λ| first."""

    carry_jacobian: np.ndarray  # J [*points, n, n]
    input_jacobian: np.ndarray  # B [*points, n, input]
    eigenvalues: np.ndarray  # [*points, n], complex
    right: np.ndarray  # [*points, n, n]: columns, directions in which the net moves
    left: np.ndarray  # [*points, n, n]: left_k · (s − s*) measures s along right_k; left @ right = I if possible
    time_constants: np.ndarray  # [*points, n]: −1 / ln|λ| steps; negative where a direction is unstable
    num_unstable: np.ndarray  # [*points]: how many |λ| > 1
    kind: np.ndarray  # [*points]: "stable" (no |λ| > 1), "saddle" (some) or "unstable" (all)
    oscillates: np.ndarray  # [*points]: whether the largest eigenvalue is complex


@border("linearize")
def linearize(cell: Cell[Any, Any], params: PyTree, carry: PyTree, x: PyTree) -> Linearization:
    """Return the Jacobians of one step at one or many carries, their eigenvalues and eigenvectors, in float64.

    The leaves of the carry are concatenated in their own order, for an LSTM h and then c, and so are those of x.

    Args:
      cell, params: as in `unroll`.
      carry: the points, leaves [points, ...] or [...], such as `fixed_points(...).carry`.
      x: the input, [input].

    Raises:
      TypeError, ValueError: as `fixed_points`.
    """
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params, carry, x = cast(as_arrays(params=params, carry=carry, x=x))
        one = jax.eval_shape(cell.initial_carry, params) if isinstance(cell, Cell) else None
        is_one = one is not None and jax.tree.map(jnp.shape, carry) == jax.tree.map(jnp.shape, one)
        points = jax.tree.map(lambda v: v[None], carry) if is_one else carry
        flat, _, unravel = _flat_step(cell, params, points, x, "carry")
        flat_x, unravel_x = ravel_pytree(x)

        def step(s: Array, x: Array) -> Array:
            return step_of_flat(cell, params, unravel, unravel_x(x))(s)

        jacobians = jax.jit(jax.vmap(jax.jacfwd(step, (0, 1)), (0, None)))(flat, flat_x)
        by_carry, by_input = map(np.asarray, jacobians)
    parts = [_eigen(jacobian) for jacobian in by_carry]
    size = flat.shape[1]
    values = np.array([part[0] for part in parts]).reshape(-1, size)
    right, left = (np.array([part[k] for part in parts]).reshape(-1, size, size) for k in (1, 2))
    with np.errstate(divide="ignore"):
        time_constants = -1 / np.log(np.abs(values))
    num_unstable = (np.abs(values) > 1).sum(axis=-1)
    kind = np.where(num_unstable == 0, "stable", np.where(num_unstable == size, "unstable", "saddle"))
    found = (by_carry, by_input, values, right, left, time_constants, num_unstable, kind, values[:, 0].imag != 0)
    return Linearization(*(array[0] if is_one else array for array in found))


def _eigen(jacobian: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return eigenvalues, largest first, right eigenvectors as columns and left ones as rows, left_k · right_k = 1."""
    import scipy.linalg  # JAX needs it too, but does not import it at first

    values, left, right = scipy.linalg.eig(jacobian, left=True, right=True)
    order = np.argsort(-np.abs(values), kind="stable")
    values, right, left = values[order], right[:, order], left[:, order].conj().T
    overlap = np.einsum("kn,nk->k", left, right)
    return values, right, left / np.where(overlap == 0, 1, overlap)[:, None]  # 0: too few eigenvectors


@border("sample_carries")
def sample_carries(key: Key[Array, ""], carries: PyTree, num: int, *, noise: float = 0.0) -> PyTree:
    """Draw carries at random from a trace, with noise: starts for `fixed_points`.

    Args:
      key: a JAX key.
      carries: `trace(...).carry`, leaves [time, *batch, n].
      num: how many to draw, with replacement.
      noise: standard deviation of the normal noise that is added, in units of each number's own standard deviation.

    Returns:
      Carries, leaves [num, n].
    """
    key = checked_key(key)
    check_count("num", num, 1)
    check_float("noise", noise)
    (carries,) = as_arrays(carries=carries)
    leaves = [leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(carries)]
    if len({len(leaf) for leaf in leaves}) != 1 or not len(leaves[0]):
        raise ArgumentValueError(f"carries must be [time, *batch, n] with the same steps, got {describe(carries)}.")
    key_rows, *keys = jax.random.split(key, 1 + len(leaves))
    rows = jax.random.randint(key_rows, (num,), 0, len(leaves[0]))
    drawn = [
        leaf[rows] + noise * leaf.std(axis=0)[None] * jax.random.normal(key, (num, leaf.shape[-1]), leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(carries), drawn)


class ClosedLoopParams(NamedTuple):
    """Parameters of a net that feeds itself."""

    cell: PyTree
    readout: PyTree


@cached
@border("closed_loop")
def closed_loop(cell: Cell[Any, Any], readout: Callable[[PyTree, PyTree], PyTree]) -> Cell[ClosedLoopParams, Any]:
    """Make the autonomous cell whose input is a function of its own carry.

    Its parameters are `ClosedLoopParams(cell params, readout params)` and its carry is the cell's own, so `trace`,
    `lyapunov_exponents`, `fixed_points` and `linearize` work as for any cell. It reads inputs without features: pass
    `xs = jnp.zeros((num_steps, 0))` and `x = jnp.zeros(0)`.

    Args:
      cell: any cell; for a stack, `stacked(cell)`.
      readout: `(readout params, carry) -> x`. Define it at the top of a module: the same function gives the same cell,
        which compiles once; a new lambda in every call does not.

    >>> import jax, jax.numpy as jnp
    >>> from jaxlstm import LSTM, unroll
    >>> from jaxlstm.diagnostics import ClosedLoopParams, closed_loop
    >>> def readout(w, carry):
    ...     return carry.h @ w
    >>> params = ClosedLoopParams(LSTM.init(jax.random.key(0), 3, 7), jnp.ones((7, 3)))
    >>> carry, ys = unroll(closed_loop(LSTM, readout), params, jnp.zeros((11, 2, 0)))
    >>> ys.shape
    (11, 2, 7)
    """
    check_cell(cell)
    check_function("readout", readout)

    def gates(params: ClosedLoopParams, carry: PyTree, z: PyTree, a: PyTree) -> tuple[PyTree, PyTree]:
        return cell.step(params.cell, carry, in_callback()(readout)(params.readout, carry))

    def activations(params: ClosedLoopParams, carry: PyTree, z: PyTree, a: PyTree) -> Any:
        return _gate_values(cell, params.cell, carry, readout(params.readout, carry))

    return Cell(
        init=_no_init,
        initial_carry=lambda params, batch_shape=(): cell.initial_carry(params.cell, batch_shape),
        gates=gates,
        project=lambda params, xs: xs,
        recur=lambda params, carry: None,
        activations=None if cell.activations is None else activations,
        name=f"closed_loop({cell.name})",
    )


@cached
@border("stacked")
def stacked(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Make one cell of a stack: its parameters and its carry are lists, as in `unroll_stack`; its output is the last's.

    `unroll_stack` is faster. This form is for tools that take one cell.

    Args:
      cell: the cell of every layer.

    >>> import jax, jaxlstm
    >>> layers = jaxlstm.init_stack(jax.random.key(0), jaxlstm.LSTM, 5, [7, 4])
    >>> carry, ys = jaxlstm.unroll(stacked(jaxlstm.LSTM), layers, jax.numpy.ones((11, 3, 5)))
    >>> len(carry), ys.shape
    (2, (11, 3, 4))
    """
    check_cell(cell)

    def gates(params: Any, carries: Any, x: PyTree, a: PyTree) -> tuple[Any, PyTree]:
        after = []
        for layer, carry in zip(params, carries, strict=True):
            carry, x = cell.step(layer, carry, x)
            after.append(carry)
        return after, x

    def activations(params: Any, carries: Any, x: PyTree, a: PyTree) -> list[Any]:
        own = []
        for layer, carry in zip(params, carries, strict=True):
            own.append(_gate_values(cell, layer, carry, x))
            _, x = cell.step(layer, carry, x)
        return own

    return Cell(
        init=_no_init,
        initial_carry=lambda params, batch_shape=(): [cell.initial_carry(layer, batch_shape) for layer in params],
        gates=gates,
        project=lambda params, xs: xs,
        recur=lambda params, carry: None,
        activations=None if cell.activations is None else activations,
        name=f"stacked({cell.name})",
    )


def _gate_values(cell: Cell[Any, Any], params: Any, carry: Any, x: PyTree) -> Any:
    assert cell.activations is not None
    return cell.activations(params, carry, cell.project(params, x), cell.recur(params, carry))


def _no_init(*_: Any, **__: Any) -> Any:
    raise TypeError("init: a cell from closed_loop or stacked has none; build its params from the inner cell's params.")


class PrincipalComponents(NamedTuple):
    """The directions in which carries vary most."""

    mean: Float[Array, "n"]
    axes: Float[Array, "components n"]
    explained: Float[Array, "components"]  # share of the variance

    def project(self, carries: PyTree) -> Float[Array, "*lead components"]:
        """Return the coordinates of carries, leaves [*lead, n]."""
        rows = _joined(carries)
        return (rows - jnp.broadcast_to(self.mean, rows.shape)) @ self.axes.T


@border("principal_components")
def principal_components(carries: PyTree, num: int = 2) -> PrincipalComponents:
    """Return the leading principal components of carries.

    Args:
      carries: such as `trace(...).carry`, leaves [*lead, n], concatenated in their own order.
      num: how many components.

    Raises:
      ValueError: `num` is larger than the size of a carry.

    >>> import jax
    >>> from jaxlstm import LSTM
    >>> from jaxlstm.diagnostics import principal_components, trace
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> carries = trace(LSTM, params, jax.random.normal(jax.random.key(1), (11, 3, 5))).carry
    >>> principal_components(carries, 2).project(carries).shape
    (11, 3, 2)
    """
    (carries,) = as_arrays(carries=carries)
    rows = _joined(carries)
    rows = rows.reshape(-1, rows.shape[-1])
    check_count("num", num, 1, rows.shape[-1])
    mean = rows.mean(axis=0)
    _, sizes, axes = jnp.linalg.svd(rows - mean[None], full_matrices=len(rows) < num)
    variances = jnp.zeros(rows.shape[-1], rows.dtype).at[: len(sizes)].set(sizes**2)
    return PrincipalComponents(mean, axes[:num], variances[:num] / jnp.maximum(variances.sum(), 1e-300))


def _joined(carries: PyTree) -> Array:
    return jnp.concatenate(jax.tree.leaves(carries), axis=-1)


def _flat_step(
    cell: Cell[Any, Any], params: PyTree, points: PyTree, x: PyTree, name: str
) -> tuple[Float[Array, "points n"], Callable[[Array], Array], Callable[[Array], PyTree]]:
    """Check arguments; return the points as rows, one step as a function of a row, and how to undo the rows."""
    check_cell(cell)
    one = jax.eval_shape(cell.initial_carry, params)
    for leaf in jax.tree.leaves(one):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ArgumentTypeError(f"the carry of {cell.name} has a leaf of {leaf.dtype}, which has no derivative.")
    leaves = jax.tree.leaves(points)
    if not leaves or any(leaf.ndim < 1 or leaf.shape[:1] != leaves[0].shape[:1] for leaf in leaves):
        raise ArgumentValueError(f"{name} must be carries [points, ...], got {describe(points)}.")
    number = leaves[0].shape[0]
    xs = jax.tree.map(lambda v: jnp.broadcast_to(v, (number, *v.shape)), x)
    check_sequence(cell, params, as_sequence(xs), points, one_step=True)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one))
    rows = jax.vmap(lambda point: ravel_pytree(point)[0])(points)

    return rows, step_of_flat(cell, params, unravel, x), unravel


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ArgumentValueError(f"{name} must be a positive number, got {value!r}.")
