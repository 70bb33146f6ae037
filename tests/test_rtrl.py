"""Real-time recurrent learning against backpropagation through time, and its approximations against NumPy loops."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlstm import LSTM, LSTMState, num_params, unroll
from jaxlstm.diagnostics import truncated_gradient
from jaxlstm.rtrl import (
    OnlineState,
    cut_recurrence,
    init_rtrl,
    make_online_step,
    rtrl_gradient,
    rtrl_step,
    snap1_pattern,
)

import oracles
from cells import CELLS, HOLES, RESET, B, H, I, T, draw, normal, worst_error
from sweeps import some

WEIGHT = jnp.asarray(normal(50, T, B, H))
OPTIONS = {"plain": {}, "masked and reset": {"mask": HOLES, "reset": RESET}}


def step_loss(y, t):
    return (jnp.sin(y) * WEIGHT[t]).sum()


def loss_of(ys):
    return (jnp.sin(ys) * WEIGHT).sum()


@pytest.mark.parametrize("way", OPTIONS)
@pytest.mark.parametrize(
    "name", ["LSTM", "leaky", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GRU", "RNN"))]
)
def test_rtrl_equals_backpropagation_through_time(name, way):
    cell = CELLS[name][0]
    params, xs, carry = draw(cell)
    bptt = lambda params: loss_of(unroll(cell, params, xs, carry, gradient="scan", **OPTIONS[way])[1])
    want = jax.value_and_grad(bptt)(params)
    got = jax.jit(lambda params: rtrl_gradient(cell, params, xs, step_loss, carry, **OPTIONS[way]))(params)
    assert worst_error(got, want) < 1e-13


def test_rtrl_equals_the_gradient_of_a_numpy_loop():
    params, xs, carry = draw(LSTM)

    def loss(*arrays):
        _, ys = oracles.loop(oracles.lstm_step, arrays, np.asarray(xs), [np.asarray(leaf) for leaf in carry])
        return (np.sin(ys) * np.asarray(WEIGHT)).sum()

    want = oracles.complex_step_gradient(loss, [np.asarray(leaf) for leaf in params])
    assert worst_error(list(rtrl_gradient(LSTM, params, xs, step_loss, carry)[1]), want) < 1e-13


class Learned(NamedTuple):
    """An LSTM's parameters, and the state it starts from."""

    w_ih: jax.Array
    w_hh: jax.Array
    b: jax.Array
    h_0: jax.Array
    c_0: jax.Array


@pytest.mark.parametrize("way", OPTIONS)
def test_a_learned_initial_carry_has_a_gradient_at_the_start_and_at_resets(way):
    cell = dataclasses.replace(
        LSTM,
        initial_carry=lambda params, batch_shape=(): LSTMState(
            *(jnp.broadcast_to(leaf, (*batch_shape, H)) for leaf in (params.h_0, params.c_0))
        ),
        gates_jvp=None,
    )
    params, xs, _ = draw(LSTM)
    params = Learned(*params, *(jnp.asarray(normal(k, H)) for k in (60, 61)))
    want = jax.grad(lambda params: loss_of(unroll(cell, params, xs, **OPTIONS[way])[1]))(params)
    got = rtrl_gradient(cell, params, xs, step_loss, **OPTIONS[way])[1]
    assert worst_error(got, want) < 1e-13 and all(np.asarray(leaf).any() for leaf in got[3:])


def test_a_loss_may_have_a_wider_dtype_than_the_net():
    params, xs, carry = draw(LSTM, dtype=np.float32)
    loss, gradient = rtrl_gradient(LSTM, params, xs, lambda y, t: (y.astype(np.float64) * WEIGHT[t]).sum(), carry)
    assert loss.dtype == np.float64 and gradient.b.dtype == np.float32


def test_no_batch_axis_and_two_batch_axes_give_the_same_gradient():
    params, xs, carry = draw(LSTM)
    want = rtrl_gradient(LSTM, params, xs, lambda y, t: (y**2).sum(), carry)
    two = rtrl_gradient(
        LSTM, params, xs[:, None], lambda y, t: (y**2).sum(), jax.tree.map(lambda leaf: leaf[None], carry)
    )
    ones = [
        rtrl_gradient(LSTM, params, xs[:, n], lambda y, t: (y**2).sum(), jax.tree.map(lambda leaf, n=n: leaf[n], carry))
        for n in range(B)
    ]
    assert worst_error(two, want) < 1e-14
    assert worst_error(jax.tree.map(lambda *v: sum(v), *ones), want) < 1e-13


def test_memory_does_not_grow_with_the_sequence():
    params, _, _ = draw(LSTM, dtype=np.float32)
    of = jax.jit(lambda xs: rtrl_gradient(LSTM, params, xs, lambda y, t: (y**2).sum()))
    sizes = [
        of.lower(jax.ShapeDtypeStruct((num_steps, B, I), np.float32)).compile().memory_analysis().temp_size_in_bytes
        for num_steps in (20, 2000)
    ]
    assert sizes[1] < sizes[0] + 2000  # temporaries do not contain the inputs


def test_eprop_equals_the_truncated_gradient():
    params, xs, carry = draw(LSTM)
    got = rtrl_gradient(cut_recurrence(LSTM), params, xs, step_loss, carry)[1]
    assert worst_error(got, truncated_gradient(LSTM, params, xs, loss_of, carry)) < 1e-13


@pytest.mark.parametrize("way", OPTIONS)
def test_eprop_loses_nothing_by_keeping_two_numbers_per_parameter(way):
    params, xs, carry = draw(LSTM)
    cut = cut_recurrence(LSTM)
    pattern = snap1_pattern(cut, params, xs[0, 0])
    got = rtrl_gradient(cut, params, xs, step_loss, carry, pattern=pattern, **OPTIONS[way])[1]
    want = truncated_gradient(LSTM, params, xs, loss_of, carry, **OPTIONS[way])
    assert worst_error(got, want) < 1e-13
    assert init_rtrl(cut, params, (B,), pattern=pattern).influence.shape == (B, 2, num_params(params))


@pytest.mark.parametrize("dtype", some(["float32", "float64"], "float32"))
def test_the_pattern_of_a_wide_layer_is_complete_in_float32(dtype):
    params = LSTM.init(jax.random.key(0), 50, 40, dtype=dtype)
    pattern = snap1_pattern(LSTM, params, jnp.zeros(50, dtype))
    units = np.concatenate([np.tile(np.arange(160) % 40, rows) for rows in (50, 40, 1)])
    assert (np.asarray(pattern.carry[0]) == units).all() and (np.asarray(pattern.y) == units).all()


def test_a_cell_that_snap1_cannot_represent_is_refused():
    def project_h(params, carry, z, a):
        carry, y = LSTM.gates(params, carry, z, a)
        return carry, y @ params.w_hh[:, :H]

    params, xs, _ = draw(LSTM)
    with pytest.raises(ValueError, match="snap1_pattern: a parameter of LSTM reaches two numbers"):
        snap1_pattern(dataclasses.replace(LSTM, gates=project_h, gates_jvp=None), params, xs[0, 0])


@pytest.mark.slow
def test_snap1_keeps_the_influence_of_the_weights_into_a_unit():
    params, xs, carry = draw(LSTM)
    units_of = snap1_pattern(LSTM, params, xs[0, 0])
    pattern = (np.arange(2 * H)[:, None, None] == np.asarray(units_of.carry)).any(axis=1)
    assert (np.asarray(units_of.y) == np.asarray(units_of.carry[0])).all()
    units = np.concatenate([np.tile(np.arange(4 * H) % H, len(v) if v.ndim == 2 else 1) for v in params])
    gates = np.concatenate([np.tile(np.arange(4 * H) // H, len(v) if v.ndim == 2 else 1) for v in params])
    of_c = np.arange(2 * H)[:, None] >= H  # the output gate's weights do not reach c
    assert (pattern == ((np.arange(2 * H)[:, None] % H == units) & ~(of_c & (gates == 3)))).all()

    # The influence of one example, in NumPy, by complex steps, cut to the pattern after every step.
    sizes = np.cumsum([v.size for v in params])[:-1]
    flat = np.concatenate([np.ravel(v) for v in params])

    def step(flat, s, x):
        w_ih, w_hh, b = np.split(flat, sizes)
        (h, c), y = oracles.lstm_step((w_ih.reshape(I, -1), w_hh.reshape(H, -1), b), np.split(s, 2), x)
        return np.concatenate([h, c]), y

    want = np.zeros(flat.size)
    s, influence = np.concatenate([np.asarray(leaf[0]) for leaf in carry]), np.zeros((2 * H, flat.size))
    for t in range(4):
        x = np.asarray(xs[t, 0])
        by_s, by_flat = np.zeros((2 * H, 2 * H)), np.zeros((2 * H, flat.size))
        for k in range(2 * H):
            by_s[:, k] = step(flat, s + 1e-30j * (np.arange(2 * H) == k), x)[0].imag / 1e-30
        for k in range(flat.size):
            by_flat[:, k] = step(flat + 1e-30j * (np.arange(flat.size) == k), s, x)[0].imag / 1e-30
        influence = np.where(pattern, by_s @ influence + by_flat, 0)
        s, y = step(flat, s, x)
        want += (np.cos(y) * np.asarray(WEIGHT[t, 0])) @ influence[:H]
    one = jax.tree.map(lambda leaf: leaf[0], carry)
    loss = lambda y, t: (jnp.sin(y) * WEIGHT[t, 0]).sum()
    _, got = rtrl_gradient(LSTM, params, xs[:4, 0], loss, one, pattern=units_of)
    assert worst_error(np.concatenate([np.ravel(v) for v in got]), want) < 1e-12
    assert worst_error(got, rtrl_gradient(LSTM, params, xs[:4, 0], loss, one)[1]) > 1e-3  # SnAp-1 is an approximation


def test_an_influence_too_large_for_memory_is_refused_with_its_size():
    params = jax.eval_shape(lambda: LSTM.init(jax.random.key(0), 256, 256))
    num_bytes = 32 * 512 * 4 * 256 * 513 * 4
    with pytest.raises(ValueError, match=f"init_rtrl: .* takes {num_bytes:,} bytes at batch shape \\[32\\]"):
        init_rtrl(LSTM, params, (32,))


# On a stream.


def test_small_updates_of_an_online_learner_add_up_to_the_gradient():
    params, xs, _ = draw(LSTM)
    readout, targets, rate = jnp.asarray(normal(1, H)), normal(2, T, B), 1e-7
    loss_fn = lambda readout, y, target: ((y @ readout - target) ** 2).sum()

    def total(params, readout):
        return sum(map(loss_fn, [readout] * T, unroll(LSTM, params, xs)[1], targets))

    optimizer = optax.sgd(rate)
    step = jax.jit(make_online_step(LSTM, loss_fn, optimizer))
    state = OnlineState((params, readout), optimizer.init((params, readout)), init_rtrl(LSTM, params, (B,)))
    losses = []
    for x, target in zip(xs, targets, strict=True):
        state, loss = step(state, x, target)
        losses.append(loss)
    moved = jax.tree.map(lambda new, old: (old - new) / rate, state.params, (params, readout))
    assert worst_error(moved, jax.grad(total, (0, 1))(params, readout)) < 1e-5
    assert abs(sum(losses) - total(params, readout)) < 1e-4


@pytest.mark.ci
def test_an_online_learner_learns_to_repeat_its_input_of_two_steps_ago():
    key = jax.random.key(0)
    stream = jax.random.bernoulli(key, jnp.float32(0.5), (2000, 4)).astype(np.float32)
    params = LSTM.init(jax.random.key(1), 1, 8)
    readout = 0.1 * jax.random.normal(jax.random.key(2), (8,), np.float32)
    optimizer = optax.adam(1e-2)
    loss_fn = lambda readout, y, target: optax.sigmoid_binary_cross_entropy(y @ readout, target).mean()
    step = make_online_step(LSTM, loss_fn, optimizer)
    state = OnlineState((params, readout), optimizer.init((params, readout)), init_rtrl(LSTM, params, (4,)))
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes ints and floats
        _, losses = jax.jit(lambda s, xs: jax.lax.scan(lambda s, v: step(s, *v), s, xs))(
            state, (stream[2:, :, None], stream[:-2])
        )
    assert losses[:100].mean() > 0.6  # a coin: log 2
    assert losses[-100:].mean() < 0.05


def test_one_step_returns_the_output_and_the_map_from_its_cotangent_to_the_gradient():
    params, xs, carry = draw(LSTM)
    state = init_rtrl(LSTM, params, (B,), carry=carry)
    for t in range(3):
        state, y, pull = rtrl_step(LSTM, params, state, xs[t])
    ys, pullback = jax.vjp(lambda params: unroll(LSTM, params, xs[:3], carry)[1][-1], params)
    assert worst_error(y, ys) < 1e-14
    assert worst_error(pull(WEIGHT[0]), pullback(WEIGHT[0])[0]) < 1e-13


def test_a_flag_of_the_wrong_shape_is_refused():
    params, xs, _ = draw(LSTM)
    with pytest.raises(ValueError, match=r"rtrl_gradient: mask must be \[time, \*batch\]"):
        rtrl_gradient(LSTM, params, xs, step_loss, mask=HOLES[:, 0])
