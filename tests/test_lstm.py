"""The LSTM's own parameters: initialisers, gate blocks, activations at their limits."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import (
    LSTM,
    LSTMGates,
    LSTMParams,
    LSTMState,
    initializers,
    split_gates,
)

from cells import H, I, draw, worst_error

IN, HID = 150, 100  # large enough for statistics


def biases(params):
    return {gate: np.asarray(block.b) for gate, block in split_gates(params)._asdict().items()}


def test_split_gates_cuts_columns_in_the_order_i_f_g_o():
    params, _, _ = draw(LSTM)
    gates = split_gates(params)
    assert isinstance(gates, LSTMGates)
    for k, gate in enumerate(gates):
        columns = slice(k * H, (k + 1) * H)
        want = LSTMParams(params.w_ih[:, columns], params.w_hh[:, columns], params.b[columns])
        assert worst_error(gate, want) == 0
    joined = LSTMParams(*(jnp.concatenate(blocks, axis=-1) for blocks in zip(*gates, strict=True)))
    assert worst_error(joined, params) == 0


def test_activations_are_sigmoid_sigmoid_tanh_sigmoid():
    z = np.linspace(-3, 3, 4 * H)[None]
    got = LSTM.activations(None, None, jnp.asarray(z), jnp.asarray(0 * z))
    sigma = 1 / (1 + np.exp(-z))
    want = (sigma[:, :H], sigma[:, H : 2 * H], np.tanh(z)[:, 2 * H : 3 * H], sigma[:, 3 * H :])
    assert worst_error(got, want) < 1e-15


def test_a_nearly_shut_gate_is_not_shut_in_float32():
    z = jnp.full((1, 4), -20.0, jnp.float32)
    gates = LSTM.activations(None, None, z, jnp.zeros_like(z))
    np.testing.assert_allclose(np.asarray(gates.f), 1 / (1 + np.exp(20.0)), rtol=1e-6)
    slope = jax.grad(lambda z: LSTM.activations(None, None, z, jnp.zeros_like(z)).f.sum())(z)
    np.testing.assert_allclose(float(slope[0, 1]), np.exp(-20.0), rtol=1e-6)


def test_the_default_initialiser_is_glorot_and_orthogonal_gate_by_gate_with_forget_bias_1():
    params = LSTM.init(jax.random.key(3), IN, HID)
    for gate in split_gates(params):
        np.testing.assert_allclose(gate.w_hh @ gate.w_hh.T, np.eye(HID), atol=1e-5)
        limit = np.sqrt(6 / (IN + HID))
        assert limit * 0.99 < np.abs(gate.w_ih).max() <= limit
        np.testing.assert_allclose(np.std(gate.w_ih), limit / np.sqrt(3), rtol=0.03)
    assert {name: set(b.tolist()) for name, b in biases(params).items()} == {"i": {0}, "f": {1}, "g": {0}, "o": {0}}
    assert set(biases(LSTM.init(jax.random.key(3), I, H, forget_bias=2.5))["f"].tolist()) == {2.5}


def test_init_torch_draws_everything_uniform_and_two_biases():
    params, limit = initializers.torch(jax.random.key(3), IN, HID), HID**-0.5
    for leaf in params[:2]:
        assert 0.99 * limit < np.abs(leaf).max() <= limit
        np.testing.assert_allclose(np.std(leaf), limit / np.sqrt(3), rtol=0.03)
    assert limit < np.abs(params.b).max() <= 2 * limit  # a sum of two
    np.testing.assert_allclose(np.std(params.b), limit * np.sqrt(2 / 3), rtol=0.1)


def test_init_keras_draws_over_the_four_gates_at_once():
    params, limit = initializers.keras(jax.random.key(3), IN, HID), np.sqrt(6 / (IN + 4 * HID))
    assert limit * 0.99 < np.abs(params.w_ih).max() <= limit
    np.testing.assert_allclose(params.w_hh @ params.w_hh.T, np.eye(HID), atol=1e-5)
    assert {name: set(b.tolist()) for name, b in biases(params).items()} == {"i": {0}, "f": {1}, "g": {0}, "o": {0}}


def test_init_flax_is_lecun_normal_and_orthogonal_without_biases():
    params = initializers.flax(jax.random.key(3), IN, HID)
    np.testing.assert_allclose(np.std(params.w_ih), IN**-0.5, rtol=0.03)
    for gate in split_gates(params):
        np.testing.assert_allclose(gate.w_hh @ gate.w_hh.T, np.eye(HID), atol=1e-5)
    assert not np.any(params.b)


def test_init_chrono_spreads_the_forget_biases_over_the_lags():
    b = biases(initializers.chrono(jax.random.key(3), I, 500, max_lag=100))
    np.testing.assert_array_equal(b["i"], -b["f"])
    lags = np.exp(b["f"])  # uniform between 1 and 99
    assert 1 <= lags.min() < 3 and 97 < lags.max() <= 99.001
    np.testing.assert_allclose(lags.mean(), 50, rtol=0.1)
    np.testing.assert_allclose(lags.std(), 98 / np.sqrt(12), rtol=0.1)
    assert not np.any(b["g"]) and not np.any(b["o"])
    with pytest.raises(ValueError, match="max_lag must be more than 2 steps, got 2"):
        initializers.chrono(jax.random.key(3), I, H, max_lag=2)


@pytest.mark.parametrize("init", [LSTM.init, *(getattr(initializers, name) for name in initializers.__all__)])
def test_initialisers_share_one_signature(init):
    names = list(inspect.signature(init).parameters)
    assert names[:3] == ["key", "input_size", "hidden_size"] and names[-1] == "dtype"


def test_the_forget_bias_is_never_added_in_the_forward_pass():
    params, xs, carry = draw(LSTM)
    shut = params._replace(b=jnp.zeros_like(params.b), w_ih=0 * params.w_ih, w_hh=0 * params.w_hh)
    state, _ = LSTM.step(shut, carry, xs[0])
    np.testing.assert_allclose(state.c, carry.c / 2, rtol=1e-15)  # f = σ(0), i g = 0
    assert isinstance(state, LSTMState)
