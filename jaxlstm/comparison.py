"""The same gradient by several roads, side by side: where one departs from the others, by weight, gate and step.

Of the loss Σ_t step_loss(y_t, t). The reference is autodiff of the scan. A road of one's own is a function
(params, xs, carry, d_ys) -> (d_params, d_xs, d_carry), d_ys the derivative of the loss by the outputs, None for what it
does not have. What a road does wrong at a masked step shows at the real step before it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxlstm.bptt import gradient_error, lstm_bptt
from jaxlstm.cell import Cell, PyTree, leaf_path, project
from jaxlstm.checks import check_sequence, check_step_loss, of_one_step, same_structure
from jaxlstm.differences import cast, central_differences
from jaxlstm.lstm import LSTM
from jaxlstm.recurrence import unroll
from jaxlstm.rtrl import MAX_BYTES, influence_bytes, rtrl_gradient

Road = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]

REFERENCE = "scan"
DIFFERENCES = "differences"
TOLERANCE = {"float64": 1e-11, "float32": 1e-4}
TOLERANCE_DIFFERENCES = {"float64": 1e-6, "float32": 1e-1}
STEP_SIZE = {"float64": 5e-4, "float32": 2e-2}
MAX_DIFFERENCES = 20_000  # numbers, of which each takes the loss four times


class Departure(NamedTuple):
    """Where a road leaves the reference: going back in time, the first step and the gate whose d_z is wrong."""

    block: str  # "gate f" where a step is known, else the leaf that is worst, "w_hh f"
    step: int | None  # None: every d_z is right, or is not known, and what is made of them is wrong
    error: float


class Comparison(NamedTuple):
    """Gradients by all roads, against autodiff of the scan."""

    dtype: str
    errors: dict[str, dict[str, float]]  # road, block: ‖g − r‖ / ‖r‖
    # road, gate: of d_z_t, relative to all gates' at that step
    by_step: dict[str, dict[str, Float[np.ndarray, "time"]]]
    departures: dict[str, Departure | None]  # road: None where it agrees
    gradients: dict[str, tuple[PyTree, PyTree, PyTree]]  # road: (d_params, d_xs, d_carry)

    @property
    def agree(self) -> bool:
        """Whether all roads are within what the dtype deserves."""
        return all(departure is None for departure in self.departures.values())


def compare_gradients(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    step_loss: Callable[[Array, Array], Array],
    *,
    carry: PyTree | None = None,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
    roads: Mapping[str, Road] | None = None,
    dtype: DTypeLike = "float64",
    by_step: bool = True,
) -> Comparison:
    """Have the gradient by every road there is, and by those of the caller.

    Autodiff of the scan ("scan", the reference), the library's rule ("bulk"), by hand ("by hand", for `LSTM` without
    resets), real-time recurrent learning ("rtrl", parameters alone, where it fits in 4 GiB), and central differences
    of the loss ("differences", up to 20,000 numbers). The error of a step is that of d_z_t, had from any road by its
    derivative by inputs that are added to z: a road is called a second time, with more features.

    Args:
      cell, params, xs, carry, mask, reset: as in `unroll`; of any floating dtype.
      step_loss: (y_t, t) -> E_t, a number; y_t is [*batch, hidden].
      roads: of the caller, by name.
      dtype: "float64" or "float32", in which everything is computed; the setting is restored.
      by_step: whether to have the errors of every step too, which takes as long again.

    Raises:
      TypeError, ValueError: as `unroll`; TypeError if a road is no function; ValueError if it has a name that is taken
        or returns another tree than the gradient's, or `step_loss` is no number.
    """
    dtype = jnp.dtype(dtype).name
    if dtype not in TOLERANCE:
        raise ValueError(f'compare_gradients: dtype must be "float64" or "float32", got {dtype!r}.')
    if not isinstance(roads or {}, Mapping) or not all(map(callable, (roads or {}).values())):
        raise TypeError(
            "compare_gradients: roads must map a name to a function (params, xs, carry, d_ys) -> "
            f"(d_params, d_xs, d_carry), got {roads!r}; those of the library are compared in any case."
        )
    if taken := {REFERENCE, "bulk", "by hand", "rtrl", DIFFERENCES} & set(roads or ()):
        raise ValueError(f"compare_gradients: roads has {', '.join(sorted(taken))}, which is a road already.")
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params, xs, carry = jax.tree.map(lambda v: cast(v, dtype), (params, xs, carry))
        batch_shape = check_sequence("compare_gradients", cell, params, xs, carry)
        carry = cell.initial_carry(params, batch_shape) if carry is None else carry
        variables = (params, xs, carry)
        ys = unroll(cell, *variables, mask=mask, reset=reset, gradient="scan")[1]
        d_ys = _loss_cotangent(step_loss, ys)
        gradients = {}
        all_roads = dict(roads or {}) | _library_roads(cell, mask, reset)  # the caller's first: an error comes early
        if influence_bytes(cell, params, batch_shape) > MAX_BYTES or not len(ys):
            del all_roads["rtrl"]
        for name, road in all_roads.items():
            gradients[name] = _checked_gradient(name, road(*variables, d_ys), variables)
        if sum(leaf.size for leaf in jax.tree.leaves(variables)) <= MAX_DIFFERENCES:
            times = jnp.arange(len(ys))
            loss = lambda v: jax.vmap(step_loss)(unroll(cell, *v, mask=mask, reset=reset)[1], times).sum()
            gradients[DIFFERENCES] = jax.jit(lambda v: central_differences(loss, v, STEP_SIZE[dtype]))(variables)
        gates = _gate_names(cell, variables)
        errors = {name: _errors(own, gradients[REFERENCE], gates) for name, own in gradients.items()}
        of_steps = {}
        if by_step and gates and cell.project is project and hasattr(params, "_replace"):
            # A road without d_xs has no d_z either.
            with_d_xs = {name: road for name, road in all_roads.items() if gradients[name][1] is not None}
            d_zs = {name: _d_z(road, variables, d_ys) for name, road in with_d_xs.items()}
            of_steps = {name: _errors_by_step(own, d_zs[REFERENCE], gates) for name, own in d_zs.items()}
    departures = {
        name: _departure(
            errors[name], of_steps.get(name, {}), (TOLERANCE_DIFFERENCES if name == DIFFERENCES else TOLERANCE)[dtype]
        )
        for name in gradients
        if name != REFERENCE
    }
    return Comparison(dtype, errors, of_steps, departures, jax.device_get(gradients))


def comparison_table(comparison: Comparison) -> str:
    """Return a comparison as text: the error of every road in every block, and what departs where."""
    roads = list(comparison.departures)
    widths = [max(len(road), 7) for road in roads]
    blocks = list(comparison.errors[REFERENCE])
    first = max(map(len, blocks))
    lines = [" " * first + "".join(f"  {road:>{width}}" for road, width in zip(roads, widths, strict=True))]
    for block in blocks:
        cells = (comparison.errors[road].get(block) for road in roads)
        text = ("" if error is None else f"{error:.0e}" for error in cells)
        lines.append(
            f"{block:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(text, widths, strict=True))
        )
    for road, departure in comparison.departures.items():
        if departure is not None:
            at = "" if departure.step is None else f" at step {departure.step}"
            lines.append(f"{road} departs in {departure.block}{at}: {departure.error:.1e}")
    lines.append(f"{'AGREE' if comparison.agree else 'DISAGREE'} in {comparison.dtype}")
    return "\n".join(lines)


def _loss_cotangent(step_loss: Callable[[Array, Array], Array], ys: Array) -> Array:
    """Return the derivative of Σ_t step_loss(y_t, t) by the outputs."""
    times = jnp.arange(len(ys))
    check_step_loss("compare_gradients", step_loss, of_one_step(ys))
    d_ys: Array = jax.vmap(jax.grad(step_loss))(ys, times)
    return d_ys


def _library_roads(cell: Cell[Any, Any], mask: Any, reset: Any) -> dict[str, Road]:
    def by_vjp(run: Callable[..., Any]) -> Road:
        return jax.jit(lambda params, xs, carry, d_ys: jax.vjp(lambda *v: run(*v)[1], params, xs, carry)[1](d_ys))

    def rtrl(params: PyTree, xs: PyTree, carry: PyTree, d_ys: Array) -> tuple[PyTree, None, None]:
        linear = lambda y, t: (y * d_ys[t]).sum()  # a loss whose cotangent is d_ys
        return rtrl_gradient(cell, params, xs, linear, carry, mask=mask, reset=reset)[1], None, None

    unrolled = {
        how: by_vjp(lambda *v, how=how: unroll(cell, *v, mask=mask, reset=reset, gradient=how))
        for how in (REFERENCE, "bulk")
    }
    by_hand = {"by hand": by_vjp(lambda *v: lstm_bptt(*v, mask=mask))} if cell is LSTM and reset is None else {}
    return {**unrolled, **by_hand, "rtrl": jax.jit(rtrl)}


def _checked_gradient(name: str, gradient: Any, variables: Any) -> Any:
    """Check that a road's gradient is one of these variables, or None."""
    if not isinstance(gradient, tuple) or len(gradient) != 3:
        raise ValueError(
            f"compare_gradients: road {name!r} must return (d_params, d_xs, d_carry), None for what it has not."
        )
    for what, own, of in zip(("d_params", "d_xs", "d_carry"), gradient, variables, strict=True):
        shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
        if own is not None and (not same_structure(own, of) or shapes(own) != shapes(of)):
            raise ValueError(
                f"compare_gradients: {what} of road {name!r} must have the shapes {shapes(of)}, got {shapes(own)}."
            )
    return gradient


def _gate_names(cell: Cell[Any, Any], variables: Any) -> tuple[str, ...]:
    """Return the names of the blocks of z, where these are the gates that `activations` names."""
    if cell.activations is None:
        return ()
    params, xs, carry = variables
    z, a = (
        jax.eval_shape(f, params, v)
        for f, v in ((cell.project, of_one_step(xs)), (cell.recur or (lambda *_: None), carry))
    )
    gates = jax.eval_shape(cell.activations, params, carry, z, a)
    widths = sum(leaf.shape[-1] for leaf in jax.tree.leaves(gates))
    return tuple(gates._fields) if getattr(z, "shape", (0,))[-1] == widths else ()


def _blocks(gradient: Any, gates: tuple[str, ...]) -> dict[str, Array]:
    """Cut a gradient into what is compared: every leaf, that of a parameter gate by gate."""
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


def _errors(gradient: Any, reference: Any, gates: tuple[str, ...]) -> dict[str, float]:
    own, want = _blocks(gradient, gates), _blocks(reference, gates)
    return {name: float(gradient_error(leaf, want[name])) for name, leaf in own.items()}


def _d_z(road: Road, variables: Any, d_ys: Array) -> Array:
    """Return the derivative by every pre-activation, from any road: that by inputs which are added to z as they are."""
    params, xs, carry = variables
    num_features, width = params.w_ih.shape
    wider = params._replace(w_ih=jnp.concatenate([params.w_ih, jnp.eye(width, dtype=xs.dtype)]))
    d_xs: Array = road(
        wider, jnp.concatenate([xs, jnp.zeros((*xs.shape[:-1], width), xs.dtype)], axis=-1), carry, d_ys
    )[1]
    return d_xs[..., num_features:]


def _errors_by_step(d_z: Array, reference: Any, gates: tuple[str, ...]) -> dict[str, np.ndarray]:
    norms = lambda v: np.linalg.norm(np.asarray(v).reshape(len(v), math.prod(v.shape[1:])), axis=-1)
    scale = norms(reference)
    pieces = zip(gates, jnp.split(d_z - reference, len(gates), axis=-1), strict=True)
    return {gate: norms(piece) / np.where(scale == 0, 1, scale) for gate, piece in pieces}


def _departure(errors: dict[str, float], by_step: dict[str, np.ndarray], tolerance: float) -> Departure | None:
    worst = lambda found: max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    wrong = {name for name, error in errors.items() if not error <= tolerance}
    if not wrong:
        return None
    steps = [t for own in by_step.values() for t, error in enumerate(own) if not error <= tolerance]
    if steps and wrong - {name for name in wrong if name.startswith("xs")}:
        t = max(steps)
        at_step = {f"gate {gate}": float(own[t]) for gate, own in by_step.items()}
        return Departure(worst(at_step), t, at_step[worst(at_step)])
    return Departure(worst(errors), None, errors[worst(errors)])
