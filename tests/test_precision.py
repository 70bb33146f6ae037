"""low_precision: what is rounded, what is not, and how close the gradients are to float64 at the rounded numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlstm import GRU, LSTM, RNN, low_precision, unroll

from cells import LEAKY, B, H, I, T, draw, normal, worst_error
from sweeps import some

LONG = (2000, 4, 24, 32)


def at_rounded(dtype, params, *others):
    """Round weights and inputs to a dtype; return everything in float64."""
    back = lambda v: jnp.asarray(v, dtype).astype("float64")
    weights = jax.tree.map(lambda v: back(v) if v.ndim >= 2 else v.astype("float64"), params)
    return weights, *map(back, others)


@functools.cache
def long_problem():
    num_steps, batch, input_size, hidden = LONG
    params = LSTM.init(jax.random.key(0), input_size, hidden)
    xs, weight = (jnp.asarray(normal(k, num_steps, batch, n), "float32") for k, n in ((1, input_size), (2, hidden)))
    return params, xs, weight


def plain_scan(dtype, params, xs):
    """What one writes without the library: operands cast, sums in float32, the rest left to autodiff."""

    def step(carry, x):
        matmul = lambda x, w: jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type="float32")
        return LSTM.gates(params, carry, matmul(x, params.w_ih) + params.b[None], matmul(carry.h, params.w_hh))

    return lax.scan(step, LSTM.initial_carry(params, xs.shape[1:2]), xs)[1]


@functools.cache
def exact_gradient(dtype):
    params, xs, weight = long_problem()
    params, xs, weight = *at_rounded(dtype, params, xs), weight.astype("float64")
    return jax.jit(jax.grad(lambda p: (unroll(LSTM, p, xs)[1] * weight).sum()))(params)


@pytest.mark.ci
@pytest.mark.parametrize("dtype, bound", [("bfloat16", 3e-3), pytest.param("float16", 4e-4, marks=pytest.mark.ci)])
def test_rounded_gradients_over_2000_steps_are_near_float64_too(dtype, bound):
    params, xs, weight = long_problem()
    cell = low_precision(LSTM, dtype, round_gradients=True)
    got = jax.jit(jax.grad(lambda p: (unroll(cell, p, xs)[1] * weight).sum()))(params)
    assert {leaf.dtype for leaf in got} == {jnp.dtype("float32")}
    assert bound / 10 < worst_error(got, exact_gradient(dtype)) <= bound


@pytest.mark.parametrize("dtype, scale, bound", [("bfloat16", 1.0, 3e-3), ("float16", 1e6, 1e-3)])
def test_rounded_gradients_of_a_mean_are_near_too_if_float16_is_scaled(dtype, scale, bound):
    params, xs, _ = long_problem()

    def gradient(cell, scale):
        scaled = jax.jit(jax.grad(lambda p: scale * (unroll(cell, p, xs)[1] ** 2).mean()))(params)
        return jax.tree.map(lambda leaf: leaf / scale, scaled)

    rounded = low_precision(LSTM, dtype, round_gradients=True)
    assert worst_error(gradient(rounded, scale), gradient(low_precision(LSTM, dtype), 1.0)) < bound


@pytest.mark.parametrize("cell", [LSTM, LEAKY], ids=lambda cell: cell.name)
def test_rounded_gradients_are_the_others_up_to_rounding(cell):
    params, xs, carry = draw(cell, dtype=np.float32)

    def gradient(how, **options):
        half = low_precision(cell, "bfloat16", **options)
        return jax.jit(jax.grad(lambda *v: (unroll(half, *v, gradient=how)[1] ** 2).sum(), (0, 1, 2)))(
            params, xs, carry
        )

    assert 1e-6 < worst_error(gradient("bulk", round_gradients=True), gradient("bulk")) < 2e-2
    assert worst_error(gradient("bulk", round_gradients=True), gradient("scan", round_gradients=True)) < 2e-2


def test_with_rounded_gradients_the_matmuls_of_the_backward_pass_read_the_low_dtype():
    params, xs, _ = draw(LSTM, dtype=np.float32)

    def operands(**options):
        cell = low_precision(LSTM, "bfloat16", **options)
        program = jax.jit(jax.grad(lambda p, x: unroll(cell, p, x)[1].sum(), (0, 1))).lower(params, xs).as_text()
        dots = [line.rpartition(":")[2].split("->")[0] for line in program.splitlines() if "dot_general" in line]
        return [line.count("bf16") for line in dots]

    assert set(operands(round_gradients=True)) == {2}
    assert operands().count(2) == 2  # only the forward pass has them


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 1.5e-3), pytest.param("float16", 2e-4, marks=pytest.mark.ci)])
def test_gradients_over_2000_steps_are_near_float64_and_nearer_than_the_plain_scans(dtype, bound):
    params, xs, weight = long_problem()
    gradient = lambda run, xs, w: jax.jit(jax.grad(lambda p: (run(p, xs) * w).sum()))
    exact = exact_gradient(dtype)
    ours = gradient(lambda p, x: unroll(low_precision(LSTM, dtype), p, x)[1], xs, weight)(params)
    plain = gradient(functools.partial(plain_scan, dtype), xs, weight)(params)
    for name, got, theirs, want in zip(params._fields, ours, plain, exact, strict=True):
        assert got.dtype == "float32"
        error = worst_error(got, want)
        assert 0 < error <= bound, name
        assert error <= 1.05 * worst_error(theirs, want), name


@pytest.mark.parametrize("cell", [LSTM, GRU, RNN, LEAKY], ids=lambda cell: cell.name)
@pytest.mark.parametrize("dtype", some(["bfloat16", "float16"], "bfloat16"))
def test_one_step_rounds_x_h_and_weights_and_nothing_else(cell, dtype):
    params, xs, carry = draw(cell, dtype=np.float32)
    got_carry, got = unroll(low_precision(cell, dtype), params, xs[:1], carry)
    round_off = lambda v: jnp.asarray(v, dtype).astype("float32")
    weights = jax.tree.map(lambda v: round_off(v) if v.ndim >= 2 else v, params)
    z = cell.project(weights, round_off(xs[0]))
    a = cell.recur(weights, jax.tree.map(round_off, carry))
    want_carry, want = cell.gates(params, carry, z, a)  # the carry itself is not rounded
    tolerance = 1e-6 if cell is not LEAKY else 2e-2  # its own matmul is summed in the dtype it is given
    assert worst_error((got_carry, got[0]), (want_carry, want)) < tolerance
    assert {leaf.dtype for leaf in jax.tree.leaves((got_carry, got))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "cell",
    [LSTM, pytest.param(RNN, marks=pytest.mark.ci), pytest.param(GRU, marks=pytest.mark.slow)],
    ids=lambda cell: cell.name,
)
def test_the_rule_and_the_scan_agree_in_mixed_precision(cell):
    params, xs, carry = draw(cell, dtype=np.float32)
    loss = lambda how: lambda *v: (unroll(low_precision(cell, "bfloat16"), *v, gradient=how)[1] ** 2).sum()
    bulk, scan = (jax.jit(jax.grad(loss(how), (0, 1, 2)))(params, xs, carry) for how in ("bulk", "scan"))
    assert worst_error(bulk, scan) < 1e-5
    # Forward over reverse, JAX drops custom rules inside a scan, and tangents are rounded; the other way it keeps them.
    along = lambda how: jax.grad(
        lambda p: jax.jvp(lambda p: loss(how)(p, xs, carry), (p,), (jax.tree.map(jnp.cos, params),))[1]
    )
    assert worst_error(along("bulk")(params), along("scan")(params)) < 1e-5


def test_the_matmuls_read_the_low_dtype_and_sum_in_float32():
    params, xs, _ = draw(LSTM, dtype=np.float32)
    text = jax.jit(lambda p, x: unroll(low_precision(LSTM, "bfloat16"), p, x)[1]).lower(params, xs).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 2
    for line in dots:
        operands, result = line.rpartition(":")[2].split("->")
        assert operands.count("bf16") == 2 and "xf32" in result


def test_the_same_cell_and_dtype_are_the_same_cell():
    assert low_precision(LSTM, "bfloat16") is low_precision(LSTM, jnp.bfloat16)
    rounded = low_precision(LSTM, "bfloat16", round_gradients=True)
    assert rounded.name == "low_precision(LSTM, bfloat16, round_gradients)" != low_precision(LSTM, "bfloat16").name
    params, xs, _ = draw(LSTM, dtype=np.float32)
    traces = []

    @jax.jit
    def run(params, xs):
        traces.append(1)
        return unroll(low_precision(LSTM, "bfloat16"), params, xs)

    run(params, xs), run(params, 2 * xs)
    assert len(traces) == 1


def test_low_precision_in_the_dtype_of_the_parameters_changes_nothing():
    params, xs, carry = draw(LSTM)
    assert worst_error(unroll(low_precision(LSTM, "float64"), params, xs, carry), unroll(LSTM, params, xs, carry)) == 0
    assert xs.shape == (T, B, I) and carry.h.shape == (B, H)
