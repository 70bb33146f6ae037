"""Flax: its own tests with our cells, shared weights, checkpoints, the layers; an Equinox module is in the docs."""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

from jaxlstm import (
    GRU,
    LSTM,
    Bidirectional,
    Chunked,
    LSTMState,
    init_stack,
    length_mask,
    low_precision,
    unroll,
    unroll_stack,
)
from jaxlstm.adapters import linen as ours_linen
from jaxlstm.adapters import nnx as ours_nnx
from jaxlstm.adapters import weights
from jaxlstm.regularize import Noisy, zoneout

from cells import CELLS, FAMILY, B, H, I, T, normal, worst_error
from jobs import UNCHECKED
from sweeps import some

LENGTHS = np.array([4, T, 1])
XS = jnp.asarray(normal(0, B, T, I))
WEIGHT = normal(1, B, T, H)


@pytest.fixture(autouse=True)
def promotion_as_flax_has_it():
    with jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        yield


# Flax's own tests.

PATCHES = {
    "tests/linen/linen_test.py RecurrentTest": """
        from flax import linen
        from jaxlstm.adapters import linen as ours
        linen.LSTMCell = linen.OptimizedLSTMCell = ours.LSTMCell
        linen.GRUCell = ours.GRUCell
        ours_are_used = [ours.LSTMCell, ours.GRUCell]
        """,
    "tests/linen/linen_recurrent_test.py": """
        from flax import linen
        from jaxlstm.adapters import linen as ours
        linen.LSTMCell = linen.OptimizedLSTMCell = ours.LSTMCell
        ours_are_used = [ours.LSTMCell]
        """,
    "tests/nnx/nn/recurrent_test.py": """
        from flax import nnx
        from jaxlstm.adapters import nnx as ours
        nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell = ours.LSTMCell, ours.OptimizedLSTMCell, ours.GRUCell
        ours_are_used = [ours.LSTMCell, ours.OptimizedLSTMCell, ours.GRUCell]
        """,
}
RUN = """
import inspect, runpy, sys
exec(inspect.cleandoc({patch!r}))
sys.argv = {argv!r}
called = set()
for cell in ours_are_used:
    call = cell.__call__
    def counted(self, *args, cell=cell, call=call):
        called.add(cell)
        return call(self, *args)
    cell.__call__ = counted
try:
    runpy.run_path({path!r}, run_name="__main__")
finally:
    print("called", len(called), "of", len(ours_are_used))
"""


@pytest.fixture(scope="module")
def flax_source(tmp_path_factory):
    """The source release of the Flax that is installed, which holds its tests."""
    folder = tmp_path_factory.mktemp("flax")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    download = subprocess.run([*command, f"flax=={version('flax')}"], capture_output=True, text=True)
    if download.returncode:
        assert "CI" not in os.environ, download.stderr
        pytest.skip(f"no source release of Flax to be had: {download.stderr[-200:]}")
    (archive,) = folder.glob("flax-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.ci
@pytest.mark.parametrize("file", PATCHES)
def test_flaxs_own_recurrent_tests_pass_with_our_cells(file, flax_source):
    path, *tests = file.split()
    code = RUN.format(patch=PATCHES[file], path=str(flax_source / path), argv=[path, *tests])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **UNCHECKED}
    )
    assert result.returncode == 0 and "\nOK" in result.stderr, result.stderr[-3000:]
    called, of = (int(word) for word in result.stdout.split() if word.isdigit())
    assert called == of, "every cell of ours was used"


# Shared weights.

FLAX_CELLS = ["LSTMCell", "OptimizedLSTMCell", "GRUCell"]


@pytest.mark.parametrize("name", some(FLAX_CELLS, "OptimizedLSTMCell"))
def test_linen_cells_share_flaxs_parameters_values_and_gradients(name):
    ours = ours_linen.GRUCell if name == "GRUCell" else ours_linen.LSTMCell
    options = {"param_dtype": jnp.float64, "bias_init": nn.initializers.normal()}
    rnns = [nn.RNN(cell(H, **options), return_carry=True) for cell in (ours, getattr(nn, name))]
    variables = [rnn.init(jax.random.key(0), XS) for rnn in rnns]
    assert worst_error(*variables) == 0, "the same names, shapes and draws"
    restored = serialization.from_bytes(variables[0], serialization.to_bytes(variables[1]))

    def loss(rnn, variables, xs):
        carry, ys = rnn.apply(variables, xs, seq_lengths=LENGTHS)
        return (WEIGHT * length_mask(LENGTHS, T).T[..., None] * ys).sum() + sum(
            (c**2).sum() for c in jax.tree.leaves(carry)
        )

    values = [jax.value_and_grad(lambda v, x, rnn=rnn: loss(rnn, v, x), argnums=(0, 1))(restored, XS) for rnn in rnns]
    assert worst_error(*values) < 1e-13


@pytest.mark.parametrize("name", some(FLAX_CELLS, "GRUCell"))
def test_nnx_cells_share_flaxs_parameters_values_and_gradients(name):
    ours, theirs = (
        nnx.RNN(getattr(module, name)(I, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0))) for module in (ours_nnx, nnx)
    )
    nnx.update(theirs, jax.tree.map(lambda v: v + 0.1, nnx.state(theirs, nnx.Param)))
    nnx.update(ours, nnx.state(theirs, nnx.Param))  # what a checkpoint holds
    loss = lambda rnn: (WEIGHT * rnn(XS)).sum()
    values = [nnx.value_and_grad(loss)(rnn) for rnn in (ours, theirs)]
    assert worst_error(*(nnx.to_pure_dict(gradient) for _, gradient in values)) < 1e-13
    assert abs(values[0][0] - values[1][0]) < 1e-13


@pytest.mark.parametrize("cell", [ours_linen.LSTMCell, pytest.param(ours_linen.GRUCell, marks=pytest.mark.ci)])
def test_linen_cells_round_as_flaxs_do_and_take_any_gate_functions(cell):
    theirs = nn.GRUCell if cell is ours_linen.GRUCell else nn.OptimizedLSTMCell
    options = {"dtype": jnp.bfloat16}, {"gate_fn": jax.nn.hard_sigmoid, "activation_fn": nn.elu}
    for option in options:
        rnns = [nn.RNN(kind(H, **option)) for kind in (cell, theirs)]
        variables = rnns[0].init(jax.random.key(0), XS.astype("float32"))
        got, want = (rnn.apply(variables, XS.astype("float32")) for rnn in rnns)
        assert got.dtype == want.dtype and worst_error(got, want) < (1e-2 if option is options[0] else 1e-6)


# The layers.


def flax_layer(cell, reverse=False):
    return nn.RNN(cell(H, param_dtype=jnp.float64), return_carry=True, reverse=reverse, keep_order=True)


@pytest.mark.parametrize("kind", ["LSTM", pytest.param("GRU", marks=pytest.mark.ci)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_layers_equal_flaxs_rnn_on_shared_weights(kind, bidirectional):
    cell, flax_cell = {
        "LSTM": (LSTM, nn.OptimizedLSTMCell),
        "GRU": (GRU, nn.GRUCell),
    }[kind]
    halves = [flax_layer(flax_cell, reverse) for reverse in (False, True)[: 1 + bidirectional]]
    drawn = [half.init(jax.random.key(n), XS)["params"] for n, half in enumerate(halves)]
    mask = length_mask(LENGTHS, T).T[..., None]

    def theirs(trees, xs):
        outs = [half.apply({"params": t}, xs, seq_lengths=LENGTHS) for half, t in zip(halves, trees, strict=True)]
        ys = jnp.concatenate([ys for _, ys in outs], axis=-1) * mask  # Flax leaves padding in its outputs
        return (jnp.sin(ys + 1) * mask).sum(), (ys, [carry for carry, _ in outs])

    options = {"bidirectional": bidirectional, "cell": cell, "param_dtype": jnp.float64, "return_carry": True}
    pair = lambda trees: {"forward_rnn": trees[0], "backward_rnn": trees[1]} if bidirectional else trees[0]

    def in_linen(trees, xs):
        variables = {"params": ours_linen.from_rnn(cell, pair(trees))}
        carries, ys = ours_linen.Recurrent(H, **options).apply(variables, xs, seq_lengths=LENGTHS)
        return (jnp.sin(ys + 1) * mask).sum(), (ys, carries)

    def in_nnx(trees, xs):
        layer = ours_nnx.Recurrent(I, H, rngs=nnx.Rngs(0), **options)
        layer.load([weights.from_linen(cell, pair(trees))])
        carries, ys = layer(xs, seq_lengths=LENGTHS)
        return (jnp.sin(ys + 1) * mask).sum(), (ys, carries)

    run = lambda loss: jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(drawn, XS)
    (value, (ys, carries)), gradients = run(theirs)
    for loss in (in_linen, in_nnx):
        (got, (got_ys, (got_carries,))), got_gradients = run(loss)
        assert abs(got - value) < 1e-12 * abs(value)
        assert worst_error((got_ys, got_gradients), (ys, gradients)) < 1e-12
        pairs = zip(got_carries if isinstance(got_carries, Bidirectional) else [got_carries], carries, strict=True)
        for state, carry in pairs:
            want = LSTMState(h=carry[1], c=carry[0]) if kind == "LSTM" else type(state)(carry)
            assert worst_error(state, want) < 1e-13


SOME = [name if name == "LSTM" else pytest.param(name, marks=pytest.mark.ci) for name in CELLS | FAMILY]


@pytest.mark.parametrize("name", SOME)
def test_the_layers_take_every_cell_and_are_unroll_stack(name):
    cell = (CELLS | FAMILY)[name][0]
    linen = ours_linen.Recurrent(H, num_layers=2, bidirectional=True, cell=cell, param_dtype=jnp.float64)
    mask, reset = normal(2, B, T) > -0.5, normal(3, B, T) > 0.5
    ys, variables = linen.init_with_output(jax.random.key(0), XS, mask=mask, reset=reset)
    tree = variables["params"]["layers"]
    like = jax.eval_shape(lambda: cell.init(jax.random.key(0), I, H))
    layers = [serialization.from_state_dict(Bidirectional(like, like), tree[f"layer_{n}"]) for n in range(2)]
    _, want = unroll_stack(cell, layers, XS.swapaxes(0, 1), mask=mask.T, reset=reset.T)
    assert worst_error(ys, want.swapaxes(0, 1)) < 1e-14
    module = ours_nnx.Recurrent(
        I, H, num_layers=2, bidirectional=True, cell=cell, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    module.layers = nnx.data(jax.tree.map(nnx.Param, tree))
    assert worst_error(module(XS, mask=mask, reset=reset), ys) < 1e-14


def test_lengths_masks_and_noise_compose_in_either_layout():
    module = ours_nnx.Recurrent(I, H, cell=zoneout(LSTM, 0.3), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    mask, reset = normal(2, B, T) > -0.5, normal(3, B, T) > 0.5
    held = normal(4, B, T, H) > 0.5
    ys = module(XS, mask=mask, seq_lengths=LENGTHS, reset=reset, noise=[LSTMState(held, ~held)])
    (layer,) = ours_nnx.conventions.layers_of(
        jax.tree.map(lambda p: p[...], nnx.to_pure_dict(nnx.state(module)))["layers"], I, module.options
    )
    first = lambda v: v.swapaxes(0, 1)
    both = first(mask) & length_mask(LENGTHS, T)
    noisy = Noisy(first(XS), LSTMState(first(held), first(~held)))
    _, want = unroll(zoneout(LSTM, 0.3), layer, noisy, mask=both, reset=first(reset))
    assert worst_error(first(ys), want) < 1e-14
    major = module(
        first(XS), mask=first(mask), seq_lengths=LENGTHS, reset=first(reset), noise=[noisy.noise], time_major=True
    )
    assert worst_error(major, want) < 1e-14
    assert worst_error(module(XS), ys) > 0.01


def test_parameters_of_another_number_of_layers_are_refused():
    two = ours_linen.Recurrent(H, num_layers=2, param_dtype=jnp.float64)
    variables = two.init(jax.random.key(0), XS)
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"Recurrent: num_layers is {number}, the parameters have 2 layers"):
            ours_linen.Recurrent(H, num_layers=number, param_dtype=jnp.float64).apply(variables, XS)
    with pytest.raises(ValueError, match="Recurrent: num_layers must be a positive int, got 0"):
        ours_nnx.Recurrent(I, H, num_layers=0, rngs=nnx.Rngs(0))


def test_nnx_cells_round_as_flaxs_do():
    xs = XS.astype("float32")
    for name in ("LSTMCell", "OptimizedLSTMCell", "GRUCell"):
        ours, theirs = (nnx.RNN(getattr(m, name)(I, H, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))) for m in (ours_nnx, nnx))
        full = nnx.RNN(getattr(nnx, name)(I, H, rngs=nnx.Rngs(0)))(xs)
        got, want = ours(xs), theirs(xs)
        assert got.dtype == want.dtype and worst_error(got.astype("float32"), want.astype("float32")) < 1e-2
        assert worst_error(got.astype("float32"), full) > 1e-4


def test_dropout_follows_flaxs_habits():
    linen = ours_linen.Recurrent(H, num_layers=2, dropout=0.5)
    xs = XS.astype("float32")
    variables = linen.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, xs)
    run = lambda seed, **options: linen.apply(variables, xs, rngs={"dropout": jax.random.key(seed)}, **options)
    assert (run(0) == run(0)).all() and not (run(0) == run(1)).all()
    plain = linen.apply(variables, xs, deterministic=True)
    assert not (run(0) == plain).all()
    with pytest.raises(Exception, match="dropout"):
        linen.apply(variables, xs)
    module = ours_nnx.Recurrent(I, H, num_layers=2, dropout=0.5, rngs=nnx.Rngs(0))
    assert not (module(xs) == module(xs)).all(), "the stream moves on"
    assert (module(xs, rngs=nnx.Rngs(dropout=3)) == module(xs, rngs=nnx.Rngs(dropout=3))).all()
    module.eval()
    assert (module(xs) == module(xs)).all()


@pytest.mark.ci
def test_layouts_carries_and_dtypes():
    linen = ours_linen.Recurrent(H, return_carry=True)
    xs = XS.astype("float32")
    variables = linen.init(jax.random.key(0), xs)
    carries, ys = linen.apply(variables, xs)
    again, more = linen.apply(variables, xs, initial_carry=carries)
    options = ours_linen.conventions.Options(LSTM, H, 1, False, jnp.float32, None, "bulk")
    (layer,) = ours_linen.conventions.layers_of(variables["params"]["layers"], I, options)
    want = unroll(LSTM, layer, jnp.concatenate([xs, xs], axis=1).swapaxes(0, 1))
    assert worst_error((again[0], more), (want[0], want[1].swapaxes(0, 1)[:, T:])) < 1e-6
    major = linen.apply(variables, xs.swapaxes(0, 1), time_major=True, return_carry=False)
    assert worst_error(major.swapaxes(0, 1), ys) < 1e-6
    several = linen.apply(
        variables, jnp.stack([xs, 2 * xs]), seq_lengths=np.stack([LENGTHS, LENGTHS]), return_carry=False
    )
    assert several.shape == (2, B, T, H)
    low = ours_linen.Recurrent(H, dtype=jnp.bfloat16)
    out = low.apply(variables, xs)
    assert out.dtype == jnp.bfloat16 and worst_error(out.astype("float32"), ys) < 2e-2
    rounded = unroll(low_precision(LSTM, "bfloat16"), layer, xs.swapaxes(0, 1))[1].swapaxes(0, 1)
    assert worst_error(out.astype("float32"), rounded.astype("bfloat16").astype("float32")) < 1e-6
    assert (out != ys.astype("bfloat16")).any(), "the matmuls are rounded, not only the outputs"


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_chunk_and_truncate(kind):
    def layer(**options):
        if kind == "linen":
            return ours_linen.Recurrent(H, param_dtype=jnp.float64, **options)
        return ours_nnx.Recurrent(I, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)

    def gradient(**options):
        if kind == "linen":
            variables = layer().init(jax.random.key(0), XS)
            return jax.grad(lambda v: (layer(**options).apply(v, XS) ** 2).sum())(variables)
        return nnx.to_pure_dict(nnx.grad(lambda m: (m(XS) ** 2).sum())(layer(**options)))

    plain = gradient(gradient="scan")
    assert worst_error(gradient(gradient=Chunked(3)), plain) < 1e-13
    assert worst_error(gradient(gradient=Chunked(3, truncate=True)), plain) > 1e-3


def test_a_module_trains_with_nnx_and_compiles_once():
    import optax

    model = ours_nnx.Recurrent(I, H, cell=zoneout(LSTM, 0.1), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces, xs = [], XS.astype("float32")

    @nnx.jit
    def train_step(model, optimizer):
        traces.append(0)
        loss, gradient = nnx.value_and_grad(lambda m: ((m(xs) - 0.3) ** 2).mean())(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(train_step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0] and len(traces) <= 2


BAD = {
    "lengths beyond T": (lambda layer: layer(XS, seq_lengths=LENGTHS + 1), ValueError, "length_mask: lengths must lie between 0 and num_steps = 7"),
    "lengths that are floats": (lambda layer: layer(XS, seq_lengths=LENGTHS / 1), TypeError, "length_mask: lengths must be integers"),
    "a mask [time, batch]": (lambda layer: layer(XS, mask=jnp.ones((T, B), bool)), ValueError, r"Recurrent: mask must be bool \[\*batch, time\] = \[3, 7\], got bool \[7, 3\]"),
    "lengths of another batch": (lambda layer: layer(XS, seq_lengths=LENGTHS[:2]), ValueError, r"Recurrent: seq_lengths must be \[\*batch\] = \[3\], got \[2\]"),
    "another width": (lambda layer: layer(XS[..., 1:]), ValueError, "xs has 4 features, params.w_ih expects 5"),
    "a carry of Flax's": (lambda layer: layer(XS, initial_carry=(XS[:, 0], XS[:, 0])), ValueError, "carries must have one entry per layer, 1 in all, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call(ours_nnx.Recurrent(I, H, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))


def test_every_layer_may_have_its_own_width():
    linen = ours_linen.Recurrent([H, 3], param_dtype=jnp.float64)
    variables = linen.init(jax.random.key(0), XS)
    stack = ours_nnx.Recurrent(I, [1, 2], rngs=nnx.Rngs(0)).params  # other shapes
    layer = ours_nnx.Recurrent(I, (H, 3), num_layers=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    variable = layer.layers["layer_1"]["b"]
    before = layer(XS)
    with pytest.raises(ValueError, match=r"Recurrent: layers must be .*float64\[12\].* got .*float32\[8\]"):
        layer.load(stack)
    with pytest.raises(ValueError, match=r"Recurrent: layers must be .*float64\[12\].* got .*float32\[12\]"):
        layer.load(init_stack(jax.random.key(1), LSTM, I, [H, 3]))
    for wrong in (stack[0], [], None):
        with pytest.raises(TypeError, match="Recurrent: layers must be a list with one entry per layer"):
            ours_linen.recurrent_params(wrong)
    loaded = init_stack(jax.random.key(1), LSTM, I, [H, 3], dtype=jnp.float64)
    layer.load(loaded)
    assert layer.layers["layer_1"]["b"] is variable, "an optimizer may hold it"
    want = unroll_stack(LSTM, loaded, XS.swapaxes(0, 1))[1].swapaxes(0, 1)
    assert worst_error(layer.params, loaded) == 0
    assert worst_error(layer(XS), want) < 1e-14 < worst_error(before, want)
    ours = {"params": ours_linen.recurrent_params(loaded)}
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, variables)
    assert worst_error(linen.apply(ours, XS), want) < 1e-14
    trees = [weights.to_linen(LSTM, params) for params in loaded]
    assert worst_error(linen.apply({"params": ours_linen.from_rnn(LSTM, *trees)}, XS), want) < 1e-14
    # A list would make the modules unhashable, and `nnx.jit` and static arguments hash them.
    assert hash(linen) == hash(ours_linen.Recurrent((H, 3), param_dtype=jnp.float64))
    assert hash(nnx.split(ours_nnx.Recurrent(I, [H, 3], rngs=nnx.Rngs(0)))[0])
    with pytest.raises(ValueError, match="Recurrent: num_layers is 3, features has 2 sizes"):
        ours_linen.Recurrent([H, 3], num_layers=3).init(jax.random.key(0), XS)


def test_widths_that_do_not_match_a_restored_tree():
    linen = ours_linen.Recurrent(H, param_dtype=jnp.float64)
    variables = linen.init(jax.random.key(0), XS)
    with pytest.raises(Exception, match="shape"):
        ours_linen.Recurrent(H + 1, param_dtype=jnp.float64).apply(variables, XS)
    with pytest.raises(ValueError, match="dropout must lie in"):
        ours_nnx.Recurrent(I, H, num_layers=2, dropout=1.0, rngs=nnx.Rngs(0))(XS)
