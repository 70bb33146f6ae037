"""Exported models in ONNX Runtime, with random weights; ONNX's own conformance cases; every option and error."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Bidirectional,
    init_stack,
    length_mask,
    low_precision,
    make_rnn,
    unroll,
    unroll_stack,
    variants,
)
from jaxlstm.adapters import weights

from cells import B, H, I, T, normal, worst_error
from sweeps import some, sweep

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from jaxlstm.adapters.onnx import to_onnx  # noqa: E402

CELLS = (LSTM, GRU, RNN, make_rnn("relu"), make_rnn("sigmoid"), variants.PeepholeLSTM, variants.CoupledLSTM)


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def random_layers(cell, hidden_sizes, *, input_size=I, bidirectional=False, seed=0):
    layers = init_stack(jax.random.key(0), cell, input_size, hidden_sizes, bidirectional=bidirectional)
    leaves, tree = jax.tree.flatten(layers)
    return jax.tree.unflatten(tree, [np.float32(normal(seed + k, *v.shape) / 2) for k, v in enumerate(leaves)])


def run(model, **inputs):
    """Run a model in ONNX Runtime; return its outputs by name."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def carries_of(cell, layers, seed):
    """Draw initial carries; return them, and the same as the inputs of the model."""
    carries, inputs = [], {}
    for depth, layer in enumerate(layers):
        halves = layer if isinstance(layer, Bidirectional) else [layer]
        drawn = [cell.initial_carry(half, (B,)) for half in halves]
        drawn = [
            type(c)(*(np.float32(normal(seed + 10 * depth + k, *v.shape)) for v in c)) for k, c in enumerate(drawn)
        ]
        carries.append(Bidirectional(*drawn) if len(drawn) == 2 else drawn[0])
        for name in drawn[0]._fields:
            inputs[f"layer_{depth}.{name}"] = np.stack([getattr(half, name) for half in drawn])
    return carries, inputs


@sweep("configurations of to_onnx equal in ONNX Runtime", 300)
def test_any_configuration_equals_unroll_stack(trial):
    rng = np.random.default_rng(trial)
    cell, bidirectional = CELLS[trial % len(CELLS)], bool(rng.integers(2))
    hidden_sizes = [(H,), (H, 3), (3, H, 2)][rng.integers(3)]
    has_lengths, has_carries, has_readout = (bool(rng.integers(2)) for _ in range(3))
    layers = random_layers(cell, hidden_sizes, bidirectional=bidirectional, seed=trial)
    features = hidden_sizes[-1] * (1 + bidirectional)
    readout = (np.float32(normal(trial, features, 2)), np.float32(normal(trial + 1, 2))) if has_readout else None
    model = to_onnx(cell, layers, lengths=has_lengths, initial_carries=has_carries, readout=readout)
    onnx.checker.check_model(model, full_check=True)
    inputs = {"xs": np.float32(normal(trial + 2, T, B, I))}
    carries, mask = None, None
    if has_lengths:
        inputs["lengths"] = rng.integers(1, T + 1, B).astype(np.int32)
        mask = length_mask(inputs["lengths"], T)
    if has_carries:
        carries, more = carries_of(cell, layers, trial)
        inputs |= more
    results = run(model, **inputs)
    final, ys = unroll_stack(cell, layers, inputs["xs"], carries, mask=mask)
    ys = ys if readout is None else ys @ readout[0] + readout[1]
    assert worst_error(results.pop("ys"), ys) < 5e-6
    for depth, carry in enumerate(final):
        halves = carry if bidirectional else [carry]
        for name in halves[0]._fields:
            own = np.stack([getattr(half, name) for half in halves])
            assert worst_error(results.pop(f"layer_{depth}.{name}_n"), own) < 5e-6
    assert not results


def test_time_and_batch_are_dynamic_and_names_are_documented():
    layers = random_layers(LSTM, (H, 3), bidirectional=True)
    model = to_onnx(LSTM, layers, lengths=True, initial_carries=True)

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    carry = {f"layer_{k}.{name}": [2, "batch", size] for k, size in enumerate((H, 3)) for name in "hc"}
    assert shapes(model.graph.input) == {"xs": ["time", "batch", I], "lengths": ["batch"], **carry}
    want = {f"{name}_n": shape for name, shape in carry.items()}
    assert shapes(model.graph.output) == {"ys": ["time", "batch", 6], **want}
    session = ort.InferenceSession(to_onnx(LSTM, layers).SerializeToString())
    for num_steps, batch in ((1, 1), (2 * T, 1), (T, 5)):
        xs = np.float32(normal(0, num_steps, batch, I))
        [ys] = session.run(["ys"], {"xs": xs})
        assert worst_error(ys, unroll_stack(LSTM, layers, xs)[1]) < 5e-6


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_pass_the_checker_and_the_reference_evaluator(dtype):
    from onnx.reference import ReferenceEvaluator

    layers = jax.tree.map(lambda v: jnp.asarray(v, dtype), random_layers(LSTM, (H,)))
    xs = normal(0, T, B, I).astype(dtype)
    [ys] = ReferenceEvaluator(to_onnx(LSTM, layers)).run(["ys"], {"xs": xs})
    assert ys.dtype == dtype
    assert worst_error(ys, unroll_stack(LSTM, layers, xs)[1]) < (1e-2 if dtype == "float16" else 1e-12)


# The operator's own attributes.


def operator(kind, arrays, xs, **attributes):
    """Run one operator on `arrays`, its initializers, in ONNX Runtime; return Y [time, directions, batch, hidden]."""
    directions, _, hidden = arrays["R"].shape
    names = ["X", "W", "R", "B"] + (["", "", "", "P"] if "P" in arrays else [])
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, names, ["Y"], hidden_size=hidden, **attributes)],
        "operator",
        [make("X", onnx.TensorProto.FLOAT, xs.shape)],
        [make("Y", onnx.TensorProto.FLOAT, (len(xs), directions, xs.shape[1], hidden))],
        [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    return run(model, X=xs)["Y"]


def test_initializers_with_clipping_peepholes_and_coupled_gates_mean_the_same():
    """Draw them in ONNX's own layout, then read them."""
    xs = np.float32(normal(0, T, B, I))

    def draw(gates, p=0):
        shapes = {"W": (1, gates * H, I), "R": (1, gates * H, H), "B": (1, 2 * gates * H), "P": (1, p * H)}
        return {k: np.float32(normal(n, *s)) for n, (k, s) in enumerate(shapes.items()) if k != "P" or p}

    clipped = variants.make_lstm(gate_clip=0.7)
    cases = [
        (LSTM, "LSTM", draw(4), {}),
        (clipped, "LSTM", draw(4), {"clip": 0.7}),
        (variants.PeepholeLSTM, "LSTM", draw(4, 3), {}),
        (variants.CoupledLSTM, "LSTM", draw(4), {"input_forget": 1}),
        (GRU, "GRU", draw(3), {"linear_before_reset": 1}),
        (RNN, "RNN", draw(1), {}),
    ]
    for cell, kind, arrays, attributes in cases:
        read = {"linear_before_reset": 1, "input_forget": attributes.get("input_forget", 0)}
        params = weights.from_onnx(cell, arrays, **read)
        want = operator(kind, arrays, xs, **attributes)[:, 0]
        assert worst_error(unroll(cell, params, xs)[1], want) < 5e-6, (cell.name, attributes)
    assert (
        worst_error(unroll(LSTM, weights.from_onnx(LSTM, draw(4)), xs)[1], unroll(clipped, params_of(draw(4)), xs)[1])
        > 0.1
    )


def params_of(arrays):
    return weights.from_onnx(LSTM, arrays)


# ONNX's own conformance cases.


def conformance_cases():
    for kind in ("lstm", "gru", "rnn"):
        importlib.import_module(f"onnx.backend.test.case.node.{kind}")
    from onnx.backend.test.case import node

    kinds = ("LSTM", "GRU", "RNN")
    cases = [case for case in node._NodeTestCases if case.model.graph.node[0].op_type in kinds]
    return {case.name: case for case in cases}


# The GRU that is ONNX's default, on the same parameters: another cell, which a user may write.


def _recur(params, state):
    return params.w_hh, state.h


def _gates(params, state, z, a):
    (w_r, w_u, w_n), h = jnp.split(a[0], 3, -1), a[1]
    z_r, z_u, z_n = jnp.split(z, 3, -1)
    r, u = jax.nn.sigmoid(z_r + h @ w_r), jax.nn.sigmoid(z_u + h @ w_u)
    n = jnp.tanh(z_n + (r * h) @ w_n + params.b_hn)
    h = (1 - u) * n + u * h
    return type(state)(h), h


RESET_BEFORE = dataclasses.replace(GRU, recur=_recur, gates=_gates, activations=None, name="GRU, reset before")


@pytest.mark.parametrize("name", some(conformance_cases(), *list(conformance_cases())[::6]))
def test_onnxs_own_conformance_cases(name):
    case = conformance_cases()[name]
    [node], [(given, want)] = case.model.graph.node, case.data_sets
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    arrays = dict(zip([n for n in node.input if n], given, strict=True))
    batch_major, direction = attributes.get("layout", 0) == 1, attributes.get("direction", b"forward").decode()
    cell = {"LSTM": variants.PeepholeLSTM if "P" in arrays else LSTM, "GRU": GRU, "RNN": RNN}[node.op_type]
    initializers = {k: v for k, v in arrays.items() if k in "WRBP"}
    if cell is GRU and attributes.get("linear_before_reset", 0) == 0:
        with pytest.raises(ValueError, match="linear_before_reset=0"):
            weights.from_onnx(cell, initializers)
        cell = RESET_BEFORE
    params = weights.from_onnx(GRU if cell is RESET_BEFORE else cell, initializers, linear_before_reset=1)
    xs = arrays["X"].swapaxes(0, 1) if batch_major else arrays["X"]
    mask = length_mask(arrays["sequence_lens"], len(xs)) if "sequence_lens" in arrays else None
    if isinstance(params, Bidirectional):
        [carry], ys = unroll_stack(cell, [params], xs, mask=mask)
        ys = np.stack(np.split(ys, 2, -1), 1)
        carries = carry
    else:
        carry, ys = unroll(cell, params, xs, mask=mask, reverse=direction == "reverse")
        ys, carries = ys[:, None], [carry]
    own = {f"Y_{key}": np.stack([getattr(c, key) for c in carries]) for key in carries[0]._fields} | {"Y": ys}
    if batch_major:  # [batch, time, directions, hidden] and [batch, directions, hidden]
        own = {key: value.transpose(2, 0, 1, 3) if key == "Y" else value.swapaxes(0, 1) for key, value in own.items()}
    compared = [own[key] for key in node.output if key]
    assert len(compared) == len(want) > 0
    for got, expected in zip(compared, want, strict=True):
        assert worst_error(got, expected) < 1e-6


LAYERS = random_layers(LSTM, (H, 3))
BAD = {
    "no list": (lambda: to_onnx(LSTM, LAYERS[0]), TypeError, "to_onnx: layers must be a list with one entry per layer, got LSTMParams"),
    "another cell": (lambda: to_onnx(variants.SLSTM, LAYERS), ValueError, "to_onnx: cell must be LSTM, GRU, RNN, PeepholeLSTM or CoupledLSTM, unmodified, got SLSTM"),
    "another function": (lambda: to_onnx(variants.make_lstm(cell_clip=1.0), LAYERS), ValueError, r"unmodified, got LSTM\(variant\)"),
    "another dtype in the matmuls": (lambda: to_onnx(low_precision(LSTM, jnp.bfloat16), LAYERS), ValueError, "to_onnx: cell must be"),
    "params of another cell": (lambda: to_onnx(GRU, LAYERS), TypeError, "to_onnx: expected GRUParams, got LSTMParams"),
    "layers that do not fit": (lambda: to_onnx(LSTM, [LAYERS[0], LAYERS[0]]), ValueError, f"to_onnx: layer 1 must read float32 and {H} features, got float32 and {I}"),
    "bfloat16": (lambda: to_onnx(LSTM, jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), LAYERS)), ValueError, "to_onnx: layers must be of float16, float32, float64, got bfloat16; cast them"),
    "a readout without a bias": (lambda: to_onnx(LSTM, LAYERS, readout=np.ones((3, 2))), TypeError, r"to_onnx: readout must be a pair \(w, b\), got ndarray"),
    "a readout of another width": (lambda: to_onnx(LSTM, LAYERS, readout=(np.ones((H, 2), np.float32), np.ones(2, np.float32))), ValueError, rf"to_onnx: readout must be \(\[3, outputs\], \[outputs\]\) of float32, got float32\[{H}, 2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_exported_gets_one_clear_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()
