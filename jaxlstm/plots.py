"""Pictures of what the diagnostics find. Needs the extra `jaxlstm[plots]`.

    recorded = trace(LSTM, params, xs)                             # xs [time, features]
    plots.gate_map(recorded, "f", labels=words)                    # a new figure
    plots.gate_map(recorded, "c", labels=words, ax=panel)          # on Axes that you made

Every function draws on `ax` and returns it; without `ax`, it makes a new figure. It never shows or saves the figure.
Arrays may be JAX's or NumPy's. The colors are by Okabe and Ito; color-blind people can tell them apart.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxlstm.cell import PyTree, leaf_path
from jaxlstm.checks import ArgumentTypeError, ArgumentValueError, border, check_count, check_float, describe, shown
from jaxlstm.diagnostics.comparison import TOLERANCE, Comparison
from jaxlstm.diagnostics.dynamics import Trace
from jaxlstm.diagnostics.sources import GradientSources
from jaxlstm.diagnostics.statespace import Linearization, PrincipalComponents

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# fmt: off
__all__ = [  # noqa: RUF022
    "gate_map", "flow_by_lag", "source_matrix", "error_by_step", "eigenvalue_plane", "phase_portrait",
    "lyapunov_spectrum", "COLORS", "MARKERS",
]
# fmt: on

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colors of lines and points, in order; readers who confuse red and green can tell them apart (Okabe & Ito)."""
MARKERS = "o^sDvP*"
"""The markers of fixed points with 0, 1, 2, ... unstable directions."""
# Smaller errors are drawn here. On a logarithmic scale, 0 has no place of its own.
SMALLEST = {"float64": 1e-18, "float32": 1e-10}


def _axes(ax: "Axes | None", projection: str | None = None) -> "Axes":
    """Return the Axes to draw on; the only place that imports matplotlib."""
    # Only pyplot makes figures that a notebook shows by itself.
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("jaxlstm.plots needs matplotlib: pip install 'jaxlstm[plots]'") from error
    if ax is not None:
        if not hasattr(ax, "plot"):
            raise ArgumentTypeError(f"ax must be Axes of matplotlib, such as plt.gca(), got {shown(ax)}.")
        return ax
    return pyplot.subplots(layout="constrained", subplot_kw={"projection": projection})[1]


@border("plots.gate_map")
def gate_map(
    recorded: Trace,
    name: str,
    *,
    sequence: int | None = None,
    units: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw one gate, or one part of the carry, over a sequence: a row per unit, a column per step.

    A gate without negative values gets a color scale from 0 to 1; a gate with negative values, such as g, gets one from
    −1 to 1. Values beyond ±1 widen it. A part of the carry gets a scale with 0 in the middle.

    Args:
      recorded: from `trace`, [time, units], or [time, batch, units] with `sequence`.
      name: a field of the gates or of the carry: "i", "f", "g", "o", "c" or "h" for an LSTM.
      sequence: which sequence of the batch to draw.
      units: which units to draw, from top to bottom; by default all.
      labels: what the net reads at every step, such as words, [time].
      ax: Axes to draw on.

    Raises:
      ValueError: the trace has no such field, unit, or sequence, or `labels` has not one text per step.

    >>> import jax
    >>> from jaxlstm import LSTM, plots
    >>> from jaxlstm.diagnostics import trace
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> recorded = trace(LSTM, params, jax.numpy.ones((11, 5)))
    >>> plots.gate_map(recorded, "f", units=[6, 0, 3], labels="hello world").get_title()
    'f'
    """
    _check_kind("recorded", recorded, Trace, "trace")
    gates = {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(recorded.gates)}
    fields = gates | {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(recorded.carry)}
    if name not in fields:
        raise ArgumentValueError(f"name must be one of {', '.join(fields)}, got {name!r}.")
    values = _numbers(fields[name])
    if values.ndim != (2 if sequence is None else 3):
        cure = "leave `sequence` out" if values.ndim == 2 else "choose one with `sequence`"
        raise ArgumentValueError(f"recorded must hold one sequence, got {name} {list(values.shape)}; {cure}.")
    if sequence is not None:
        check_count("sequence", sequence, 0, values.shape[1] - 1)
        values = values[:, sequence]
    num_steps, num_units = values.shape
    if not values.size:
        raise ArgumentValueError(f"recorded must hold at least one step and one unit, got {name} {list(values.shape)}.")
    rows = np.arange(num_units).tolist() if units is None else np.atleast_1d(units).tolist()
    for unit in rows:
        check_count("units", unit, 0, num_units - 1)
    if labels is not None and len(labels) != num_steps:
        raise ArgumentValueError(f"labels must hold one text for each of {num_steps} steps, got {len(labels)}.")

    is_positive = name in gates and bool((values >= 0).all())
    values = values[:, rows]
    limit = float(np.abs(values).max(initial=0)) or 1.0
    limit = max(1.0, limit) if name in gates else limit
    axes = _axes(ax)
    colors: dict[str, Any] = {"cmap": "cividis", "vmin": 0} if is_positive else {"cmap": "RdBu_r", "vmin": -limit}
    image = axes.imshow(values.T, aspect="auto", interpolation="nearest", vmax=limit, **colors)
    axes.figure.colorbar(image, ax=axes, pad=0.01)
    axes.set(title=name, xlabel="step", ylabel="unit")
    if units is not None:
        axes.set_yticks(range(len(rows)), [str(unit) for unit in rows])
    if labels is not None:
        axes.set_xticks(range(num_steps), list(labels))
    return axes


@border("plots.flow_by_lag")
def flow_by_lag(
    flow: PyTree,
    *,
    band: tuple[float, float] | None = (0.0, 1.0),
    label: str | None = None,
    color: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how much of the gradient of the last output's loss is left at every lag: median and band of the sequences.

    Call it again with the same `ax` to compare nets.

    Args:
      flow: from `gradient_flow`, leaves [time, *batch, units]; the norm is over the units of all leaves.
      band: quantiles of the sequences between which the band lies; by default it is their range. None draws none.
      label: name of the net, for the legend.
      color: of line and band; by default the next of `COLORS`.
      ax: Axes to draw on.

    Raises:
      ValueError: the gradient at the last step is 0, so that nothing can be relative to it; or a wrong band.
    """
    if band is not None and not (np.shape(band) == (2,) and 0 <= band[0] <= band[1] <= 1):
        raise ArgumentValueError(f"band must be two quantiles, 0 <= low <= high <= 1, got {shown(band)}.")
    leaves = [_numbers(leaf) for leaf in jax.tree.leaves(flow)]
    if len({leaf.shape[:-1] for leaf in leaves}) != 1 or leaves[0].ndim < 2:
        raise ArgumentValueError(
            f"flow must be what gradient_flow returns, [time, *batch, units], got {describe(flow) or flow}."
        )
    norms = np.sqrt(sum((leaf**2).sum(axis=-1) for leaf in leaves))  # [time, *batch]
    if not norms.size or not (norms[-1] > 0).all():
        raise ArgumentValueError(
            "flow must end with a gradient that is not 0 or NaN; let loss_fn read the last output, and end no sequence "
            "early."
        )
    by_lag = (norms / norms[-1]).reshape(len(norms), -1)[::-1]
    axes = _axes(ax)
    # A call for each net: the lines that are already there say how many nets came before.
    before = sum(line.get_gid() == "flow" for line in axes.lines)
    color = COLORS[before % len(COLORS)] if color is None else color
    axes.plot(np.median(by_lag, axis=1), color=color, label=label, linewidth=2, gid="flow")
    if band is not None and by_lag.shape[1] > 1:
        low, high = np.quantile(by_lag, band, axis=1)
        axes.fill_between(range(len(by_lag)), low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(yscale="log", xlabel="lag: steps back from the loss", ylabel="gradient, relative to lag 0")
    if label is not None:
        axes.legend()
    return axes


@border("plots.source_matrix")
def source_matrix(
    sources: GradientSources, leaf: str | None = None, *, decades: float = 8.0, ax: "Axes | None" = None
) -> "Axes":
    """Draw ‖G[t, s]‖: how much the loss of step t takes from the use of the weights at step s.

    Args:
      sources: from `gradient_sources`.
      leaf: one parameter, such as "w_hh"; by default the norm is over all of them.
      decades: the range of the colors: smaller norms than the largest / 10^decades have the same color.
      ax: Axes to draw on.

    Raises:
      ValueError: the parameters have no such leaf, or all norms are 0.
    """
    _check_kind("sources", sources, GradientSources, "gradient_sources")
    norms = {leaf_path(path): _numbers(value) for path, value in jax.tree.leaves_with_path(sources.norms)}
    if leaf is not None and leaf not in norms:
        raise ArgumentValueError(f"leaf must be one of {', '.join(norms)}, got {leaf!r}.")
    matrix = np.sqrt(sum(value**2 for value in norms.values())) if leaf is None else norms[leaf]
    check_float("decades", decades)
    if not decades > 0:
        raise ArgumentValueError(f"decades must be a number above 0, got {decades}.")
    largest = float(matrix.max(initial=0))
    if not largest > 0:
        raise ArgumentValueError("sources must have a norm above 0; is the loss constant?")
    smallest = largest / 10**decades
    # The loss of step t cannot depend on later uses, s > t: they have no color.
    later = np.triu(np.ones(matrix.shape, bool), 1)
    drawn = np.ma.masked_array(np.maximum(matrix, smallest), later)
    axes = _axes(ax)
    image = axes.imshow(drawn, cmap="cividis", norm="log", vmin=smallest, vmax=largest, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="norm of G[t, s]" + (f" of {leaf}" if leaf else ""))
    axes.set(xlabel="use of the weights, step s", ylabel="loss, step t")
    return axes


@border("plots.error_by_step")
def error_by_step(found: Comparison, method: str, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the error of a method's gradient per gate and step, with the tolerance, and mark where it departs.

    Errors below 1e-18 in float64 and 1e-10 in float32 are drawn there.

    Args:
      found: from `compare_gradients`, with `by_step`.
      method: a method with errors by step: one of the caller's, or "bulk" or "by hand".
      ax: Axes to draw on.

    Raises:
      ValueError: `found` has no errors by step for this method.
    """
    _check_kind("found", found, Comparison, "compare_gradients")
    if method not in found.by_step:
        names = ", ".join(found.by_step) or "none; call compare_gradients with by_step=True and a cell with gates"
        raise ArgumentValueError(f"method must be one with errors by step, got {method!r}; these are {names}.")
    axes = _axes(ax)
    for number, (gate, errors) in enumerate(found.by_step[method].items()):
        drawn = np.maximum(_numbers(errors), SMALLEST[found.dtype])
        look: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(drawn, label=f"gate {gate}", markersize=5, **look)
    axes.axhline(TOLERANCE[found.dtype], color="0.4", linestyle="--", label="tolerance")
    departure, title = found.departures.get(method), f"{method} agrees"
    if departure is not None:
        at = "" if departure.step is None else f" at step {departure.step}"
        title = f"{method} departs in {departure.block}{at}"
        if departure.step is not None:
            axes.axvline(departure.step, color="0.4", linestyle=":", label="departure")
    axes.set(title=title, xlabel="step", ylabel="error of d_z, relative to all gates", yscale="log")
    axes.set_ylim(bottom=SMALLEST[found.dtype] / 2)
    axes.legend()
    return axes


@border("plots.eigenvalue_plane")
def eigenvalue_plane(jacobians: Linearization | Float[Array, "*lead n n"], *, ax: "Axes | None" = None) -> "Axes":
    """Draw the eigenvalues of the carry's Jacobian and the unit circle, beyond which a direction grows at every step.

    Args:
      jacobians: from `linearize`, or from `carry_jacobians`; the eigenvalues of all points or steps are drawn.
      ax: Axes to draw on.

    Raises:
      ValueError: the Jacobians are not [*lead, n, n].
    """
    if isinstance(jacobians, Linearization):
        values = np.ravel(jacobians.eigenvalues)
    else:
        matrices = _numbers(jacobians)
        if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
            raise ArgumentValueError(f"jacobians must be [*lead, n, n] or from linearize, got {list(matrices.shape)}.")
        values = np.ravel(np.linalg.eigvals(matrices))
    axes = _axes(ax)
    turn = np.exp(2j * np.pi * np.linspace(0, 1, 361))
    axes.plot(turn.real, turn.imag, color="0.4", linewidth=1)
    grows = np.abs(values) > 1
    for own, label, color, marker in (
        (values[~grows], "shrinks, |λ| ≤ 1", COLORS[0], "o"),
        (values[grows], "grows, |λ| > 1", COLORS[1], "^"),
    ):
        if own.size:
            axes.plot(own.real, own.imag, marker, color=color, markersize=5, alpha=0.7, label=label)
    axes.set(xlabel="real part", ylabel="imaginary part", aspect="equal")
    axes.legend()
    return axes


@border("plots.phase_portrait")
def phase_portrait(
    components: PrincipalComponents,
    carries: PyTree | None = None,
    points: PyTree | None = None,
    around: Linearization | None = None,
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw trajectories and fixed points in two or three principal components.

    Stable points are filled; the others are open, with one marker and color for each number of unstable directions. The
    unstable directions are lines, all of the same length in the space of the carry: one that looks short points out of
    the picture.

    Args:
      components: from `principal_components`, 2 or 3 of them; with 3, Axes with `projection="3d"`.
      carries: trajectories, such as `trace(...).carry`, leaves [time, *batch, n].
      points: fixed points, `fixed_points(...).carry`, leaves [points, n].
      around: `linearize(..., points, x)`; without it, all points look alike.
      ax: Axes to draw on.

    Raises:
      ValueError: there are not 2 or 3 components, `ax` has other dimensions, a carry has another size, or `around` is
        not about these points.
    """
    _check_kind("components", components, PrincipalComponents, "principal_components")
    if around is not None:
        _check_kind("around", around, Linearization, "linearize")
    num, size = np.shape(components.axes)
    if num not in (2, 3):
        raise ArgumentValueError(f"components must be 2 or 3, got {num}; call principal_components(carries, 2).")
    if ax is not None and (ax.name == "3d") != (num == 3):
        raise ArgumentValueError(f'ax must have {num} dimensions for {num} components; 3 need projection="3d".')
    paths = None if carries is None else _coordinates("carries", carries, components)
    places = np.zeros((0, num)) if points is None else _coordinates("points", points, components)
    if places.ndim != 2:
        raise ArgumentValueError(f"points must have leaves [points, n], got coordinates {list(places.shape)}.")
    if around is not None and np.shape(around.right) != (len(places), size, size):
        raise ArgumentValueError(
            f"around must be about these {len(places)} points of {size} numbers; call linearize with points."
        )

    axes: Any = _axes(ax, "3d" if num == 3 else None)
    if paths is not None:
        for path in paths.reshape(len(paths), -1, num).swapaxes(0, 1):
            axes.plot(*path.T, color="0.7", linewidth=0.5, zorder=1)
    kinds = np.full(len(places), -1) if around is None else np.asarray(around.num_unstable)
    if around is not None:
        seen = places if paths is None else paths.reshape(-1, num)
        length = 0.08 * np.ptp(seen, axis=0).max(initial=0) or 0.1
        rights, eigenvalues = np.asarray(around.right), np.asarray(around.eigenvalues)
        for place, right, values, kind in zip(places, rights, eigenvalues, kinds, strict=True):
            # A complex pair turns in the plane of the real and the imaginary part of its eigenvector.
            directions = np.where(values.imag < 0, right.imag, right.real).T[:kind]
            for direction in directions @ _numbers(components.axes).T:
                ends = np.stack([place - length * direction, place + length * direction])
                axes.plot(*ends.T, color="0.2", linewidth=1)
    for kind in np.unique(kinds):
        color, marker = COLORS[kind % len(COLORS)], MARKERS[kind % len(MARKERS)] if kind >= 0 else "o"
        look = {"facecolor": color if kind <= 0 else "white", "edgecolor": color, "linewidth": 1.5, "zorder": 3}
        label = {-1: "fixed point", 0: "stable", 1: "1 unstable direction"}.get(kind, f"{kind} unstable directions")
        if num == 3:
            look["depthshade"] = False
        axes.scatter(*places[kinds == kind].T, marker=marker, s=35, label=label, **look)
    names = [f"PC {k + 1} ({share:.0%})" for k, share in enumerate(_numbers(components.explained))]
    axes.set(**{f"{axis}label": name for axis, name in zip("xyz", names, strict=False)})
    if len(places):
        axes.legend()
    return axes


@border("plots.lyapunov_spectrum")
def lyapunov_spectrum(
    exponents: Float[Array, "*batch num_exponents"],
    *,
    reference: Sequence[float] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw Lyapunov exponents, largest first: the mean over the sequences, and a bar for their range.

    Args:
      exponents: from `lyapunov_exponents`.
      reference: values to compare with, such as published ones, as many or fewer.
      ax: Axes to draw on.

    Raises:
      ValueError: `exponents` is empty, or has fewer values than `reference`.
    """
    rows = _numbers(exponents)
    if rows.ndim < 1 or not rows.size:
        raise ArgumentValueError(f"exponents must be [*batch, num_exponents], got {list(rows.shape)}.")
    rows = rows.reshape(-1, rows.shape[-1])
    values = _numbers(() if reference is None else reference)
    if len(values) > rows.shape[1]:
        raise ArgumentValueError(f"reference has {len(values)} values for {rows.shape[1]} exponents.")
    axes = _axes(ax)
    number = np.arange(1, rows.shape[1] + 1)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.plot(number, rows.mean(axis=0), "o", color=COLORS[0], label="measured")
    if len(rows) > 1:
        axes.vlines(number, rows.min(axis=0), rows.max(axis=0), color=COLORS[0])
    if reference is not None:
        look: dict[str, Any] = {"color": COLORS[1], "markersize": 20, "markeredgewidth": 2}
        axes.plot(number[: len(values)], values, "_", label="reference", **look)
        axes.legend()
    axes.set(xlabel="Lyapunov exponent, largest first", ylabel="growth, nats per step", xlim=(0.5, len(number) + 0.5))
    axes.locator_params(axis="x", integer=True)
    return axes


def _numbers(array: Any) -> np.ndarray:
    """Return an array as float64; bfloat16 too, which matplotlib cannot draw."""
    return np.asarray(array).astype(np.float64)


def _check_kind(name: str, value: Any, kind: type, function: str) -> None:
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{name} must be what {function} returns, got {shown(value)}.")


def _coordinates(name: str, carries: PyTree, components: PrincipalComponents) -> np.ndarray:
    leaves = [_numbers(leaf) for leaf in jax.tree.leaves(carries)]
    size = len(components.mean)
    if len({leaf.shape[:-1] for leaf in leaves}) != 1 or sum(leaf.shape[-1] for leaf in leaves if leaf.ndim) != size:
        raise ArgumentValueError(
            f"{name} must be carries of {size} numbers, such as trace(...).carry or fixed_points(...).carry, got "
            f"{describe(jax.tree.map(np.asarray, carries))}."
        )
    return (np.concatenate(leaves, axis=-1) - _numbers(components.mean)) @ _numbers(components.axes).T
