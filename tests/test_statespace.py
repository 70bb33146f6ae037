"""Fixed points, linearizations, closed loops and principal components, against systems with known answers."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from jaxlstm import GRU, LSTM, RNN, Cell, LSTMParams, LSTMState, RNNParams, RNNState, init_stack, unroll, unroll_stack
from jaxlstm.diagnostics import (
    ClosedLoopParams,
    carry_jacobians,
    closed_loop,
    fixed_points,
    linearize,
    lyapunov_exponents,
    principal_components,
    sample_carries,
    stacked,
    trace,
)

import oracles
from cells import LEAKY, B, H, I, T, draw, normal, worst_error

X = normal(9, I)


class Position(NamedTuple):
    s: jax.Array


LINEAR = Cell(  # s' = s A + x W + b: one fixed point, by solving
    init=lambda key, input_size, hidden_size, *, dtype="float32": None,
    initial_carry=lambda params, batch_shape=(): Position(jnp.zeros((*batch_shape, len(params.b)), params.b.dtype)),
    gates=lambda params, carry, z, a: (Position(z + a), z + a),
    recur=lambda params, carry: carry.s @ params.w_hh,
    name="linear",
)


def linear(radius=0.9):
    a = normal(0, H, H)
    a *= radius / np.abs(np.linalg.eigvals(a)).max()
    return RNNParams(*map(jnp.asarray, (normal(1, I, H), a, normal(2, H))))


def starts_of(kind, *shapes, seed=3, scale=1.0, num=40):
    return kind(*(scale * normal(seed + k, num, *shape) for k, shape in enumerate(shapes)))


def test_a_linear_cell_has_the_one_point_that_solves_it():
    params = linear()
    found = fixed_points(LINEAR, params, starts_of(Position, (H,)), X)
    drive = X @ np.asarray(params.w_ih) + np.asarray(params.b)
    want = np.linalg.solve(np.eye(H) - np.asarray(params.w_hh).T, drive)
    assert len(found) == 1 and list(found.num_starts) == [40] and set(found.of_start) == {0}
    assert worst_error(found.carry.s, want[None]) < 1e-10 and found.carry.s.dtype == np.float64
    around = linearize(LINEAR, params, found.carry, X)
    assert worst_error(around.carry_jacobian[0], np.asarray(params.w_hh).T) < 1e-14
    assert worst_error(around.input_jacobian[0], np.asarray(params.w_ih).T) < 1e-14
    eigenvalues = np.linalg.eigvals(np.asarray(params.w_hh))
    assert worst_error(np.sort_complex(around.eigenvalues[0]), np.sort_complex(eigenvalues)) < 1e-10
    assert (around.kind[0], around.num_unstable[0]) == ("stable", 0)
    slowest = -1 / np.log(0.9)
    assert abs(around.time_constants[0, 0] - slowest) < 1e-8 * slowest


def test_a_rotation_that_shrinks_is_stable_and_oscillates():
    turn = np.array([[np.cos(0.3), np.sin(0.3)], [-np.sin(0.3), np.cos(0.3)]])
    params = RNNParams(
        jnp.zeros((1, 3)), jnp.asarray(np.block([[0.9 * turn, np.zeros((2, 1))], [0, 0, 0.5]])), jnp.ones(3)
    )
    found = fixed_points(LINEAR, params, starts_of(Position, (3,)), np.zeros(1))
    around = linearize(LINEAR, params, found.carry, np.zeros(1))
    assert (around.kind[0], around.oscillates.tolist()) == ("stable", [True])
    assert worst_error(np.abs(around.eigenvalues[0]), np.array([0.9, 0.9, 0.5])) < 1e-14
    assert worst_error(around.time_constants[0], -1 / np.log([0.9, 0.9, 0.5])) < 1e-12


def test_a_tanh_unit_has_three_points():
    params = RNNParams(jnp.zeros((1, 1)), jnp.full((1, 1), 2.0), jnp.zeros(1))
    found = fixed_points(RNN, params, RNNState(np.linspace(-1, 1, 41)[:, None]), np.zeros(1))
    root = brentq(lambda s: np.tanh(2 * s) - s, 0.5, 1, xtol=1e-15)
    order = np.argsort(found.carry.h[:, 0])
    assert worst_error(found.carry.h[order, 0], np.array([-root, 0, root])) < 1e-10
    around = linearize(RNN, params, found.carry, np.zeros(1))
    assert worst_error(around.eigenvalues[order, 0].real, np.array([2 * (1 - root**2), 2, 2 * (1 - root**2)])) < 1e-10
    assert list(around.kind[order]) == ["stable", "unstable", "stable"]
    assert list(around.num_unstable[order]) == [0, 1, 0] and not around.oscillates.any()
    assert around.time_constants[order[1], 0] < 0 < around.time_constants[order[0], 0]


def test_a_latch_built_by_hand_has_its_two_states_and_the_saddle_between():
    """c' = f c + tanh(w h), h' = tanh(c'), by gates that biases hold open, f = 1/2."""
    w, f = 2.0, 0.5
    b = jnp.array([50.0, 0.0, 0.0, 50.0])  # i and o open, f half open
    w_hh = jnp.array([[0.0, 0.0, w, 0.0]])
    params = LSTMParams(jnp.zeros((1, 4)), w_hh, b)
    starts = starts_of(LSTMState, (1,), (1,), scale=2)
    found = fixed_points(LSTM, params, starts, np.zeros(1))
    root = brentq(lambda c: f * c + np.tanh(w * np.tanh(c)) - c, 0.5, 3, xtol=1e-15)
    order = np.argsort(found.carry.c[:, 0])
    c = np.array([-root, 0, root])
    assert worst_error(found.carry.c[order, 0], c) < 1e-10 and worst_error(found.carry.h[order, 0], np.tanh(c)) < 1e-10
    # The Jacobian has rank 1, so its eigenvalues are its trace and 0.
    h = np.tanh(c)
    leading = f + (1 - h**2) * w * (1 - np.tanh(w * h) ** 2)
    around = linearize(LSTM, params, found.carry, np.zeros(1))
    assert worst_error(around.eigenvalues[order].real, np.stack([leading, 0 * leading], -1)) < 1e-10
    assert list(around.kind[order]) == ["stable", "saddle", "stable"]


def numpy_leaves(tree):
    return list(map(np.asarray, jax.tree.leaves(tree)))


@pytest.mark.parametrize(
    "cell, step",
    [
        (LSTM, oracles.lstm_step),
        pytest.param(GRU, oracles.gru_step, marks=pytest.mark.ci),
        pytest.param(RNN, oracles.rnn_step(np.tanh), marks=pytest.mark.ci),
        pytest.param(LEAKY, oracles.leaky_step, marks=pytest.mark.ci),
    ],
    ids=["LSTM", "GRU", "RNN", "a user's cell"],
)
def test_a_step_maps_every_point_to_itself(cell, step):
    params, xs, _ = draw(cell)
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    starts = sample_carries(jax.random.key(0), trace_or_unroll(cell, params, xs), 60, noise=2.0)
    found = fixed_points(cell, params, starts, X)
    assert len(found) >= 1 and found.num_starts.sum() == (found.of_start >= 0).sum() > 30
    assert list(found.num_starts) == sorted(found.num_starts, reverse=True)
    leaves = jax.tree.leaves(found.carry)
    for n in range(len(found)):
        carry = tuple(leaf[n] for leaf in leaves)
        after, _ = step(numpy_leaves(params), carry, X)
        assert worst_error(tuple(after), carry) < 1e-10
        # The input Jacobian and the carry Jacobian, by differences of the NumPy step.
        around = linearize(cell, params, jax.tree.map(lambda leaf, n=n: leaf[n], found.carry), X)
        flat = np.concatenate(carry)
        split = np.cumsum([len(leaf) for leaf in carry])[:-1]

        def moved(s, x, split=split):
            return np.concatenate(step(numpy_leaves(params), tuple(np.split(s, split)), x)[0])

        by_input = [(moved(flat, X + e) - moved(flat, X - e)) / 2e-6 for e in 1e-6 * np.eye(I)]
        by_carry = [(moved(flat + e, X) - moved(flat - e, X)) / 2e-6 for e in 1e-6 * np.eye(len(flat))]
        assert worst_error(around.input_jacobian, np.stack(by_input, -1)) < 1e-8
        assert worst_error(around.carry_jacobian, np.stack(by_carry, -1)) < 1e-8
        j, right, left, values = around.carry_jacobian, around.right, around.left, around.eigenvalues
        assert worst_error(abs(j @ right - right * values), 0 * abs(right)) < 1e-10
        assert worst_error(abs(left @ j - values[:, None] * left), 0 * abs(left)) < 1e-8
        assert worst_error(abs(np.diagonal(left @ right) - 1), np.zeros(len(j))) < 1e-10
        assert (np.diff(abs(values)) <= 0).all()


def trace_or_unroll(cell, params, xs):
    """Return carries [steps, ...] that the cell passes through."""
    carry, carries = cell.initial_carry(params, (B,)), []
    for x in xs:
        carry, _ = cell.step(params, carry, x)
        carries.append(carry)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *carries)


def test_a_stack_is_a_cell_of_lists():
    layers = init_stack(jax.random.key(0), GRU, I, [H, 3], dtype="float64")
    cell, xs = stacked(GRU), normal(1, T, B, I)
    assert cell is stacked(GRU)
    (carries, ys), (want, want_ys) = unroll(cell, layers, xs), unroll_stack(GRU, layers, xs)
    assert worst_error((carries, ys), (want, want_ys)) < 1e-13
    of = lambda run: jax.grad(lambda layers: (run(layers)[1] ** 2).sum())(layers)
    assert worst_error(of(lambda v: unroll(cell, v, xs)), of(lambda v: unroll_stack(GRU, v, xs))) < 1e-12
    starts = [type(want[0])(normal(2, 20, H)), type(want[0])(normal(3, 20, 3))]
    found = fixed_points(cell, layers, starts, X)
    # The lower layer rests by itself, and the upper one reads what it puts out.
    lower = fixed_points(GRU, layers[0], starts[0], X)
    assert len(found) == len(lower) == 1
    assert worst_error(found.carry[0].h, lower.carry.h) < 1e-10
    upper = fixed_points(GRU, layers[1], starts[1], lower.carry.h[0])
    assert worst_error(found.carry[1].h, upper.carry.h) < 1e-10
    # The lower layer does not read the upper one, so each layer's own Jacobian is a block on the diagonal.
    jacobian = linearize(cell, layers, found.carry, X).carry_jacobian[0]
    own = linearize(GRU, layers[0], lower.carry, X), linearize(GRU, layers[1], upper.carry, lower.carry.h[0])
    assert worst_error((jacobian[:H, :H], jacobian[H:, H:]), tuple(around.carry_jacobian[0] for around in own)) < 1e-10
    assert not jacobian[:H, H:].any() and jacobian[H:, :H].any()


def test_a_stack_has_a_trace_with_the_gates_of_every_layer():
    layers, xs = init_stack(jax.random.key(0), GRU, I, [H, 3], dtype="float64"), normal(1, T, B, I)
    traced = trace(stacked(GRU), layers, xs)
    lower = trace(GRU, layers[0], xs)
    upper = trace(GRU, layers[1], lower.y)
    assert worst_error(traced.gates, [lower.gates, upper.gates]) < 1e-14
    assert worst_error(traced.carry, [lower.carry, upper.carry]) < 1e-14
    starts = sample_carries(jax.random.key(1), traced.carry, 20)
    assert len(fixed_points(stacked(GRU), layers, starts, X)) == 1
    nameless = stacked(dataclasses.replace(GRU, activations=None, gates_jvp=None))
    with pytest.raises(ValueError, match=r"trace: stacked\(GRU\) does not name its gates"):
        trace(nameless, layers, xs)


# Starts that lead nowhere, and options.

NOWHERE = Cell(  # s' = s + 1 + s²/9: no point, and a speed that has a minimum
    init=lambda key, input_size, hidden_size, *, dtype="float32": None,
    initial_carry=lambda params, batch_shape=(): Position(jnp.zeros((*batch_shape, 1), params["b"].dtype)),
    gates=lambda params, carry, z, a: (Position(carry.s + 1 + carry.s**2 / 9), carry.s),
    project=lambda params, xs: xs,
    recur=lambda params, carry: None,
    name="nowhere",
)


AWAY = dataclasses.replace(  # s' = s + e^(−s): slower and slower, and never at rest
    NOWHERE, gates=lambda params, carry, z, a: (Position(carry.s + jnp.exp(-carry.s)), carry.s), name="away"
)


def test_starts_that_diverge_are_outliers_though_they_become_slow():
    starts = starts_of(Position, (1,))
    found = fixed_points(AWAY, {"b": jnp.zeros(1)}, starts, np.zeros(1), tolerance=1e-20)
    assert len(found) == 0 and set(found.of_start) == {-2} and found.final_speed.max() < 1e-20


def test_nothing_found_is_an_empty_result():
    found = fixed_points(NOWHERE, {"b": jnp.zeros(1)}, starts_of(Position, (1,)), np.zeros(1))
    assert len(found) == 0 and found.carry.s.shape == (0, 1) and found.num_starts.shape == (0,)
    assert set(found.of_start) == {-1} and worst_error(found.final_speed, np.full(40, 0.5)) < 1e-4
    around = linearize(NOWHERE, {"b": jnp.zeros(1)}, found.carry, np.zeros(1))
    assert around.eigenvalues.shape == (0, 1) and around.kind.shape == (0,)
    none = fixed_points(LINEAR, linear(), Position(np.zeros((0, H))), X)
    assert len(none) == 0 and none.of_start.shape == (0,)


@jax.debug_nans(False)
def test_a_start_that_is_not_a_number_ends_nowhere_and_disturbs_no_other():
    starts = starts_of(Position, (H,))
    starts.s[3] = np.nan
    starts.s[5] = np.inf
    found = fixed_points(LINEAR, linear(), starts, X)
    assert len(found) == 1 and sorted(np.flatnonzero(found.of_start == -1)) == [3, 5]


@jax.debug_nans(False)
def test_points_far_from_the_starts_are_outliers_and_close_points_are_one():
    params = RNNParams(jnp.zeros((1, 1)), jnp.full((1, 1), 2.0), jnp.zeros(1))
    starts = RNNState(np.array([*np.linspace(-0.02, 0.02, 20), 0.9, np.nan])[:, None])
    near, far = (fixed_points(RNN, params, starts, np.zeros(1), outlier_scale=scale) for scale in (1.0, 100.0))
    assert len(near) == 1 and -2 in near.of_start and abs(near.carry.h[0, 0]) < 1e-10
    assert len(far) > len(near) and -2 not in far.of_start
    spread = RNNState(np.linspace(-1, 1, 41)[:, None])
    assert len(fixed_points(RNN, params, spread, np.zeros(1), merge_distance=5.0)) == 1
    once = fixed_points(RNN, params, spread, np.zeros(1), max_iterations=1)
    assert (once.of_start == -1).sum() > 20
    assert (fixed_points(RNN, params, spread, np.zeros(1), max_iterations=1, tolerance=9.0).of_start >= 0).all()


def test_float32_parameters_give_points_of_float64():
    with jax.enable_x64(False):
        params = LSTM.init(jax.random.key(0), I, H)
        starts = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), starts_of(LSTMState, (H,), (H,)))
        found = fixed_points(LSTM, params, starts, jnp.ones(I))
        assert len(found) == 1 and found.speed[0] < 1e-25 and found.carry.c.dtype == np.float64
        assert linearize(LSTM, params, found.carry, jnp.ones(I)).carry_jacobian.dtype == np.float64


class Counted(NamedTuple):
    h: jax.Array
    count: jax.Array


COUNTED = Cell(
    init=RNN.init,
    initial_carry=lambda params, batch_shape=(): Counted(
        RNN.initial_carry(params, batch_shape).h, jnp.zeros(batch_shape, jnp.int32)
    ),
    gates=lambda params, carry, z, a: (Counted(jnp.tanh(z + a), carry.count + 1), jnp.tanh(z + a)),
    name="counted",
)
PARAMS = LSTM.init(jax.random.key(0), I, H, dtype="float64")
STARTS = starts_of(LSTMState, (H,), (H,))
BAD = {
    "an integer leaf": (lambda: fixed_points(COUNTED, RNN.init(jax.random.key(0), I, H), Counted(np.zeros((4, H)), np.zeros(4, int)), X), TypeError, "fixed_points: the carry of counted has a leaf of int32, which has no derivative"),
    "no starts": (lambda: fixed_points(LSTM, PARAMS, (), X), ValueError, r"fixed_points: starts must be carries \[points, ...\]"),
    "starts of two numbers": (lambda: fixed_points(LSTM, PARAMS, LSTMState(STARTS.h, STARTS.c[1:]), X), ValueError, "fixed_points: starts must be carries"),
    "another cell's starts": (lambda: fixed_points(LSTM, PARAMS, RNNState(STARTS.h), X), TypeError, "fixed_points: .*of LSTM must be LSTMState.*got RNNState"),
    "an input of another width": (lambda: fixed_points(LSTM, PARAMS, STARTS, X[1:]), ValueError, "fixed_points: .*features"),
    "no cell": (lambda: linearize(PARAMS, PARAMS, STARTS, X), TypeError, "linearize: cell must be a Cell"),
    "a negative tolerance": (lambda: fixed_points(LSTM, PARAMS, STARTS, X, tolerance=-1.0), ValueError, "fixed_points: tolerance must be a positive number, got -1.0"),
    "no iterations": (lambda: fixed_points(LSTM, PARAMS, STARTS, X, max_iterations=0), ValueError, "fixed_points: max_iterations"),
    "too many components": (lambda: principal_components(STARTS, 2 * H + 1), ValueError, "principal_components: num"),
    "nothing to draw from": (lambda: sample_carries(jax.random.key(0), LSTMState(np.zeros((0, H)), np.zeros((0, H))), 3), ValueError, "sample_carries: carries must be"),
    "a readout that is no function": (lambda: closed_loop(LSTM, 3), TypeError, "closed_loop: readout must be"),
    "no init": (lambda: stacked(LSTM).init(jax.random.key(0), 1, 2), TypeError, "init: a cell from closed_loop or stacked has none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


# Nets that feed themselves.


def readout(w, carry):
    return carry.h @ w


@pytest.mark.ci
@pytest.mark.parametrize("cell", [LSTM, RNN], ids=["LSTM", "RNN"])
def test_a_closed_loop_is_the_net_with_its_readout_folded_into_its_weights(cell):
    params, _, carry = draw(cell)
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    w = jnp.asarray(normal(8, H, I))
    loop, both = closed_loop(cell, readout), ClosedLoopParams(params, w)
    assert loop is closed_loop(cell, readout)
    folded = params._replace(w_hh=params.w_hh + w @ params.w_ih)  # x = h w
    nothing, zeros = jnp.zeros((50, B, 0)), jnp.zeros((50, B, I))
    own, written_out = unroll(loop, both, nothing, carry), unroll(cell, folded, zeros, carry)
    assert worst_error(own, written_out) < 1e-9  # 50 steps of a net that may be chaotic
    recorded, want = trace(loop, both, nothing[:5], carry), trace(cell, folded, zeros[:5], carry)
    assert worst_error((recorded.carry, recorded.gates), (want.carry, want.gates)) < 1e-13
    exponents = [
        lyapunov_exponents(c, p, xs, carry, num_exponents=3, num_warmup=5)
        for c, p, xs in ((loop, both, nothing), (cell, folded, zeros))
    ]
    assert worst_error(*exponents) < 1e-6
    jacobians = carry_jacobians(loop, both, nothing[:5], carry), carry_jacobians(cell, folded, zeros[:5], carry)
    assert worst_error(*jacobians) < 1e-12
    starts = jax.tree.map(lambda leaf: normal(4, 30, *leaf.shape[1:]), carry)
    found = fixed_points(loop, both, starts, np.zeros(0)), fixed_points(cell, folded, starts, np.zeros(I))
    assert len(found[0]) == len(found[1]) >= 1
    order = [np.lexsort(np.round(jax.tree.leaves(f.carry)[0].T, 6)) for f in found]
    assert worst_error(*(jax.tree.map(lambda v, o=o: v[o], f.carry) for f, o in zip(found, order, strict=True))) < 1e-8
    loss = lambda how: lambda p: (unroll(loop, p, nothing[:7], carry, gradient=how)[1] ** 2).sum()
    gradients = [jax.grad(loss(how))(both) for how in ("bulk", "scan")]
    assert worst_error(*gradients) < 1e-12
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients[0].readout))


# Principal components and samples.


def test_principal_components_are_the_eigenvectors_of_the_covariance():
    carries = LSTMState(normal(0, T, B, H), 3 * normal(1, T, B, H))
    found = principal_components(carries, 3)
    rows = np.concatenate(carries, -1).reshape(-1, 2 * H)
    variances, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    assert worst_error(found.mean, rows.mean(axis=0)) < 1e-14
    assert worst_error(found.explained, variances[::-1][:3] / variances.sum()) < 1e-12
    signs = np.sign((np.asarray(found.axes) * vectors[:, ::-1][:, :3].T).sum(axis=-1))
    assert worst_error(found.axes * signs[:, None], vectors[:, ::-1][:, :3].T) < 1e-10
    assert worst_error(found.project(carries), ((rows - rows.mean(axis=0)) @ found.axes.T).reshape(T, B, 3)) < 1e-13


def test_samples_are_rows_of_the_trace_with_noise():
    carries = LSTMState(jnp.asarray(normal(0, T, B, H)), jnp.asarray(5 * normal(1, T, B, H)))
    rows = np.concatenate(carries, -1).reshape(-1, 2 * H)
    drawn = np.concatenate(sample_carries(jax.random.key(0), carries, 200), -1)
    assert drawn.shape == (200, 2 * H)
    nearest = np.abs(drawn[:, None] - rows[None]).max(-1)
    assert (nearest.min(-1) == 0).all() and len(set(nearest.argmin(-1))) > T * B // 2, "h and c of the same step"
    noisy = np.concatenate(sample_carries(jax.random.key(0), carries, 4000, noise=0.5), -1)
    quiet = np.concatenate(sample_carries(jax.random.key(0), carries, 4000), -1)
    assert worst_error((noisy - quiet).std(axis=0), 0.5 * rows.std(axis=0)) < 0.1
