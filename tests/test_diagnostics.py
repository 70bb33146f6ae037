"""The gates, gradient flow, Jacobians and truncated gradient of a net, against NumPy, complex steps, closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlstm import GRU, LSTM, LSTMState, make_rnn, unroll
from jaxlstm.diagnostics import (
    carry_jacobians,
    cell_state_terms,
    gradient_flow,
    jacobian_products,
    lyapunov_exponents,
    term_shares,
    trace,
    truncated_gradient,
)

import oracles
from cells import CELLS, HOLES, RESET, B, H, I, T, draw, normal, worst_error
from sweeps import some

OPTIONS = {"plain": {}, "masked, reset and reversed": {"mask": HOLES, "reset": RESET, "reverse": True}}
WEIGHT = normal(50, T, B, H)


def weighted(ys):
    return (ys * WEIGHT).sum()


def numpy(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


# Gates.


@pytest.mark.parametrize("way", OPTIONS)
def test_a_trace_holds_the_gates_of_a_numpy_loop(way):
    params, xs, carry = draw(LSTM)
    seen = {}

    def step(params, state, x):
        z = x @ params[0] + state[0] @ params[1] + params[2]
        seen[len(seen)] = [*state, *np.split(z, 4)]
        return oracles.lstm_step(params, state, x)

    zero = tuple(np.zeros((B, H)) for _ in carry)
    oracles.loop(step, numpy(params), np.asarray(xs), numpy(carry), reset_carry=zero, **OPTIONS[way])
    got = trace(LSTM, params, xs, carry, **OPTIONS[way])
    mask = OPTIONS[way].get("mask", np.ones((T, B), bool))
    times = range(T)[::-1] if OPTIONS[way].get("reverse") else range(T)
    places = [(t, n) for n in range(B) for t in times if mask[t, n]]
    assert len(seen) == len(places)
    for place, (h, c, z_i, z_f, z_g, z_o) in zip(places, seen.values(), strict=True):
        i, f, g, o = oracles.sigmoid(z_i), oracles.sigmoid(z_f), np.tanh(z_g), oracles.sigmoid(z_o)
        own = jax.tree.map(lambda leaf, place=place: np.asarray(leaf[place]), got)
        assert (
            worst_error([own.start.h, own.start.c, own.z + own.a], [h, c, np.concatenate([z_i, z_f, z_g, z_o])]) < 1e-14
        )
        assert worst_error(list(own.gates), [i, f, g, o]) < 1e-14
        assert worst_error([own.carry.c, own.y], [f * c + i * g, o * np.tanh(f * c + i * g)]) < 1e-14
    assert not any(leaf[~mask].any() for leaf in numpy(got))


def test_tracing_a_cell_that_does_not_name_its_gates_is_refused():
    leaky = CELLS["leaky"][0]
    params, xs, _ = draw(leaky)
    with pytest.raises(ValueError, match="trace: leaky does not name its gates; give the Cell `activations`"):
        trace(leaky, params, xs)


# Gradient flow.


def probed_steps(name):
    """Return the NumPy step of a cell with a probe on every leaf of its carry; its input is x, then the probes."""
    step = CELLS[name][1]

    def of_lstm(params, state, x):
        w_ih, w_hh, b = params
        z_i, z_f, z_g, z_o = np.split(x[:I] @ w_ih + state[0] @ w_hh + b, 4)
        c = oracles.sigmoid(z_f) * state[1] + oracles.sigmoid(z_i) * np.tanh(z_g) + x[I + H :]
        h = oracles.sigmoid(z_o) * np.tanh(c) + x[I : I + H]
        return (h, c), h

    def of_one_leaf(params, state, x):
        ((s,), _) = step(params, state, x[:I])
        s = s + x[I:]
        return (s,), s**2 if name == "leaky" else s

    return of_lstm if name == "LSTM" else of_one_leaf


@pytest.mark.parametrize(
    "name", ["LSTM", "leaky", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GRU", "RNN"))]
)
@pytest.mark.parametrize("way", OPTIONS)
def test_gradient_flow_is_the_derivative_by_a_probe_at_every_step(name, way):
    cell = CELLS[name][0]
    params, xs, carry = draw(cell)
    zero = tuple(np.zeros((B, H)) for _ in carry)

    def loss(probes):
        inputs = np.concatenate([np.asarray(xs), probes], axis=-1)
        start = tuple(leaf.astype(complex) for leaf in numpy(carry))
        _, ys = oracles.loop(probed_steps(name), numpy(params), inputs, start, reset_carry=zero, **OPTIONS[way])
        return (ys * WEIGHT).sum()

    (want,) = oracles.complex_step_gradient(loss, [np.zeros((T, B, H * len(carry)))])
    got = gradient_flow(cell, params, xs, weighted, carry, **OPTIONS[way])
    assert worst_error(np.concatenate(numpy(got), axis=-1), want) < 1e-13


def test_gradient_flow_is_d_h_and_d_c_of_the_hand_derived_gradient():
    params, xs, carry = draw(LSTM)
    recorded = trace(LSTM, params, xs, carry)
    i, f, g, o = map(np.asarray, recorded.gates)
    c_prev, tanh_c, w_hh = np.asarray(recorded.start.c), np.tanh(recorded.carry.c), np.asarray(params.w_hh)
    d_h, d_c, want = np.zeros((B, H)), np.zeros((B, H)), {}
    for t in reversed(range(T)):
        d_h = d_h + WEIGHT[t]
        d_c = d_c + d_h * o[t] * (1 - tanh_c[t] ** 2)
        want[t] = (d_h, d_c)
        d_f, d_i, d_g, d_o = d_c * c_prev[t], d_c * g[t], d_c * i[t], d_h * tanh_c[t]
        d_z = [d_i * i[t] * (1 - i[t]), d_f * f[t] * (1 - f[t]), d_g * (1 - g[t] ** 2), d_o * o[t] * (1 - o[t])]
        d_c, d_h = d_c * f[t], np.concatenate(d_z, axis=-1) @ w_hh.T
    got = gradient_flow(LSTM, params, xs, weighted, carry)
    assert worst_error(list(got), [np.stack([want[t][k] for t in range(T)]) for k in (0, 1)]) < 1e-13


def test_gradient_flow_of_a_leaf_that_is_passed_on_unchanged():
    """The leaf is a clock beside the carry: every step reads it and none changes it."""
    cell = dataclasses.replace(
        LSTM,
        initial_carry=lambda params, batch_shape=(): (LSTM.initial_carry(params, batch_shape), jnp.ones(batch_shape)),
        recur=lambda params, carry: LSTM.recur(params, carry[0]),
        gates=lambda params, carry, z, a: (
            lambda new, y: ((new, carry[1]), y * carry[1][..., None])
        )(*LSTM.gates(params, carry[0], z, a)),
        activations=None,
        gates_jvp=None,
    )  # fmt: skip
    params, xs, _ = draw(LSTM)
    _, clock = gradient_flow(cell, params, xs, weighted)
    _, ys = unroll(LSTM, params, xs)
    each = (ys * WEIGHT).sum(axis=-1)  # the clock after step t is read at t + 1, t + 2, ...
    assert worst_error(clock, each[::-1].cumsum(axis=0)[::-1] - each) < 1e-13


def test_probes_work_in_a_jitted_step_and_are_refused_in_a_checkpoint():
    params, xs, carry = draw(LSTM)
    want = gradient_flow(LSTM, params, xs, weighted, carry)
    jitted = dataclasses.replace(LSTM, gates=jax.jit(LSTM.gates), gates_jvp=None)
    assert worst_error(gradient_flow(jitted, params, xs, weighted, carry), want) < 1e-14
    kept = dataclasses.replace(LSTM, gates=jax.checkpoint(LSTM.gates), gates_jvp=None)
    with pytest.raises(ValueError, match=r"gradient_flow: the cell computes its carry inside a (?:checkpoint|remat)"):
        gradient_flow(kept, params, xs, weighted, carry)


# Jacobians.


@pytest.mark.parametrize("name", some(["LSTM", "GRU", "leaky"], "LSTM"))
def test_jacobians_are_the_derivatives_of_a_numpy_step(name):
    cell, step = CELLS[name]
    params, xs, carry = draw(cell)
    got = carry_jacobians(cell, params, xs, carry, mask=HOLES, reset=RESET)
    starts, seen = {}, []

    def noting(params, state, x):
        seen.append(state)
        return step(params, state, x)

    zero = tuple(np.zeros((B, H)) for _ in carry)
    oracles.loop(noting, numpy(params), np.asarray(xs), numpy(carry), HOLES, RESET, zero)
    starts = dict(zip([(t, n) for n in range(B) for t in range(T) if HOLES[t, n]], seen, strict=True))
    size = H * len(carry)
    for t, n in np.ndindex(T, B):
        want = np.zeros((size, size))
        if not RESET[t, n] and not HOLES[t, n]:
            want = np.eye(size)
        elif not RESET[t, n]:
            for k in range(size):
                moved = np.concatenate(starts[t, n]).astype(complex)
                moved[k] += 1e-30j
                new, _ = step(numpy(params), np.split(moved, len(carry)), np.asarray(xs[t, n]))
                want[:, k] = np.concatenate(new).imag / 1e-30
        assert worst_error(got[t, n], want) < 1e-13


@pytest.mark.parametrize("reverse", some([False, True], False))
def test_the_product_of_jacobians_is_the_derivative_of_the_last_carry_by_the_first(reverse):
    params, xs, carry = draw(LSTM)
    jacobians = carry_jacobians(LSTM, params, xs[:, 0], LSTMState(*(leaf[0] for leaf in carry)), reverse=reverse)
    product = np.linalg.multi_dot(list(jacobians if reverse else jacobians[::-1]))
    of_first = lambda flat: jnp.concatenate(
        unroll(LSTM, params, xs[:, 0], LSTMState(*jnp.split(flat, 2)), reverse=reverse)[0]
    )
    want = jax.jacfwd(of_first)(jnp.concatenate([leaf[0] for leaf in carry]))
    assert worst_error(product, want) < 1e-13


def test_jacobian_products_run_from_the_last_carry_to_every_earlier_one():
    params, xs, carry = draw(GRU)
    jacobians = np.asarray(carry_jacobians(GRU, params, xs, carry))
    got = jacobian_products(jacobians)
    for t in range(T):
        want = np.stack([functools.reduce(np.matmul, jacobians[t:, n][::-1]) for n in range(B)])
        assert worst_error(got[t], want) < 1e-14


def test_the_shares_of_the_four_terms_follow_their_norms():
    params, xs, carry = draw(LSTM)
    terms = cell_state_terms(params, xs, carry)
    shares = term_shares(terms)
    norms = np.stack([np.sqrt((np.asarray(term) ** 2).sum((-2, -1))) for term in terms])
    assert worst_error(list(shares), list(norms / norms.sum(0))) < 1e-14
    assert (np.asarray(shares.carousel[0]) == 1).all()


def of_eigenvalues(values):
    """Return a matrix with these eigenvalues that is far from normal."""
    base = normal(3, len(values), len(values)) + np.eye(len(values))
    return base @ np.diag(values) @ np.linalg.inv(base)


IDENTITY = dataclasses.replace(
    make_rnn("tanh"),
    gates=lambda params, carry, z, a: (carry._replace(h=z + a), z + a),
    activations=None,
    gates_jvp=None,
    name="linear RNN",
)


def test_lyapunov_exponents_of_a_linear_net_are_the_logarithms_of_its_eigenvalues():
    values = np.array([1.1, -0.8, 0.5, 0.2])
    w_hh = of_eigenvalues(values)
    assert np.linalg.norm(w_hh @ w_hh.T - w_hh.T @ w_hh) > 0.1 * np.linalg.norm(w_hh) ** 2  # not normal
    params, _, _ = draw(IDENTITY)
    params, xs = params._replace(w_hh=jnp.asarray(w_hh)), jnp.asarray(normal(4, 300, B, I))
    got = lyapunov_exponents(IDENTITY, params, xs, num_exponents=3, num_warmup=200)
    assert np.abs(np.asarray(got) - np.log(np.abs(values))[:3]).max() < 1e-6
    singular = np.log(np.linalg.svd(w_hh, compute_uv=False))[:3]
    assert np.abs(singular - np.log(np.abs(values))[:3]).min() > 0.1  # the growth in a single step would be this


def test_all_lyapunov_exponents_add_up_to_the_mean_log_determinant():
    params, xs, carry = draw(GRU)
    got = lyapunov_exponents(GRU, params, xs, carry, num_exponents=H)
    want = np.linalg.slogdet(np.asarray(carry_jacobians(GRU, params, xs, carry)))[1].mean(axis=0)
    assert worst_error(got.sum(axis=-1), want) < 1e-12


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_exponents": 0}, "num_exponents must be 1 to 8, got 0"),
        ({"num_exponents": 9}, "num_exponents must be 1 to 8, got 9"),
        ({"num_warmup": T}, f"num_warmup must be 0 to {T - 1}, got {T}"),
    ],
)
def test_too_many_exponents_and_warmup_steps_are_refused(settings, message):
    params, xs, _ = draw(LSTM)
    with pytest.raises(ValueError, match=f"lyapunov_exponents: {message}"):
        lyapunov_exponents(LSTM, params, xs, **settings)


def test_the_four_terms_are_the_jacobian_of_c_at_a_fixed_output_gate():
    params, xs, carry = draw(LSTM)
    terms, recorded = cell_state_terms(params, xs, carry), trace(LSTM, params, xs, carry)

    def c_of(c_prev, o_prev, x):
        return LSTM.step(params, LSTMState(o_prev * jnp.tanh(c_prev), c_prev), x)[0].c

    each = jax.vmap(jax.vmap(jax.jacfwd(c_of)))
    want = each(recorded.start.c[1:], recorded.gates.o[:-1], xs[1:])
    assert worst_error(sum(terms)[1:], want) < 1e-12
    assert worst_error(terms.carousel[0], recorded.gates.f[0][..., None] * jnp.eye(H)[None]) == 0
    assert not any(term[0].any() for term in terms[1:])
    assert all(term[1:].any() for term in terms)


def test_with_h_cut_the_last_c_depends_on_the_first_by_the_product_of_f():
    params, xs, carry = draw(LSTM)
    cut = dataclasses.replace(
        LSTM, recur=lambda params, carry: lax.stop_gradient(LSTM.recur(params, carry)), gates_jvp=None
    )
    jacobians = carry_jacobians(cut, params, xs, carry)[..., H:, H:]
    product = np.stack([np.linalg.multi_dot(list(jacobians[::-1, n])) for n in range(B)])
    kept = trace(LSTM, params, xs, carry).gates.f.prod(axis=0)
    assert worst_error(product, kept[..., None] * jnp.eye(H)[None]) < 1e-14


# The gradient of 1997.


def test_the_truncated_gradient_equals_eligibility_traces():
    """E-prop with true learning signals, forward in time, in NumPy (Bellec et al. 2020)."""
    params, xs, carry = draw(LSTM)
    recorded = trace(LSTM, params, xs, carry)
    i, f, g, o = map(np.asarray, recorded.gates)
    c_prev, h_prev, tanh_c = np.asarray(recorded.start.c), np.asarray(recorded.start.h), np.tanh(recorded.carry.c)
    inputs = [np.asarray(xs), h_prev, np.ones((T, B, 1))]
    eligible = [np.zeros((B, v.shape[-1], 3, H)) for v in inputs]  # ∂c / ∂w, for the gates i, f, g
    want = [np.zeros((v.shape[-1], 4, H)) for v in inputs]
    for t in range(T):
        by_z = [g[t] * i[t] * (1 - i[t]), c_prev[t] * f[t] * (1 - f[t]), i[t] * (1 - g[t] ** 2)]
        by_c, by_o = WEIGHT[t] * o[t] * (1 - tanh_c[t] ** 2), WEIGHT[t] * tanh_c[t] * o[t] * (1 - o[t])
        for k, v in enumerate(inputs):
            now = v[t][:, :, None, None] * np.stack(by_z, axis=1)[:, None]
            eligible[k] = f[t][:, None, None] * eligible[k] + now
            want[k][:, :3] += np.einsum("bh,bigh->igh", by_c, eligible[k])
            want[k][:, 3] += np.einsum("bi,bh->ih", v[t], by_o)
    got = truncated_gradient(LSTM, params, xs, weighted, carry)
    flat = [v.reshape(len(v), 4 * H) for v in want]
    assert worst_error(list(got), [flat[0], flat[1], flat[2][0]]) < 1e-13
    exact = jax.grad(lambda params: weighted(unroll(LSTM, params, xs, carry)[1]))(params)
    assert worst_error(got, exact) > 0.01


def test_without_a_recurrent_matmul_the_truncated_gradient_is_the_gradient():
    cell = dataclasses.replace(
        LSTM,
        recur=lambda params, carry: None,
        gates=lambda params, carry, z, a: LSTM.gates(params, carry, z, 0 * z),
        activations=None,
        gates_jvp=None,
    )
    params, xs, carry = draw(LSTM)
    exact = jax.grad(lambda params: weighted(unroll(cell, params, xs, carry)[1]))(params)
    assert worst_error(truncated_gradient(cell, params, xs, weighted, carry), exact) < 1e-14


@pytest.mark.parametrize(
    "call",
    [
        lambda p, x: trace(LSTM, p, x),
        lambda p, x: gradient_flow(LSTM, p, x, jnp.sum),
        lambda p, x: carry_jacobians(LSTM, p, x),
        lambda p, x: lyapunov_exponents(LSTM, p, x),
        lambda p, x: truncated_gradient(LSTM, p, x, jnp.sum),
    ],
    ids=["trace", "gradient_flow", "carry_jacobians", "lyapunov_exponents", "truncated_gradient"],
)
def test_errors_name_the_function_that_was_called(call, request):
    params, xs, _ = draw(LSTM)
    name = request.node.callspec.id
    with pytest.raises(ValueError, match=f"{name}: xs has {I - 1} features, params.w_ih expects {I}"):
        call(params, xs[..., 1:])


@pytest.mark.parametrize("call", [gradient_flow, truncated_gradient])
@pytest.mark.parametrize("loss_fn, got", [(lambda ys: ys[-1], rf"\[{B}, {H}\]"), (lambda ys: None, "NoneType")])
def test_a_loss_that_does_not_return_a_number_is_refused(call, loss_fn, got):
    params, xs, _ = draw(LSTM)
    with pytest.raises(ValueError, match=f"{call.__name__}: loss_fn must return one number, got {got}"):
        call(LSTM, params, xs, loss_fn)


def test_integer_inputs_are_refused():
    params, xs, _ = draw(LSTM)
    with pytest.raises(TypeError, match="gradient_flow: xs must be floating, got int"):
        gradient_flow(LSTM, params, xs.astype(int), jnp.sum)


def test_the_leading_lyapunov_exponents_of_a_bfloat16_net_are_near_those_of_float32():
    params, xs, carry = draw(LSTM, dtype=np.float32)
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), (params, xs, carry))
    found, want = (lyapunov_exponents(LSTM, p, x, carry=c, num_exponents=4) for p, x, c in (half, (params, xs, carry)))
    # Ten roundings of 2^-8 a step. Of eight exponents the last, near −6, would be lost among them.
    np.testing.assert_allclose(found, want, atol=10 * 2**-8)
