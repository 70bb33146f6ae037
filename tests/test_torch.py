"""Values and gradients against torch's nn.LSTM, nn.GRU and nn.RNN, packed sequences included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import LSTM, GRUParams, LSTMParams, LSTMState, RNNParams, length_mask, lstm_bptt, unroll

from cells import CELLS, worst_error
from golden import generate

GOLDEN = np.load(generate.PATH)


def golden_case(name):
    return {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f"{name}/")}


def params_from_torch(name, results, suffix="_l0", prefix=""):
    """Convert torch's weights, or with prefix "d_" its gradients: our b takes the gradient of torch's first bias."""
    w_ih, w_hh, b_ih, b_hh = (
        results[f"{prefix}{part}{suffix}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = w_hh.shape[1]
    b = b_ih if prefix else b_ih + b_hh
    if name != "GRU":
        return (LSTMParams if name == "LSTM" else RNNParams)(w_ih.T, w_hh.T, b)
    b_hn = b_hh[2 * hidden :]
    if not prefix:
        b = np.concatenate([b[: 2 * hidden], b_ih[2 * hidden :]])
    return GRUParams(w_ih.T, w_hh.T, b, b_hn)


def states(cell, params, results, prefix, direction=0):
    like = jax.eval_shape(lambda p: cell.initial_carry(p), params)
    return type(like)(*(results[f"{prefix}{k}"][direction] for k in range(len(like))))


@pytest.mark.parametrize("name", generate.MODULES)
def test_values_and_all_gradients_equal_torch(name):
    cell, results = CELLS[name][0], golden_case(name)
    params = params_from_torch(name, results)
    carry = states(cell, params, results, "state")
    (final, ys), pullback = jax.vjp(
        lambda *v: unroll(cell, *v), *jax.tree.map(jnp.asarray, (params, results["xs"], carry))
    )
    assert worst_error((final, ys), (states(cell, params, results, "final"), results["ys"])) < 1e-12
    gradients = pullback((states(cell, params, results, "d_final"), jnp.asarray(results["d_ys"])))
    want = (params_from_torch(name, results, prefix="d_"), results["d_xs"], states(cell, params, results, "d_state"))
    assert worst_error(gradients, want) < 1e-12


@pytest.mark.parametrize("name", generate.MODULES)
def test_packed_sequences_of_mixed_lengths_equal_torch_in_both_directions(name):
    cell, results = CELLS[name][0], golden_case(f"packed {name}")
    mask = length_mask(jnp.array(generate.LENGTHS), generate.T)
    d_xs = 0
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        half = slice(direction * generate.H, (direction + 1) * generate.H)
        params = params_from_torch(name, results, suffix)
        carry = states(cell, params, results, "state", direction)
        run = lambda *v, direction=direction: unroll(cell, *v, mask=mask, reverse=direction == 1)
        (final, ys), pullback = jax.vjp(run, *jax.tree.map(jnp.asarray, (params, results["xs"], carry)))
        want = (states(cell, params, results, "final", direction), results["ys"][..., half])
        assert worst_error((final, ys), want) < 1e-12
        d_final = states(cell, params, results, "d_final", direction)
        d_params, d_xs_half, d_carry = pullback((d_final, jnp.asarray(results["d_ys"][..., half])))
        d_xs = d_xs + d_xs_half
        want = (params_from_torch(name, results, suffix, "d_"), states(cell, params, results, "d_state", direction))
        assert worst_error((d_params, d_carry), want) < 1e-12
    assert worst_error(d_xs, results["d_xs"]) < 1e-12


@pytest.mark.parametrize("layer", [lambda *v: unroll(LSTM, *v), lstm_bptt], ids=["unroll", "lstm_bptt"])
def test_float32_gradients_are_as_accurate_as_torchs(layer):
    *_, input_size, hidden = generate.FLOAT32_SHAPE

    @jax.jit
    def gradient(weights, xs, carry, d_ys, d_final):
        _, pullback = jax.vjp(lambda p: layer(p, xs, carry), weights)
        return jax.flatten_util.ravel_pytree(pullback((d_final, d_ys))[0])[0]

    ratios = []
    for seed, torch_error in zip(generate.SEEDS, GOLDEN["float32 errors"], strict=True):
        shapes = ((4 * hidden, input_size), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        (w_ih, w_hh, b_ih, b_hh), carry, d_final, xs, d_ys = generate.draw(seed, shapes, generate.FLOAT32_SHAPE)
        carry, d_final = (LSTMState(*(leaf[0] for leaf in state)) for state in (carry, d_final))
        flat = []
        for dtype in ("float32", "float64"):
            cast = lambda *tree, dtype=dtype: jax.tree.map(lambda v: jnp.asarray(v, dtype), tree)
            b = np.asarray(b_ih, dtype) + np.asarray(b_hh, dtype)
            args = cast(LSTMParams(w_ih.T, w_hh.T, b), xs, carry, d_ys, d_final)
            flat.append(np.asarray(gradient(*args), np.float64))
        error = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
        assert 0 < error < 1e-5
        ratios.append(error / torch_error)
    assert np.median(ratios) <= 2, ratios


@pytest.mark.ci
def test_the_golden_file_is_what_torch_computes():
    pytest.importorskip("torch")
    fresh = generate.generate()
    assert sorted(fresh) == sorted(GOLDEN.files)
    for name, value in fresh.items():
        tolerance = 0.5 if name == "float32 errors" else 1e-13  # rounding itself depends on the machine
        np.testing.assert_allclose(GOLDEN[name], value, rtol=tolerance, atol=1e-13 * (tolerance < 0.1), err_msg=name)
