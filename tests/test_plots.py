"""The pictures hold the data they were given, say what they show, and leave matplotlib as it was."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks import plots as benchmark_plots
from jaxlstm import GRU, LSTM, RNN, plots
from jaxlstm.diagnostics import (
    Comparison,
    Departure,
    FixedPoints,
    GradientSources,
    Linearization,
    PrincipalComponents,
    Trace,
    gradient_flow,
    principal_components,
    trace,
)
from jaxlstm.lstm import LSTMGates, LSTMState

from cells import draw

ROOT = Path(__file__).parents[1]
STEPS, BATCH, UNITS = 5, 3, 4


def array(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


# What the diagnostics return, written by hand.
SHAPE = (STEPS, BATCH, UNITS)
GATES = LSTMGates(*(jax.nn.sigmoid(array(*SHAPE, seed=k)) for k in range(4)))._replace(g=np.tanh(array(*SHAPE)))
TRACE = Trace(None, None, None, GATES, LSTMState(0.1 * array(*SHAPE), 3 * array(*SHAPE)), None)
ONE = jax.tree.map(lambda leaf: leaf[:, 1], TRACE)
FLOW = LSTMState(array(*SHAPE, seed=5), array(*SHAPE, seed=6))
SOURCES = GradientSources(None, None, None, {"a": np.tril(np.abs(array(4, 4))), "b": np.tril(np.ones((4, 4)))}, None)
WRONG_FROM_2 = {"i": np.array([1e-3, 1e-2, 0, 1e-16]), "f": np.array([1e-3, 1e-2, 0.1, 0])}
COMPARED_GRADIENTS = Comparison(
    "float64", {}, {"bulk": {"i": np.zeros(4), "f": np.zeros(4)}, "mine": WRONG_FROM_2},
    {"bulk": None, "mine": Departure("gate f", 2, 0.1), "rtrl": None}, {}, {},
)  # fmt: skip
PLANE = PrincipalComponents(np.array([1.0, 0.0, 0.0]), np.array([[0.0, 1, 0], [0, 0, 1]]), np.array([0.6, 0.3]))
SPACE = PrincipalComponents(np.zeros(3), np.eye(3), np.array([0.5, 0.3, 0.2]))
PATHS = LSTMState(array(STEPS, BATCH, 2), array(STEPS, BATCH, 1))
PLACES = LSTMState(array(4, 2, seed=1), array(4, 1, seed=1))
VALUES = np.array([[0.9, 0.5, 0.1], [1.2, 0.5, 0.1], [1.1 + 0.3j, 1.1 - 0.3j, 0.1], [0.9, 0.2, 0.1]])
RIGHT = np.stack([np.eye(3)] * 4).astype(complex)
RIGHT[2, :, :2] = np.array([[1, 1], [1j, -1j], [0, 0]]) / np.sqrt(2)
AROUND = Linearization(None, None, VALUES, RIGHT, None, None, np.array([0, 1, 2, 0]), None, None)
EXPONENTS = np.array([[0.9, 0.0, -14.0], [0.7, 0.2, -15.0]])


@pytest.fixture(autouse=True)
def nothing_stays_open_or_changes():
    settings = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == settings
    plt.close("all")


def pixels_of(function):
    """Return the function that draws a picture and returns its pixels, for the table of keywords."""

    def draw_pixels(*arguments, **keywords):
        axes = function(*arguments, **keywords)
        canvas = FigureCanvasAgg(axes.figure)
        canvas.draw()
        plt.close(axes.figure)
        return np.asarray(canvas.buffer_rgba()).copy()

    return draw_pixels


def panel(projection=None):
    """Return Axes of a figure that pyplot does not know."""
    return Figure().add_subplot(projection=projection)


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


CALLS = {
    "gate_map": (plots.gate_map, (ONE, "f")),
    "flow_by_lag": (plots.flow_by_lag, (FLOW,)),
    "source_matrix": (plots.source_matrix, (SOURCES,)),
    "error_by_step": (plots.error_by_step, (COMPARED_GRADIENTS, "mine")),
    "eigenvalue_plane": (plots.eigenvalue_plane, (AROUND,)),
    "phase_portrait": (plots.phase_portrait, (PLANE, PATHS, PLACES, AROUND)),
    "lyapunov_spectrum": (plots.lyapunov_spectrum, (EXPONENTS,)),
}
EACH = pytest.mark.parametrize("name", CALLS)


def test_every_function_is_called_here():
    assert {name for name in plots.__all__ if name.islower()} == CALLS.keys()


@EACH
def test_a_picture_is_drawn_where_the_caller_says_or_on_a_new_figure(name):
    function, arguments = CALLS[name]
    before = plt.figure()
    axes = function(*arguments)
    assert axes.figure is not before and plt.get_fignums() == [1, 2]
    assert axes.figure.get_layout_engine() is not None, "labels and colorbars have room"
    given = panel()
    assert function(*arguments, ax=given) is given and given.has_data()
    assert plt.get_fignums() == [1, 2]


@EACH
def test_a_picture_has_names_on_its_axes_and_nothing_is_shown(name, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("plt.show was called"))
    function, arguments = CALLS[name]
    axes = function(*arguments)
    assert axes.get_xlabel() and axes.get_ylabel()


@EACH
def test_jax_arrays_in_any_dtype_give_the_same_picture_as_numpy_arrays(name):
    function, arguments = CALLS[name]

    def as_jax(leaf):
        return jnp.asarray(leaf, jnp.bfloat16 if leaf.dtype == np.float64 and leaf.ndim else None)

    rounded = jax.tree.map(lambda v: np.asarray(as_jax(v)).astype(v.dtype) if hasattr(v, "dtype") else v, arguments)
    in_jax = jax.tree.map(lambda v: as_jax(v) if hasattr(v, "dtype") else v, arguments)
    pictures = [pixels_of(function)(*given) for given in (rounded, in_jax)]
    np.testing.assert_array_equal(*pictures)


# Gates.


def test_a_gate_map_holds_the_gate_with_a_row_per_unit():
    axes = plots.gate_map(ONE, "f")
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), np.asarray(ONE.gates.f).T)
    assert image.get_clim() == (0, 1) and axes.get_title() == "f"
    assert len(axes.figure.axes) == 2, "a colorbar"


@pytest.mark.parametrize("name, limit", [("g", 1), ("c", np.abs(ONE.carry.c).max()), ("h", np.abs(ONE.carry.h).max())])
def test_what_can_be_negative_has_zero_in_the_middle(name, limit):
    (image,) = plots.gate_map(ONE, name).images
    assert image.get_clim() == pytest.approx((-limit, limit))


def test_units_and_labels_are_those_chosen_in_their_order():
    axes = plots.gate_map(TRACE, "c", sequence=2, units=jnp.array([3, 0]), labels=["the", "cat", "", "sat", "."])
    np.testing.assert_array_equal(axes.images[0].get_array(), TRACE.carry.c[:, 2, [3, 0]].T)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["3", "0"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["the", "cat", "", "sat", "."]
    np.testing.assert_array_equal(axes.get_xticks(), range(STEPS))
    limit = np.abs(TRACE.carry.c[:, 2, [3, 0]]).max()
    assert axes.images[0].get_clim() == (-limit, limit), "the scale of what is drawn"


@pytest.mark.parametrize("cell, names", [(LSTM, "ifgohc"), (GRU, "runh"), (RNN, "h")], ids=["LSTM", "GRU", "RNN"])
def test_a_trace_of_any_cell_can_be_drawn(cell, names):
    params, xs, carry = draw(cell)
    recorded = trace(cell, params, xs, carry)
    for name in names:
        held = recorded.gates if hasattr(recorded.gates, name) else recorded.carry
        (image,) = plots.gate_map(recorded, name, sequence=0, ax=panel()).images
        np.testing.assert_array_equal(image.get_array(), np.asarray(getattr(held, name))[:, 0].T)


# The gradient by lag.


def test_the_flow_is_the_norm_over_all_leaves_by_lag_relative_to_lag_0():
    axes = plots.flow_by_lag(FLOW, label="a net")
    norms = np.linalg.norm(np.concatenate([FLOW.h, FLOW.c], axis=-1), axis=-1)[::-1]
    left = norms / norms[0]
    np.testing.assert_allclose(lines(axes)["a net"], np.median(left, axis=1))
    (band,) = axes.collections
    xs, ys = band.get_paths()[0].vertices.T
    for lag in range(STEPS):
        drawn = ys[xs == lag]
        assert (drawn.min(), drawn.max()) == pytest.approx((left[lag].min(), left[lag].max()))
    assert axes.get_yscale() == "log" and texts(axes) == ["a net"]


def test_a_band_between_quantiles_and_none():
    (band,) = plots.flow_by_lag(FLOW, band=(0.5, 0.5)).collections
    heights = band.get_paths()[0].vertices[:, 1]
    (line,) = plots.flow_by_lag(FLOW, band=(0.5, 0.5)).lines
    assert set(heights) <= set(line.get_ydata())
    assert not plots.flow_by_lag(FLOW, band=None).collections
    assert not plots.flow_by_lag(FLOW.h[:, 0]).collections, "one sequence"


def test_nets_on_the_same_axes_have_different_colors_and_one_may_be_chosen():
    axes = plots.flow_by_lag(FLOW, label="one")
    axes.axhline(0.5, label="_")
    plots.flow_by_lag(FLOW, label="two", ax=axes)
    plots.flow_by_lag(FLOW, label="three", color="#123456", ax=axes)
    assert [axes.lines[n].get_color() for n in (0, 2, 3)] == [*plots.COLORS[:2], "#123456"]
    assert to_rgba(axes.collections[2].get_facecolor()[0])[:3] == to_rgba("#123456")[:3]
    assert texts(axes) == ["one", "two", "three"]


def test_the_flow_of_a_real_net_can_be_drawn():
    params, xs, carry = draw(LSTM)
    flow = gradient_flow(LSTM, params, xs, lambda ys: ys[-1].sum(), carry)
    (line,) = plots.flow_by_lag(flow).lines
    assert len(line.get_ydata()) == len(xs) and line.get_ydata()[0] == 1


# Sources, errors, eigenvalues.


def test_the_matrix_holds_the_norms_and_leaves_out_uses_after_the_loss():
    axes = plots.source_matrix(SOURCES, "a")
    image = axes.images[0].get_array()
    np.testing.assert_array_equal(image.mask, np.triu(np.ones((4, 4)), 1))
    np.testing.assert_array_equal(image[~image.mask], SOURCES.norms["a"][~image.mask])
    whole = plots.source_matrix(SOURCES).images[0].get_array()
    np.testing.assert_allclose(whole[1, 0] ** 2, SOURCES.norms["a"][1, 0] ** 2 + 1)


def test_the_colors_span_the_decades_asked_for():
    norms = SOURCES.norms["a"]
    (image,) = plots.source_matrix(SOURCES, "a", decades=0.5).images
    smallest, largest = norms.max() / np.sqrt(10), norms.max()
    assert isinstance(image.norm, LogNorm) and image.get_clim() == pytest.approx((smallest, largest))
    drawn = image.get_array()
    np.testing.assert_allclose(drawn[~drawn.mask], np.maximum(norms, smallest)[~drawn.mask])
    assert (norms[~drawn.mask] < smallest).any()


def test_errors_are_drawn_per_gate_with_the_departure_and_the_tolerance():
    axes = plots.error_by_step(COMPARED_GRADIENTS, "mine")
    drawn = lines(axes)
    for gate, errors in WRONG_FROM_2.items():
        np.testing.assert_array_equal(drawn[f"gate {gate}"], np.maximum(errors, 1e-18))
    assert set(drawn["tolerance"]) == {1e-11}
    (departure,) = [line for line in axes.lines if line.get_label() == "departure"]
    assert set(departure.get_xdata()) == {2}
    assert axes.get_title() == "mine departs in gate f at step 2" and axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 1e-18


def test_a_cell_may_have_more_gates_than_there_are_colors():
    many = {f"gate {k}": np.full(4, 10.0**-k) for k in range(9)}
    axes = plots.error_by_step(COMPARED_GRADIENTS._replace(by_step={"mine": many}), "mine")
    assert [line.get_ydata()[0] for line in axes.lines[:9]] == [10.0**-k for k in range(9)]


def test_a_method_that_agrees_or_departs_at_no_step_has_no_mark():
    axes = plots.error_by_step(COMPARED_GRADIENTS, "bulk")
    assert axes.get_title() == "bulk agrees" and "departure" not in lines(axes)
    nowhere = COMPARED_GRADIENTS._replace(departures={"mine": Departure("w_hh f", None, 0.1)}, dtype="float32")
    axes = plots.error_by_step(nowhere, "mine")
    assert axes.get_title() == "mine departs in w_hh f" and "departure" not in lines(axes)
    assert set(lines(axes)["tolerance"]) == {1e-4}


def test_eigenvalues_are_drawn_inside_and_outside_the_unit_circle():
    matrices = np.array([[[2.0, 1.0], [0.0, 0.5]], [[0.0, -1.1], [1.1, 0.0]]])
    axes = plots.eigenvalue_plane(matrices)
    circle, *dots = axes.lines
    np.testing.assert_allclose(np.hypot(*circle.get_data()), 1)
    found = {line.get_label(): sorted(zip(*line.get_data(), strict=True)) for line in dots}
    assert found["shrinks, |λ| ≤ 1"] == [(0.5, 0.0)]
    np.testing.assert_allclose(found["grows, |λ| > 1"], [(0, -1.1), (0, 1.1), (2, 0)], atol=1e-12)
    assert axes.get_aspect() == 1 and texts(axes) == list(found)


def test_the_eigenvalues_of_a_linearization_are_drawn_as_they_are():
    _, inside, outside = plots.eigenvalue_plane(AROUND).lines
    drawn = np.concatenate(
        [inside.get_xdata() + 1j * inside.get_ydata(), outside.get_xdata() + 1j * outside.get_ydata()]
    )
    assert sorted(drawn, key=str) == sorted(VALUES.ravel(), key=str) and len(outside.get_xdata()) == 3


# Fixed points.


def test_a_portrait_has_a_line_per_sequence_and_markers_by_kind():
    axes = plots.phase_portrait(PLANE, PATHS, PLACES, AROUND)
    trajectories, directions = axes.lines[:BATCH], axes.lines[BATCH:]
    for n, line in enumerate(trajectories):
        np.testing.assert_allclose(np.array(line.get_data()), [PATHS.h[:, n, 1], PATHS.c[:, n, 0]])
    assert len(directions) == 3, "one and two"
    kinds = {dots.get_label(): dots for dots in axes.collections}
    assert list(kinds) == ["stable", "1 unstable direction", "2 unstable directions"] == texts(axes)
    where = np.concatenate([PLACES.h[:, 1:], PLACES.c], axis=1)
    np.testing.assert_allclose(kinds["stable"].get_offsets(), where[[0, 3]])
    np.testing.assert_allclose(kinds["1 unstable direction"].get_offsets(), where[[1]])
    filled = {label: to_rgba(dots.get_facecolor()[0]) != to_rgba("white") for label, dots in kinds.items()}
    assert filled == {"stable": True, "1 unstable direction": False, "2 unstable directions": False}
    assert len({dots.get_paths()[0].vertices.tobytes() for dots in axes.collections}) == 3, "three markers"
    assert axes.get_xlabel() == "PC 1 (60%)" and axes.get_ylabel() == "PC 2 (30%)"


def test_unstable_directions_have_the_same_length_in_the_space_of_the_carry():
    axes = plots.phase_portrait(SPACE, PATHS, PLACES, AROUND)
    ends = [np.array(line.get_data_3d()).T for line in axes.lines[BATCH:]]
    lengths = [np.linalg.norm(end - start) for start, end in ends]
    steps = np.stack([(end - start) / length for (start, end), length in zip(ends, lengths, strict=True)])
    # A pair of complex eigenvectors, (1, ±i, 0)/√2: its plane, not twice the same line.
    np.testing.assert_allclose(np.abs(steps), [[1, 0, 0], [1, 0, 0], [0, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(lengths[0], np.sqrt(2) * np.array(lengths[1:]))
    middle = np.concatenate([PLACES.h, PLACES.c], axis=1)[[1, 2, 2]]
    np.testing.assert_allclose([end.mean(axis=0) for end in ends], middle)


def test_three_components_make_a_picture_in_three_dimensions():
    axes = plots.phase_portrait(SPACE, PATHS)
    assert axes.name == "3d" and axes.get_zlabel() == "PC 3 (20%)" and axes.get_legend() is None
    assert plots.phase_portrait(SPACE, PATHS, ax=(given := panel("3d"))) is given


def test_points_alone_are_all_alike():
    axes = plots.phase_portrait(PLANE, points=PLACES)
    assert not axes.lines and texts(axes) == ["fixed point"] and len(axes.collections[0].get_offsets()) == 4
    assert not plots.phase_portrait(PLANE, PATHS, jax.tree.map(lambda v: v[:0], PLACES)).collections, "none found"


def test_a_portrait_of_a_real_net_equals_its_projection():
    params, xs, carry = draw(LSTM)
    carries = trace(LSTM, params, xs, carry).carry
    plane = principal_components(carries, 2)
    axes = plots.phase_portrait(plane, carries)
    want = np.asarray(plane.project(carries))
    for n, line in enumerate(axes.lines):
        np.testing.assert_allclose(np.array(line.get_data()).T, want[:, n], atol=1e-12)


# Lyapunov exponents.


def test_exponents_are_drawn_by_number_with_their_range_and_reference():
    axes = plots.lyapunov_spectrum(EXPONENTS, reference=[0.906, 0.0])
    drawn = {line.get_label(): line.get_data() for line in axes.lines}
    np.testing.assert_allclose(drawn["measured"], [[1, 2, 3], EXPONENTS.mean(axis=0)])
    np.testing.assert_allclose(drawn["reference"], [[1, 2], [0.906, 0]])
    (bars,) = axes.collections
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], np.sort(EXPONENTS, axis=0).T)
    assert axes.get_xlim() == (0.5, 3.5) and texts(axes) == ["measured", "reference"]
    alone = plots.lyapunov_spectrum(EXPONENTS[0])
    assert not alone.collections and alone.get_legend() is None


# Errors.


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: plots.gate_map(GATES, "f"), TypeError, "gate_map: recorded must be what trace returns, got LSTMGates"),
        (lambda: plots.gate_map(ONE, "z"), ValueError, "gate_map: name must be one of i, f, g, o, h, c, got 'z'"),
        (lambda: plots.gate_map(TRACE, "f"), ValueError, "one sequence, got f [5, 3, 4]; choose one with `sequence`"),
        (lambda: plots.gate_map(ONE, "f", sequence=0), ValueError, "got f [5, 4]; leave `sequence` out"),
        (lambda: plots.gate_map(TRACE, "f", sequence=3), ValueError, "sequence must be 0 to 2, got 3"),
        (lambda: plots.gate_map(ONE, "f", units=[0, 4]), ValueError, "units must be 0 to 3, got 4"),
        (lambda: plots.gate_map(ONE, "f", labels="ab"), ValueError, "one text for each of 5 steps, got 2"),
        (lambda: plots.gate_map(jax.tree.map(lambda v: v[:0], ONE), "f"), ValueError, "at least one step and one unit"),
        (lambda: plots.flow_by_lag(FLOW, band=(0.9, 0.1)), ValueError, "flow_by_lag: band must be two quantiles"),
        (lambda: plots.flow_by_lag(FLOW, band=3), ValueError, "flow_by_lag: band must be two quantiles"),
        (lambda: plots.flow_by_lag({}), ValueError, "flow must be what gradient_flow returns, [time, *batch, units], got {}"),
        (lambda: plots.flow_by_lag(np.ones(5)), ValueError, "[time, *batch, units], got float64[5]"),
        (lambda: plots.flow_by_lag(FLOW, ax=3), TypeError, "flow_by_lag: ax must be Axes of matplotlib, such as plt.gca"),
        (lambda: plots.flow_by_lag(0 * FLOW.h), ValueError, "flow must end with a gradient that is not 0 or NaN; let"),
        (lambda: plots.flow_by_lag(FLOW.h[:0]), ValueError, "flow must end with a gradient that is not 0"),
        (lambda: plots.source_matrix(FLOW), TypeError, "source_matrix: sources must be what gradient_sources returns"),
        (lambda: plots.source_matrix(SOURCES, "w"), ValueError, "leaf must be one of a, b, got 'w'"),
        (lambda: plots.source_matrix(SOURCES, decades=0), ValueError, "decades must be a number above 0, got 0"),
        (lambda: plots.source_matrix(SOURCES._replace(norms=np.zeros((2, 2)))), ValueError, "is the loss constant?"),
        (lambda: plots.error_by_step(FLOW, "mine"), TypeError, "error_by_step: found must be what compare_gradients"),
        (lambda: plots.error_by_step(COMPARED_GRADIENTS, "rtrl"), ValueError, "got 'rtrl'; these are bulk, mine"),
        (lambda: plots.error_by_step(COMPARED_GRADIENTS._replace(by_step={}), "bulk"), ValueError, "with by_step=True"),
        (lambda: plots.eigenvalue_plane(np.ones((3, 2))), ValueError, "jacobians must be [*lead, n, n] or from lin"),
        (lambda: plots.phase_portrait(PATHS), TypeError, "components must be what principal_components returns"),
        (lambda: plots.phase_portrait(PLANE._replace(axes=np.eye(3)[:1])), ValueError, "components must be 2 or 3, got"),
        (lambda: plots.phase_portrait(SPACE, PATHS, ax=panel()), ValueError, "ax must have 3 dimensions for 3 comp"),
        (lambda: plots.phase_portrait(PLANE, ax=panel("3d")), ValueError, "ax must have 2 dimensions for 2 components"),
        (lambda: plots.phase_portrait(PLANE, PATHS.h), ValueError, "carries must be carries of 3 numbers"),
        (lambda: plots.phase_portrait(PLANE, None, FixedPoints(PLACES, *[np.zeros(4)] * 4)), ValueError,
         "carries of 3 numbers, such as trace(...).carry or fixed_points(...).carry, got carry.h float64"),
        (lambda: plots.phase_portrait(PLANE, None, PATHS), ValueError, "points must have leaves [points, n]"),
        (lambda: plots.phase_portrait(PLANE, None, PLACES, PLACES), TypeError, "around must be what linearize returns"),
        (lambda: plots.phase_portrait(PLANE, PATHS, None, AROUND), ValueError, "around must be about these 0 points"),
        (lambda: plots.lyapunov_spectrum(np.zeros((2, 0))), ValueError, "exponents must be [*batch, num_exponents]"),
        (lambda: plots.lyapunov_spectrum([0.1], reference=[1, 2]), ValueError, "reference has 2 values for 1 exponent"),
    ],
)  # fmt: skip
def test_an_error_says_what_is_wrong(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert words in str(raised.value) and str(raised.value).startswith("plots.")
    assert not plt.get_fignums(), "no empty figure stays behind"


def test_matplotlib_is_loaded_when_a_function_is_called_and_named_if_missing():
    code = (
        "import sys, jaxlstm; from jaxlstm import plots\n"
        "assert not [name for name in sys.modules if name.startswith('matplotlib')]\n"
        "sys.modules['matplotlib'] = None\n"
        "try: jaxlstm.plots.lyapunov_spectrum([0.1])\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "jaxlstm.plots needs matplotlib: pip install 'jaxlstm[plots]'\n"


# The benchmark's picture and the gallery.


def test_the_picture_of_the_benchmark_has_a_row_per_library_and_a_dot_per_shape(tmp_path, monkeypatch):
    shape = {"jaxlstm": {"median": 2.0}, "Equinox": {"median": 3.0}, "torch": {"median": 1.0}}
    twice = {name: {"median": 2 * time["median"] ** 2} for name, time in shape.items()}
    no_torch = [{name: time for name, time in row.items() if name != "torch"} for row in (shape, twice)]
    rows = [{"forward": row, "gradient": gradient} for row, gradient in zip((shape, twice), no_torch, strict=True)]
    monkeypatch.setattr(benchmark_plots.plt, "close", lambda figure: None)
    assert benchmark_plots.benchmark(tmp_path / "a.png", {"shapes": rows}).stat().st_size > 10_000
    gradient, forward = plt.gcf().axes
    assert [tick.get_text() for tick in gradient.get_yticklabels()] == ["Equinox", "torch"]
    dots, mean, *torch = [line.get_xdata() for line in forward.lines]
    np.testing.assert_allclose(dots, [1.5, 2.25])
    np.testing.assert_allclose(mean, [np.sqrt(1.5 * 2.25)])
    np.testing.assert_allclose(torch[0], [0.5, 0.25])
    assert [line.get_ydata()[0] for line in forward.lines[:4]] == [0, 0, 1, 1]
    assert [text.get_text() for text in gradient.texts] == ["no gradient"]


def gallery():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gallery_shows_every_function():
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    for name in CALLS:
        assert f"plots.{name}(" in page and f"](gallery/{name}.png)" in page
        assert (ROOT / "docs" / "gallery" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.ci
@pytest.mark.documented
@jax.debug_key_reuse(False)
def test_the_gallery_is_drawn_from_its_page(tmp_path):
    namespace, written = gallery().main(tmp_path)
    assert {path.stem for path in written} == CALLS.keys()
    assert all(path.stat().st_size > 10_000 for path in written)
    # What the page says about the pictures.
    assert sorted(namespace["around"].num_unstable) == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert namespace["found"].departures["mine"][:2] == ("gate f", 20)
    reference = np.log(np.abs(namespace["around"].eigenvalues[namespace["stable"], :8]))
    np.testing.assert_allclose(namespace["exponents"], reference, atol=0.02)
