"""Regularisers: against NumPy loops with the same masks, gradients by complex steps; statistics; every error."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Bidirectional,
    Bulk,
    LSTMState,
    init_stack,
    low_precision,
    step_stack,
    unroll,
    unroll_stack,
)
from jaxlstm.diagnostics import trace
from jaxlstm.regularize import (
    Locked,
    Noisy,
    dropout_mask,
    recurrent_dropout,
    variational_dropout,
    weight_drop,
    zoneout,
    zoneout_noise,
)

import oracles
from cells import CELLS, HOLES, LEAKY, RESET, B, H, I, T, draw, normal, worst_error
from oracles import sigmoid
from sweeps import some

RATES = LSTMState(h=0.2, c=0.5)
KEY = functools.partial(jax.random.key)
MASK_X, MASK_H = (np.asarray(dropout_mask(KEY(n), 0.4, (B, size), jnp.float64)) for n, size in ((1, I), (2, H)))
CANDIDATE = np.asarray(dropout_mask(KEY(3), 0.4, (T, B, H), jnp.float64))


# The same cells as NumPy steps. What a step reads, x, is followed by its noise: x, then one entry a unit and kind.


def zoned(step, rates):
    """Hold units: x is followed by d_h and d_c of the step, or by nothing at evaluation."""

    def zoned_step(params, state, x):
        size, num = len(state[0]), len(state)
        noise = list(rates) if len(x) == I else np.split(x[-num * size :], num)
        new, _ = step(params, state, x[:I])
        new = tuple(d * old + (1 - d) * now for d, old, now in zip(noise, state, new, strict=True))
        return new, new[0]

    return zoned_step


def candidate_lstm(params, state, x):
    (w_ih, w_hh, b), (h, c), m = params, state, x[I:]
    z_i, z_f, z_g, z_o = np.split(x[:I] @ w_ih + h @ w_hh + b, 4)
    c = sigmoid(z_f) * c + sigmoid(z_i) * m * np.tanh(z_g)
    h = sigmoid(z_o) * np.tanh(c)
    return (h, c), h


def candidate_gru(params, state, x):
    (w_ih, w_hh, b, b_hn), (h,), m = params, state, x[I:]
    z_r, z_u, z_n = np.split(x[:I] @ w_ih + b, 3)
    a_r, a_u, a_n = np.split(h @ w_hh, 3)
    r, u = sigmoid(z_r + a_r), sigmoid(z_u + a_u)
    h = (1 - u) * m * np.tanh(z_n + r * (a_n + b_hn)) + u * h
    return (h,), h


def locked_lstm(params, state, x):
    """Drop x and h before the matmuls; x is followed by both masks, the same at every step."""
    (w_ih, w_hh, b), (h, c) = params, state
    m_x, m_h = x[I : 2 * I], x[2 * I :]
    z_i, z_f, z_g, z_o = np.split((m_x * x[:I]) @ w_ih + (m_h * h) @ w_hh + b, 4)
    c = sigmoid(z_f) * c + sigmoid(z_i) * np.tanh(z_g)
    h = sigmoid(z_o) * np.tanh(c)
    return (h, c), h


def locked_gru(params, state, x):
    """Only what the matmul reads is dropped: u ⊙ h keeps all of h."""
    (w_ih, w_hh, b, b_hn), (h,) = params, state
    z_r, z_u, z_n = np.split((x[I : 2 * I] * x[:I]) @ w_ih + b, 3)
    a_r, a_u, a_n = np.split((x[2 * I :] * h) @ w_hh, 3)
    r, u = sigmoid(z_r + a_r), sigmoid(z_u + a_u)
    h = (1 - u) * np.tanh(z_n + r * (a_n + b_hn)) + u * h
    return (h,), h


HELD = zoneout_noise(KEY(4), RATES, LSTM.initial_carry(draw(LSTM)[0], (B,)), T)
HELD_GRU = zoneout_noise(KEY(5), 0.3, GRU.initial_carry(draw(GRU)[0], (B,)), T)
OVER_TIME = np.broadcast_to(np.concatenate([MASK_X, MASK_H], axis=-1), (T, B, I + H))
BOTH = np.concatenate([OVER_TIME, HELD.h, HELD.c], axis=-1)


def zoned_locked(params, state, x):
    """Zoneout around variational dropout: noise of the one before that of the other."""
    new, _ = locked_lstm(params, state, x[: 2 * I + H])
    d_h, d_c = np.split(x[2 * I + H :], 2)
    h, c = d_h * state[0] + (1 - d_h) * new[0], d_c * state[1] + (1 - d_c) * new[1]
    return (h, c), h


lock = lambda params: Locked(params, jnp.asarray(MASK_X), jnp.asarray(MASK_H))
same = lambda params: params
# name -> cell, what wraps params, what wraps xs, the NumPy step, the noise that follows its x.
CASES = {
    "zoneout": (zoneout(LSTM, RATES), same, lambda xs: Noisy(xs, HELD), zoned(oracles.lstm_step, RATES), np.concatenate(HELD, -1)),
    "zoneout at evaluation": (zoneout(LSTM, RATES), same, same, zoned(oracles.lstm_step, RATES), None),
    "zoneout of a GRU": (zoneout(GRU, 0.3), same, lambda xs: Noisy(xs, HELD_GRU), zoned(oracles.gru_step, [0.3]), HELD_GRU.h),
    "recurrent dropout": (recurrent_dropout(LSTM), same, lambda xs: Noisy(xs, CANDIDATE), candidate_lstm, CANDIDATE),
    "recurrent dropout of a GRU": (recurrent_dropout(GRU), same, lambda xs: Noisy(xs, CANDIDATE), candidate_gru, CANDIDATE),
    "variational dropout": (variational_dropout(LSTM), lock, same, locked_lstm, OVER_TIME),
    "variational dropout of a GRU": (variational_dropout(GRU), lock, same, locked_gru, OVER_TIME),
    "zoneout around variational dropout": (
        zoneout(variational_dropout(LSTM), RATES), lock, lambda xs: Noisy(xs, HELD), zoned_locked, BOTH),
}  # fmt: skip


def base_of(cell):
    return GRU if "GRU" in cell.name else LSTM


@pytest.mark.parametrize("gradient", ["bulk", pytest.param("scan", marks=pytest.mark.ci)])
@pytest.mark.parametrize("name", some(CASES, *list(CASES)[::2]))
def test_values_and_gradients_equal_a_loop_with_the_same_noise(name, gradient):
    cell, wrap_params, wrap_xs, step, noise = CASES[name]
    params, xs, carry = draw(base_of(cell))
    leaves, treedef = jax.tree.flatten((params, xs, carry))
    weight = normal(7, T, B, H)

    def loss(run, leaves):
        final, ys = run(*treedef.unflatten(leaves))
        return (weight * ys).sum() + sum((leaf * leaf).sum() for leaf in final)

    def loop(params, xs, carry):
        noisy = xs if noise is None else np.concatenate([xs, noise], axis=-1)
        zeros = tuple(np.zeros_like(leaf) for leaf in carry)
        return oracles.loop(step, params, noisy, carry, HOLES, RESET, zeros)

    run = lambda params, xs, carry: unroll(
        cell, wrap_params(params), wrap_xs(xs), carry, mask=HOLES, reset=RESET, gradient=gradient
    )
    values = jax.jit(run)(params, xs, carry)
    assert worst_error(values, jax.tree.map(np.asarray, loop(*jax.tree.map(np.asarray, (params, xs, carry))))) < 1e-13
    gradients = jax.jit(jax.grad(functools.partial(loss, run)))(leaves)
    for seed in range(2):
        direction = [normal(100 + seed * 50 + n, *leaf.shape) for n, leaf in enumerate(leaves)]
        moved = [np.asarray(leaf) + 1e-30j * d for leaf, d in zip(leaves, direction, strict=True)]
        want = loss(loop, moved).imag / 1e-30
        got = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert abs(got - want) < 1e-12 * abs(want)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_without_noise_a_regularised_cell_is_the_cell(name):
    cell = CELLS[name][0]
    params, xs, carry = draw(cell)
    want = unroll(cell, params, xs, carry, mask=HOLES, reset=RESET)
    for regularised in (variational_dropout(cell), recurrent_dropout(cell), zoneout(cell, 0.0)):
        got = unroll(regularised, params, xs, carry, mask=HOLES, reset=RESET)
        assert worst_error(got, want) < 1e-15


def test_the_same_choice_is_the_same_cell_and_compiles_once():
    assert variational_dropout(LSTM) is variational_dropout(LSTM)
    assert recurrent_dropout(GRU) is recurrent_dropout(GRU)
    assert zoneout(LSTM, RATES) is zoneout(LSTM, LSTMState(0.2, 0.5)) is not zoneout(LSTM, 0.2)


def test_masks_have_no_gradient_and_may_be_mapped_over():
    cell = zoneout(variational_dropout(LSTM), RATES)
    params, xs, _ = draw(LSTM)
    one = lambda xs, m_x, m_h, d: unroll(cell, Locked(params, m_x, m_h), Noisy(xs, d))[1]
    mapped = jax.vmap(one, in_axes=(1, 0, 0, 1), out_axes=1)(xs, MASK_X, MASK_H, HELD)
    assert worst_error(mapped, unroll(cell, lock(params), Noisy(xs, HELD))[1]) < 1e-14
    gradient = jax.grad(lambda locked: (unroll(cell, locked, Noisy(xs, HELD))[1] ** 2).sum())(lock(params))
    assert (gradient.x == 0).all() and (gradient.h == 0).all() and (gradient.params.w_hh != 0).all()


@pytest.mark.ci
def test_masks_of_several_batch_axes_and_blocks_of_time():
    params, _, _ = draw(LSTM)
    xs = jnp.asarray(normal(0, T, 2, 3, I))
    locked = Locked(
        params, dropout_mask(KEY(1), 0.4, (2, 3, I), jnp.float64), dropout_mask(KEY(2), 0.4, (2, 3, H), jnp.float64)
    )
    cell = variational_dropout(LSTM)
    one_block, blocks, scan = (
        jax.grad(lambda p, options=options: (unroll(cell, locked._replace(params=p), xs, **options)[1] ** 2).sum())(
            params
        )
        for options in ({}, {"gradient": Bulk(block_size=2)}, {"gradient": "scan"})
    )
    assert worst_error(one_block, scan) < 1e-13 and worst_error(blocks, scan) < 1e-13


def test_a_stack_takes_noise_per_layer_and_trace_shows_its_gates():
    cell = recurrent_dropout(LSTM)
    params = init_stack(KEY(0), LSTM, I, [H, 3], bidirectional=False, dtype=jnp.float64)
    xs = jnp.asarray(normal(0, T, B, I))
    noise = [dropout_mask(KEY(n), 0.5, (T, B, size), jnp.float64) for n, size in ((1, H), (2, 3))]
    _, ys = unroll_stack(cell, params, xs, noise=noise)
    _, first = unroll(cell, params[0], Noisy(xs, noise[0]))
    _, want = unroll(cell, params[1], Noisy(first, noise[1]))
    assert worst_error(ys, want) < 1e-15
    assert worst_error(unroll_stack(cell, params, xs)[1], unroll_stack(LSTM, params, xs)[1]) < 1e-15
    gates = trace(cell, params[0], Noisy(xs, noise[0])).gates
    assert gates.g.shape == (T, B, H) and (gates.g != 0).all()


def test_noise_reaches_both_directions_and_every_step_of_a_stack():
    cell = zoneout(LSTM, RATES)
    params = [Bidirectional(*(draw(LSTM, seed)[0] for seed in (0, 20)))]
    xs = draw(LSTM)[1]
    other = zoneout_noise(KEY(9), RATES, LSTM.initial_carry(params[0].forward, (B,)), T)
    _, ys = unroll_stack(cell, params, xs, noise=[Bidirectional(HELD, other)])
    _, forward = unroll(cell, params[0].forward, Noisy(xs, HELD))
    _, backward = unroll(cell, params[0].backward, Noisy(xs, other), reverse=True)
    assert worst_error(ys, jnp.concatenate([forward, backward], axis=-1)) < 1e-15
    stack, carries = [params[0].forward], [LSTM.initial_carry(params[0].forward, (B,))]
    for t in range(T):
        carries, y = step_stack(cell, stack, carries, xs[t], noise=[jax.tree.map(lambda d, t=t: d[t], HELD)])
        np.testing.assert_allclose(y, forward[t], atol=1e-14)


def test_rates_from_numpy_and_unbatched_masks_in_few_digits():
    assert dropout_mask(KEY(0), np.float64(0.3), (5,), "bfloat16").dtype == jnp.bfloat16
    assert zoneout(LSTM, np.float32(0.5)) is zoneout(LSTM, 0.5)
    params, xs, _ = jax.tree.map(lambda v: v.astype("float32"), draw(LSTM))
    locked = Locked(params, x=dropout_mask(KEY(1), 0.4, (I,)), h=dropout_mask(KEY(2), 0.4, (H,)))
    _, low = unroll(low_precision(variational_dropout(LSTM), "bfloat16"), locked, xs[:, 0])
    _, full = unroll(variational_dropout(LSTM), locked, xs[:, 0])
    assert 1e-5 < worst_error(low, full) < 0.1


# Expectations.


def test_a_mask_keeps_the_mean_and_drops_the_rate():
    mask = np.asarray(dropout_mask(KEY(0), 0.3, (400, 500)))
    scale = np.float32(1 / 0.7)
    assert set(np.unique(mask)) == {0, scale}
    error = np.sqrt(0.3 * 0.7 / mask.size)
    assert abs((mask == 0).mean() - 0.3) < 4 * error and abs(mask.mean() - 1) < 4 * scale * error
    for one, other in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)
    assert (dropout_mask(KEY(0), 0.0, (5,)) == 1).all()
    assert dropout_mask(KEY(0), 0.5, (5,), "bfloat16").dtype == jnp.bfloat16


def test_the_mean_over_masks_of_one_step_is_the_step_at_evaluation():
    """Of what is linear in the noise: the pre-activations, the candidate's share of c, and all of zoneout."""
    n = 20_000
    params, xs, carry = draw(LSTM)
    x, carry = xs[:1, 0], jax.tree.map(lambda v: v[0], carry)
    many = lambda v: jnp.broadcast_to(v, (n, *v.shape))
    evaluation, _ = unroll(LSTM, params, x, carry)

    def close(got, want):
        got = np.asarray(got)
        assert (abs(got.mean(0) - want) < 5 * got.std(0) / np.sqrt(n) + 1e-12).all() and got.std(0).max() > 0

    cell, m = recurrent_dropout(LSTM), dropout_mask(KEY(1), 0.4, (n, 1, H), jnp.float64)
    last, _ = jax.vmap(lambda m: unroll(cell, params, Noisy(x, m), carry))(m)
    close(last.c, evaluation.c)
    cell, d = zoneout(LSTM, RATES), zoneout_noise(KEY(2), RATES, jax.tree.map(many, carry), 1)
    last, _ = unroll(cell, params, Noisy(many(x[0])[None], d), jax.tree.map(many, carry))
    expected, _ = unroll(cell, params, x, carry)
    close(last.c, expected.c)
    close(last.h, expected.h)
    held = np.asarray(d.c)
    assert abs(held.mean() - RATES.c) < 0.01 and abs(np.asarray(d.h).mean() - RATES.h) < 0.01
    assert abs(np.corrcoef(held.ravel(), np.asarray(d.h).ravel())[0, 1]) < 0.02, "h and c are held independently"
    cell, m_x, m_h = (
        variational_dropout(LSTM),
        *(dropout_mask(KEY(n_), 0.4, (n, s), jnp.float64) for n_, s in ((3, I), (4, H))),
    )
    z = cell.project(Locked(params, x=m_x), many(x[0]))
    a = cell.recur(Locked(params, h=m_h), jax.tree.map(many, carry))
    close(z, LSTM.project(params, x[0]))
    close(a, LSTM.recur(params, carry))


def test_locked_masks_stay_and_noise_is_new_at_every_step():
    """A unit that variational dropout drops, it drops at every step; zoneout and recurrent dropout draw again."""
    params, _, _ = draw(LSTM)
    xs = jnp.ones((T, B, I))
    z = variational_dropout(LSTM).project(Locked(params, x=jnp.asarray(MASK_X)), xs)
    assert (z == z[:1]).all() and not (z[:, 0] == z[:, 1]).all()
    assert not (np.asarray(HELD.h) == np.asarray(HELD.h)[0]).all() and not (CANDIDATE[:1] == CANDIDATE).all()


def test_weight_drop_and_dropped_embeddings():
    params, xs, _ = draw(LSTM)
    dropped = weight_drop(KEY(1), 0.5, params)
    assert (dropped.w_ih == params.w_ih).all() and (dropped.b == params.b).all()
    gone = np.asarray(dropped.w_hh) == 0
    assert 0.3 < gone.mean() < 0.7
    np.testing.assert_allclose(np.asarray(dropped.w_hh)[~gone], 2 * np.asarray(params.w_hh)[~gone], rtol=1e-15)
    gradient = jax.grad(lambda p: (unroll(LSTM, weight_drop(KEY(1), 0.5, p), xs)[1] ** 2).sum())(params)
    assert ((np.asarray(gradient.w_hh) == 0) == gone).all(), "what is dropped has no gradient"
    embedding = jnp.asarray(normal(0, 2000, 3))
    table = embedding * dropout_mask(KEY(2), 0.25, (len(embedding), 1), embedding.dtype)
    rows = np.asarray(table) / normal(0, 2000, 3)
    assert all(len(set(np.round(row, 9))) == 1 for row in rows), "a symbol is dropped whole"
    assert abs((rows[:, 0] == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)
    np.testing.assert_allclose(rows[rows != 0], 4 / 3)


def test_the_same_key_is_the_same_mask_in_another_process():
    code = "import jax, jaxlstm; print(jaxlstm.regularize.dropout_mask(jax.random.key(7), 0.5, (4, 8)).tolist())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(output) == dropout_mask(jax.random.key(7), 0.5, (4, 8)).tolist()


# Every wrong argument.

PARAMS, XS, CARRY = draw(LSTM)
BAD = {
    "rate of 1": (lambda: dropout_mask(KEY(0), 1.0, (3,)), ValueError, r"dropout_mask: rate must lie in \[0, 1\), got 1.0"),
    "negative rate": (lambda: weight_drop(KEY(0), -0.5, PARAMS), ValueError, r"weight_drop: rate must lie in \[0, 1\), got -0.5"),
    "untyped key": (lambda: dropout_mask(3, 0.5, (4,)), TypeError, r"dropout_mask: key must be a JAX key"),
    "params without w_hh": (lambda: weight_drop(KEY(0), 0.5, [PARAMS]), TypeError, r"weight_drop: params must be a NamedTuple with w_hh, got list"),
    "zoneout of 1": (lambda: zoneout(LSTM, LSTMState(0.1, 1.0)), ValueError, r"zoneout: rates must lie in \[0, 1\), got 1.0"),
    "rates of another cell": (lambda: unroll(zoneout(GRU, RATES), draw(GRU)[0], XS), ValueError, r"unroll: one step of zoneout\(GRU\) fails"),
    "noise without a key": (lambda: zoneout_noise(0, 0.5, CARRY, T), TypeError, r"zoneout_noise: key must be a JAX key"),
    "noise of another length": (
        lambda: unroll(zoneout(LSTM, RATES), PARAMS, Noisy(XS, jax.tree.map(lambda v: v[1:], HELD))), ValueError,
        r"unroll: every array of xs must be \[time, \*batch, ...\]"),
    "a cell without a known candidate": (lambda: recurrent_dropout(RNN), ValueError, r"recurrent_dropout: cell must be LSTM or GRU"),
    "locked masks of another batch": (
        lambda: unroll(variational_dropout(LSTM), Locked(PARAMS, x=jnp.ones((1, I))), XS), ValueError,
        r"Locked.x must be \[\*batch, features\] = \[3, 5\], got \[1, 5\]"),
    "a locked mask for all features": (
        lambda: unroll(variational_dropout(LSTM), Locked(PARAMS, x=jnp.ones((B, 1))), XS), ValueError,
        r"Locked.x must be \[\*batch, features\] = \[3, 5\], got \[3, 1\]"),
    "a locked mask of half the units": (
        lambda: unroll(variational_dropout(LSTM), Locked(PARAMS, h=jnp.ones((B, H // 2))), XS), ValueError,
        r"Locked.h must be \[\*batch, features\] = \[3, 4\], got \[3, 2\]"),
    "dropout's mask for zoneout": (
        lambda: unroll(zoneout(LSTM, RATES), PARAMS, Noisy(XS, LSTMState(jnp.asarray(CANDIDATE), jnp.asarray(CANDIDATE)))), ValueError,
        r"unroll: noise must be bool"),
    "noise without its batch": (
        lambda: unroll(recurrent_dropout(LSTM), PARAMS, Noisy(XS, jnp.ones((T, H)))), ValueError,
        r"unroll: noise of a step must be \[3, 4\], got \[4\]"),
    "zoneout by a dict": (lambda: zoneout(LSTM, {"h": 0.1, "c": 0.5}), TypeError, r"zoneout: rates must be one number or a NamedTuple of numbers, got dict"),
    "zoneout by a traced rate": (lambda: jax.jit(lambda r: unroll(zoneout(LSTM, r), PARAMS, XS))(0.5), TypeError, r"zoneout: rates must be known"),
    "zoneout of no cell": (lambda: zoneout("LSTM", 0.5), TypeError, r"zoneout: cell must be a Cell"),
    "locked masks that do not divide": (
        lambda: unroll(variational_dropout(LSTM), Locked(PARAMS, h=jnp.ones((2, H))), XS), ValueError,
        r"Locked.h must be \[\*batch, features\] = \[3, 4\], got \[2, 4\]"),
    "locked masks with a time axis": (
        lambda: unroll(variational_dropout(LSTM), Locked(PARAMS, x=jnp.ones((T, B, I))), XS), ValueError, r"Locked.x must be"),
    "a carry without h": (lambda: unroll(zoneout(LEAKY, 0.1), draw(LEAKY)[0], XS), ValueError, r"unroll: one step of zoneout\(leaky\) fails"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_cell_without_h_names_its_output():
    params, xs, carry = draw(LEAKY)
    cell = zoneout(LEAKY, 0.25, output=lambda carry: carry.s**2)
    step = lambda params, state, x: (lambda new: (new, new[0] ** 2))(
        zoned(oracles.leaky_step, [0.25])(params, state, x)[0]
    )
    want = oracles.loop(step, [np.asarray(v) for v in params.values()], np.asarray(xs), [np.asarray(v) for v in carry])
    assert worst_error(unroll(cell, params, xs, carry), want) < 1e-14


def test_a_closed_form_gets_the_parameters_of_the_cell_itself():
    seen = []

    def gates_jvp(params, carry, gates):
        seen.append(type(params))
        return LSTM.gates_jvp(params, carry, gates)

    cell = variational_dropout(dataclasses.replace(LSTM, gates_jvp=gates_jvp))
    params, xs, _ = draw(LSTM)
    jax.grad(lambda p: unroll(cell, Locked(p, h=jnp.ones((B, H))), xs)[1].sum())(params)
    assert set(seen) == {type(params)}
