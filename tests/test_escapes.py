"""Faults that once passed all tests: noise, dtypes, keys, settings, and what a cell hands straight on."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Cell,
    LSTMState,
    fit,
    generate,
    init_stack,
    init_train_state,
    initializers,
    length_mask,
    make_train_step,
    regularize,
    segment_resets,
    step_stack,
    unroll,
    unroll_stack,
)
from jaxlstm.adapters import linen as ours_linen
from jaxlstm.adapters import nnx as ours_nnx
from jaxlstm.diagnostics import check_gradients, compare_gradients, gradient_flow, gradient_sources
from jaxlstm.rtrl import rtrl_gradient, snap1_pattern

from cells import B, H, I, T, draw, normal, worst_error
from sweeps import some

STACK = init_stack(jax.random.key(0), LSTM, I, [H, H], dtype="float64")
XS = jnp.asarray(normal(0, T, B, I))


@jax.debug_key_reuse(False)
def test_a_traced_dropout_rate_drops():
    run = lambda rate: unroll_stack(LSTM, STACK, XS, dropout=rate, key=jax.random.key(1))[1]
    assert worst_error(jax.jit(run)(0.5), run(0.5)) < 1e-6
    assert worst_error(jax.jit(run)(0.0), run(0.0)) < 1e-14 and worst_error(run(0.5), run(0.0)) > 1e-3


@jax.debug_nans(False)
def test_a_nan_in_a_masked_single_step_reaches_no_gradient():
    mask = np.array([True, False, True])
    x = jnp.where(mask[:, None], XS[0], jnp.nan)
    carries = [LSTM.initial_carry(layer, (B,)) for layer in STACK]

    def loss(layers, x):
        after, y = step_stack(LSTM, layers, carries, x, mask=mask)
        return (y**2).sum() + sum((carry.c**2).sum() for carry in after)

    gradients = jax.grad(loss, (0, 1))(STACK, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)) and (gradients[1][1] == 0).all()


@pytest.mark.parametrize("init", [LSTM.init, GRU.init, initializers.torch, initializers.flax])
def test_every_gate_of_every_matrix_has_a_draw_of_its_own(init):
    params = init(jax.random.key(0), H, H)
    blocks = [block for w in params[:2] for block in jnp.split(w, w.shape[1] // H, axis=1)]
    for n, one in enumerate(blocks):
        for other in blocks[:n]:
            assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 0.999


def test_weight_drop_drops_entries_not_columns_or_rows():
    params = LSTM.init(jax.random.key(0), I, 32)
    gone = np.asarray(regularize.weight_drop(jax.random.key(1), 0.5, params).w_hh) == 0
    for axis in (0, 1):
        assert (gone.mean(axis) > 0.2).all() and (gone.mean(axis) < 0.8).all()


def test_complex_parameters_and_a_rate_of_nan_are_refused():
    for init in (LSTM.init, GRU.init, RNN.init, initializers.keras):
        with pytest.raises(TypeError, match="dtype must be a floating type, got complex64"):
            init(jax.random.key(0), I, H, dtype="complex64")
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\), got nan"):
        regularize.dropout_mask(jax.random.key(0), float("nan"), (2,))


def test_the_comparison_restores_the_callers_float32():
    with jax.enable_x64(False):
        params, xs = LSTM.init(jax.random.key(0), I, H), jnp.ones((3, B, I))
        found = compare_gradients(LSTM, params, xs, lambda y, t: (y**2).sum(), by_step=False)
        assert found.gradients["bulk"][0].b.dtype == "float64" and max(found.errors["bulk"].values()) < 1e-12
        assert jnp.ones(()).dtype == "float32"


def test_differences_take_larger_steps_for_larger_parameters():
    loss = lambda w: jnp.sin(w / 1e6).sum()
    found = check_gradients(loss, 1e6 * jnp.arange(1.0, 4.0), key=jax.random.key(0))
    assert found.agree and found.leaves["params"].floor < 1e-9


def test_several_learning_rates_are_not_reported_as_one():
    rated = lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    both = optax.multi_transform({"slow": rated(0.1), "fast": rated(0.5)}, {"a": "slow", "b": "fast"})
    loss = lambda p, batch: (p["a"] * p["b"] * batch).sum()
    state = init_train_state(params, both, jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = make_train_step(loss, both)(state, jnp.ones(2))
    assert "learning_rate" not in metrics
    np.testing.assert_allclose([state.params["a"][0], state.params["b"][0]], [0.9, 0.5], rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_of_no_steps(reverse):
    assert segment_resets(np.zeros((0, B), int), reverse=reverse).shape == (0, B)


class Twice(NamedTuple):
    h: jax.Array
    c: jax.Array


def same_leaves(params, carry, z, a):
    h = jnp.tanh(z + a + carry.c)
    return Twice(h, h), h


TWICE = Cell(
    name="twice",
    init=RNN.init,
    initial_carry=lambda params, batch_shape=(): Twice(*[jnp.zeros((*batch_shape, H))] * 2),
    gates=same_leaves,
)


def test_two_leaves_of_a_carry_that_are_one_array_have_a_probe_each():
    params, xs, _ = draw(RNN)
    weight = jnp.asarray(normal(3, T, B, H))
    found = gradient_flow(TWICE, params, xs, lambda ys: (ys * weight).sum())

    def later(carry, t):
        """The loss as a function of the carry after step t."""
        return (unroll(TWICE, params, xs[t + 1 :], carry, gradient="scan")[1] * weight[t + 1 :]).sum()

    for t in (0, 3, T - 1):
        carry, _ = unroll(TWICE, params, xs[: t + 1])
        want = jax.grad(later)(carry, t)
        # The first leaf is the array itself, which is also the second leaf and the output.
        got = jax.tree.map(lambda v, t=t: v[t], found)
        assert worst_error(got, Twice(want.h + want.c + weight[t], want.c)) < 1e-12


def test_a_parameter_that_a_cell_hands_straight_out_is_differentiated():
    def gates(params, state, z, a):
        return LSTM.gates(params, state, z, a)[0], params.b

    cell = dataclasses.replace(LSTM, gates=gates)  # keeps the closed form, which knows nothing of b
    params, xs, _ = draw(LSTM)
    loss = lambda p, how: (jnp.sin(unroll(cell, p, xs[:, 0], gradient=how)[1]) * jnp.arange(T)[:, None] / 7).sum()
    with jax.numpy_dtype_promotion("standard"):
        got, want = (jax.grad(loss)(params, how) for how in ("bulk", "scan"))
    assert worst_error(got, want) < 1e-13 and abs(want.b).max() > 0.1


def learned_start(params, batch_shape=()):
    return LSTMState(*(jnp.broadcast_to(v, (*batch_shape, H)) for v in params[1]))


LEARNED = Cell(
    name="learned",
    init=LSTM.init,
    initial_carry=learned_start,
    gates=lambda params, *rest: LSTM.gates(params[0], *rest),
    project=lambda params, xs: LSTM.project(params[0], xs),
    recur=lambda params, carry: LSTM.recur(params[0], carry),
)  # fmt: skip
LEARNED_PARAMS = (draw(LSTM)[0], LSTMState(jnp.asarray(normal(5, H)), jnp.asarray(normal(6, H))))


def test_a_learned_initial_carry_is_credited_to_the_first_use_and_never_lost():
    step_loss = lambda y, t: jnp.sin(y).sum()
    found = gradient_sources(LEARNED, LEARNED_PARAMS, XS, step_loss)
    of_last = found.row(jnp.array(T - 1))[1]
    assert (of_last.c[1:] == 0).all() and abs(of_last.c[0]).max() > 1e-6
    exact = rtrl_gradient(LEARNED, LEARNED_PARAMS, XS, step_loss)[1]
    summed = jax.tree.map(lambda v: v.sum(0), found.by_loss)
    assert worst_error(summed, exact) < 1e-12 and min(abs(leaf).min() for leaf in exact[1]) > 1e-6
    with pytest.raises(ValueError, match="snap1_pattern: the initial carry of learned is learned from parameters"):
        snap1_pattern(LEARNED, LEARNED_PARAMS, XS[0, 0])


@pytest.mark.parametrize(
    "dtype", [np.float32, jnp.float32, np.dtype("float32"), "float32", jnp.bfloat16, float], ids=str
)
def test_a_dtype_may_be_given_in_any_form(dtype):
    assert LSTM.init(jax.random.key(0), I, H, dtype=dtype).b.dtype == jnp.dtype(dtype)
    assert regularize.dropout_mask(jax.random.key(0), 0.5, (2,), dtype).dtype == jnp.dtype(dtype)
    with pytest.raises(TypeError, match="dtype must be a floating type, got int32"):
        LSTM.init(jax.random.key(0), I, H, dtype=np.int32)


@jax.custom_vjp
def fire(v):
    return (v > 0).astype(v.dtype)


fire.defvjp(lambda v: (fire(v), v), lambda v, d: (d / (1 + jnp.abs(v)) ** 2,))


def test_snap1_follows_a_surrogate_gradient():
    def gates(params, s, z, a):
        c = 0.9 * s.c + jnp.split(z + a, 4, -1)[0]
        y = fire(c - 0.1)
        return LSTMState(y, c * (1 - y)), y

    cell = dataclasses.replace(LSTM, gates=gates, gates_jvp=None, activations=None)
    params, xs, carry = draw(LSTM)
    pattern = snap1_pattern(cell, params, xs[0, 0])
    step_loss = lambda y, t: (y * WEIGHTS).sum()
    exact, kept = (rtrl_gradient(cell, params, xs[:1], step_loss, carry, pattern=p)[1] for p in (None, pattern))
    assert worst_error(kept, exact) < 1e-13 and abs(exact.w_ih).max() > 1e-3


WEIGHTS = jnp.asarray(normal(8, B, H))
STATE = init_train_state(XS, optax.sgd(0.1), jax.random.key(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: unroll_stack(LSTM, STACK, XS, merge="sum"), "unroll_stack: merge must be a function, got 'sum'"),
        (lambda: snap1_pattern(LSTM, STACK[0], XS[0]), "snap1_pattern: x must be one input without batch axes"),
        (lambda: compare_gradients(LSTM, STACK[0], XS, len, dtype="flot64"), 'dtype must be "float64" or "float32"'),
        (lambda: compare_gradients(LSTM, STACK[0], "no", len), "compare_gradients: xs must hold arrays of numbers"),
        (lambda: generate(lambda s, x, k: x, (), XS, jax.random.key(0), 2), r"step_fn must return \(carry, x\), got"),
        (
            lambda: fit(lambda s, b: s, init_train_state(XS, optax.sgd(0.1), jax.random.key(0)), XS),
            r"fit: train_step must return \(TrainState, metrics\), got TrainState",
        ),
        (
            lambda: fit(len, init_train_state(XS, optax.sgd(0.1), jax.random.key(0)), (XS, 1.0)),
            "fit: batches must be arrays",
        ),
        (
            lambda: fit(len, init_train_state(XS, optax.sgd(0.1), jax.random.key(0)), (XS, np.ones(()))),
            "fit: batches must share their first axis",
        ),
        (lambda: make_train_step(int, optax.sgd(0.1)), "make_train_step: loss_fn must"),
    ],
)
def test_wrong_calls_that_the_fuzz_does_not_draw(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_number_of_steps_may_be_an_array_of_one_integer():
    lengths = np.array([3, 1])
    assert length_mask(lengths, lengths.max()).shape == length_mask(lengths, jnp.asarray(lengths).max()).shape == (3, 2)


# The Flax layers.


def layers():
    """Return each layer as a function of the inputs and of a call's keywords."""
    module = ours_linen.Recurrent(features=H, num_layers=2, dropout=0.5, deterministic=True)
    inputs = jnp.ones((B, T, I), "float32")
    variables = module.init(jax.random.key(0), inputs)
    model = ours_nnx.Recurrent(I, H, num_layers=2, dropout=0.5, deterministic=True, rngs=nnx.Rngs(0))
    dropped = {"rngs": {"dropout": jax.random.key(1)}}
    return {"linen": lambda *args, **call: module.apply(variables, *args, **dropped, **call), "nnx": model}


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@jax.debug_key_reuse(False)
def test_keywords_of_a_call_override_the_layers_own(kind):
    layer, inputs = layers()[kind], jnp.asarray(normal(1, B, T, I), "float32")
    outputs = layer(inputs)
    as_time_major = layer(jnp.swapaxes(inputs, 0, 1), time_major=True)
    assert worst_error(jnp.swapaxes(as_time_major, 0, 1), outputs) < 1e-6
    carries, same = layer(inputs, return_carry=True)
    assert worst_error(same, outputs) == 0 and len(carries) == 2
    assert worst_error(layer(inputs, deterministic=False), outputs) > 1e-3


@jax.debug_key_reuse(False)
def test_an_nnx_layer_leaves_the_callers_dropout_stream_alone():
    rngs = nnx.Rngs(0)
    model = ours_nnx.Recurrent(I, H, num_layers=2, dropout=0.5, rngs=rngs)
    before = int(rngs.dropout.count[...])
    inputs = jnp.ones((B, T, I), "float32")
    assert worst_error(model(inputs), model(inputs)) > 1e-3, "new noise in every call"
    assert int(rngs.dropout.count[...]) == before


@pytest.mark.parametrize("name", some(["LSTMCell", "OptimizedLSTMCell", "GRUCell"], "LSTMCell"))
@jax.debug_key_reuse(False)
def test_an_nnx_cell_uses_its_own_functions(name):
    functions = {"gate_fn": jax.nn.hard_sigmoid, "activation_fn": jax.nn.soft_sign}
    own, flaxs = (getattr(room, name)(I, H, **functions, rngs=nnx.Rngs(0)) for room in (ours_nnx, nnx))
    x = jnp.asarray(normal(1, B, I), "float32")
    one = jnp.ones((B, H), "float32")
    carry = one if name == "GRUCell" else (one, 2 * one)
    with jax.numpy_rank_promotion("allow"):
        assert worst_error(own(carry, x), flaxs(carry, x)) < 1e-6
        usual = getattr(nnx, name)(I, H, rngs=nnx.Rngs(0))
        assert worst_error(own(carry, x), usual(carry, x)) > 1e-3


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_outputs_of_a_layer_have_its_dtype(kind):
    inputs = jnp.ones((B, T, I), "float32")
    if kind == "linen":
        module = ours_linen.Recurrent(features=H, dtype="bfloat16")
        outputs, variables = module.init_with_output(jax.random.key(0), inputs)
        params = variables["params"]
    else:
        module = ours_nnx.Recurrent(I, H, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        outputs, params = module(inputs), nnx.state(module, nnx.Param)
    assert outputs.dtype == "bfloat16" and {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_layer_casts_inputs_of_another_precision_and_refuses_integers(kind):
    layer, inputs = layers()[kind], jnp.asarray(normal(1, B, T, I))
    assert inputs.dtype == "float64" and worst_error(layer(inputs), layer(inputs.astype("float32"))) == 0
    with pytest.raises(TypeError, match="xs must be floating, got int"):
        layer(inputs.astype(int))
