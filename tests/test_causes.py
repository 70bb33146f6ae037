"""Why two gradients of one LSTM differ: one test per classical cause, listed in docs/trust-your-gradients.md."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlstm import LSTM, Chunked, LSTMParams, LSTMState, lstm_bptt, unroll
from jaxlstm.diagnostics import check_gradients, compare_gradients

from cells import B, H, I, T, draw, normal, worst_error

WEIGHT = jnp.asarray(normal(50, T, B, H))
LENGTHS = np.array([T, T - 2, 2])
MASK = np.arange(T)[:, None] < LENGTHS


def weighted(ys):
    return (ys * WEIGHT).sum()


def gradient(run, params, *rest):
    """Return the gradient by the parameters of a function that returns ys."""
    return jax.jit(jax.grad(lambda params: weighted(run(params, *rest))))(params)


def exact(params, xs, carry):
    return unroll(LSTM, params, xs, carry, gradient="scan")[1]


def test_truncation_leaves_out_what_lies_before_the_cut():
    params, xs, carry = draw(LSTM)
    whole = gradient(exact, params, xs, carry)
    chunked = lambda how: gradient(lambda p: unroll(LSTM, p, xs, carry, gradient=how)[1], params)
    assert worst_error(chunked(Chunked(3)), whole) < 1e-13
    assert worst_error(chunked(Chunked(3, truncate=True)), whole) > 1e-2


def test_a_gradient_without_the_initial_carry_departs_in_h_0_or_c_0():
    params, xs, carry = draw(LSTM)

    def forgetful(params, xs, carry, d_ys):
        pull = jax.vjp(lambda *v: lstm_bptt(*v)[1], params, xs, carry)[1]
        d_params, d_xs, d_carry = pull(d_ys)
        return d_params, d_xs, jax.tree.map(jnp.zeros_like, d_carry)

    methods = {"mine": forgetful}
    found = compare_gradients(LSTM, params, xs, lambda y, t: (y * WEIGHT[t]).sum(), carry=carry, methods=methods)
    assert found.departures["mine"].block in ("h_0", "c_0") and found.departures["mine"].error == 1
    assert all(departure is None for method, departure in found.departures.items() if method != "mine")


def test_the_last_output_of_a_padded_sequence_has_no_gradient_and_the_final_carry_has():
    params, xs, carry = draw(LSTM)
    of_last_row = jax.grad(lambda xs: unroll(LSTM, params, xs, carry, mask=MASK)[1][-1].sum())(xs)
    of_carry = jax.grad(lambda xs: unroll(LSTM, params, xs, carry, mask=MASK)[0].h.sum())(xs)
    assert not of_last_row[:, 1:].any() and of_last_row[:, 0].any()
    assert all(of_carry[length - 1, n].any() and not of_carry[length:, n].any() for n, length in enumerate(LENGTHS))


def test_masked_steps_left_in_change_every_weight():
    params, xs, carry = draw(LSTM)
    masked = gradient(lambda p: unroll(LSTM, p, xs, carry, mask=MASK)[1], params)
    padded = gradient(exact, params, jnp.where(MASK[..., None], xs, 0), carry)  # zeros are inputs too
    assert min(worst_error(a, b) for a, b in zip(padded, masked, strict=True)) > 1e-2


def test_two_equal_biases_have_equal_gradients_and_move_twice_as_fast():
    params, xs, carry = draw(LSTM)
    two = (params.b / 2, params.b / 2)
    of_two = jax.grad(lambda two: weighted(exact(params._replace(b=two[0] + two[1]), xs, carry)))(two)
    of_one = gradient(exact, params, xs, carry).b
    assert worst_error(of_two, (of_one, of_one)) < 1e-14
    moved = sum(b - 0.1 * d for b, d in zip(two, of_two, strict=True))
    assert worst_error(moved, params.b - 0.2 * of_one) < 1e-14


def test_a_mean_over_the_batch_is_a_multiple_of_the_sum():
    params, xs, carry = draw(LSTM)

    def mean_over_the_batch(params):
        return jax.jit(jax.grad(lambda params: (exact(params, xs, carry) * WEIGHT).mean(axis=1).sum()))(params)

    ours = gradient(exact, params, xs, carry)
    assert worst_error(mean_over_the_batch(params), ours) > 0.1
    assert worst_error(jax.tree.map(lambda leaf: B * leaf, mean_over_the_batch(params)), ours) < 1e-14


def test_another_gate_order_is_the_same_gradient_in_another_order():
    params, xs, carry = draw(LSTM)
    order = np.concatenate([np.arange(H) + H * gate for gate in (0, 3, 1, 2)])  # i, o, f, g, as in ONNX

    def in_onnx_order(params):
        back = np.argsort(order)
        return exact(LSTMParams(*(leaf[..., back] for leaf in params)), xs, carry)

    ours = gradient(exact, params, xs, carry)
    theirs = gradient(in_onnx_order, LSTMParams(*(leaf[..., order] for leaf in params)))
    assert worst_error(theirs, ours) > 0.1
    assert worst_error(LSTMParams(*(leaf[..., np.argsort(order)] for leaf in theirs)), ours) < 1e-14


def test_a_forget_bias_added_at_run_time_is_one_more_in_b():
    params, xs, carry = draw(LSTM)
    one = jnp.zeros(4 * H).at[H : 2 * H].set(1)
    plus_one = lambda params: exact(params._replace(b=params.b + one), xs, carry)
    ours = gradient(exact, params, xs, carry)
    assert worst_error(gradient(plus_one, params), ours) > 1e-2
    assert worst_error(gradient(plus_one, params._replace(b=params.b - one)), ours) < 1e-14


@pytest.mark.parametrize("limit, same", [(1e9, True), (0.1, False)])
def test_clipping_inside_the_recurrence_is_another_gradient(limit, same):
    @jax.custom_vjp
    def clipped(h):
        return h

    clipped.defvjp(lambda h: (h, None), lambda _, d_h: (jnp.clip(d_h, -limit, limit),))
    recur = lambda params, carry: clipped(carry.h) @ params.w_hh
    params, xs, carry = draw(LSTM)
    cell = dataclasses.replace(LSTM, recur=recur, gates_jvp=None)
    got = gradient(lambda p: unroll(cell, p, xs, carry, gradient="scan")[1], params)
    assert (worst_error(got, gradient(exact, params, xs, carry)) < 1e-14) is same


def test_a_dropout_mask_drawn_anew_is_another_function():
    params, xs, carry = draw(LSTM)

    def loss(params, seed):
        kept = jax.random.bernoulli(jax.random.key(seed), 0.5, WEIGHT.shape)
        return weighted(jnp.where(kept, exact(params, xs, carry), 0))

    gradients = [jax.grad(loss)(params, seed) for seed in range(2)]
    checks = [check_gradients(loss, params, 0, gradients=g, key=jax.random.key(n)) for n, g in enumerate(gradients)]
    assert [check.agree for check in checks] == [True, False]


def test_a_long_sum_in_float32_has_fewer_digits_than_one_in_float64():
    params, _, _ = draw(LSTM)
    xs = jnp.asarray(1 + normal(3, 5000, 1, I))
    to32 = lambda tree: jax.tree.map(lambda v: v.astype(jnp.float32), tree)
    of = jax.jit(jax.grad(lambda params, xs: unroll(LSTM, params, xs, gradient="scan")[1].sum()))
    short, long = (worst_error(of(to32(params), to32(v)), of(params, v)) for v in (xs[:10], xs))
    assert 1e-8 < short < 5e-7 and 3 * short < long < 1e-3, (short, long)


@pytest.mark.usefixtures("ranks_may_be_promoted")
def test_ten_bits_of_a_factor_as_tf32_has_show_at_once():
    """A CPU has no TF32, so the test rounds by hand; `python -m jaxlstm` measures the default of a GPU."""
    tf32 = lambda v: lax.reduce_precision(v, exponent_bits=8, mantissa_bits=10)
    cell = dataclasses.replace(
        LSTM,
        project=lambda params, xs: tf32(xs) @ tf32(params.w_ih) + params.b,
        recur=lambda params, carry: tf32(carry.h) @ tf32(params.w_hh),
        gates_jvp=None,
    )
    params, xs, carry = draw(LSTM, dtype=np.float32)
    loss = lambda cell: lambda p: (unroll(cell, p, xs, carry, gradient="scan")[1] * WEIGHT.astype(np.float32)).sum()
    want = gradient(exact, *jax.tree.map(lambda v: v.astype(np.float64), (params, xs, carry)))
    assert worst_error(jax.grad(loss(LSTM))(params), want) < 1e-6
    assert 1e-5 < worst_error(jax.grad(loss(cell))(params), want) < 1e-2


def test_an_open_gate_is_exactly_flat_in_float32_and_a_shut_one_is_not():
    slope = lambda z: float(jax.grad(jax.nn.sigmoid)(jnp.float32(z)))
    assert slope(17) == 0 and slope(16) > 0 and slope(-17) > 0 and slope(-80) > 0
    assert float(jax.grad(jax.nn.sigmoid)(17.0)) > 0  # float64
    params, xs, carry = draw(LSTM, dtype=np.float32)
    of_f = lambda shift: jax.grad(
        lambda b: unroll(LSTM, params._replace(b=b), 0 * xs, LSTMState(0 * carry.h, carry.c))[1].sum()
    )(jnp.zeros(4 * H, np.float32).at[H : 2 * H].set(shift))[H : 2 * H]
    assert not of_f(40).any() and of_f(-40).any()  # a gate that rounds to 1 cannot learn to close


def test_jit_and_eager_differ_by_rounding_alone():
    params, xs, carry = draw(LSTM)
    eager = jax.grad(lambda params: weighted(exact(params, xs, carry)))(params)
    assert worst_error(gradient(exact, params, xs, carry), eager) < 1e-14
