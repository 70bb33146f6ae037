"""Weights from and to other frameworks: the frameworks' own results, exact round trips, malformed entries and files."""

import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from jaxlstm import GRU, LSTM, RNN, Bidirectional, init_stack, unroll_stack, variants
from jaxlstm.adapters import weights

from cells import B, H, I, T, normal, worst_error
from golden import generate
from sweeps import some

CELL = {"LSTM": LSTM, "ProjectedLSTM": variants.make_projected_lstm(3), "GRU": GRU, "RNN": RNN}
CELL |= {"PeepholeLSTM": variants.PeepholeLSTM, "CoupledLSTM": variants.CoupledLSTM}


@pytest.fixture(autouse=True)
def promotion_as_the_other_frameworks_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        yield


def random_layers(cell, hidden_sizes=(H,), *, input_size=I, bidirectional=False, dtype=jnp.float32, seed=0):
    """Draw parameters with no zero among them, so that no block can be forgotten."""
    layers = init_stack(jax.random.key(0), cell, input_size, hidden_sizes, bidirectional=bidirectional, dtype=dtype)
    leaves, tree = jax.tree.flatten(layers)
    drawn = [jnp.asarray(normal(seed + k, *leaf.shape) / 2, dtype) for k, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def bitwise(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


# torch, in float64: values, final states, and the gradients of everything.


def check_torch(name, results, *, bias):
    """Compare a stack with the results of a torch module that `generate` ran, all of them under torch's names."""
    cell = CELL[name]
    state_dict = {key: value for key, value in results.items() if key.startswith(("weight_", "bias_"))}
    layers = weights.from_torch(cell, state_dict)
    bidirectional = isinstance(layers[0], Bidirectional)
    number = sum(key.startswith("state") for key in results)

    def carries(prefix):
        like = type(cell.initial_carry(layers[0].forward if bidirectional else layers[0]))
        each = [like(*rows) for rows in zip(*(results[f"{prefix}{k}"] for k in range(number)), strict=True)]
        return [Bidirectional(*each[k : k + 2]) for k in range(0, len(each), 2)] if bidirectional else each

    (final, ys), pullback = jax.vjp(
        lambda layers, xs, carries: unroll_stack(cell, layers, xs, carries),
        *jax.tree.map(jnp.asarray, (layers, results["xs"], carries("state"))),
    )
    assert worst_error((final, ys), (carries("final"), results["ys"])) < 1e-12
    d_layers, d_xs, d_carries = pullback(jax.tree.map(jnp.asarray, (carries("d_final"), results["d_ys"])))
    assert worst_error((d_xs, d_carries), (results["d_xs"], carries("d_state"))) < 1e-12
    gradients = weights.to_torch(cell, d_layers)
    for key in state_dict:
        want, got = results[f"d_{key}"], gradients[key]
        if key.startswith("bias_hh"):  # of one bias here; only a GRU has a second one, in its last block
            first = gradients[key.replace("hh", "ih")]
            got = np.concatenate([first[: -len(first) // 3], got[-len(first) // 3 :]]) if name == "GRU" else first
        assert worst_error(got, want) < 1e-12, key

    # There and back is exact, and the state dict has torch's own names and shapes.
    back = weights.to_torch(cell, layers, bias=bias)
    assert {key: value.shape for key, value in back.items()} == {key: v.shape for key, v in state_dict.items()}
    assert all(value.flags.c_contiguous for value in back.values())
    assert bitwise(weights.from_torch(cell, back), layers)
    if len(layers) == 1 and not bidirectional:  # an LSTMCell has the same names without a layer
        assert bitwise(weights.from_torch(cell, {key[:-3]: value for key, value in back.items()}), layers)
    prefixed = weights.to_torch(cell, layers, prefix="encoder.")
    assert bitwise(weights.from_torch(cell, prefixed | {"decoder.w": np.ones(2)}, prefix="encoder."), layers)
    return layers, back


@pytest.mark.parametrize("name", some(generate.WEIGHTS, *list(generate.WEIGHTS)[::2]))
def test_stacks_equal_torch_after_the_transfer(name):
    with np.load(generate.PATH) as golden:
        results = {key.split("/")[1]: golden[key] for key in golden.files if key.startswith(f"weights {name}/")}
    check_torch(name, results, bias=generate.WEIGHTS[name][1].get("bias", True))


MODULES = [
    ("LSTM", {"num_layers": 1}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"num_layers": 3, "proj_size": 2}),
    ("LSTM", {"num_layers": 1, "proj_size": 1, "bias": False, "bidirectional": True}),
    ("GRU", {"num_layers": 3}),
    ("GRU", {"num_layers": 1, "bias": False, "bidirectional": True}),
    ("RNN", {"num_layers": 3, "bias": False}),
]


@pytest.mark.ci
@pytest.mark.parametrize("case", MODULES, ids=str)
def test_a_torch_module_computes_the_same_with_the_weights_sent_back(case):
    torch = pytest.importorskip("torch")
    kind, options = case
    results = generate.whole(kind, options, seed=4)
    name = "ProjectedLSTM" if "proj_size" in options else kind
    _, back = check_torch(name, results, bias=options.get("bias", True))
    *_, input_size, hidden = generate.WEIGHTS_SHAPE
    module = getattr(torch.nn, kind)(input_size, hidden, dtype=torch.float64, **options)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in back.items()})
    tensors = lambda *names: [torch.from_numpy(results[key]) for key in names]
    states, d_states = (tensors(*(f"{part}{k}" for k in range(1 + (kind == "LSTM")))) for part in ("state", "d_final"))
    again = generate.run(module, *tensors("xs"), states, *tensors("d_ys"), d_states)
    # Only the biases have moved from one of torch's two to the other, so all gradients are the same too.
    for key in [key for key in again if not key.startswith("bias_")]:
        assert worst_error(again[key], results[key]) < 1e-12, key
    assert bitwise(
        weights.from_torch(CELL[name], module.state_dict()),  # tensors, as users pass them
        weights.from_torch(CELL[name], back),
    )


@pytest.mark.parametrize("bidirectional", some([False, True], True))
def test_the_flat_vector_of_jax_experimental_rnn(bidirectional):
    sizes = {"input_size": I, "hidden_size": H, "num_layers": 2, "bidirectional": bidirectional}
    vector = jnp.asarray(normal(3, rnn.get_num_params_in_lstm(I, H, 2, bidirectional)), jnp.float32)
    layers = weights.from_jax_rnn(LSTM, vector, **sizes)
    w_ih, w_hh, b_ih, b_hh = rnn.unpack_lstm_weights(vector, I, H, 2, bidirectional)
    halves = jax.tree.leaves(layers, is_leaf=lambda node: hasattr(node, "w_ih"))
    for k, half in enumerate(halves):
        assert bitwise(half, (type(half))(w_ih[k].T, w_hh[k].T, b_ih[k] + b_hh[k]))
    back = weights.to_jax_rnn(LSTM, layers)
    assert back.shape == vector.shape and bitwise(weights.from_jax_rnn(LSTM, back, **sizes), layers)
    xs, zeros = jnp.asarray(normal(4, B, T, I), jnp.float32), jnp.zeros((len(halves), B, H))
    want, *_ = rnn.lstm_ref(
        xs, zeros, zeros, *rnn.unpack_lstm_weights(jnp.asarray(back), I, H, 2, bidirectional),
        jnp.full(B, T, jnp.int32), I, H, 2, 0.0, bidirectional,
    )  # fmt: skip
    assert worst_error(unroll_stack(LSTM, layers, xs.swapaxes(0, 1))[1].swapaxes(0, 1), want) < 1e-6


# The other frameworks, in float32. A peer is (parameters, run, read, write): its own random parameters, a function of
# them and of xs [batch, time, input], and the conversions in both directions.


def linen_peer(cell, module):
    from flax import linen as nn

    layer = nn.RNN(getattr(nn, module)(H))
    tree = layer.init(jax.random.key(0), jnp.ones((B, T, I), jnp.float32))["params"]
    read, write = (lambda t: weights.from_linen(cell, t)), (lambda p: {"cell": weights.to_linen(cell, p)})
    return tree, lambda tree, xs: layer.apply({"params": tree}, xs), read, write


def linen_pair(cell, module):
    from flax import linen as nn

    layer = nn.Bidirectional(*(nn.RNN(getattr(nn, module)(H)) for _ in range(2)))
    tree = layer.init(jax.random.key(0), jnp.ones((B, T, I), jnp.float32))["params"]
    read, write = (lambda t: weights.from_linen(cell, t)), (lambda p: weights.to_linen(cell, p))
    return tree, lambda tree, xs: layer.apply({"params": tree}, xs), read, write


def nnx_peer(cell, module):
    from flax import nnx

    make = lambda: getattr(nnx, module)(I, H, rngs=nnx.Rngs(0))

    def run(tree, xs):
        own = make()
        nnx.update(own, tree)
        return nnx.RNN(own)(xs, initial_carry=own.initialize_carry((len(xs), I), rngs=nnx.Rngs(0)))

    state = nnx.state(make(), nnx.Param)
    total = lambda state: sum(leaf.sum() for leaf in weights.from_nnx(cell, state))
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(jax.grad(total)(state)))
    assert bitwise(weights.from_nnx(cell, state), weights.from_nnx(cell, nnx.to_pure_dict(state)))
    options = {"optimized": False} if module == "LSTMCell" else {}
    read, write = (lambda t: weights.from_nnx(cell, t)), (lambda p: weights.to_nnx(cell, p, **options))
    return nnx.to_pure_dict(state), run, read, write


def equinox_peer(cell, module, use_bias=True):
    eqx = pytest.importorskip("equinox")
    own = getattr(eqx.nn, module)(I, H, use_bias=use_bias, key=jax.random.key(0))

    def run(fields, xs):
        names = sorted(fields)
        layer = eqx.tree_at(lambda c: [getattr(c, name) for name in names], own, [fields[name] for name in names])

        def one(xs):
            zero = jnp.zeros(H, xs.dtype)
            step = lambda carry, x: (layer(x, carry),) * 2
            _, carries = jax.lax.scan(step, (zero, zero) if module == "LSTMCell" else zero, xs)
            return carries[0] if module == "LSTMCell" else carries

        return jax.vmap(one)(xs)

    fields = {name: value for name, value in vars(own).items() if isinstance(value, jax.Array)}
    assert bitwise(weights.from_equinox(cell, vars(own)), weights.from_equinox(cell, fields))
    read = lambda t: weights.from_equinox(cell, t)
    return fields, run, read, lambda p: weights.to_equinox(cell, p, bias=use_bias)


def haiku_peer(cell, module):
    hk = pytest.importorskip("haiku")

    def apply(xs):
        core = hk.LSTM(H)
        return hk.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))[0]

    model = hk.without_apply_rng(hk.transform(apply))
    tree = model.init(jax.random.key(0), jnp.ones((T, B, I), jnp.float32))["lstm/linear"]
    run = lambda tree, xs: model.apply({"lstm/linear": tree}, xs.swapaxes(0, 1)).swapaxes(0, 1)
    return tree, run, lambda t: weights.from_haiku(cell, t), lambda p: weights.to_haiku(cell, p)


def keras_peer(cell, module, use_bias=True, bidirectional=False):
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    layer = getattr(keras.layers, module)(H, return_sequences=True, use_bias=use_bias)
    layer = keras.layers.Bidirectional(layer) if bidirectional else layer
    layer.build((None, None, I))
    rest = [variable.value for variable in layer.non_trainable_variables]
    run = lambda tree, xs: layer.stateless_call(tree, rest, xs)[0]
    read, write = (
        (lambda t: weights.from_keras(cell, t, bidirectional=bidirectional)),
        (lambda p: weights.to_keras(cell, p, bias=use_bias)),
    )
    return layer.get_weights(), run, read, write


PEERS = {
    "linen LSTMCell": lambda: (LSTM, *linen_peer(LSTM, "LSTMCell")),
    "linen OptimizedLSTMCell": lambda: (LSTM, *linen_peer(LSTM, "OptimizedLSTMCell")),
    "linen GRUCell": lambda: (GRU, *linen_peer(GRU, "GRUCell")),
    "linen Bidirectional": lambda: (LSTM, *linen_pair(LSTM, "OptimizedLSTMCell")),
    "nnx LSTMCell": lambda: (LSTM, *nnx_peer(LSTM, "LSTMCell")),
    "nnx OptimizedLSTMCell": lambda: (LSTM, *nnx_peer(LSTM, "OptimizedLSTMCell")),
    "nnx GRUCell": lambda: (GRU, *nnx_peer(GRU, "GRUCell")),
    "Equinox LSTMCell": lambda: (LSTM, *equinox_peer(LSTM, "LSTMCell")),
    "Equinox GRUCell": lambda: (GRU, *equinox_peer(GRU, "GRUCell")),
    "Equinox GRUCell without bias": lambda: (GRU, *equinox_peer(GRU, "GRUCell", use_bias=False)),
    "Haiku LSTM": lambda: (LSTM, *haiku_peer(LSTM, "LSTM")),
    "Keras LSTM": lambda: (LSTM, *keras_peer(LSTM, "LSTM")),
    "Keras GRU": lambda: (GRU, *keras_peer(GRU, "GRU")),
    "Keras SimpleRNN without bias": lambda: (RNN, *keras_peer(RNN, "SimpleRNN", use_bias=False)),
    "Keras Bidirectional LSTM without bias": lambda: (
        LSTM,
        *keras_peer(LSTM, "LSTM", use_bias=False, bidirectional=True),
    ),
    "Keras Bidirectional GRU": lambda: (GRU, *keras_peer(GRU, "GRU", bidirectional=True)),
}


@pytest.mark.parametrize("name", some(PEERS, "nnx OptimizedLSTMCell"))
@pytest.mark.filterwarnings("ignore")
def test_layers_equal_the_other_frameworks_after_the_transfer(name):
    cell, theirs, run, read, write = PEERS[name]()
    # Random numbers in the framework's own layout: fresh biases are 0 and would hide a mistake.
    leaves, tree = jax.tree.flatten(theirs)
    theirs = jax.tree.unflatten(tree, [np.float32(normal(7 + k, *leaf.shape) / 2) for k, leaf in enumerate(leaves)])
    xs, weight = np.float32(normal(5, B, T, I)), normal(6, T).astype(np.float32)[:, None]
    params = read(theirs)

    def ours(params, xs):
        return unroll_stack(cell, [params], xs.swapaxes(0, 1))[1].swapaxes(0, 1)

    loss = lambda run: lambda params, xs: (run(params, xs) * weight).sum()
    assert worst_error(ours(params, xs), run(theirs, xs)) < 1e-6
    # The conversion is differentiable, so both gradients are of the framework's own arrays.
    gradients = [jax.grad(loss(f), (0, 1))(theirs, xs) for f in (lambda tree, xs: ours(read(tree), xs), run)]
    assert worst_error(*gradients) < 1e-6
    # Our weights in their layer, and exactly back.
    mine = jax.tree.map(lambda leaf: jnp.asarray(leaf) * 0.7, params)
    sent = write(mine)
    assert jax.tree.map(jnp.shape, sent) == jax.tree.map(jnp.shape, theirs)
    assert worst_error(run(sent, xs), ours(mine, xs)) < 1e-6
    if name == "Haiku LSTM":
        assert worst_error(read(sent), mine) < 1e-7
        mine = mine._replace(b=mine.b.at[H : 2 * H].set(1 + jnp.arange(H) / 8))  # numbers that lose nothing
        sent = write(mine)
    assert bitwise(read(sent), mine) and bitwise(read(write(read(sent))), mine)


@pytest.mark.parametrize("name", ["LSTM", "PeepholeLSTM", "CoupledLSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_onnx_initializers_come_back_exactly(name, bidirectional):
    """Test only the round trip: test_onnx.py runs them in ONNX Runtime."""
    cell = CELL[name]
    [layer] = random_layers(cell, bidirectional=bidirectional)
    initializers = weights.to_onnx_initializers(cell, layer)
    attributes = {"linear_before_reset": 1, "input_forget": int(name == "CoupledLSTM")}
    assert bitwise(weights.from_onnx(cell, initializers, **attributes), layer)
    directions, rows = 1 + bidirectional, len(weights.ONNX[name]) * H
    assert initializers["W"].shape == (directions, rows, I)
    del initializers["B"]
    halves = weights.from_onnx(cell, initializers, **attributes)
    assert all(not np.any(half.b) for half in (halves if bidirectional else [halves]))


def test_dtypes_stay_and_conversions_compile():
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        [layer] = random_layers(LSTM, dtype=dtype)
        tree = weights.to_linen(LSTM, layer)
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
        assert bitwise(jax.jit(lambda tree: weights.from_linen(LSTM, tree))(tree), layer)
    assert bitwise(weights.from_linen(LSTM, {"params": {"encoder": {"OptimizedLSTMCell_0": tree}}}), layer)
    variant = variants.make_lstm(gate=jax.nn.hard_sigmoid)  # another function, the same weights
    assert bitwise(weights.from_linen(variant, tree), layer)


# Errors name the function and the entry.

[LAYER], LAYERS = random_layers(LSTM), random_layers(LSTM, (H, H), bidirectional=True)
TORCH = weights.to_torch(LSTM, LAYERS)
LINEN, HAIKU, EQUINOX = (f(LSTM, LAYER) for f in (weights.to_linen, weights.to_haiku, weights.to_equinox))
GRU_LAYER = random_layers(GRU)[0]
ONNX = weights.to_onnx_initializers(GRU, GRU_LAYER)


def without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


BAD = {
    "missing": (lambda: weights.from_torch(LSTM, without(TORCH, "bias_hh_l1")), ValueError, r"from_torch: entry bias_hh_l1 is missing; the entries left are bias_hh_l1_reverse, bias_ih_l1_reverse, weight_hh_l1_reverse, weight_ih_l1_reverse\."),
    "missing, with a prefix": (lambda: weights.from_torch(LSTM, TORCH, prefix="lstm."), ValueError, r"from_torch: entry lstm\.weight_ih_l0 is missing; the entries left are nothing"),
    "unexpected": (lambda: weights.from_torch(LSTM, TORCH | {"weight_hr_l0": np.ones((2, H))}), ValueError, "from_torch: entry weight_hr_l0 is unexpected"),
    "a layer left out": (lambda: weights.from_torch(LSTM, {k.replace("_l1", "_l2"): v for k, v in TORCH.items()}), ValueError, "from_torch: entry weight_ih_l2 is unexpected: this cell and its number of layers do not have it"),
    "wrong shape": (lambda: weights.from_torch(LSTM, TORCH | {"weight_hh_l1": np.ones((4 * H, 7), np.float32)}), ValueError, rf"from_torch: entry weight_hh_l1 must be \[{4 * H}, {H}\], got \[{4 * H}, 7\]"),
    "wrong width": (lambda: weights.from_torch(LSTM, TORCH | {"weight_ih_l1": np.ones((4 * H, 5), np.float32)}), ValueError, rf"from_torch: entry weight_ih_l1 must be \[any, {2 * H}\], got \[{4 * H}, 5\]"),
    "wrong dtype": (lambda: weights.from_torch(LSTM, TORCH | {"bias_ih_l0": TORCH["bias_ih_l0"].astype(int)}), ValueError, "from_torch: entry bias_ih_l0 must be a floating array, got int64"),
    "two dtypes": (lambda: weights.from_torch(LSTM, TORCH | {"bias_ih_l0": TORCH["bias_ih_l0"].astype(float)}), ValueError, "from_torch: entry bias_ih_l0 is float64, unlike the entries before it, which are float32"),
    "not an array": (lambda: weights.from_torch(LSTM, TORCH | {"bias_ih_l0": [[1.0], [2.0, 3.0]]}), ValueError, "from_torch: entry bias_ih_l0 cannot be read as an array"),
    "another cell's": (lambda: weights.from_torch(RNN, TORCH), ValueError, rf"from_torch: entry weight_hh_l0 must be \[{4 * H}, {4 * H}\]"),
    "rows that are no gates": (lambda: weights.from_torch(LSTM, weights.to_torch(RNN, random_layers(RNN, (5,)))), ValueError, "from_torch: entry weight_ih_l0 has 5 numbers for 4 gates: it is another cell's"),
    "a cell torch lacks": (lambda: weights.from_torch(variants.SLSTM, TORCH), ValueError, "from_torch: cell must be one of LSTM, ProjectedLSTM, GRU, RNN, got SLSTM"),
    "no cell": (lambda: weights.from_torch(TORCH, LSTM), TypeError, "from_torch: cell must be a Cell such as LSTM, got dict"),
    "float64 with x64 off": (lambda: with_x64_off(lambda: weights.from_haiku(LSTM, {k: v.astype(float) for k, v in HAIKU.items()})), ValueError, 'from_haiku: entry w is float64, which JAX would round; call jax.config.update\\("jax_enable_x64", True\\) first'),
    "params for layers": (lambda: weights.to_torch(LSTM, LAYER), TypeError, "to_torch: layers must be a list with one entry per layer, got LSTMParams"),
    "another cell's params": (lambda: weights.to_torch(LSTM, [GRU_LAYER]), TypeError, "to_torch: expected LSTMParams, got GRUParams"),
    "a bias that would be lost": (lambda: weights.to_torch(LSTM, LAYERS, bias=False), ValueError, "to_torch: bias=False, but the biases of params are not 0"),
    "a second bias that would be lost": (lambda: weights.to_keras(GRU, GRU_LAYER._replace(b=0 * GRU_LAYER.b), bias=False), ValueError, "to_keras: bias=False, but the biases"),
    "a b_hn that would be lost": (lambda: weights.to_nnx(GRU, GRU_LAYER), ValueError, "to_nnx: nnx.GRUCell has no b_hn, and params.b_hn is not 0"),
    "a vector of other sizes": (lambda: weights.from_jax_rnn(LSTM, np.ones(7), input_size=I, hidden_size=H), ValueError, rf"from_jax_rnn: weights must be \[{4 * H * (I + H + 2)}\] for these sizes, got \[7\]"),
    "no layers at all": (lambda: weights.from_jax_rnn(LSTM, np.ones(7), input_size=I, hidden_size=H, num_layers=0), ValueError, "from_jax_rnn: input_size, hidden_size and num_layers must be positive"),
    "layers of two widths": (lambda: weights.to_jax_rnn(LSTM, random_layers(LSTM, (H, 3))), ValueError, "to_torch: torch's layers all have the same number of units and directions"),
    "one layer in both directions": (lambda: weights.to_torch(LSTM, [LAYERS[0], *random_layers(LSTM, input_size=2 * H)]), ValueError, "to_torch: torch's layers all have the same number of units and directions"),
    "layers that do not fit": (lambda: weights.to_torch(LSTM, [LAYER, LAYER]), ValueError, f"to_torch: layer 1 must read float32 and {H} features, got float32 and {I}"),
    "layers of two dtypes": (lambda: weights.to_torch(LSTM, [LAYER, *random_layers(LSTM, input_size=H, dtype=jnp.float64)]), ValueError, f"to_torch: layer 1 must read float32 and {H} features, got float64 and {H}"),
    "directions that differ": (lambda: weights.from_torch(LSTM, TORCH | {"weight_ih_l0_reverse": np.ones((4 * H, 9), np.float32)}), ValueError, rf"from_torch: layer 0: w_ih is float32\[{I}, {4 * H}\] forward and float32\[9, {4 * H}\] backward; both must be alike"),
    "no mapping": (lambda: weights.from_torch(LSTM, None), TypeError, "from_torch: expected arrays by name, such as a dict, got NoneType"),
    "a Keras layer": (lambda: weights.from_keras(LSTM, LSTM), TypeError, r"from_keras: weights must be a list, such as layer.get_weights\(\), got Cell"),
    "an Equinox module": (lambda: weights.from_equinox(LSTM, LSTM), TypeError, "from_equinox: expected arrays by name, such as a dict, got Cell"),
    "a module": (lambda: weights.from_linen(LSTM, LSTM), TypeError, "from_linen: expected arrays by name, such as a dict, got Cell"),
    "objects": (lambda: weights.from_haiku(LSTM, HAIKU | {"w": object()}), ValueError, "from_haiku: entry w must be a floating array, got object"),
    "a bias that Equinox would lose": (lambda: weights.to_equinox(LSTM, LAYER, bias=False), ValueError, "to_equinox: bias=False, but the biases"),
    "two Keras layers": (lambda: weights.from_keras(LSTM, weights.to_keras(LSTM, LAYER) * 2), ValueError, "from_keras: weights must be kernel, recurrent_kernel, bias, got 6 arrays"),
    "two Keras layers for a pair": (lambda: weights.from_keras(LSTM, [*weights.to_keras(LSTM, LAYER), *weights.to_keras(LSTM, random_layers(LSTM, input_size=H + 5)[0])], bidirectional=True), ValueError, "from_keras: w_ih is "),
    "a list too long": (lambda: weights.from_keras(LSTM, weights.to_keras(LSTM, LAYER) * 3, bidirectional=True), ValueError, "from_keras: weights must be kernel, recurrent_kernel, bias for each direction, got 9 arrays"),
    "Keras, backward": (lambda: weights.from_keras(LSTM, [*weights.to_keras(LSTM, LAYER), *weights.to_keras(LSTM, LAYER)[::-1]], bidirectional=True), ValueError, "from_keras: entry backward kernel must be"),
    "Keras, reset before": (lambda: weights.from_keras(GRU, [*weights.to_keras(GRU, GRU_LAYER)[:2], np.ones(3 * H, np.float32)]), ValueError, "from_keras: bias is of a GRU with reset_after=False, another cell"),
    "Flax, missing": (lambda: weights.from_linen(LSTM, without(LINEN, "hf")), ValueError, "from_linen: entry hf/kernel is missing; the entries left are h"),
    "Flax, unexpected": (lambda: weights.from_linen(LSTM, LINEN | {"ii": LINEN["ii"] | {"bias": np.ones(H)}}), ValueError, "from_linen: entry ii/bias is unexpected"),
    "Flax, one direction": (lambda: weights.from_linen(LSTM, {"forward_rnn": {"cell": LINEN}, "rnn": {}}), ValueError, "from_linen: entry backward_rnn is missing"),
    "Flax, a third direction": (lambda: weights.from_linen(LSTM, {"forward_rnn": {}, "backward_rnn": {}, "rnn": {}}), ValueError, "from_linen: entry rnn is unexpected"),
    "nnx, missing": (lambda: weights.from_nnx(LSTM, {"dense_i": {"kernel": np.ones((I, 4 * H))}, "dense_h": {}}), ValueError, "from_nnx: entry dense_h/kernel is missing"),
    "nnx, unexpected": (lambda: weights.from_nnx(LSTM, weights.to_nnx(LSTM, LAYER) | {"rngs": np.ones(1)}), ValueError, "from_nnx: entry rngs is unexpected"),
    "Equinox, half a bias": (lambda: weights.from_equinox(GRU, without(weights.to_equinox(GRU, GRU_LAYER), "bias")), ValueError, "from_equinox: entry bias is missing"),
    "Equinox, unexpected": (lambda: weights.from_equinox(LSTM, EQUINOX | {"bias_n": np.ones(H, np.float32)}), ValueError, "from_equinox: entry bias_n is "),
    "Haiku, a GRU": (lambda: weights.from_haiku(GRU, {"w_i": 0, "w_h": 0, "b": 0}), ValueError, "from_haiku: w_i and w_h are of an hk.GRU, which resets h before the matmul: another cell"),
    "Haiku, no input": (lambda: weights.from_haiku(LSTM, HAIKU | {"w": HAIKU["w"][-H:]}), ValueError, rf"from_haiku: w must be \[input\+{H}, {4 * H}\], got \[{H}, {4 * H}\]"),
    "Haiku, unexpected": (lambda: weights.from_haiku(LSTM, HAIKU | {"c": 0}), ValueError, "from_haiku: entry c is unexpected"),
    "ONNX, reset before": (lambda: weights.from_onnx(GRU, ONNX), ValueError, "from_onnx: a GRU with linear_before_reset=0 is another cell"),
    "ONNX, coupled": (lambda: weights.from_onnx(variants.CoupledLSTM, weights.to_onnx_initializers(LSTM, LAYER)), ValueError, "from_onnx: an LSTM with input_forget=0 is another cell than CoupledLSTM"),
    "ONNX, not coupled": (lambda: weights.from_onnx(LSTM, weights.to_onnx_initializers(LSTM, LAYER), input_forget=1), ValueError, "from_onnx: an LSTM with input_forget=1 is another cell than LSTM"),
    "ONNX, directions": (lambda: weights.from_onnx(RNN, {"W": np.ones((3, H, I)), "R": np.ones((3, H, H))}), ValueError, "from_onnx: W must have 1 or 2 directions, got 3"),
    "ONNX, peepholes": (lambda: weights.from_onnx(LSTM, weights.to_onnx_initializers(variants.PeepholeLSTM, random_layers(variants.PeepholeLSTM)[0])), ValueError, "from_onnx: entry P is unexpected"),
}  # fmt: skip


def with_x64_off(call):
    with jax.enable_x64(False):
        return call()


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_entry_gets_one_clear_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


# Files.


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_safetensors_files(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    weights.write_safetensors("lstm.safetensors", TORCH)
    assert bitwise(weights.from_torch(LSTM, weights.read_safetensors("lstm.safetensors")), LAYERS)
    transposed = np.arange(6.0).reshape(2, 3).T  # the library writes the buffer as it lies in memory
    weights.write_safetensors("transposed.safetensors", {"a": transposed})
    assert np.array_equal(weights.read_safetensors("transposed.safetensors")["a"], transposed)
    [layer] = random_layers(LSTM, dtype=jnp.bfloat16)
    weights.write_safetensors("nested.safetensors", {"cell": weights.to_linen(LSTM, layer)})
    arrays = weights.read_safetensors("nested.safetensors")
    assert sorted(arrays)[0] == "cell/hf/bias" and arrays["cell/hf/bias"].dtype == jnp.bfloat16
    whole = (tmp_path / "lstm.safetensors").read_bytes()
    broken = {
        "truncated in the header": whole[:50],
        "truncated in the arrays": whole[:-3],
        "empty": b"",
        "a pickle": pickle.dumps(Bomb()),
        "other bytes": b"PK\x03\x04" + bytes(range(256)),
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"read_safetensors: .*{name} is not a whole safetensors file: .*pickle"):
            weights.read_safetensors(path)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(FileNotFoundError):
        weights.read_safetensors("absent.safetensors")


class Model(NamedTuple):
    layers: list
    scale: jax.Array  # a number
    tables: dict


def own_model(dtype=jnp.bfloat16):
    tables = {"b": np.arange(6).reshape(2, 3).T, "a": {"c": jnp.array([-0.0, jnp.inf])}}
    return Model(random_layers(LSTM, dtype=dtype) * 2, jnp.float32(0.1), tables)


def test_a_safetensors_file_of_any_pytree(tmp_path):
    pytest.importorskip("safetensors")
    path, model = tmp_path / "model.safetensors", own_model()
    weights.write_safetensors(path, model)
    names = ["layers/0/b", "layers/0/w_hh", "layers/0/w_ih", "layers/1/b", "layers/1/w_hh", "layers/1/w_ih"]
    assert sorted(weights.read_safetensors(path)) == [*names, "scale", "tables/a/c", "tables/b"]
    for like in (own_model(), jax.eval_shape(own_model)):
        again = weights.read_safetensors(path, like=like)
        assert jax.tree.structure(again) == jax.tree.structure(model)
        for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
            assert isinstance(got, jax.Array) and (got.dtype, got.shape) == (want.dtype, want.shape)
            assert np.asarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


@pytest.mark.parametrize(
    "like, message",
    [
        (
            lambda model: model._replace(layers=model.layers[:1]),
            r"layers/1/b is bfloat16\[16\] in .*, but absent in `like`",
        ),
        (
            lambda model: model._replace(layers=model.layers * 2),
            r"layers/2/w_ih is absent in .*, but bfloat16\[5, 16\] in",
        ),
        (
            lambda model: model._replace(scale=jnp.ones(1, "float32")),
            r"scale is float32\[\] in .*, but float32\[1\] in",
        ),
        (lambda model: own_model("float32"), r"layers/0/w_ih is bfloat16\[.*, but float32"),
    ],
)
def test_a_file_that_holds_another_model_is_refused(like, message, tmp_path):
    pytest.importorskip("safetensors")
    weights.write_safetensors(tmp_path / "model.safetensors", own_model())
    with pytest.raises(ValueError, match="read_safetensors: " + message):
        weights.read_safetensors(tmp_path / "model.safetensors", like=like(own_model()))


def test_two_arrays_with_one_path_are_not_written(tmp_path):
    pytest.importorskip("safetensors")
    for model in ({"a/b": np.ones(1), "a": {"b": np.ones(2)}}, {"a": [np.ones(1)], "a/0": np.ones(1)}):
        with pytest.raises(ValueError, match="write_safetensors: two arrays would have one name, among a/"):
            weights.write_safetensors(tmp_path / "model.safetensors", model)
    assert not [*tmp_path.iterdir()]


def test_no_framework_is_imported_to_convert():
    code = "import sys\nfrom jaxlstm.adapters import weights\nprint(*sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jaxlstm" in loaded
    assert not {"torch", "flax", "haiku", "equinox", "keras", "onnx", "onnxruntime", "safetensors"} & set(loaded)


@jax.enable_x64(False)
def test_a_file_with_64_bits_is_not_rounded_in_silence(tmp_path):
    arrays = {"a": np.array([1 / 3, 2.0])}
    weights.write_safetensors(tmp_path / "a.safetensors", arrays)
    np.testing.assert_array_equal(weights.read_safetensors(tmp_path / "a.safetensors")["a"], arrays["a"])
    with pytest.raises(
        ValueError, match=r"read_safetensors: a is float64, which JAX would round. Turn on jax_enable_x64"
    ):
        weights.read_safetensors(tmp_path / "a.safetensors", like=arrays)
