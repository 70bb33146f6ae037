"""Every public keyword does something: another value gives another result, shape, program or error."""

import inspect
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlstm
from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Bidirectional,
    Bulk,
    Chunked,
    LSTMState,
    RNNParams,
    RNNState,
    Scan,
    diagnostics,
    epochs,
    initializers,
    plots,
    regularize,
    rtrl,
    variants,
)
from jaxlstm.adapters import weights
from jaxlstm.adapters.onnx import to_onnx
from jaxlstm.bptt import lstm_forward

from cells import B, H, I, T, draw, normal
from test_plots import (
    AROUND,
    COMPARED_GRADIENTS,
    EXPONENTS,
    FLOW,
    ONE,
    PATHS,
    PLACES,
    PLANE,
    SOURCES,
    TRACE,
    panel,
    pixels_of,
)

PARAMS, XS, CARRY = draw(LSTM)
OTHER_CARRY = jax.tree.map(lambda v: v + 1, CARRY)
MASK = np.arange(T)[:, None] < np.array([7, 4, 5])
RESET = np.zeros((T, B), bool)
RESET[3] = True
STACK = jaxlstm.init_stack(jax.random.key(2), LSTM, I, [H, H], dtype="float64")
CARRIES = [CARRY, CARRY]
PAIR = jaxlstm.init_bidirectional(jax.random.key(3), LSTM, I, H, dtype="float64")
BOTH = Bidirectional(CARRY, CARRY)
STARTS = RNNState(np.linspace(-0.9, 0.4, 9)[:, None])
THREE_POINTS = RNNParams(jnp.zeros((1, 1)), jnp.full((1, 1), 2.0), jnp.zeros(1))
VECTOR = weights.to_jax_rnn(LSTM, [PARAMS])
ONNX_GRU = weights.to_onnx_initializers(GRU, draw(GRU)[0])
ZONEOUT = regularize.zoneout(LSTM, 0.5)
HELD = LSTMState(*[jnp.ones((T, B, H), bool)] * 2)
PATTERN = rtrl.snap1_pattern(LSTM, PARAMS, jnp.ones(I))
WEIGHT = jnp.asarray(normal(9, T, B, H))


def step_loss(y, t):
    return (y * WEIGHT[t]).sum()


def loss_of(ys):
    return (jnp.sin(ys) * WEIGHT).sum()


def key(n=0):
    return jax.random.key(n)


def program_of(run):
    """Return the gradient's program, since a way to differentiate changes no value."""
    return str(jax.make_jaxpr(jax.grad(lambda params: (run(params)[1] ** 2).sum()))(PARAMS))


def with_gradient(function, params, cell=LSTM):
    def run(gradient):
        return str(jax.make_jaxpr(jax.grad(lambda p: (function(cell, p, XS, gradient=gradient)[1] ** 2).sum()))(params))

    return run


def trained_online(pattern):
    readout, optimizer = jnp.ones(H), optax.sgd(0.1)
    step = rtrl.make_online_step(LSTM, lambda readout, y, x: ((y @ readout) ** 2).sum(), optimizer, pattern=pattern)
    state = rtrl.OnlineState(
        (PARAMS, readout), optimizer.init((PARAMS, readout)), rtrl.init_rtrl(LSTM, PARAMS, (B,), pattern=pattern)
    )
    for x in XS[:3]:
        state, _ = step(state, x, x)
    return state.params


def rtrl_steps(mask=None, reset=None, pattern=None):
    state = rtrl.init_rtrl(LSTM, PARAMS, (B,), carry=CARRY, pattern=pattern)
    for t in range(3):
        state, _, pull = rtrl.rtrl_step(
            LSTM, PARAMS, state, XS[t], mask=mask if t == 2 else None, reset=reset if t == 1 else None, pattern=pattern
        )
    return pull(jnp.ones((B, H)))


def stopped_early(**options):
    """Train a number that rises from epoch to epoch, so that the first one is the best."""
    optimizer = optax.sgd(0.1)
    step = jaxlstm.make_train_step(lambda w, batch: ((batch + 100 - w) ** 2).mean(), optimizer)
    state = jaxlstm.init_train_state(jnp.zeros(()), optimizer, key())
    batches = lambda key: epochs.shuffled_batches(key, WEIGHT.ravel(), 8)
    options = {"key": key(1), "num_epochs": 4, "patience": 4} | options
    return epochs.fit_epochs(step, state, batches, lambda w: w, **options)


def written_and_read(like):
    with tempfile.TemporaryDirectory() as folder:
        weights.write_safetensors(f"{folder}/model.safetensors", [np.ones(2)])
        return weights.read_safetensors(f"{folder}/model.safetensors", like=like)


VARIANTS = [name for name in variants.__all__ if name.endswith("LSTM")]
OF_1997 = variants.make_lstm_1997().init(jax.random.key(4), I, H, dtype="float64")
FLAGS = {"mask": (None, MASK), "reset": (None, RESET)}
ONE_STEP = {"mask": (None, MASK[4]), "reset": (None, np.array([True, False, True]))}
DTYPE = {"dtype": ("float32", "float64")}
COMPARED = {"carry": CARRY, "by_step": False, "max_differences": 0}
# By name: the function, arguments that stay, and for every keyword two values that must give two results.
TABLE = {
    "LSTM.init": (LSTM.init, (key(), I, H), {"forget_bias": (1.0, 3.0), **DTYPE}),
    "GRU.init": (GRU.init, (key(), I, H), DTYPE),
    "RNN.init": (RNN.init, (key(), I, H), DTYPE),
    **{f"{name}.init": (getattr(variants, name).init, (key(), I, H), {"forget_bias": (1.0, 3.0), **DTYPE})
       for name in VARIANTS if name not in ("ProjectedLSTM", "NoForgetGateLSTM")},
    "NoForgetGateLSTM.init": (variants.NoForgetGateLSTM.init, (key(), I, H), DTYPE),
    "ProjectedLSTM.init": (variants.ProjectedLSTM.init, (key(), I, H), {
        "proj_size": (None, 3), "forget_bias": (1.0, 3.0), **DTYPE}),
    "make_lstm_1997": (lambda **o: variants.make_lstm_1997(**o).init(key(), I, H), (), {"block_size": (1, 2)}),
    "make_lstm_1997, program": (lambda **o: with_gradient(jaxlstm.unroll, OF_1997, variants.make_lstm_1997(**o))(
        "bulk"), (), {"truncate": (False, True)}),
    "make_lstm": (lambda **o: jaxlstm.unroll(variants.make_lstm(**o), PARAMS, XS), (), {
        "gate": (jax.nn.sigmoid, jax.nn.hard_sigmoid), "candidate": (jnp.tanh, jnp.sin),
        "output": (jnp.tanh, jnp.sin), "cell_clip": (None, 0.1), "gate_clip": (None, 0.1)}),
    "initializers.torch": (initializers.torch, (key(), I, H), DTYPE),
    "initializers.keras": (initializers.keras, (key(), I, H), DTYPE),
    "initializers.flax": (initializers.flax, (key(), I, H), DTYPE),
    "initializers.chrono": (initializers.chrono, (key(), I, H), {"max_lag": (9, 99)}),
    "initializers.chrono, dtype": (lambda **o: initializers.chrono(key(), I, H, max_lag=9, **o), (), DTYPE),
    "make_rnn": (lambda nonlinearity: jaxlstm.make_rnn(nonlinearity).step(*draw(RNN)[::2], XS[0]), (), {
        "nonlinearity": ("tanh", "relu")}),
    "segment_resets": (jaxlstm.segment_resets, (np.array([[0], [0], [1]]),), {"reverse": (False, True)}),
    "unroll": (jaxlstm.unroll, (LSTM, PARAMS, XS), {
        "carry": (None, CARRY), "reverse": (False, True), **FLAGS}),
    "unroll, reset": (lambda **o: jaxlstm.unroll(LSTM, PARAMS, XS, reset=RESET, **o), (), {
        "reset_carry": (None, OTHER_CARRY)}),
    "unroll, program": (with_gradient(jaxlstm.unroll, PARAMS), (), {"gradient": ("bulk", "scan")}),
    "Bulk": (lambda **o: with_gradient(jaxlstm.unroll, PARAMS)(Bulk(**o)), (), {
        "block_size": (None, 3), "keep_gates": (False, True)}),
    "Chunked": (lambda **o: with_gradient(jaxlstm.unroll, PARAMS)(Chunked(**o)), (), {
        "chunk_size": (2, 3), "truncate": (False, True), "within": (Bulk(), Scan())}),
    "low_precision": (lambda **o: with_gradient(jaxlstm.unroll, PARAMS, jaxlstm.low_precision(LSTM, "float16", **o))(
        "bulk"), (), {"round_gradients": (False, True)}),
    "init_bidirectional": (jaxlstm.init_bidirectional, (key(), LSTM, I, H), DTYPE),
    "unroll_bidirectional": (jaxlstm.unroll_bidirectional, (LSTM, PAIR, XS), {
        "carry": (None, BOTH), "merge": (jnp.add, jnp.subtract), **FLAGS}),
    "unroll_bidirectional, reset": (lambda **o: jaxlstm.unroll_bidirectional(LSTM, PAIR, XS, reset=RESET, **o), (), {
        "reset_carry": (None, Bidirectional(OTHER_CARRY, OTHER_CARRY))}),
    "unroll_bidirectional, program": (with_gradient(jaxlstm.unroll_bidirectional, PAIR), (), {
        "gradient": ("bulk", "scan")}),
    "init_stack": (jaxlstm.init_stack, (key(), LSTM, I, [H, H]), {"bidirectional": (False, True), **DTYPE}),
    "init_stack, both": (lambda **o: jaxlstm.init_stack(key(), LSTM, I, [H, H], bidirectional=True, **o), (), {
        "merge": (jnp.add, lambda a, b: jnp.concatenate([a, b, a], -1))}),
    "unroll_stack": (jaxlstm.unroll_stack, (LSTM, STACK, XS), {"carries": (None, CARRIES), **FLAGS}),
    "unroll_stack, reset": (lambda **o: jaxlstm.unroll_stack(LSTM, STACK, XS, reset=RESET, **o), (), {
        "reset_carries": (None, [OTHER_CARRY, OTHER_CARRY])}),
    "unroll_stack, key": (lambda **o: jaxlstm.unroll_stack(LSTM, STACK, XS, dropout=0.5, **o), (), {
        "key": (key(8), key(9))}),
    "unroll_stack, dropout": (lambda **o: jaxlstm.unroll_stack(LSTM, STACK, XS, key=key(), **o), (), {
        "dropout": (0.0, 0.5)}),
    "unroll_stack, noise": (lambda **o: jaxlstm.unroll_stack(ZONEOUT, STACK, XS, **o), (), {
        "noise": (None, [HELD, HELD])}),
    "unroll_stack, both": (lambda **o: jaxlstm.unroll_stack(LSTM, [PAIR], XS, **o), (), {
        "merge": (jnp.add, jnp.subtract)}),
    "unroll_stack, program": (with_gradient(jaxlstm.unroll_stack, STACK), (), {"gradient": ("bulk", "scan")}),
    "step_stack": (jaxlstm.step_stack, (LSTM, STACK, CARRIES, XS[0]), ONE_STEP),
    "step_stack, reset": (lambda **o: jaxlstm.step_stack(LSTM, STACK, CARRIES, XS[0], reset=RESET[3], **o), (), {
        "reset_carries": (None, [OTHER_CARRY, OTHER_CARRY])}),
    "step_stack, noise": (lambda **o: jaxlstm.step_stack(ZONEOUT, STACK, CARRIES, XS[0], **o), (), {
        "noise": (None, [jax.tree.map(lambda v: v[0], HELD)] * 2)}),
    "lstm_bptt": (jaxlstm.lstm_bptt, (PARAMS, XS, CARRY), {"mask": (None, MASK)}),
    "lstm_forward": (lstm_forward, (PARAMS, XS, CARRY), {"mask": (None, MASK)}),
    "init_train_state": (jaxlstm.init_train_state, (PARAMS, optax.sgd(0.1), key()), {"carry": ((), CARRY)}),
    "fit_epochs": (stopped_early, (), {
        "key": (key(1), key(2)), "num_epochs": (4, 6), "patience": (1, 2)}),
    "dropout_mask": (regularize.dropout_mask, (key(), 0.5, (3, 4)), DTYPE),
    "zoneout": (lambda output: regularize.zoneout(LSTM, 0.5, output=output).step(PARAMS, CARRY, XS[0]), (), {
        "output": (lambda carry: carry.h, lambda carry: carry.c)}),
    "init_rtrl": (rtrl.init_rtrl, (LSTM, PARAMS), {
        "batch_shape": ((2,), (3,)), "pattern": (None, PATTERN), "max_bytes": (1 << 30, 0)}),
    "init_rtrl, carry": (lambda **o: rtrl.init_rtrl(LSTM, PARAMS, (B,), **o), (), {"carry": (None, CARRY)}),
    "rtrl_step": (rtrl_steps, (), {"pattern": (None, PATTERN), **ONE_STEP}),
    "rtrl_gradient": (rtrl.rtrl_gradient, (LSTM, PARAMS, XS, step_loss), {
        "carry": (None, CARRY), "pattern": (None, PATTERN), "max_bytes": (1 << 30, 0), **FLAGS}),
    "make_online_step": (trained_online, (), {"pattern": (None, PATTERN)}),
    "gradient_flow": (diagnostics.gradient_flow, (LSTM, PARAMS, XS, loss_of), {
        "carry": (None, CARRY), "reverse": (False, True), **FLAGS}),
    "gradient_sources": (lambda **o: diagnostics.gradient_sources(LSTM, PARAMS, XS, step_loss, **o)[:4], (), {
        "carry": (None, CARRY), **FLAGS}),
    "trace": (diagnostics.trace, (LSTM, PARAMS, XS), {"carry": (None, CARRY), "reverse": (False, True), **FLAGS}),
    "carry_jacobians": (diagnostics.carry_jacobians, (LSTM, PARAMS, XS), {
        "carry": (None, CARRY), "reverse": (False, True), **FLAGS}),
    "lyapunov_exponents": (diagnostics.lyapunov_exponents, (LSTM, PARAMS, XS), {
        "carry": (None, CARRY), "num_exponents": (1, 2), "num_warmup": (0, 3)}),
    "cell_state_terms": (diagnostics.cell_state_terms, (PARAMS, XS), {"carry": (None, CARRY)}),
    "truncated_gradient": (diagnostics.truncated_gradient, (LSTM, PARAMS, XS, loss_of), {
        "carry": (None, CARRY), "reverse": (False, True), **FLAGS}),
    "check_gradients": (lambda **o: diagnostics.check_gradients(
        lambda p: jnp.sin(p).sum(), jnp.arange(3.0), **{"key": key()} | o)[:2], (), {
            "gradients": (None, np.ones(3)), "num_directions": (1, 8), "key": (key(1), key(2))}),
    "compare_gradients": (lambda **o: diagnostics.compare_gradients(
        LSTM, PARAMS, XS, step_loss, **COMPARED | o)[1:], (), {
            "carry": (CARRY, OTHER_CARRY), "max_bytes": (1 << 30, 0), "max_differences": (0, 9999),
            "by_step": (False, True), "methods": (None, {"mine": lambda *v: (None, None, None)}),
            "dtype": ("float64", "float32"), **FLAGS}),
    "fixed_points": (lambda **o: diagnostics.fixed_points(RNN, THREE_POINTS, STARTS, np.zeros(1), **o), (), {
        "tolerance": (1e-24, 1.0), "max_iterations": (200, 1), "merge_distance": (1e-5, 5.0),
        "outlier_scale": (10.0, 1.0)}),
    "sample_carries": (diagnostics.sample_carries, (key(), CARRY, 5), {"noise": (0.0, 0.5)}),
    "principal_components": (diagnostics.principal_components, (CARRY,), {"num": (2, 1)}),
    "gate_map": (pixels_of(plots.gate_map), (TRACE, "f"), {"sequence": (0, 1)}),
    "gate_map, one": (pixels_of(plots.gate_map), (ONE, "f"), {
        "units": (None, [1, 0]), "labels": (None, "abcde"), "ax": (None, panel())}),
    "flow_by_lag": (pixels_of(plots.flow_by_lag), (FLOW,), {
        "band": ((0.0, 1.0), None), "label": (None, "a"), "color": (None, "red"), "ax": (None, panel())}),
    "source_matrix": (pixels_of(plots.source_matrix), (SOURCES,), {
        "leaf": (None, "a"), "decades": (8.0, 0.5), "ax": (None, panel())}),
    "error_by_step": (pixels_of(plots.error_by_step), (COMPARED_GRADIENTS, "mine"), {"ax": (None, panel())}),
    "eigenvalue_plane": (pixels_of(plots.eigenvalue_plane), (AROUND,), {"ax": (None, panel())}),
    "phase_portrait": (pixels_of(plots.phase_portrait), (PLANE,), {
        "carries": (None, PATHS), "points": (None, PLACES), "ax": (None, panel())}),
    "phase_portrait, points": (pixels_of(plots.phase_portrait), (PLANE, PATHS, PLACES), {"around": (None, AROUND)}),
    "lyapunov_spectrum": (pixels_of(plots.lyapunov_spectrum), (EXPONENTS,), {
        "reference": (None, [0.9]), "ax": (None, panel())}),
    "from_torch": (weights.from_torch, (LSTM, weights.to_torch(LSTM, STACK)), {"prefix": ("", "lstm.")}),
    "to_torch": (weights.to_torch, (LSTM, STACK), {"prefix": ("", "lstm."), "bias": (True, False)}),
    "from_jax_rnn": (lambda **o: weights.from_jax_rnn(LSTM, VECTOR, **{"input_size": I, "hidden_size": H} | o), (), {
        "input_size": (I, I + 1), "hidden_size": (H, H + 1), "num_layers": (1, 2), "bidirectional": (False, True)}),
    "from_keras": (weights.from_keras, (LSTM, 2 * weights.to_keras(LSTM, PARAMS)), {"bidirectional": (True, False)}),
    "to_keras": (weights.to_keras, (LSTM, PARAMS), {"bias": (True, False)}),
    "to_nnx": (weights.to_nnx, (LSTM, PARAMS), {"optimized": (True, False)}),
    "to_equinox": (weights.to_equinox, (LSTM, PARAMS), {"bias": (True, False)}),
    "read_safetensors": (written_and_read, (), {"like": (None, [np.ones(2)])}),
    "from_onnx": (weights.from_onnx, (GRU, ONNX_GRU), {"linear_before_reset": (1, 0)}),
    "from_onnx, coupled": (weights.from_onnx, (LSTM, weights.to_onnx_initializers(LSTM, PARAMS)), {
        "input_forget": (0, 1)}),
    "to_onnx": (to_onnx, (LSTM, STACK), {
        "lengths": (False, True), "initial_carries": (False, True),
        "readout": (None, (np.ones((H, 2)), np.ones(2)))}),
}  # fmt: skip


def outcome(function, arguments, **keyword):
    """Return what a call gives, as text that shows every bit."""
    try:
        result = function(*arguments, **keyword)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    bits = lambda leaf: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
    data = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    leaves = [bits(data(leaf)) if hasattr(leaf, "dtype") else repr(leaf) for leaf in jax.tree.leaves(result)]
    return str(jax.tree.structure(result)), leaves


CASES = [(name, keyword) for name, (_, _, keywords) in TABLE.items() for keyword in keywords]


# Functions with long cases; `make test` leaves them to CI.
LONG = (
    "check_gradients",
    "compare_gradients",
    "fit_epochs",
    "fixed_points",
    "gradient_sources",
    "rtrl_step",
    *plots.__all__,
)


@pytest.mark.parametrize(
    "name, keyword",
    [pytest.param(*case, marks=pytest.mark.ci if case[0].partition(",")[0] in LONG else ()) for case in CASES],
    ids=lambda text: text,
)
@jax.debug_key_reuse(False)
def test_a_keyword_is_not_ignored(name, keyword):
    function, arguments, keywords = TABLE[name]
    one, other = (outcome(function, arguments, **{keyword: value}) for value in keywords[keyword])
    assert one != other
    assert one == outcome(function, arguments, **{keyword: keywords[keyword][0]}), "the same call twice"


def test_every_public_keyword_is_in_the_table():
    rooms = (jaxlstm, epochs, initializers, regularize, rtrl, diagnostics, variants, plots)
    functions = {f"{cell.name.partition('(')[0]}.init": cell.init for cell in (LSTM, GRU, RNN)}
    functions |= {f"{name}.init": getattr(variants, name).init for name in VARIANTS}
    for room in rooms:
        functions |= {name: getattr(room, name) for name in room.__all__ if inspect.isfunction(getattr(room, name))}
    of_weights = {name: thing for name, thing in inspect.getmembers(weights, inspect.isfunction) if name[0] != "_"}
    functions |= {name: thing for name, thing in of_weights.items() if thing.__module__ == weights.__name__}
    functions["to_onnx"] = to_onnx
    missing = []
    for name, function in functions.items():
        tried = {
            word
            for entry, word in CASES
            if entry.partition(",")[0].rpartition(".")[2] in (name, name.rpartition(".")[2])
        }
        for parameter in inspect.signature(function).parameters.values():
            is_option = parameter.default is not parameter.empty or parameter.kind is parameter.KEYWORD_ONLY
            if is_option and parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in tried:
                missing.append(f"{name}({parameter.name})")
    assert not missing
