"""The gradient by hand against autodiff, complex steps and finite differences; and that each checker can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jaxlstm import (
    LSTM,
    LSTMState,
    lstm_bptt,
    split_gates,
    unroll,
)
from jaxlstm.bptt import lstm_backward, lstm_forward
from jaxlstm.diagnostics import gradient_error

import oracles
from cells import HOLES, B, H, I, T, draw, normal, worst_error
from sweeps import some

D_YS = normal(6, T, B, H)
MASKS = {"all": None, "holes": HOLES, "lengths": np.arange(T)[:, None] < np.array([5, 0, 7])}


def loss(layer, variables, mask):
    carry, ys = layer(*variables, mask=mask)
    return (ys * D_YS).sum() + jnp.sin(carry.h).sum() + jnp.cos(carry.c).sum()


def unroll_lstm(params, xs, carry, mask):
    return unroll(LSTM, params, xs, carry, mask=mask)


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("mask", MASKS)
def test_by_hand_equals_autodiff(mask, jitted):
    variables = draw(LSTM)
    ours, autodiff = (
        (jax.jit if jitted else lambda f: f)(
            jax.value_and_grad(lambda v, layer=layer: loss(layer, v, MASKS[mask]))
        )(variables)
        for layer in (lstm_bptt, unroll_lstm)
    )  # fmt: skip
    assert worst_error(ours, autodiff) < 1e-13
    assert max(jax.tree.leaves(gradient_error(ours[1], autodiff[1]))) < 1e-13


@pytest.mark.parametrize("mask", MASKS)
def test_by_hand_equals_complex_steps_of_a_numpy_loop(mask):
    variables = draw(LSTM)

    def oracle(*arrays):
        (h, c), ys = oracles.loop(oracles.lstm_step, arrays[:3], arrays[3], arrays[4:], MASKS[mask])
        return (ys * D_YS).sum() + np.sin(h).sum() + np.cos(c).sum()

    want = oracles.complex_step_gradient(oracle, [np.asarray(v) for v in jax.tree.leaves(variables)])
    got = jax.grad(lambda v: loss(lstm_bptt, v, MASKS[mask]))(variables)
    assert worst_error(got, want) < 1e-12


def test_forward_and_backward_stand_alone_without_autodiff():
    params, xs, carry = draw(LSTM)
    outputs, residuals = lstm_forward(params, xs, carry, mask=HOLES)
    cotangents = (LSTMState(jnp.asarray(normal(1, B, H)), jnp.asarray(normal(2, B, H))), jnp.asarray(D_YS))
    want, pullback = jax.vjp(lambda *v: unroll_lstm(*v, mask=HOLES), params, xs, carry)
    assert worst_error(outputs, want) < 1e-15
    assert worst_error(lstm_backward(params, residuals, cotangents), pullback(cotangents)) < 1e-13


@pytest.mark.parametrize("shape", some([(T, I), (T, 2, B, I), (0, B, I), (T, 0, I)], (T, 2, B, I), (0, B, I)))
def test_any_batch_rank_no_steps_and_no_batch(shape):
    params, _, _ = draw(LSTM)
    xs = jnp.asarray(normal(3, *shape))
    carry = jax.tree.map(lambda c: c + 0.1, LSTM.initial_carry(params, shape[1:-1]))
    total = lambda layer: lambda v: sum((leaf**2).sum() for leaf in jax.tree.leaves(layer(*v)))
    layers = (lstm_bptt, lambda *v: unroll(LSTM, *v))
    ours, autodiff = (jax.value_and_grad(total(layer))((params, xs, carry)) for layer in layers)
    assert worst_error(ours, autodiff) < 1e-13


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_garbage_in_padding_changes_no_bit(garbage):
    params, xs, carry = draw(LSTM)
    gradient = jax.jit(lambda xs: jax.value_and_grad(lambda v: loss(lstm_bptt, v, HOLES))((params, xs, carry)))
    clean, dirty = (gradient(jnp.where(HOLES[..., None], xs, filler)) for filler in (0.0, garbage))
    for got, want in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_it_runs_under_vmap_over_parameters():
    params, xs, carry = draw(LSTM)
    stacked = jax.tree.map(lambda v: jnp.stack([v, 0.7 * v]), params)
    gradients = [
        jax.vmap(jax.grad(lambda p, layer=layer: loss(layer, (p, xs, carry), HOLES)))(stacked)
        for layer in (lstm_bptt, unroll_lstm)
    ]
    assert worst_error(*gradients) < 1e-13


def test_wrong_input_is_named():
    params, xs, carry = draw(LSTM)
    with pytest.raises(ValueError, match=r"lstm_bptt: xs has 3 features, params.w_ih expects 5"):
        lstm_bptt(params, xs[..., :3], carry)
    with pytest.raises(TypeError, match=r"carry of LSTM must be LSTMState\(h, c\), got tuple"):
        lstm_bptt(params, xs, tuple(carry))
    with pytest.raises(ValueError, match=r"mask must be \[time, \*batch\] = \[7, 3\], got \[3, 7\]"):
        lstm_bptt(params, xs, carry, mask=HOLES.T)
    with pytest.raises(TypeError, match=r"xs must be floating, got int64"):
        lstm_bptt(params, xs.astype(int), carry)
    with pytest.raises(ValueError, match=r"lstm_forward: params must have w_ih \[input, n\] and b \[n\]"):
        lstm_forward(params._replace(b=params.b[:1]), xs, carry)
    with pytest.raises(TypeError, match=r"lstm_bptt: carry must be LSTMState\(h, c\), got None"):
        lstm_bptt(params, xs, None)
    (final, ys), residuals = lstm_forward(params, xs, carry)
    with pytest.raises(TypeError, match=r"lstm_backward: cotangents must be \(d_carry, d_ys\)"):
        lstm_backward(params, residuals, (ys, final))


# The autodiff side, to second order and in both modes.


@pytest.mark.ci
@pytest.mark.parametrize("mask", [pytest.param("all", marks=pytest.mark.slow), "holes"])
def test_check_grads_of_unroll_to_second_order_in_both_modes(mask):
    f = jax.jit(lambda *v: loss(unroll_lstm, v, MASKS[mask]))
    check_grads(f, draw(LSTM), order=2, modes=("fwd", "rev"), rtol=1e-5)


def test_check_grads_of_the_gradient_by_hand():
    check_grads(lambda *v: loss(lstm_bptt, v, HOLES), draw(LSTM), order=1, modes=("rev",), rtol=1e-6)


# Checkers that can fail.


@pytest.mark.parametrize("gate", "ifgo")
@pytest.mark.parametrize("name", ["w_ih", "w_hh", "b"])
def test_a_fault_in_one_weight_of_one_gate_is_found_there(name, gate):
    variables = draw(LSTM)
    right, *_ = jax.grad(lambda v: loss(unroll_lstm, v, None))(variables)
    column = "ifgo".index(gate) * H + 1
    wrong = right._replace(**{name: getattr(right, name).at[..., column].multiply(1 + 1e-6)})
    errors = gradient_error(split_gates(wrong), split_gates(right))
    for at, block in errors._asdict().items():
        for leaf, error in block._asdict().items():
            assert (error > 1e-8) == ((leaf, at) == (name, gate)), (leaf, at)


@pytest.mark.parametrize("line", ["d_h through w_hh", "d_c through f", "tanh' of c", "held carry"])
def test_a_missing_term_is_noticed(line, monkeypatch):
    """Differentiate a scan in which one path is cut, and see that the full gradient by hand disagrees with it."""
    params, xs, carry = draw(LSTM)
    cut = jax.lax.stop_gradient

    def faulty(params, xs, carry, mask):
        def step(state, inputs):
            x, m = inputs
            h, c = state
            z = x @ params.w_ih + (cut(h) if line == "d_h through w_hh" else h) @ params.w_hh + params.b[None]
            i, f, g, o = jnp.split(z, 4, -1)
            kept = jax.nn.sigmoid(f) * (cut(c) if line == "d_c through f" else c)
            c_new = kept + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_new = jax.nn.sigmoid(o) * jnp.tanh(cut(c_new) if line == "tanh' of c" else c_new)
            hold = cut if line == "held carry" else lambda v: v
            m = m[:, None]
            return (jnp.where(m, h_new, hold(h)), jnp.where(m, c_new, hold(c))), jnp.where(m, h_new, 0)

        final, ys = jax.lax.scan(step, tuple(carry), (xs, mask))
        return LSTMState(*final), ys

    gradients = [jax.grad(lambda p, f=f: loss(f, (p, xs, carry), HOLES))(params) for f in (lstm_bptt, faulty)]
    assert min(gradient_error(*gradients)) > 1e-3


def test_gradient_error_is_the_relative_2_norm_per_leaf():
    reference = {"w": jnp.array([3.0, 4.0]), "zero": jnp.zeros(2), "none": jnp.zeros((0, 3))}
    gradients = {"w": jnp.array([3.0, 4.5]), "zero": jnp.array([0.3, 0.4]), "none": jnp.zeros((0, 3))}
    errors = gradient_error(gradients, reference)
    np.testing.assert_allclose([errors["w"], errors["zero"], errors["none"]], [0.1, 0.5, 0.0], rtol=1e-15)


@jax.debug_nans(False)
def test_gradient_error_sees_tiny_huge_and_nan_gradients():
    for scale in (1e-30, 1e30):
        tiny = jnp.array([3.0, 4.0], "float32") * jnp.float32(scale)
        np.testing.assert_allclose(gradient_error(2 * tiny, tiny), 1.0, rtol=1e-6)
    assert np.isnan(gradient_error(jnp.array([1.0, np.nan]), jnp.ones(2)))
    assert np.isnan(gradient_error(jnp.ones(2), jnp.array([1.0, np.nan])))
    assert not gradient_error(jnp.array([np.inf]), jnp.ones(1)) < 1


def test_gradient_error_is_measured_in_the_wider_dtype():
    reference = {"w": jnp.asarray(normal(0, 1000))}
    for dtype, unit in (("bfloat16", 2.0**-8), ("float32", 2.0**-24)):
        error = gradient_error(jax.tree.map(lambda v, d=dtype: v.astype(d), reference), reference)["w"]
        assert error.dtype == jnp.float64 and unit / 4 < error < unit
    assert gradient_error(jnp.ones(2, "bfloat16"), jnp.ones(2, "bfloat16")).dtype == jnp.float32


def test_gradient_error_refuses_other_trees_and_shapes():
    with pytest.raises(ValueError, match=r"must be alike, got dict of w float64\[2\]; and dict of w float64\[1\]"):
        gradient_error({"w": jnp.ones(2)}, {"w": jnp.ones(1)})
    with pytest.raises(ValueError, match="must be alike"):
        gradient_error({"w": jnp.ones(2)}, {"v": jnp.ones(2)})
    params, _, _ = draw(LSTM)
    with pytest.raises(ValueError, match=r"got LSTMParams of .*; and tuple of"):
        gradient_error(params, tuple(params))
    assert jax.tree.leaves(gradient_error(nnx.State({"w": jnp.ones(2)}), nnx.State({"w": jnp.ones(2)}))) == [0]
