"""Calls drawn at random: wrong ones raise one clear error, right ones in any form give the values of a NumPy loop."""

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import GRU, LSTM, RNN, Bulk, Chunked, Scan, unroll

import oracles
from cells import B, H, I, T
from sweeps import sweep

CALLS = fuzz.calls()


@pytest.mark.ci
@jax.debug_key_reuse(False)
@jax.numpy_dtype_promotion("standard")
def test_the_calls_that_are_made_wrong_are_right():
    for name, call in CALLS.items():
        assert fuzz.outcome(call, *next(iter(call.arguments.items())))[0] == "accepted", name


@jax.debug_nans(False)
@jax.debug_key_reuse(False)
@jax.numpy_dtype_promotion("standard")
def test_wrong_calls_raise_one_clear_error(seed):
    every = [
        (name, argument, kind) for name, call in CALLS.items() for argument in call.arguments for kind in fuzz.WRONG
    ]
    drawn = [every[n] for n in np.random.default_rng(seed).choice(len(every), 600, replace=False)]
    unclear = []
    for name, argument, kind in drawn:
        result, found = fuzz.outcome(CALLS[name], argument, fuzz.WRONG[kind])
        if result == "unclear":
            unclear.append(f"{name}({argument}={kind}): {type(found).__name__}: {found}")
    assert len(unclear) < 0.02 * len(drawn), "\n".join(unclear)


STEPS = {LSTM: oracles.lstm_step, GRU: oracles.gru_step, RNN: oracles.rnn_step(np.tanh)}
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]


def numpy_loop(step, params, xs, carry, mask, reset, reverse):
    """Run one sequence after another; return the last carry and the outputs."""
    last, ys = [np.zeros_like(leaf) for leaf in carry], np.zeros((*xs.shape[:-1], H), xs.dtype)
    for n in np.ndindex(xs.shape[1:-1]):
        state = [leaf[n] for leaf in carry]
        for t in range(len(xs))[:: -1 if reverse else 1]:
            if reset is not None and reset[t][n]:
                state = [np.zeros_like(leaf) for leaf in state]
            if mask is None or mask[t][n]:
                state, ys[t][n] = step(params, state, xs[t][n])
        for leaf, own in zip(last, state, strict=True):
            leaf[n] = own
    return [*last, ys]


@sweep("calls of unroll in any form right", 60)
def test_unroll_in_any_form_gives_the_values_of_a_numpy_loop(trial, seed):
    """Draw the cell, dtype, axes, flags, direction, way to differentiate, and how the arrays and the call come."""
    rng = np.random.default_rng([trial, seed])
    choose = lambda options: options[rng.integers(len(options))]
    cell, dtype = choose(list(STEPS)), choose(DTYPES)
    batch_shape, num_steps = choose([(B,), (B,), (2, B), (), (0,)]), choose([T, T, 1, 0])
    draw = lambda *shape: rng.normal(size=shape) * 0.5
    params = jax.tree.map(lambda w: draw(*w.shape), cell.init(jax.random.key(0), I, H))
    xs = draw(num_steps, *batch_shape, I)
    carry = jax.tree.map(lambda v: draw(*v.shape), cell.initial_carry(cell.init(jax.random.key(0), I, H), batch_shape))
    if dtype.startswith("complex"):
        params, xs = jax.tree.map(lambda v: v + 0.1j * draw(*v.shape), (params, xs))
    params, xs, carry = jax.tree.map(lambda v: np.asarray(jnp.asarray(v, dtype)), (params, xs, carry))
    mask, reset = (choose([None, rng.random(xs.shape[:-1]) < 0.6]) for _ in range(2))
    reverse, gradient = choose([False, True]), choose(["bulk", Scan(), Bulk(block_size=3), Chunked(), Chunked(2)])

    wide = "complex128" if dtype.startswith("complex") else "float64"
    flat = lambda tree: [np.asarray(leaf, wide) for leaf in jax.tree.leaves(tree)]
    want = numpy_loop(STEPS[cell], flat(params), flat(xs)[0], flat(carry), mask, reset, reverse)
    convert = choose([lambda tree: tree, lambda tree: jax.tree.map(jnp.asarray, tree)])
    call = lambda params, xs, carry: unroll(
        cell, params, xs, carry, mask=mask, reset=reset, reverse=reverse, gradient=gradient
    )
    arguments = convert((params, xs, carry))
    way = choose(["eager", "jit", "vmap", "grad"])
    if way == "vmap":
        each = jax.vmap(call, (None, None, 0))(*arguments[:2], jax.tree.map(lambda v: jnp.stack([v, v]), arguments[2]))
        got = jax.tree.map(lambda v: v[1], each)
    elif way == "grad" and wide == "float64":

        def loss(xs):
            result = call(arguments[0], xs, arguments[2])
            return result[1].sum(), result

        got = jax.grad(loss, has_aux=True)(arguments[1])[1]
    else:
        got = (jax.jit(call) if way == "jit" else call)(*arguments)
    for own, right in zip(jax.tree.leaves(got), want, strict=True):
        assert own.dtype == dtype and own.shape == right.shape
        tolerance = 60 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(own, wide), right, rtol=tolerance, atol=tolerance)
