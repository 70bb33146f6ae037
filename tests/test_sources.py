"""The sources of a gradient, against a NumPy backward pass that keeps the uses of the weights apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import LSTM, unroll
from jaxlstm.diagnostics import gradient_cosine, gradient_sources, trace
from jaxlstm.rtrl import cut_recurrence

from cells import CELLS, HOLES, RESET, B, H, I, T, draw, normal, worst_error

WEIGHT = jnp.asarray(normal(50, T, B, H))
OPTIONS = {"plain": {}, "masked and reset": {"mask": HOLES, "reset": RESET}}


def step_loss(y, t):
    return (jnp.sin(y) * WEIGHT[t]).sum()


def losses_of(cell, params, xs, carry, **options):
    return jax.vmap(step_loss)(unroll(cell, params, xs, carry, gradient="scan", **options)[1], jnp.arange(T))


def rows(found):
    """Return all of G, [t, s, ...]."""
    return jax.vmap(found.row)(jnp.arange(T))


@pytest.mark.parametrize("way", [pytest.param("plain", marks=pytest.mark.slow), "masked and reset"])
@pytest.mark.parametrize(
    "name", ["LSTM", pytest.param("leaky", marks=pytest.mark.ci), pytest.param("GRU", marks=pytest.mark.slow)]
)
def test_the_parts_add_up_to_the_gradient(name, way):
    cell = CELLS[name][0]
    params, xs, carry = draw(cell)
    found = jax.jit(lambda *v: gradient_sources(cell, *v[:2], step_loss, v[2], **OPTIONS[way]))(params, xs, carry)
    each = jax.jacrev(lambda params: losses_of(cell, params, xs, carry, **OPTIONS[way]))(params)
    whole = jax.grad(lambda params: losses_of(cell, params, xs, carry, **OPTIONS[way]).sum())(params)
    total = lambda axes: lambda tree: jax.tree.map(lambda g: g.sum(axes), tree)
    assert worst_error(found.losses, losses_of(cell, params, xs, carry, **OPTIONS[way])) < 1e-14
    assert worst_error(found.by_loss, each) < 1e-12
    assert worst_error(total(1)(rows(found)), each) < 1e-12
    for parts in (total((0, 1))(rows(found)), total(0)(found.by_loss), total(0)(found.by_lag)):
        assert worst_error(parts, whole) < 1e-12
    norms = jax.tree.map(lambda g: jnp.sqrt((g**2).sum(tuple(range(2, g.ndim)))), rows(found))
    assert worst_error(found.norms, norms) < 1e-14
    assert not any(np.triu(leaf, 1).any() for leaf in jax.tree.leaves(found.norms))


def test_every_use_of_the_weights_equals_a_numpy_backward_pass():
    params, xs, carry = draw(LSTM)
    recorded = trace(LSTM, params, xs, carry)
    i, f, g, o = map(np.asarray, recorded.gates)
    h_prev, c_prev, tanh_c = np.asarray(recorded.start.h), np.asarray(recorded.start.c), np.tanh(recorded.carry.c)
    want = np.zeros((T, T, H, 4 * H))
    for t in range(T):
        d_h, d_c = np.cos(recorded.y[t]) * np.asarray(WEIGHT[t]), np.zeros((B, H))
        for s in range(t, -1, -1):
            d_c = d_c + d_h * o[s] * (1 - tanh_c[s] ** 2)
            d_f, d_i, d_g, d_o = d_c * c_prev[s], d_c * g[s], d_c * i[s], d_h * tanh_c[s]
            d_z = [d_i * i[s] * (1 - i[s]), d_f * f[s] * (1 - f[s]), d_g * (1 - g[s] ** 2), d_o * o[s] * (1 - o[s])]
            d_z = np.concatenate(d_z, axis=-1)
            want[t, s] = h_prev[s].T @ d_z
            d_c, d_h = d_c * f[s], d_z @ np.asarray(params.w_hh).T
    found = gradient_sources(LSTM, params, xs, step_loss, carry)
    assert worst_error(rows(found).w_hh, want) < 1e-12
    assert worst_error(found.norms.w_hh, np.linalg.norm(want, axis=(2, 3))) < 1e-12
    by_lag = [sum(want[t, t - k] for t in range(k, T)) for k in range(T)]
    assert worst_error(found.by_lag.w_hh, np.stack(by_lag)) < 1e-12


def test_the_truncated_gradient_is_exact_at_lag_0_and_changes_direction_later():
    params, xs, carry = draw(LSTM)
    exact, cut = (gradient_sources(cell, params, xs, step_loss, carry).by_lag for cell in (LSTM, cut_recurrence(LSTM)))
    cosines = np.asarray(jax.vmap(gradient_cosine)(cut, exact))
    assert cosines[0] > 1 - 1e-12
    flat = [np.concatenate([np.ravel(leaf[3]) for leaf in tree]) for tree in (cut, exact)]
    assert abs(cosines[3] - np.dot(*flat) / np.prod([np.linalg.norm(v) for v in flat])) < 1e-12
    assert cosines[3] < 0.99


def test_memory_grows_linearly_with_the_number_of_steps():
    params, _, _ = draw(LSTM, dtype=np.float32)
    of = jax.jit(lambda xs: gradient_sources(LSTM, params, xs, lambda y, t: (y**2).sum()).by_lag)
    num_bytes = [
        of.lower(jax.ShapeDtypeStruct((num_steps, B, I), np.float32)).compile().memory_analysis().temp_size_in_bytes
        for num_steps in (50, 100)
    ]
    assert num_bytes[1] < 2.5 * num_bytes[0]


@pytest.mark.parametrize(
    "loss, message",
    [(lambda ys: ys.sum(), r"step_loss must take \(y_t, t\)"), (lambda y, t: y, rf"return one number.*\[{B}, {H}\]")],
)
def test_a_loss_that_is_not_a_sum_over_steps_is_refused(loss, message):
    params, xs, _ = draw(LSTM)
    with pytest.raises(ValueError, match=f"gradient_sources: .*{message}"):
        gradient_sources(LSTM, params, xs, loss)


@pytest.mark.ci
def test_tiny_gradients_have_norms_and_angles_in_float32():
    params, xs, carry = draw(LSTM, dtype=np.float32)
    small = lambda y, t: np.float32(1e-25) * (jnp.sin(y) * WEIGHT.astype(np.float32)[t]).sum()
    of = lambda loss: gradient_sources(LSTM, params, xs, loss, carry)
    tiny, whole = of(small), of(lambda y, t: (jnp.sin(y) * WEIGHT.astype(np.float32)[t]).sum())
    assert worst_error(jax.tree.map(lambda v: v * np.float32(1e25), tiny.norms), whole.norms) < 1e-5
    assert abs(float(gradient_cosine(tiny.by_loss, whole.by_loss)) - 1) < 1e-5


def test_sequences_without_steps_have_no_sources():
    params, xs, _ = draw(LSTM)
    found = gradient_sources(LSTM, params, xs[:0], step_loss)
    assert found.losses.shape == (0,) and found.by_lag.w_hh.shape == (0, H, 4 * H) and found.norms.b.shape == (0, 0)
