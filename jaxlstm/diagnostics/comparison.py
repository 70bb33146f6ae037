"""Compare the gradient of a recurrent cell by several methods: which one departs, in which weight, gate and step.

The loss is Σ_t step_loss(y_t, t), and the reference is autodiff of the scan. A method is a function
(params, xs, carry, d_ys) -> (d_params, d_xs, d_carry), where d_ys is the derivative of the loss with respect to ys. It
returns None in place of a gradient that it does not compute. A fault at a masked step shows at the last real step
before it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxlstm.bptt import lstm_bptt
from jaxlstm.cell import Cell, PyTree, leaf_path, project
from jaxlstm.checks import (
    ArgumentTypeError,
    ArgumentValueError,
    as_arrays,
    border,
    check_count,
    check_sequence,
    check_step_loss,
    of_one_step,
    shown,
)
from jaxlstm.diagnostics.differences import adaptive_differences, cast, check_alike, gradient_error
from jaxlstm.lstm import LSTM
from jaxlstm.recurrence import unroll
from jaxlstm.rtrl import MAX_BYTES, influence_bytes, rtrl_gradient

Method = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]

REFERENCE = "scan"
DIFFERENCES = "differences"
TOLERANCE = {"float64": 1e-11, "float32": 1e-4}
TOLERANCE_DIFFERENCES = {"float64": 1e-6, "float32": 1e-1}
STEP_SIZE = {"float64": 5e-4, "float32": 2e-2}


class Departure(NamedTuple):
    """Where a method departs from the reference: the latest step at which d_z_t is wrong, and all wrong gates there.

    A backward pass reaches the latest step first, and passes its fault on to all earlier steps.
    """

    block: str  # "gate f" or "gates i, f, g" if a step is known, else the worst leaf, as "w_hh f"
    step: int | None  # None: every d_z_t is right or unknown, and the fault lies in what is computed from them
    error: float


class Comparison(NamedTuple):
    """Gradients by all methods, compared with autodiff of the scan; `print` shows them as a table."""

    dtype: str
    errors: dict[str, dict[str, float]]  # by method and block: ‖g − r‖ / ‖r‖
    # By method and gate: the error of d_z_t, relative to the norm over all gates at that step.
    by_step: dict[str, dict[str, Float[np.ndarray, "time"]]]
    departures: dict[str, Departure | None]  # by method; None where it agrees
    gradients: dict[str, tuple[PyTree, PyTree, PyTree]]  # by method: (d_params, d_xs, d_carry)
    floors: dict[str, float]  # by block: the error that differences cannot resolve; empty without differences

    @property
    def agree(self) -> bool:
        """Whether all methods agree within the tolerance of the dtype."""
        return all(departure is None for departure in self.departures.values())

    def __str__(self) -> str:
        """Return a table of the error of every method in every block, all departures, and the verdict."""
        blocks = list(self.errors[REFERENCE])
        width = max(map(len, blocks))
        columns = {
            method: [_short(self.errors[method].get(block)).rjust(max(len(method), 7)) for block in blocks]
            for method in self.departures
        }
        lines = ["  ".join([" " * width, *(method.rjust(max(len(method), 7)) for method in columns)])]
        for block, *cells in zip(blocks, *columns.values(), strict=True):
            lines.append("  ".join([block.ljust(width), *cells]))
        for method, departure in self.departures.items():
            if departure is not None:
                at = "" if departure.step is None else f" at step {departure.step}"
                lines.append(f"{method} departs in {departure.block}{at}: {departure.error:.1e}")
        coarse = [name for name, floor in self.floors.items() if floor > TOLERANCE_DIFFERENCES[self.dtype]]
        lines += [f"differences cannot resolve {name}: floor {self.floors[name]:.1e}" for name in coarse]
        lines.append(f"{'AGREE' if self.agree else 'DISAGREE'} in {self.dtype}")
        return "\n".join(lines)


@border("compare_gradients")
def compare_gradients(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    step_loss: Callable[[Array, Array], Array],
    *,
    carry: PyTree | None = None,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
    methods: Mapping[str, Method] | None = None,
    dtype: DTypeLike = "float64",
    by_step: bool = True,
    max_differences: int = 20_000,
    max_bytes: int = MAX_BYTES,
) -> Comparison:
    """Compute the gradient by every available method, plus any methods the caller supplies.

    The methods are autodiff of the scan ("scan", the reference), the library's rule ("bulk"), the hand-derived gradient
    ("by hand", only for `LSTM` without resets), real-time recurrent learning ("rtrl", only d_params), and central
    differences of the loss ("differences").

    Args:
      cell, params, xs, carry, mask, reset: as in `unroll`, in any floating dtype.
      step_loss: (y_t, t) -> E_t, a number; y_t is [*batch, hidden].
      methods: the caller's methods, by name: (params, xs, carry, d_ys) -> (d_params, d_xs, d_carry).
      dtype: "float64" or "float32", used for the whole computation; JAX's x64 setting is restored afterwards.
      by_step: also compute the errors of every step: every method gets extra inputs that are added to z, so that its
        d_xs contain d_z.
      max_differences: leave differences out if more numbers than this would be perturbed; each takes twelve evaluations
        of the loss.
      max_bytes: leave "rtrl" out if it needs more memory.

    Returns:
      A `Comparison`; `print` shows it as a table.

    Raises:
      TypeError: as `unroll`; or a method is not a function.
      ValueError: as `unroll`; or the name of a method is taken, a method returns a tree unlike the gradient, or
        `step_loss` does not return a number.
    """
    name = shown(dtype) if dtype is None else getattr(dtype, "__name__", str(dtype))
    if name not in TOLERANCE:
        raise ArgumentValueError(f'dtype must be "float64" or "float32", got {name!r}.')
    dtype = name
    check_count("max_differences", max_differences)
    own_methods = _checked_methods(methods)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params, xs, carry = cast(as_arrays(params=params, xs=xs, carry=carry), dtype)
        batch_shape = check_sequence(cell, params, xs, carry)
        carry = cell.initial_carry(params, batch_shape) if carry is None else carry
        variables = (params, xs, carry)
        ys = unroll(cell, *variables, mask=mask, reset=reset, gradient="scan")[1]
        check_step_loss(step_loss, of_one_step(ys))
        times = jnp.arange(len(ys))
        d_ys = jax.vmap(jax.grad(step_loss))(ys, times)

        # The caller's methods run first, so that an error in one of them comes early.
        all_methods = own_methods | _library_methods(cell, mask, reset, max_bytes)
        if influence_bytes(cell, params, batch_shape) > max_bytes or not len(ys):
            del all_methods["rtrl"]
        gates = _gate_names(cell, variables)
        has_z = by_step and bool(gates) and cell.project is project and hasattr(params, "_replace")
        gradients: dict[str, Any] = {}
        d_zs: dict[str, Any] = {}
        for name, method in all_methods.items():
            # Real-time recurrent learning returns no d_xs, and pays for every further input.
            with_z = has_z and name != "rtrl"
            gradients[name], d_zs[name] = _run_method(name, method, variables, d_ys, with_z=with_z)
        floors = {}
        if sum(leaf.size for leaf in jax.tree.leaves(variables)) <= max_differences:

            def loss(variables: Any) -> Array:
                ys = unroll(cell, *variables, mask=mask, reset=reset)[1]
                return jax.vmap(step_loss)(ys, times).sum()

            by_differences = functools.partial(adaptive_differences, loss, step_size=STEP_SIZE[dtype])
            gradients[DIFFERENCES], spread = jax.jit(by_differences)(variables)
            floors = _relative_norms(spread, gradients[REFERENCE], gates)

        errors = {name: _errors(own, gradients[REFERENCE], gates) for name, own in gradients.items()}
        of_steps = {name: _errors_by_step(own, d_zs[REFERENCE], gates) for name, own in d_zs.items() if own is not None}
    departures = {
        name: _departure(errors[name], of_steps.get(name, {}), TOLERANCE[dtype])
        for name in gradients
        if name not in (REFERENCE, DIFFERENCES)
    }
    if DIFFERENCES in gradients:
        # Ignore errors below three times the floor: there, the differences are too coarse to judge the gradient.
        allowed = TOLERANCE_DIFFERENCES[dtype]
        resolved = {name: error for name, error in errors[DIFFERENCES].items() if not error <= 3 * floors[name]}
        departures[DIFFERENCES] = _departure(resolved, {}, allowed)
    return Comparison(dtype, errors, of_steps, departures, jax.device_get(gradients), floors)


def _checked_methods(methods: Any) -> dict[str, Method]:
    methods = {} if methods is None else methods
    if not isinstance(methods, Mapping) or not all(map(callable, methods.values())):
        raise ArgumentTypeError(
            "methods must map a name to a function (params, xs, carry, d_ys) -> (d_params, d_xs, d_carry), got "
            f"{methods!r}; the library's own methods are always compared."
        )
    if taken := {REFERENCE, "bulk", "by hand", "rtrl", DIFFERENCES} & set(methods):
        raise ArgumentValueError(f"methods has {', '.join(sorted(taken))}, a library method; choose another name.")
    return dict(methods)


def _library_methods(cell: Cell[Any, Any], mask: Any, reset: Any, max_bytes: int) -> dict[str, Method]:
    def by_rtrl(params: PyTree, xs: PyTree, carry: PyTree, d_ys: Array) -> tuple[PyTree, None, None]:
        def linear_loss(y: Array, t: Array) -> Array:  # its derivative by y_t is d_ys[t]
            return (y * d_ys[t]).sum()

        return rtrl(cell, params, xs, linear_loss, carry)[1], None, None

    rtrl = functools.partial(rtrl_gradient, mask=mask, reset=reset, max_bytes=max_bytes)
    run = functools.partial(unroll, cell, mask=mask, reset=reset)
    methods = {how: _by_autodiff(functools.partial(run, gradient=how)) for how in (REFERENCE, "bulk")}
    if cell is LSTM and reset is None:
        methods["by hand"] = _by_autodiff(functools.partial(lstm_bptt, mask=mask))
    return methods | {"rtrl": jax.jit(by_rtrl)}


def _by_autodiff(run: Callable[..., tuple[PyTree, Array]]) -> Method:
    """Make the method that differentiates a function (params, xs, carry) -> (carry, ys)."""

    def outputs(params: PyTree, xs: PyTree, carry: PyTree) -> Array:
        return run(params, xs, carry)[1]

    def method(params: PyTree, xs: PyTree, carry: PyTree, d_ys: Array) -> tuple[PyTree, PyTree, PyTree]:
        return jax.vjp(outputs, params, xs, carry)[1](d_ys)

    return jax.jit(method)


def _checked_gradient(name: str, gradient: Any, variables: Any) -> Any:
    """Check that a method returns a gradient by the variables, or None for some of them."""
    if not isinstance(gradient, tuple) or len(gradient) != 3:
        raise ArgumentValueError(
            f"method {name!r} must return (d_params, d_xs, d_carry), with None for what it does not compute."
        )
    for variable, own, of in zip(("params", "xs", "carry"), gradient, variables, strict=True):
        if own is not None:
            check_alike(f"d_{variable} of method {name!r}", jax.tree.map(jnp.asarray, own), variable, of)
    return gradient


def _gate_names(cell: Cell[Any, Any], variables: Any) -> tuple[str, ...]:
    """Return the names of the blocks of z if they are the gates that `activations` names, else ()."""
    if cell.activations is None:
        return ()
    params, xs, carry = variables
    z = jax.eval_shape(cell.project, params, of_one_step(xs))
    a = jax.eval_shape(cell.recur, params, carry)
    gates = jax.eval_shape(cell.activations, params, carry, z, a)
    widths = sum(leaf.shape[-1] for leaf in jax.tree.leaves(gates))
    return tuple(getattr(gates, "_fields", ())) if getattr(z, "shape", (0,))[-1] == widths else ()


def _blocks(gradient: Any, gates: tuple[str, ...]) -> dict[str, Array]:
    """Cut a gradient into the blocks that are compared: one per leaf, and per gate for parameters."""
    d_params, d_xs, d_carry = gradient
    cut: dict[str, Array] = {}
    wide = max((leaf.shape[-1] for leaf in jax.tree.leaves(d_params) if leaf.ndim), default=0)
    for path, leaf in jax.tree.leaves_with_path(d_params):
        if gates and leaf.ndim and leaf.shape[-1] == wide:
            pieces = jnp.split(leaf, len(gates), axis=-1)
            cut |= {f"{leaf_path(path)} {gate}": piece for gate, piece in zip(gates, pieces, strict=True)}
        else:
            cut[leaf_path(path)] = leaf
    cut |= {f"xs {leaf_path(path)}".strip(): leaf for path, leaf in jax.tree.leaves_with_path(d_xs)}
    return cut | {f"{leaf_path(path)}_0": leaf for path, leaf in jax.tree.leaves_with_path(d_carry)}


def _relative_norms(spread: Any, reference: Any, gates: tuple[str, ...]) -> dict[str, float]:
    """Return ‖spread‖ / ‖reference‖ for every block, or ‖spread‖ where the reference is 0."""
    own, want = _blocks(spread, gates), _blocks(reference, gates)
    norm = lambda leaf: float(np.linalg.norm(np.ravel(leaf).astype("float64")))
    return {name: norm(leaf) / (norm(want[name]) or 1.0) for name, leaf in own.items()}


def _errors(gradient: Any, reference: Any, gates: tuple[str, ...]) -> dict[str, float]:
    own, want = _blocks(gradient, gates), _blocks(reference, gates)
    return {name: float(gradient_error(leaf, want[name])) for name, leaf in own.items()}


def _run_method(name: str, method: Method, variables: Any, d_ys: Array, *, with_z: bool) -> tuple[Any, Any]:
    """Return a gradient, and the derivative by every z_t, or None.

    For d_z, the method gets further inputs, all 0, that an identity matrix in w_ih adds to z_t unchanged.
    """
    params, xs, carry = variables
    if not with_z:
        return _checked_gradient(name, method(params, xs, carry, d_ys), variables), None
    num_features, width = params.w_ih.shape
    wider = params._replace(w_ih=jnp.concatenate([params.w_ih, jnp.eye(width, dtype=xs.dtype)]))
    zeros = jnp.zeros((*xs.shape[:-1], width), xs.dtype)
    wide_xs = jnp.concatenate([xs, zeros], axis=-1)
    gradient = method(wider, wide_xs, carry, d_ys)
    d_params, d_xs, d_carry = _checked_gradient(name, gradient, (wider, wide_xs, carry))
    if d_params is not None:
        d_params = d_params._replace(w_ih=d_params.w_ih[:num_features])
    if d_xs is None:
        return (d_params, None, d_carry), None
    return (d_params, d_xs[..., :num_features], d_carry), d_xs[..., num_features:]


def _errors_by_step(d_z: Array, reference: Any, gates: tuple[str, ...]) -> dict[str, np.ndarray]:
    scale = _norms(reference)
    pieces = zip(gates, jnp.split(d_z - reference, len(gates), axis=-1), strict=True)
    return {gate: _norms(piece) / np.where(scale == 0, 1, scale) for gate, piece in pieces}


def _norms(v: Array) -> Float[np.ndarray, "time"]:
    return np.linalg.norm(np.asarray(v).reshape(len(v), math.prod(v.shape[1:])), axis=-1)


def _departure(errors: dict[str, float], by_step: dict[str, np.ndarray], tolerance: float) -> Departure | None:
    wrong = {name for name, error in errors.items() if not error <= tolerance}
    if not wrong:
        return None
    steps = [t for own in by_step.values() for t, error in enumerate(own) if not error <= tolerance]
    # If only d_xs are wrong, the fault may lie in how they are computed from d_z, which is known from d_xs alone.
    if steps and not all(name.startswith("xs") for name in wrong):
        t = max(steps)
        of_gates = {gate: float(own[t]) for gate, own in by_step.items() if not own[t] <= tolerance}
        block = ("gate " if len(of_gates) == 1 else "gates ") + ", ".join(of_gates)
        return Departure(block, t, float(np.max(list(of_gates.values()))))
    return _worst(errors, None)


def _worst(errors: dict[str, float], step: int | None) -> Departure:
    block = list(errors)[int(np.argmax(list(errors.values())))]  # for NumPy, a NaN is the largest
    return Departure(block, step, errors[block])


def _short(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"
