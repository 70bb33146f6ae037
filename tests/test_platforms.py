"""Programs for accelerators that this machine does not have: every function lowers, and each gets the right loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jaxlstm
from jaxlstm import (
    GRU,
    LSTM,
    Bidirectional,
    Chunked,
    Scan,
    diagnostics,
    epochs,
    fit,
    generate,
    init_bidirectional,
    init_stack,
    init_train_state,
    initializers,
    length_mask,
    low_precision,
    lstm_bptt,
    make_rnn,
    make_train_step,
    plots,
    regularize,
    rtrl,
    segment_resets,
    split_gates,
    step_stack,
    sweep,
    unroll,
    unroll_bidirectional,
    unroll_stack,
    variants,
)
from jaxlstm.adapters import linen
from jaxlstm.epochs import evaluate, fit_epochs, shuffled_batches

from cells import FAMILY, HOLES, RESET, B, H, I, T, draw, worst_error
from sweeps import some

ACCELERATORS = ("cuda", "tpu")
KEY = jax.random.key(0)
OPTIMIZER = optax.sgd(0.1)


def step_loss(y, t):
    return (y**2).sum()


def loss_of(ys):
    return (ys**2).sum()


def cast(tree, dtype):
    return jax.tree.map(lambda v: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)


def zeros_of(function):
    """Make zeros of what a function returns, without computing it."""
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), jax.eval_shape(function))


STACK = zeros_of(lambda: init_stack(KEY, LSTM, I, [H, H], bidirectional=True))
PAIR = zeros_of(lambda: init_bidirectional(KEY, GRU, I, H))
PATTERN = rtrl.snap1_pattern(LSTM, draw(LSTM, dtype="float32")[0], jnp.ones(I, "float32"))
FLAX = linen.Recurrent(H)


def trained(p, xs):
    step = make_train_step(lambda p, xs: loss_of(unroll(LSTM, p, xs)[1]), OPTIMIZER)
    return fit(step, init_train_state(p, OPTIMIZER, KEY), jnp.stack([xs, xs]))[0].params


def trained_by_epochs(p, xs):
    p, xs = jax.lax.stop_gradient((p, xs))  # a loop that stops early has no gradient
    measure = lambda p, xs: (unroll(LSTM, p, xs.swapaxes(0, 1))[1] ** 2, jnp.ones((T, len(xs), B, H), bool))
    step = make_train_step(lambda p, xs: measure(p, xs)[0].mean(), OPTIMIZER)
    validate = lambda p: evaluate(measure, p, jnp.stack([xs, xs, xs]), 2)
    batches = lambda key: shuffled_batches(key, jnp.stack([xs, xs]), 1)
    return fit_epochs(step, init_train_state(p, OPTIMIZER, KEY), batches, validate, key=KEY, num_epochs=3, patience=1)


def online(p, xs):
    step = rtrl.make_online_step(LSTM, lambda readout, y, x: loss_of(y @ readout), OPTIMIZER)
    readout = jnp.ones((H, 1), xs.dtype)
    state = rtrl.OnlineState((p, readout), OPTIMIZER.init((p, readout)), rtrl.init_rtrl(LSTM, p, (B,)))
    return step(state, xs[0], xs[0])[0].params


def one_rtrl_step(p, xs):
    state = rtrl.init_rtrl(LSTM, p, (B,), pattern=PATTERN)
    state, y, pull = rtrl.rtrl_step(LSTM, p, state, xs[0], pattern=PATTERN)
    return y, pull(y)


def zoned_out(p, xs, c):
    noise = regularize.zoneout_noise(KEY, 0.1, c, len(xs))
    return unroll(regularize.zoneout(LSTM, 0.1), p, regularize.Noisy(xs, noise))


def dropped_out(p, xs, c):
    keep = regularize.dropout_mask(KEY, 0.5, c.h.shape, dtype=xs.dtype)
    return unroll(regularize.variational_dropout(LSTM), regularize.Locked(p, h=keep), xs)


def candidates_dropped(p, xs, c):
    keep = regularize.dropout_mask(KEY, 0.5, (T, B, H), dtype=xs.dtype)
    return unroll(regularize.recurrent_dropout(LSTM), p, regularize.Noisy(xs, keep))


# By the public functions they call: functions of an LSTM's parameters p, inputs xs and a carry c.
PROGRAMS = {
    "unroll": lambda p, xs, c: unroll(LSTM, p, xs, c, mask=HOLES, reset=RESET),
    "unroll, Scan": lambda p, xs, c: unroll(LSTM, p, xs, c, gradient=Scan()),
    "unroll, Chunked": lambda p, xs, c: unroll(LSTM, p, xs, gradient=Chunked(3, truncate=True)),
    "unroll, low_precision": lambda p, xs, c: unroll(low_precision(LSTM, "bfloat16"), p, xs),
    "unroll, round_gradients": lambda p, xs, c: unroll(low_precision(LSTM, "bfloat16", round_gradients=True), p, xs),
    "unroll_stack": lambda p, xs, c: unroll_stack(LSTM, cast(STACK, xs.dtype), xs * p.b[0], dropout=0.5, key=KEY),
    "unroll_bidirectional": lambda p, xs, c: unroll_bidirectional(
        GRU, Bidirectional(*cast(PAIR, xs.dtype)), xs * p.b[0]
    ),
    "step_stack": lambda p, xs, c: step_stack(LSTM, [p], [c], xs[0]),
    "generate": lambda p, xs, c: generate(
        lambda carry, h, key: LSTM.step(p, carry, jnp.ones((B, I), xs.dtype) * h.mean()), c, c.h, KEY, T
    ),
    "lstm_bptt": lambda p, xs, c: lstm_bptt(p, xs, c),
    "split_gates": lambda p, xs, c: split_gates(p),
    "length_mask": lambda p, xs, c: jnp.where(length_mask(jnp.arange(B), T), xs[..., 0], 0),
    "segment_resets": lambda p, xs, c: jnp.where(segment_resets(jnp.asarray(RESET, int)), xs[..., 0], 0),
    "init_stack": lambda p, xs, c: init_stack(KEY, LSTM, I, [H], dtype=xs.dtype),
    "init_bidirectional": lambda p, xs, c: init_bidirectional(KEY, make_rnn("relu"), I, H, dtype=xs.dtype),
    "LSTM.init": lambda p, xs, c: LSTM.init(KEY, I, H, dtype=xs.dtype),
    "fit, make_train_step, init_train_state": lambda p, xs, c: trained(p, xs),
    "fit_epochs": lambda p, xs, c: trained_by_epochs(p, xs),
    "evaluate, shuffled_batches": lambda p, xs, c: evaluate(
        lambda p, x: (unroll(LSTM, p, x)[1], jnp.ones((1, 2, B, H), bool)), p, shuffled_batches(KEY, xs, 2), 1
    ),
    "sweep": lambda p, xs, c: sweep(lambda x: unroll(LSTM, p, x)[1], jnp.stack([xs, 2 * xs])),
    "initializers": lambda p, xs, c: (
        initializers.torch(KEY, I, H, dtype=xs.dtype),
        initializers.keras(KEY, I, H, dtype=xs.dtype),
        initializers.flax(KEY, I, H, dtype=xs.dtype),
        initializers.chrono(KEY, I, H, max_lag=9, dtype=xs.dtype),
    ),
    "zoneout, zoneout_noise": zoned_out,
    "variational_dropout, dropout_mask": dropped_out,
    "recurrent_dropout": candidates_dropped,
    "weight_drop": lambda p, xs, c: unroll(LSTM, regularize.weight_drop(KEY, 0.5, p), xs),
    "rtrl_gradient": lambda p, xs, c: rtrl.rtrl_gradient(LSTM, p, xs, step_loss),
    "rtrl_step, init_rtrl": lambda p, xs, c: one_rtrl_step(p, xs),
    "make_online_step": lambda p, xs, c: online(p, xs),
    "cut_recurrence": lambda p, xs, c: unroll(rtrl.cut_recurrence(LSTM), p, xs),
    "trace": lambda p, xs, c: diagnostics.trace(LSTM, p, xs),
    "carry_jacobians, jacobian_products": lambda p, xs, c: diagnostics.jacobian_products(
        diagnostics.carry_jacobians(LSTM, p, xs)
    ),
    "lyapunov_exponents": lambda p, xs, c: diagnostics.lyapunov_exponents(LSTM, p, xs),
    "cell_state_terms, term_shares": lambda p, xs, c: diagnostics.term_shares(diagnostics.cell_state_terms(p, xs)),
    "gradient_flow": lambda p, xs, c: diagnostics.gradient_flow(LSTM, p, xs, loss_of),
    "gradient_sources": lambda p, xs, c: diagnostics.gradient_sources(LSTM, p, xs, step_loss)[:4],
    "truncated_gradient": lambda p, xs, c: diagnostics.truncated_gradient(LSTM, p, xs, loss_of),
    "gradient_error, gradient_cosine": lambda p, xs, c: (
        diagnostics.gradient_error(xs, xs + 1),
        diagnostics.gradient_cosine(xs, xs + 1),
    ),
    "linen": lambda p, xs, c: FLAX.apply(FLAX.init(KEY, xs), xs),
}
# These return text or values of this machine; arrays never pass through a compiled program of theirs.
ON_THE_HOST = {
    "make_lstm", "make_lstm_1997", "make_projected_lstm", "fixed_points", "linearize", "closed_loop", "stacked",
    "sample_carries", "principal_components",
    "gate_map", "flow_by_lag", "source_matrix", "error_by_step", "eigenvalue_plane", "phase_portrait",
    "lyapunov_spectrum",
    "central_differences", "check_gradients", "compare_gradients", "make_rnn", "num_params", "snap1_pattern", "summary",
}  # fmt: skip
# A QR factorization has no derivative where a bfloat16 run would need one.
VALUE_ONLY = {"LSTM.init", "init_stack", "init_bidirectional", "initializers"}


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], "float32"))
@pytest.mark.parametrize("name", some(PROGRAMS, *list(PROGRAMS)[::4]))
@jax.debug_key_reuse(False)
@jax.enable_x64(False)
def test_every_function_and_its_gradient_lower_for_accelerators(name, dtype):
    arguments = cast(draw(LSTM, dtype="float32"), dtype)
    program = PROGRAMS[name]

    def loss(*arguments):
        leaves = [leaf for leaf in jax.tree.leaves(program(*arguments)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(leaf.astype(jnp.float32).sum() for leaf in leaves)

    functions = [program] if name in VALUE_ONLY else [program, jax.grad(loss, (0, 1))]
    for function in functions:
        traced = jax.jit(function).trace(*arguments)
        for platform in ACCELERATORS:
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "callback" not in text
            assert not re.search(r"x?f64>", text)
    gradients = jax.eval_shape(jax.grad(loss, (0, 1)), *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(dtype)}


def test_every_public_function_is_lowered():
    tried = {word for name in PROGRAMS for word in name.split(", ")} | ON_THE_HOST
    for room in (jaxlstm, epochs, regularize, rtrl, diagnostics, variants, plots):
        public = {name for name in room.__all__ if callable(getattr(room, name)) and name.islower()}
        assert public <= tried, public - tried
    assert set(initializers.__all__) == {"torch", "keras", "flax", "chrono"}


@pytest.mark.ci
@pytest.mark.parametrize("name", FAMILY)
@jax.enable_x64(False)
def test_every_cell_and_its_gradient_lower_for_accelerators(name):
    cell = FAMILY[name][0]
    for dtype in ("float32", "bfloat16"):
        params, xs, carry = cast(draw(cell, dtype="float32"), dtype)
        loss = lambda p, xs, c, cell=cell: unroll(cell, p, xs, c)[1].astype("float32").sum()
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(params, xs, carry)
        for platform in ACCELERATORS:
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "callback" not in text and not re.search(r"x?f64>", text)


# The loop over time. z of these shapes takes 32 and 82 MB: on a CPU, it is computed in the loop.

LONG = jax.ShapeDtypeStruct((1000, 16, 32), "float32")
LONGER = jax.ShapeDtypeStruct((2500, 16, 32), "float32")
OF_LONG = jax.eval_shape(lambda: LSTM.init(KEY, 32, 128))


def forward(params, xs):
    return unroll(LSTM, params, xs)[1]


def gradient(params, xs):
    return jax.grad(lambda params: loss_of(forward(params, xs)))(params)


def matmuls(text):
    """Return the shape of every matmul's result in a lowered program."""
    return sorted(re.findall(r"dot_general .* -> tensor<([\dx]+)xf32>", text))


def lowered(function, *arguments, platform):
    # A function of its own, so that nothing is remembered from the last call.
    fresh = jax.jit(lambda *arguments: function(*arguments))
    return fresh.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def trips(text, number):
    """Return whether a loop of a lowered program runs this number of times."""
    return re.search(rf"constant dense<{number}> : tensor<i\d+>", text) is not None


@pytest.mark.parametrize("platform", ["cpu", *ACCELERATORS])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_loop_is_the_one_for_the_platform_whichever_machine_traces(monkeypatch, platform, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    text, longer = (lowered(forward, OF_LONG, xs, platform=platform) for xs in (LONG, LONGER))
    if platform == "cpu":
        assert matmuls(text) == matmuls(longer) == ["16x512", "16x512"]
        assert trips(text, 1000) and trips(longer, 2500)
        assert text.count("stablehlo.while") == longer.count("stablehlo.while") == 1
    else:
        assert set(matmuls(text)) == {"16x512", "1000x16x512"} and set(matmuls(longer)) == {"16x512", "250x16x512"}
        assert trips(text, 1000 // 5) and trips(longer, 250 // 5)
        assert [text.count("stablehlo.while"), longer.count("stablehlo.while")] == [1, 2]


def test_only_a_cpu_merges_time_and_batch_in_the_gradient():
    """Where the batch is sharded and no mesh tells, merging would gather it on every device."""
    merged = re.compile("dot_general .*tensor<800x512x")
    assert merged.search(lowered(gradient, OF_LONG, LONG, platform="cpu"))
    for platform in ACCELERATORS:
        assert not merged.search(lowered(gradient, OF_LONG, LONG, platform=platform))


def test_accelerators_take_several_steps_of_every_loop_of_the_gradient_at_a_time():
    for platform in ACCELERATORS:
        text = lowered(gradient, OF_LONG, LONG, platform=platform)
        assert text.count("stablehlo.while") == 2 and trips(text, 200) and not trips(text, 1000)


def test_the_plain_scan_is_the_same_program_on_every_platform():
    scan = lambda params, xs: unroll(LSTM, params, xs, gradient=Scan())[1]
    assert len({lowered(scan, OF_LONG, LONG, platform=platform) for platform in ("cpu", "cuda")}) == 1


def test_an_export_has_the_loop_of_the_platform_it_is_for():
    def exported(*platforms):
        return export.export(jax.jit(forward), platforms=platforms)(OF_LONG, LONG)

    assert set(matmuls(exported("cuda").mlir_module())) == {"16x512", "1000x16x512"}
    both = exported("cpu", "cuda")
    assert set(matmuls(both.mlir_module())) == {"16x512", "1000x16x512"}
    assert trips(both.mlir_module(), 1000) and trips(both.mlir_module(), 200)
    params = jax.tree.map(lambda v: jnp.full(v.shape, 0.01, v.dtype), OF_LONG)
    xs = jnp.ones(LONG.shape, LONG.dtype)
    np.testing.assert_allclose(jax.jit(both.call)(params, xs), jax.jit(forward)(params, xs), atol=1e-6)


@pytest.mark.parametrize("platform, want", [("cpu", {"16x512"}), ("cuda", {"1000x16x512", "16x512"})])
def test_a_mesh_decides_by_its_devices_and_leaves_no_branch(platform, want):
    device = jax.sharding.AbstractDevice(
        device_kind="any", num_cores=None, platform={"cuda": "gpu"}.get(platform, platform)
    )
    axis = {"axis_types": (jax.sharding.AxisType.Auto,), "abstract_device": device}
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), **axis)):
        text = lowered(gradient, OF_LONG, LONG, platform=platform)
    assert set(matmuls(text)) >= want and "stablehlo.case" not in text
    assert trips(text, 1000 if platform == "cpu" else 200)
    assert text.count("stablehlo.while") == 2  # one block


def test_an_export_of_unknown_size_has_one_plan_and_no_branch():
    (batch,) = export.symbolic_shape("batch")
    xs = jax.ShapeDtypeStruct((1000, batch, 32), "float32")
    text = export.export(jax.jit(gradient), platforms=["cuda"])(OF_LONG, xs).mlir_module()
    assert "stablehlo.case" not in text and text.count("stablehlo.while") == 2


@pytest.fixture
def elsewhere(monkeypatch):
    """Run what accelerators run."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arguments, default, cpu: default(*arguments))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("xs, block", [(LONG, "1000x16x512"), (LONGER, "250x16x512")])
def test_the_program_for_accelerators_computes_the_same(elsewhere, xs, block):
    params = jax.tree.map(lambda v: jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape) / 10, OF_LONG)
    xs = jnp.sin(jnp.arange(xs.size, dtype=jnp.float32)).reshape(xs.shape)
    of = lambda how: jax.jit(jax.value_and_grad(lambda p, x: loss_of(unroll(LSTM, p, x, gradient=how)[1]), (0, 1)))
    program = of("bulk")
    assert block in matmuls(program.lower(params, xs).as_text())
    assert worst_error(program(params, xs), of("scan")(params, xs)) < 1e-4


def test_on_accelerators_the_gradient_takes_at_most_half_of_the_plain_scans_memory(elsewhere):
    params, xs = jax.eval_shape(lambda: LSTM.init(KEY, 256, 256)), jax.ShapeDtypeStruct((2000, 16, 256), "float32")

    def temporaries(how):
        program = jax.jit(jax.grad(lambda p, x: unroll(LSTM, p, x, gradient=how)[1].sum(), (0, 1)))
        return program.lower(params, xs).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("bulk") < 0.5 * temporaries("scan")
