"""Stacks and both directions: against torch, NumPy loops, `lstm_ref`; one step; generation; every error."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from jaxlstm import (
    GRU,
    LSTM,
    Bidirectional,
    Bulk,
    Chunked,
    LSTMParams,
    LSTMState,
    generate,
    init_bidirectional,
    init_stack,
    length_mask,
    low_precision,
    segment_resets,
    step_stack,
    unroll,
    unroll_bidirectional,
    unroll_stack,
)
from jaxlstm.regularize import Noisy, dropout_mask

import oracles
from cells import CELLS, HOLES, RESET, B, H, I, T, draw, normal, worst_error
from golden import generate as golden
from sweeps import some, sweep

GOLDEN = np.load(golden.PATH)


# Against torch.


def layers_of(entries, num_layers, directions):
    """Put one thing per layer and direction, in torch's order, into a stack."""
    entries = list(entries)
    pairs = [entries[n * directions : (n + 1) * directions] for n in range(num_layers)]
    return [Bidirectional(*pair) if directions == 2 else pair[0] for pair in pairs]


FEW = [n if layers == 2 else pytest.param(n, marks=pytest.mark.ci) for n, (layers, *_) in enumerate(golden.STACKS)]


@pytest.mark.parametrize("case", FEW, ids=lambda n: str(golden.STACKS[n]))
def test_stacks_equal_torch_values_and_all_gradients(case):
    num_layers, directions, lengths, given = golden.STACKS[case]
    want = {key.split("/")[1]: GOLDEN[key] for key in GOLDEN.files if key.startswith(f"stack {case}/")}
    parameters, states, d_states, xs, d_ys = golden.draw_stack(num_layers, directions)
    quads = [parameters[n : n + 4] for n in range(0, len(parameters), 4)]
    in_layers = functools.partial(layers_of, num_layers=num_layers, directions=directions)
    params = in_layers(LSTMParams(w_ih.T, w_hh.T, b_ih + b_hh) for w_ih, w_hh, b_ih, b_hh in quads)
    of_states = lambda two: in_layers(map(LSTMState, *two))
    mask = None if lengths is None else length_mask(lengths, len(xs))

    @jax.jit
    def run(params, xs, carries, cotangents):
        out, pullback = jax.vjp(
            lambda p, x, c: unroll_stack(LSTM, p, x, c if given else None, mask=mask), params, xs, carries
        )
        return out, pullback(cotangents)

    args = jax.tree.map(jnp.asarray, (params, xs, of_states(states), (of_states(d_states), d_ys)))
    out, (d_params, d_xs, d_carries) = run(*args)
    assert worst_error(out, (of_states((want["final0"], want["final1"])), want["ys"])) < 1e-12
    suffixes = [f"l{n}{back}" for n in range(num_layers) for back in ("", "_reverse")[:directions]]
    d_want = in_layers(
        LSTMParams(want[f"d_weight_ih_{s}"].T, want[f"d_weight_hh_{s}"].T, want[f"d_bias_ih_{s}"]) for s in suffixes
    )
    assert worst_error((d_params, d_xs), (d_want, want["d_xs"])) < 1e-12
    if given:
        assert worst_error(d_carries, of_states((want["d_state0"], want["d_state1"]))) < 1e-12


# Against jax.experimental.rnn.lstm_ref, over the grid of its own test.

GRID = list(itertools.product([1, 4], [1, 4], [1, 2], [1, 6], [1, 4], [True, False]))


@sweep("stacks equal jax.experimental.rnn.lstm_ref over its test's grid", len(GRID))
def test_stacks_equal_lstm_ref(trial):
    batch, num_steps, input_size, hidden, num_layers, bidirectional = GRID[
        (7 * trial + 35) % len(GRID)
    ]  # large ones too
    directions = 2 if bidirectional else 1
    normals = np.random.default_rng(trial).normal
    sizes = [input_size] + [directions * hidden] * (num_layers - 1)
    pseudo = range(num_layers * directions)
    shapes = {"w_ih": lambda n: (4 * hidden, sizes[n // directions]), "w_hh": lambda n: (4 * hidden, hidden)}
    weights = {
        name: {n: jnp.asarray(normals(size=shape(n)) / 2, "float32") for n in pseudo} for name, shape in shapes.items()
    }
    biases = [{n: jnp.asarray(normals(size=4 * hidden), "float32") for n in pseudo} for _ in range(2)]
    xs = jnp.asarray(normals(size=(batch, num_steps, input_size)), "float32")
    h, c = (jnp.asarray(normals(size=(len(pseudo), batch, hidden)), "float32") for _ in range(2))
    lengths = np.random.default_rng(trial).integers(1, num_steps + 1, batch).astype("int32")  # 0 it gets wrong

    @jax.jit
    def reference(weights, biases, xs, h, c):
        return rnn.lstm_ref(
            xs, h, c, weights["w_ih"], weights["w_hh"], *biases, seq_lengths=jnp.asarray(lengths),
            input_size=input_size, hidden_size=hidden, num_layers=num_layers, dropout=0.0, bidirectional=bidirectional,
        )  # fmt: skip

    @jax.jit
    def ours(weights, biases, xs, h, c):
        in_layers = functools.partial(layers_of, num_layers=num_layers, directions=directions)
        params = in_layers(
            LSTMParams(weights["w_ih"][n].T, weights["w_hh"][n].T, biases[0][n] + biases[1][n]) for n in pseudo
        )
        carries, ys = unroll_stack(
            LSTM, params, xs.swapaxes(0, 1), in_layers(map(LSTMState, h, c)), mask=length_mask(lengths, num_steps)
        )
        states = jax.tree.leaves(carries, is_leaf=lambda leaf: isinstance(leaf, LSTMState))
        return ys.swapaxes(0, 1), *(jnp.stack(leaves) for leaves in zip(*states, strict=True))

    loss = lambda run: lambda *args: sum((jnp.sin(v + 1) ** 2).sum() for v in run(*args))
    args = (weights, biases, xs, h, c)
    with jax.numpy_dtype_promotion("standard"):
        for got, want in zip(ours(*args), reference(*args), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        gradients = [jax.jit(jax.grad(loss(run), argnums=(0, 1, 2, 3, 4)))(*args) for run in (ours, reference)]
    assert worst_error(*gradients) < 1e-5


# Against NumPy loops, with everything at once.


def numpy_stack(params, xs, carries, mask, reset, reset_carries):
    """Run a bidirectional stack as loops: `oracles.loop` in both directions, each a layer's width."""
    back_reset = np.concatenate([reset[1:], np.zeros_like(reset[:1])])
    finals = []
    for layer, carry, reset_carry in zip(params, carries, reset_carries, strict=True):
        halves = [
            oracles.loop(oracles.lstm_step, p, xs, c, mask, flags, r, reverse=reverse)
            for p, c, r, flags, reverse in zip(
                layer, carry, reset_carry, (reset, back_reset), (False, True), strict=True
            )
        ]
        finals.append(Bidirectional(*(LSTMState(*final) for final, _ in halves)))
        xs = np.concatenate([ys for _, ys in halves], axis=-1)
    return finals, xs


def test_masks_resets_and_learned_carries_compose_in_both_directions_and_in_layers():
    params = [
        Bidirectional(*(draw(LSTM, seed)[0] for seed in (20, 30))),
        Bidirectional(
            *(LSTMParams(normal(s, 2 * H, 4 * H), normal(s + 1, H, 4 * H), normal(s + 2, 4 * H)) for s in (40, 50))
        ),
    ]
    xs = normal(60, T, B, I)
    states = lambda seed: [
        Bidirectional(*(LSTMState(normal(seed + n, B, H), normal(seed + n + 1, B, H)) for n in (0, 2)))
        for _ in range(2)
    ]
    tree = jax.tree.map(np.asarray, (params, xs, states(70), states(80)))
    leaves, treedef = jax.tree.flatten(tree)
    weight = normal(90, T, B, 2 * H)

    def loss(run, leaves):
        params, xs, carries, reset_carries = treedef.unflatten(leaves)
        finals, ys = run(params, xs, carries, HOLES, RESET, reset_carries)
        return (weight * ys).sum() + sum((leaf * leaf).sum() for leaf in jax.tree.leaves(finals))

    run = lambda params, xs, carries, mask, reset, r: unroll_stack(
        LSTM, params, xs, carries, mask=mask, reset=reset, reset_carries=r
    )
    finals, ys = run(*treedef.unflatten(leaves)[:3], HOLES, RESET, treedef.unflatten(leaves)[3])
    assert worst_error((finals, ys), numpy_stack(*tree[:3], HOLES, RESET, tree[3])) < 1e-13
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, run)))(list(map(jnp.asarray, leaves)))
    assert abs(value - loss(numpy_stack, leaves)) < 1e-12
    # The derivative along random directions, by complex steps through the loops.
    for seed in range(3):
        direction = [normal(100 + seed * 50 + n, *leaf.shape) for n, leaf in enumerate(leaves)]
        moved = [leaf + 1e-30j * d for leaf, d in zip(leaves, direction, strict=True)]
        want = loss(numpy_stack, moved).imag / 1e-30
        got = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True))
        assert abs(got - want) < 1e-12 * abs(want)


def test_the_backward_half_is_reset_where_segment_resets_says():
    ids = jnp.array([3, 3, 5, 5, 5, 2, 2])
    params = init_bidirectional(jax.random.key(1), LSTM, I, H, dtype=jnp.float64)
    xs = jnp.asarray(normal(0, T, I))
    _, ys = unroll_bidirectional(LSTM, params, xs, reset=segment_resets(ids))
    _, backward = unroll(LSTM, params.backward, xs, reset=segment_resets(ids, reverse=True), reverse=True)
    assert (ys[:, H:] == backward).all()


def test_any_number_of_batch_axes_in_every_layer_form():
    params = init_stack(jax.random.key(0), GRU, I, [4, 3], bidirectional=True, dtype=jnp.float64)
    xs, mask, reset = jnp.asarray(normal(0, T, 2, 3, I)), normal(1, T, 2, 3) > -0.5, normal(2, T, 2, 3) > 0.8
    run = lambda xs, mask, reset: unroll_stack(GRU, params, xs, mask=mask, reset=reset)
    carries, ys = run(xs, mask, reset)
    for a, b in np.ndindex(2, 3):
        alone = run(xs[:, a, b], mask[:, a, b], reset[:, a, b])
        assert worst_error(jax.tree.map(lambda c, a=a, b=b: c[a, b], carries), alone[0]) < 1e-14
        assert worst_error(ys[:, a, b], alone[1]) < 1e-14


@pytest.mark.parametrize("shape", [(0, 3, I), (4, 0, I)], ids=["no steps", "no items"])
def test_nothing_at_all_works_with_gradients(shape):
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], bidirectional=True, dtype=jnp.float64)
    mask = jnp.ones(shape[:2], bool)
    loss = lambda params: unroll_stack(LSTM, params, jnp.ones(shape), mask=mask, reset=mask)[1].sum()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.grad(loss)(params)))


def test_any_merge_and_zeros_where_masked():
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], bidirectional=True, merge=jnp.maximum, dtype=jnp.float64)
    assert params[1].forward.w_ih.shape == (4, 12)
    xs = jnp.asarray(normal(0, T, B, I))
    outputs = [
        unroll(LSTM, half, xs, mask=HOLES, reverse=r)[1] for half, r in zip(params[0], (False, True), strict=True)
    ]
    merge = lambda f, b: jnp.exp(f) * b + 1
    _, ys = unroll_bidirectional(LSTM, params[0], xs, mask=HOLES, merge=merge)
    assert (ys == np.where(HOLES[..., None], merge(*outputs), 0)).all()
    _, ys = unroll_stack(LSTM, params, xs, merge=jnp.maximum)
    assert ys.shape == (T, B, 3)


def test_nan_in_padding_reaches_no_layer():
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], bidirectional=True, dtype=jnp.float64)
    mask = length_mask([T, 0, 3], T)
    xs = jnp.asarray(normal(0, T, B, I))
    loss = lambda params, xs: (unroll_stack(LSTM, params, xs, mask=mask)[1] ** 2).sum()
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    padded = [run(params, jnp.where(mask[..., None], xs, filling)) for filling in (0.0, jnp.nan)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, padded)))


# One step.


@pytest.mark.parametrize("name", some(CELLS, "LSTM", "leaky"))
def test_steps_equal_the_sequence(name):
    cell = CELLS[name][0]
    params = init_stack(jax.random.key(0), cell, I, [H, 3], dtype=jnp.float64)
    xs = jnp.asarray(normal(9, T, B, I))
    draw_like = lambda seed: jax.tree.map(
        lambda v: jnp.asarray(normal(seed, *v.shape)), [cell.initial_carry(layer, (B,)) for layer in params]
    )
    carries, reset_carries = draw_like(10), draw_like(11)
    options = [{}, {"reset_carries": reset_carries}]
    for more in options:
        last, ys = unroll_stack(cell, params, xs, carries, mask=HOLES, reset=RESET, **more)
        now = carries
        step = jax.jit(functools.partial(step_stack, cell))
        for t in range(T):
            now, y = step(params, now, xs[t], mask=HOLES[t], reset=RESET[t], **more)
            np.testing.assert_allclose(y, ys[t], rtol=0, atol=1e-14)
        assert worst_error(now, last) < 1e-14


def test_a_step_in_few_digits_equals_the_sequence_in_few_digits():
    params = init_stack(jax.random.key(0), LSTM, I, [H, 3])
    xs = jnp.asarray(normal(9, T, B, I), "float32")
    now = [LSTM.initial_carry(layer, (B,)) for layer in params]
    _, ys = unroll_stack(low_precision(LSTM, "bfloat16"), params, xs)
    for t in range(T):
        now, y = step_stack(low_precision(LSTM, "bfloat16"), params, now, xs[t])
        np.testing.assert_allclose(y, ys[t], atol=1e-6)
    assert abs(unroll_stack(LSTM, params, xs)[1] - ys).max() > 1e-5


# Generation.


def test_generation_reads_what_it_wrote():
    params = init_stack(jax.random.key(0), LSTM, 1, [4, 3], dtype=jnp.float64)
    carries = [LSTM.initial_carry(layer, (B,)) for layer in params]
    noise = lambda key: jax.random.normal(key, (B, 1), jnp.float64)

    def step_fn(carries, x, key):
        carries, y = step_stack(LSTM, params, carries, x)
        return carries, y[..., :1] + noise(key)

    x0, key = jnp.ones((B, 1)), jax.random.key(5)
    last, xs = generate(step_fn, carries, x0, jax.random.clone(key), 5)
    now, x = carries, x0
    for t in range(5):
        now, x = step_fn(now, x, jax.random.fold_in(jax.random.clone(key), t))
        np.testing.assert_allclose(x, xs[t], rtol=1e-14)
    assert worst_error(last, now) < 1e-14
    _, more = generate(step_fn, carries, x0, jax.random.clone(key), 8)
    np.testing.assert_allclose(more[:5], xs, rtol=1e-14)
    assert generate(step_fn, carries, x0, jax.random.clone(key), 0)[1].shape == (0, B, 1)


def test_generation_is_one_scan_and_traces_its_step_as_often_whatever_its_length():
    traced = []

    def step_fn(carry, x, key):
        traced.append(0)
        return carry, x + 1

    counts = []
    for num_steps in (3, 300):
        jaxpr = jax.make_jaxpr(lambda key, n=num_steps: generate(step_fn, (), jnp.zeros(()), key, n))(jax.random.key(0))
        assert str(jaxpr).count("scan[") == 1
        counts.append(len(traced))
        traced.clear()
    assert max(counts) <= 2


# Dropout between layers.


def dropped(key, rate=0.3, num_steps=50, sizes=(20, 20, 20)):
    """Return which outputs of a layer of constant outputs the next one sees, layer by layer."""
    from jaxlstm import Cell

    # A cell that puts out its input, and a last entry that hands on what it reads.
    through = Cell(
        init=lambda key, input_size, hidden_size, **_: {"w": jnp.ones(hidden_size)},
        initial_carry=lambda params, batch_shape=(): jnp.zeros((*batch_shape, 1)),
        project=lambda params, xs: xs,
        recur=lambda params, carry: None,
        gates=lambda params, carry, z, a: (carry, z),
        name="through",
    )
    params = [{"w": jnp.ones(n)} for n in sizes]
    xs = jnp.ones((num_steps, 8, sizes[0]))
    return [unroll_stack(through, params[:n], xs, dropout=rate, key=jax.random.clone(key))[1] for n in (1, 2, 3)]


def test_dropout_between_layers_keeps_the_mean_and_is_drawn_anew_for_every_step_and_layer():
    one, two, three = dropped(jax.random.key(0))
    assert (one == 1).all(), "neither before the first layer nor after the last"
    first, second = two, np.where(two > 0, three / np.where(two > 0, two, 1), np.nan)
    scale = 1 / 0.7
    assert set(np.unique(first)) == {0, scale}
    n = first.size
    sampling_error = scale * np.sqrt(0.3 * 0.7 / n)
    assert abs(first.mean() - 1) < 4 * sampling_error
    assert abs(np.nanmean(second) - 1) < 4 * scale * np.sqrt(0.3 * 0.7 / np.isfinite(second).sum())
    correlation = lambda a, b: np.corrcoef(a.ravel(), b.ravel())[0, 1]
    both = np.isfinite(second)
    assert abs(correlation(first[1:], first[:-1])) < 4 / np.sqrt(n), "steps are independent"
    assert abs(correlation(first[:, 1:], first[:, :-1])) < 4 / np.sqrt(n), "items are independent"
    kept = (np.asarray(three) > 0) | ~np.asarray(two > 0)  # where the first mask kept, what did the second do?
    again = dropped(jax.random.key(1))[1]
    assert abs(correlation(kept[both], again[both])) < 4 / np.sqrt(both.sum()), "keys are independent"
    masks = [
        np.asarray(dropout_mask(jax.random.fold_in(jax.random.key(0), d), 0.3, first.shape, first.dtype))
        for d in (1, 2)
    ]
    assert (first == masks[0]).all() and np.allclose(three, masks[0] * masks[1]), "as documented: fold_in(key, layer)"
    assert abs(correlation(*masks)) < 4 / np.sqrt(n), "layers are independent"


def test_dropout_is_off_by_default_and_needs_no_key_for_one_layer():
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], dtype=jnp.float64)
    xs = jnp.asarray(normal(0, T, B, I))
    _, plain = unroll_stack(LSTM, params, xs)
    assert (plain == unroll_stack(LSTM, params, xs, dropout=0.0, key=jax.random.key(1))[1]).all()
    assert unroll_stack(LSTM, params[:1], xs, dropout=0.5)[1].shape == (T, B, 4)
    rate = jax.jit(lambda rate: unroll_stack(LSTM, params, xs, dropout=rate, key=jax.random.key(1))[1])
    assert worst_error(rate(0.0), plain) < 1e-14, "a traced rate, to be swept with vmap"


# Structure.


def test_a_stack_compiles_once_and_every_layer_runs_one_scan():
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], bidirectional=True, dtype=jnp.float64)
    count = []

    @jax.jit
    def run(params, xs, key):
        count.append(0)
        return unroll_stack(LSTM, params, xs, mask=HOLES, dropout=0.1, key=key)[1]

    for seed in (0, 1):
        run(params, jnp.asarray(normal(seed, T, B, I)), jax.random.key(seed))
    assert len(count) == 1
    traced = jax.jit(lambda p, x: unroll_stack(LSTM, p, x)).trace(params, jnp.ones((2 * T, B, I)))
    for platform in ("cpu", "cuda"):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while") == 4


def test_a_stack_passes_on_how_to_differentiate():
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], bidirectional=True, dtype=jnp.float64)
    # In a jaxpr, there is a branch for a CPU and one for other platforms.
    jaxpr = lambda **options: str(
        jax.make_jaxpr(lambda p: unroll_stack(LSTM, p, jnp.ones((T, B, I)), **options))(params)
    )
    assert jaxpr().count("custom_jvp") == 4 * 2 and "custom_jvp" not in jaxpr(gradient="scan")
    gradient = lambda **options: jax.make_jaxpr(
        jax.grad(lambda p: unroll_stack(LSTM, p, jnp.ones((T, B, I)), **options)[1].sum())
    )(params)
    assert str(gradient(gradient=Bulk(block_size=3))) != str(gradient())
    low = unroll_stack(low_precision(LSTM, "bfloat16"), params, jnp.asarray(normal(0, T, B, I)))[1]
    assert 1e-4 < worst_error(low, unroll_stack(LSTM, params, jnp.asarray(normal(0, T, B, I)))[1]) < 0.1


@pytest.mark.ci
def test_stacks_and_both_directions_chunk_and_truncate():
    """Chunks change no gradient; truncated ones equal pieces whose carries are stopped between."""
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], dtype=jnp.float64)
    pair = init_bidirectional(jax.random.key(1), LSTM, I, 4, dtype=jnp.float64)
    xs = jnp.asarray(normal(0, T, B, I))

    def of_stack(params, gradient):
        return (unroll_stack(LSTM, params, xs, mask=HOLES, gradient=gradient)[1] ** 2).sum()

    def of_pair(pair, gradient):
        return (unroll_bidirectional(LSTM, pair, xs, mask=HOLES, gradient=gradient)[1] ** 2).sum()

    def in_pieces(params):
        total, carries = 0.0, None
        for cut in (slice(0, 3), slice(3, 6), slice(6, 7)):
            carries, ys = unroll_stack(LSTM, params, xs[cut], carries, mask=HOLES[cut], gradient="scan")
            carries = jax.tree.map(jax.lax.stop_gradient, carries)
            total += (ys**2).sum()
        return total

    gradient = jax.jit(jax.grad(of_stack), static_argnums=1)
    pair_gradient = jax.jit(jax.grad(of_pair), static_argnums=1)
    whole, of_pieces = gradient(params, "scan"), jax.jit(jax.grad(in_pieces))(params)
    assert worst_error(gradient(params, Chunked(3)), whole) < 1e-13
    # Within the first layer of a stack, a chunk also stops what upper layers send back: as pieces of all layers do.
    assert worst_error(gradient(params, Chunked(3, truncate=True)), of_pieces) < 1e-13
    assert worst_error(of_pieces, whole) > 1e-3
    assert worst_error(pair_gradient(pair, Chunked(3)), pair_gradient(pair, "scan")) < 1e-13
    assert worst_error(pair_gradient(pair, Chunked(3, truncate=True)), pair_gradient(pair, "scan")) > 1e-3


def test_init_stack_knows_the_outputs_of_each_cell_and_passes_options_on():
    params = init_stack(jax.random.key(0), LSTM, I, [4, 3], bidirectional=True, forget_bias=2.0)
    assert params[0].forward.w_ih.shape == (I, 16) and params[1].backward.w_ih.shape == (8, 12)
    assert (params[1].forward.b[3:6] == 2).all()
    assert not (params[0].forward.w_ih == params[0].backward.w_ih).any()
    assert init_stack(jax.random.key(0), LSTM, I, []) == []


# Every wrong argument: one error that names function, argument, expected and got.

PARAMS = [draw(LSTM)[0], LSTMParams(*(jnp.asarray(normal(n, *s)) for n, s in enumerate([(H, 12), (3, 12), (12,)])))]
BOTH = [Bidirectional(draw(LSTM)[0], draw(LSTM, 3)[0])]
XS = jnp.asarray(normal(0, T, B, I))
CARRIES = [LSTM.initial_carry(layer, (B,)) for layer in PARAMS]
BAD = {
    "widths of a restored tree": (
        lambda: unroll_stack(LSTM, PARAMS[::-1], XS), ValueError,
        r"unroll_stack, layer 0: xs has 5 features, params.w_ih expects 4"),
    "one layer's width": (
        lambda: unroll_stack(LSTM, [PARAMS[0], PARAMS[0]], XS), ValueError,
        r"unroll_stack, layer 1: xs has 4 features, params.w_ih expects 5"),
    "width of a backward half": (
        lambda: unroll_stack(LSTM, [Bidirectional(PARAMS[0], PARAMS[1])], XS), ValueError,
        r"unroll_stack, layer 0, backward: xs has 5 features, params.w_ih expects 4"),
    "one layer's params": (
        lambda: unroll_stack(LSTM, PARAMS[0], XS), TypeError, r"unroll_stack: params must be a list .* got LSTMParams"),
    "a dict of layers": (
        lambda: unroll_stack(LSTM, dict(enumerate(PARAMS)), XS), TypeError, r"unroll_stack: params must be a list .* got dict"),
    "too few carries": (
        lambda: unroll_stack(LSTM, PARAMS, XS, [None]), ValueError, r"unroll_stack: carries must have one entry per layer, 2 in all, got 1"),
    "one carry": (
        lambda: unroll_stack(LSTM, PARAMS, XS, LSTM.initial_carry(PARAMS[0], (B,))), TypeError,
        r"unroll_stack: carries must be a list with one entry per layer, got LSTMState"),
    "carry of one direction": (
        lambda: unroll_stack(LSTM, BOTH, XS, [LSTM.initial_carry(PARAMS[0], (B,))]), TypeError,
        r"unroll_stack, layer 0: carry must be Bidirectional\(forward, backward\), got LSTMState"),
    "another layer's carry": (
        lambda: unroll_stack(LSTM, PARAMS, XS, [LSTM.initial_carry(PARAMS[0], (B,))] * 2), ValueError,
        r"unroll_stack, layer 1: carry is h float64\[3,4\].* expects h float64\[3,3\]"),
    "params of one direction": (
        lambda: unroll_bidirectional(LSTM, PARAMS[0], XS), TypeError,
        r"unroll_bidirectional: params must be Bidirectional\(forward, backward\), got LSTMParams"),
    "dropout of 1": (lambda: unroll_stack(LSTM, PARAMS, XS, dropout=1.0, key=jax.random.key(0)), ValueError,
        r"unroll_stack: dropout must lie in \[0, 1\), got 1.0"),
    "negative dropout": (lambda: unroll_stack(LSTM, PARAMS, XS, dropout=-0.1), ValueError, r"got -0.1"),
    "dropout that is no number": (lambda: unroll_stack(LSTM, PARAMS, XS, dropout="a"), ValueError, r"got 'a'"),
    "dropout without a key": (lambda: unroll_stack(LSTM, PARAMS, XS, dropout=0.5), ValueError,
        r"unroll_stack: dropout=0.5 needs a key; pass key="),
    "an untyped key": (lambda: unroll_stack(LSTM, PARAMS, XS, dropout=0.5, key=3), TypeError,
        r"unroll_stack: key must be a JAX key, got int"),
    "a float mask": (lambda: unroll_stack(LSTM, PARAMS, XS, mask=jnp.ones((T, B))), TypeError,
        r"unroll_stack, layer 0: mask must be bool, got float64"),
    "a reset [batch, time]": (lambda: unroll_stack(LSTM, BOTH, XS, reset=RESET.T), ValueError,
        r"unroll_stack, layer 0, forward: reset must be \[time, \*batch\] = \[7, 3\], got \[3, 7\]"),
    "a scalar reset": (lambda: unroll_stack(LSTM, BOTH, XS, reset=np.array(True)), ValueError,
        r"unroll_stack, layer 0, forward: reset must be \[time, \*batch\] = \[7, 3\], got \[\]"),
    "a step inside generate": (
        lambda: generate(lambda c, x, key: step_stack(LSTM, PARAMS, c, x), CARRIES, XS[0, :, 1:], jax.random.key(0), 3), ValueError,
        r"^step_stack, layer 0: x has 4 features"),
    "a step of both directions": (lambda: step_stack(LSTM, BOTH, [None], XS[0]), TypeError,
        r"step_stack, layer 0: a bidirectional layer has no step"),
    "a step without carries": (lambda: step_stack(LSTM, PARAMS, None, XS[0]), TypeError,
        r"step_stack: carries is None; pass \[cell.initial_carry"),
    "a step's mask": (lambda: step_stack(LSTM, PARAMS, CARRIES, XS[0], mask=HOLES), ValueError,
        r"^step_stack, layer 0: mask must be \[\*batch\] = \[3\], got \[7, 3\].$"),
    "a step's width": (lambda: step_stack(LSTM, PARAMS, CARRIES, XS[0, :, 1:]), ValueError,
        r"^step_stack, layer 0: x has 4 features, params.w_ih expects 5; x is \[\*batch, input\], got \[3, 4\].$"),
    "a step's carries of None": (lambda: step_stack(LSTM, PARAMS, [None, None], XS[0]), TypeError,
        r"step_stack, layer 0: carry is None; cell.initial_carry"),
    "a step's reset carries without reset": (lambda: step_stack(LSTM, PARAMS, CARRIES, XS[0], reset_carries=CARRIES), ValueError,
        r"step_stack, layer 0: reset_carry is given without reset"),
    "a step's reset carries of another shape": (
        lambda: step_stack(LSTM, PARAMS, CARRIES, XS[0], reset=RESET[0], reset_carries=CARRIES[::-1]), ValueError,
        r"step_stack, layer 0: reset_carry is h float64\[3,3\].* expects h float64\[3,4\]"),
    "noise of the first layer only": (lambda: unroll_stack(LSTM, PARAMS, Noisy(XS, None)), ValueError,
        r"unroll_stack: xs is Noisy, .* pass noise="),
    "a cell that is none": (lambda: init_stack(jax.random.key(0), "LSTM", I, [4]), TypeError, r"init_stack: cell must be a Cell"),
    "sizes that are one number": (lambda: init_stack(jax.random.key(0), LSTM, I, 7), TypeError,
        r"init_stack: hidden_sizes must be a sequence, one size per layer, got 7"),
    "a size of 0": (lambda: init_stack(jax.random.key(0), LSTM, I, [7, 0]), ValueError, r"init_stack: hidden_size must be a positive int, got 0"),
    "lengths beyond T": (lambda: length_mask([3, T + 1], T), ValueError,
        r"length_mask: lengths must lie between 0 and num_steps = 7, got lengths from 3 to 8"),
    "negative lengths": (lambda: length_mask([3, -1], T), ValueError, r"got lengths from -1 to 3"),
    "lengths that are floats": (lambda: length_mask(np.array([3.0]), T), TypeError, r"lengths must be integers, got float"),
    "generation back in time": (lambda: generate(lambda c, x, k: (c, x), (), XS, jax.random.key(0), -1), ValueError,
        r"generate: num_steps must be at least 0, got -1"),
    "generation of half a step": (lambda: generate(lambda c, x, k: (c, x), (), XS, jax.random.key(0), 2.5), ValueError, r"got 2.5"),
    "generation of another carry": (
        lambda: generate(lambda c, x, k: (tuple(c), x), CARRIES[0], XS, jax.random.key(0), 2), TypeError,
        r"generate: step_fn must return a carry like the one it is given, LSTMState\(h, c\): .*; got tuple: "),
    "generation of something else": (lambda: generate(lambda c, x, k: (c, x[0]), (), XS, jax.random.key(0), 2), TypeError,
        r"generate: step_fn must return a x like the one it is given, ArrayImpl: float64\[7,3,5\]; got ShapeDtypeStruct: float64\[3,5\]"),
    "generation with an old key": (lambda: generate(lambda c, x, k: (c, x), (), XS, 0, 2), TypeError, r"generate: key must be a JAX key"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_lengths_that_are_traced_are_clipped():
    mask = jax.jit(lambda lengths: length_mask(lengths, 4))(jnp.array([-2, 9, 3]))
    assert mask.sum(axis=0).tolist() == [0, 4, 3]
    known = jnp.array([1, 4])  # closed over, they are no arguments of jit
    assert jax.jit(lambda: length_mask(known, 4))().sum(axis=0).tolist() == [1, 4]
    for lengths in (known, np.array([1, 4]), [1, 4]):
        with pytest.raises(ValueError, match="got lengths from 1 to 4"):
            jax.jit(lambda lengths=lengths: length_mask(lengths, 3))()
