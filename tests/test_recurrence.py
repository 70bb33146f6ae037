"""unroll against NumPy loops and complex-step derivatives: every cell, masks, resets, directions, shapes, meshes."""

import collections
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Bulk,
    Cell,
    Chunked,
    LSTMState,
    RNNParams,
    Scan,
    init_train_state,
    initializers,
    length_mask,
    low_precision,
    segment_resets,
    split_gates,
    unroll,
)
from jaxlstm.checks import ArgumentValueError
from jaxlstm.masks import Steps
from jaxlstm.tuning import make_plans

import oracles
from cells import CELLS, HOLES, LEAKY, RESET, B, H, I, T, draw, normal, worst_error
from sweeps import some

LENGTHS = np.array([5, 0, 7])
MASK = np.arange(T)[:, None] < LENGTHS
assert not HOLES.all() and (RESET & ~HOLES).any()  # a reset at a masked step is among the cases

# mask, reset, whether the reset carry is given: not, one for all steps, one per step; reverse
WAYS = {
    "plain": (None, None, None, False),
    "reverse": (None, None, None, True),
    "lengths": (MASK, None, None, False),
    "lengths, reverse": (MASK, None, None, True),
    "reset to zero": (None, RESET, None, False),
    "holes and resets, reverse": (HOLES, RESET, "one", True),
    "holes and resets per step": (HOLES, RESET, "per step", False),
    "holes and resets per step, reverse": (HOLES, RESET, "per step", True),
}


def tree_arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def draw_reset_carry(carry, kind):
    if kind is None:
        return None
    lead = (T,) if kind == "per step" else ()
    leaves, treedef = jax.tree.flatten(carry)
    return treedef.unflatten([jnp.asarray(normal(77 + k, *lead, *c.shape)) for k, c in enumerate(leaves)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", [*some(CELLS, "LSTM", "leaky"), pytest.param("LSTM, in blocks", marks=pytest.mark.slow)]
)
def test_values_and_all_gradients_equal_a_numpy_loop(name, way):
    name, in_blocks, _ = name.partition(", in blocks")
    cell, step = CELLS[name]
    mask, reset, kind, reverse = WAYS[way]
    params, xs, carry = draw(cell)
    reset_carry = draw_reset_carry(carry, kind)
    d_ys = normal(50, T, B, H)

    # The oracle's loss, of real or complex arrays: Σ ys d_ys + Σ sin of the final carry.
    split = np.cumsum([len(jax.tree.leaves(tree)) for tree in (params, carry, reset_carry)])

    def oracle_run(arrays):
        p, c, r = arrays[: split[0]], arrays[split[0] : split[1]], arrays[split[1] : split[2]]
        zero = tuple(np.zeros_like(leaf) for leaf in c)
        return oracles.loop(step, p, arrays[-1], c, mask, reset, r or zero, reverse)

    def oracle_loss(*arrays):
        final, ys = oracle_run(arrays)
        return (ys * d_ys).sum() + sum(np.sin(leaf).sum() for leaf in final)

    gradient = Bulk(block_size=3, keep_gates=False) if in_blocks else Bulk()
    run = functools.partial(unroll, mask=mask, reset=reset, reverse=reverse, gradient=gradient)

    def loss(variables):
        params, carry, reset_carry, xs = variables
        final, ys = run(cell, params, xs, carry, reset_carry=reset_carry)
        return (ys * d_ys).sum() + sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(final)), (final, ys)

    variables = (params, carry, reset_carry, xs)
    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(variables)
    arrays = tree_arrays(variables)
    assert worst_error(outputs, oracle_run(arrays)) < 1e-14
    assert worst_error(gradients, oracles.complex_step_gradient(oracle_loss, arrays)) < 1e-12


def test_the_oracle_notices_a_wrong_gate_order():
    params, xs, carry = draw(LSTM)
    _, ys = unroll(LSTM, params, xs, carry)
    swapped = jax.tree.map(lambda v: jnp.concatenate([v[..., H : 2 * H], v[..., :H], v[..., 2 * H :]], -1), params)
    _, wrong = oracles.loop(oracles.lstm_step, tree_arrays(swapped), np.asarray(xs), tree_arrays(carry))
    assert worst_error(ys, wrong) > 0.1


# Masks and resets.


@pytest.mark.parametrize("cell", [LSTM, GRU, RNN])
@pytest.mark.parametrize("reverse", [False, True])
def test_masked_steps_hold_the_carry_and_output_zero(cell, reverse):
    params, xs, carry = draw(cell)
    final, ys = unroll(cell, params, xs, carry, mask=MASK, reverse=reverse)
    assert not np.any(np.asarray(ys)[~MASK])
    for n, length in enumerate(LENGTHS):
        own = jax.tree.map(lambda c, n=n: c[n], carry)
        alone, _ = unroll(cell, params, xs[:length, n], own, reverse=reverse)
        assert worst_error(jax.tree.map(lambda c, n=n: c[n], final), alone) < 1e-15


@pytest.mark.parametrize("reverse", [False, True])
def test_length_0_returns_the_initial_carry_bit_for_bit(reverse):
    params, xs, carry = draw(LSTM)
    carry = carry._replace(h=carry.h.at[1, 0].set(-0.0))
    final, _ = unroll(LSTM, params, xs, carry, mask=MASK, reverse=reverse)
    assert LENGTHS[1] == 0
    for got, want in zip(final, carry, strict=True):
        assert np.asarray(got[1]).tobytes() == np.asarray(want[1]).tobytes()


@pytest.mark.parametrize("cell", [LSTM, GRU, RNN])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e300])
def test_garbage_in_padding_changes_no_bit_of_values_and_gradients(cell, garbage):
    params, xs, carry = draw(cell)

    @jax.jit
    def everything(xs):
        loss = lambda params, xs, carry: sum(
            (leaf**2).sum() for leaf in jax.tree.leaves(unroll(cell, params, xs, carry, mask=HOLES))
        )
        return unroll(cell, params, xs, carry, mask=HOLES), jax.grad(loss, (0, 1, 2))(params, xs, carry)

    clean, dirty = (everything(jnp.where(HOLES[..., None], xs, filler)) for filler in (0.0, garbage))
    for got, want in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        assert np.isfinite(got).all()
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("reverse", [False, True])
def test_resets_are_separate_runs(reverse):
    params, xs, _ = draw(LSTM)
    ids = jnp.array([0, 0, 0, 4, 4, 1, 1])[:, None] * jnp.ones((1, B), int)
    final, ys = unroll(LSTM, params, xs, reset=segment_resets(ids, reverse=reverse), reverse=reverse)
    runs = [unroll(LSTM, params, piece, reverse=reverse) for piece in (xs[:3], xs[3:5], xs[5:])]
    assert worst_error(ys, jnp.concatenate([run[1] for run in runs])) < 1e-15
    assert worst_error(final, runs[0 if reverse else -1][0]) < 1e-15


def test_a_reset_at_the_first_step_hides_the_carry():
    params, xs, carry = draw(LSTM)
    reset = jnp.zeros((T, B), bool).at[0].set(True)
    d_carry = jax.grad(lambda carry: unroll(LSTM, params, xs, carry, reset=reset)[1].sum())(carry)
    assert not any(np.any(leaf) for leaf in d_carry)
    assert worst_error(unroll(LSTM, params, xs, carry, reset=reset), unroll(LSTM, params, xs)) == 0


def test_a_reset_at_a_masked_step_is_held():
    params, xs, carry = draw(LSTM)
    mask, reset = jnp.ones((T, B), bool).at[-2:].set(False), jnp.zeros((T, B), bool).at[-1].set(True)
    final, _ = unroll(LSTM, params, xs, carry, mask=mask, reset=reset)
    assert not any(np.any(leaf) for leaf in final)


def test_length_mask_and_segment_resets_of_any_batch_rank():
    lengths = np.array([[2, 0, 3], [1, 4, 3]])
    want = [[[t < n for n in row] for row in lengths] for t in range(4)]
    np.testing.assert_array_equal(length_mask(lengths, 4), want)
    assert length_mask(3, 5).tolist() == [True, True, True, False, False]
    assert length_mask(jnp.zeros((2, 3), int), 0).shape == (0, 2, 3)
    ids = np.array([[3, 0], [3, 1], [2, 1]])
    assert segment_resets(ids).tolist() == [[False, False], [False, True], [True, False]]
    assert segment_resets(ids, reverse=True).tolist() == [[False, True], [True, False], [False, False]]
    assert segment_resets(ids[:0]).shape == (0, 2)


# Shapes.


@pytest.mark.parametrize("shape", [(T, I), (T, 1, I), (T, 2, B, I), (T, 2, 1, B, I)])
def test_any_batch_rank_is_the_same_as_one_by_one(shape):
    params, _, _ = draw(LSTM)
    xs, mask = jnp.asarray(normal(3, *shape)), jnp.asarray(normal(4, *shape[:-1]) > -0.5)
    carry, ys = unroll(LSTM, params, xs, mask=mask)
    flat_xs, flat_mask = xs.reshape(T, -1, I), mask.reshape(T, -1)
    for n in range(flat_xs.shape[1]):
        own, y = unroll(LSTM, params, flat_xs[:, n], mask=flat_mask[:, n])
        assert worst_error(ys.reshape(T, -1, H)[:, n], y) < 1e-14
        assert worst_error(carry.c.reshape(-1, H)[n], own.c) < 1e-14


@pytest.mark.parametrize("name", some(CELLS, "LSTM", "leaky"))
@pytest.mark.parametrize("num_steps, batch", [(0, B), (T, 0), (0, 0)])
def test_no_steps_and_no_batch_work_with_gradients(name, num_steps, batch):
    cell, _ = CELLS[name]
    params, _, _ = draw(cell)
    xs, flags = jnp.zeros((num_steps, batch, I)), jnp.ones((num_steps, batch), bool)
    carry = jax.tree.map(lambda c: c + 1, cell.initial_carry(params, (batch,)))
    for options in ({}, {"mask": flags, "reset": ~flags}):
        loss = lambda v, options=options: jax.tree.reduce(
            jnp.add, jax.tree.map(jnp.sum, unroll(cell, v[0], v[1], v[2], **options))
        )
        final, ys = unroll(cell, params, xs, carry, **options)
        assert ys.shape == (num_steps, batch, H)
        if num_steps == 0:
            assert worst_error(final, carry) == 0
        d_params, d_xs, d_carry = jax.jit(jax.grad(loss))((params, xs, carry))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves((d_params, d_xs)))
        assert all((leaf == 1).all() for leaf in jax.tree.leaves(d_carry))


def test_vmap_over_batch_and_over_parameters_is_the_loop():
    params, xs, carry = draw(LSTM)
    other, _, _ = draw(LSTM, seed=30)
    batch_major = jax.vmap(functools.partial(unroll, LSTM, params))(xs.swapaxes(0, 1))
    assert worst_error(batch_major[1].swapaxes(0, 1), unroll(LSTM, params, xs)[1]) < 1e-15
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    both = jax.vmap(lambda p: jax.grad(lambda p: unroll(LSTM, p, xs, carry)[1].sum())(p))(stacked)
    for n, one in enumerate((params, other)):
        alone = jax.grad(lambda p: unroll(LSTM, p, xs, carry)[1].sum())(one)
        assert worst_error(jax.tree.map(lambda leaf, n=n: leaf[n], both), alone) < 1e-13


def test_checkpoint_hessian_and_jvp_agree_with_plain_gradients():
    params, xs, carry = draw(LSTM)
    loss = lambda params: (unroll(LSTM, params, xs, carry, mask=HOLES)[1] ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(params)
    assert worst_error(jax.jit(jax.grad(jax.checkpoint(loss)))(params), gradient) < 1e-14
    direction = jax.tree.map(lambda p: jnp.asarray(normal(p.size, *p.shape)), params)
    along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(jax.jvp(loss, (params,), (direction,))[1], along, rtol=1e-13)
    # A column of the Hessian, forward over reverse and reverse over reverse.
    hessian = jax.jit(jax.hessian(lambda b: loss(params._replace(b=b))))(params.b)
    twice = jax.jit(jax.grad(lambda b: jax.grad(lambda b: loss(params._replace(b=b)))(b)[0]))(params.b)
    np.testing.assert_allclose(hessian[0], twice, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-11, atol=1e-13)


@jax.debug_key_reuse(False)  # a key held through a masked step was used for what the mask has thrown away
def test_a_carry_may_hold_keys_counters_and_flags():
    def gates(params, carry, z, a):
        h, keys, count, odd = carry
        keys, now = (jax.vmap(jax.random.fold_in, (0, None))(keys, n) for n in range(2))
        noise = jax.vmap(lambda key: jax.random.normal(key, z.shape[-1:], z.dtype))(now)
        h = jnp.tanh(z + a + noise)
        return (h, keys, count + 1, ~odd), h

    noisy = Cell(
        init=RNN.init,
        initial_carry=lambda params, batch_shape=(): (
            jnp.zeros((*batch_shape, H), params.b.dtype),
            jax.random.split(jax.random.key(0), *batch_shape),
            jnp.zeros(batch_shape, "int32"),
            jnp.zeros(batch_shape, bool),
        ),
        gates=gates,
        recur=lambda params, carry: carry[0] @ params.w_hh,
    )
    params, xs, _ = draw(RNN)
    (_, keys, count, odd), ys = unroll(noisy, params, xs, mask=HOLES)
    np.testing.assert_array_equal(count, HOLES.sum(0))
    np.testing.assert_array_equal(odd, HOLES.sum(0) % 2 == 1)
    assert jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) and np.isfinite(ys).all()


def test_project_may_embed_tokens_and_recur_may_return_none():
    embedding = jnp.asarray(normal(1, 9, H))
    cell = Cell(
        init=lambda key, input_size, hidden_size, *, dtype: embedding,
        initial_carry=lambda params, batch_shape=(): jnp.zeros((*batch_shape, H), params.dtype),
        gates=lambda params, carry, z, a: (carry / 2 + z, carry / 2 + z),
        project=lambda params, tokens: params[tokens],
        recur=lambda params, carry: None,
    )
    tokens = np.random.default_rng(0).integers(0, 9, (T, B))
    _, ys = unroll(cell, embedding, tokens)
    want = np.zeros((B, H))
    for t in range(T):
        want = want / 2 + np.asarray(embedding)[tokens[t]]
        np.testing.assert_allclose(ys[t], want, rtol=1e-14)


def test_h_may_have_another_size_than_c():
    """A projection, h = (o ⊙ tanh c) W_hr (Sak et al. 2014), with the default project and recur."""
    narrow = 3
    Params = collections.namedtuple("Params", "w_ih w_hh b w_hr")

    def gates(params, state, z, a):
        state, h = LSTM.gates(params, state, z, a)
        return LSTMState(h @ params.w_hr, state.c), h @ params.w_hr

    projected = Cell(
        init=LSTM.init,
        initial_carry=lambda params, batch_shape=(): LSTMState(
            jnp.zeros((*batch_shape, narrow)), jnp.zeros((*batch_shape, H))
        ),
        gates=gates,
        name="projected",
    )
    shapes = ((I, 4 * H), (narrow, 4 * H), (4 * H,), (H, narrow))
    params = Params(*(normal(k, *shape) for k, shape in enumerate(shapes)))
    xs = normal(9, T, B, I)
    carry, ys = unroll(projected, params, xs)
    step = lambda p, state, x: (lambda s, h: ((h @ p[3], s[1]), h @ p[3]))(*oracles.lstm_step(p[:3], state, x))
    want = oracles.loop(step, params, xs, (np.zeros((B, narrow)), np.zeros((B, H))))
    assert worst_error((carry, ys), want) < 1e-14


def test_numpy_inputs_are_accepted():
    params, xs, carry = draw(LSTM)
    from_numpy = unroll(LSTM, *jax.tree.map(np.asarray, (params, xs, carry)), mask=MASK)
    assert worst_error(from_numpy, unroll(LSTM, params, xs, carry, mask=MASK)) == 0


def test_a_second_call_compiles_nothing():
    params, xs, carry = draw(LSTM)
    traces = []

    @jax.jit
    def run(cell, params, xs, carry, mask):
        traces.append(1)
        return unroll(cell, params, xs, carry, mask=mask)

    for k in range(3):
        run(LSTM, jax.tree.map(lambda p, k=k: p + k, params), xs, carry, jnp.asarray(MASK))
    assert len(traces) == 1


def test_the_program_does_not_grow_with_the_number_of_steps():
    params, _, _ = draw(LSTM)
    sizes = set()
    for num_steps in (10, 1000):
        loss = lambda p, x: unroll(LSTM, p, x)[1].sum()
        sizes.add(len(jax.jit(jax.grad(loss)).lower(params, jnp.zeros((num_steps, B, I))).as_text().splitlines()))
    assert len(sizes) == 1


@pytest.mark.parametrize("shape, in_loop", [((2000, 16), 2), ((T, B), 1)], ids=["long", "short"])
def test_one_loop_with_the_projection_inside_unless_the_sequence_is_short(shape, in_loop):
    params = jax.eval_shape(lambda: LSTM.init(jax.random.key(0), I, 64))
    xs = jax.ShapeDtypeStruct((*shape, I), "float32")
    (jitted,) = jax.make_jaxpr(lambda p, x: unroll(LSTM, p, x, gradient=Scan()))(params, xs).eqns
    compiled = jax.jit(lambda p, x: unroll(LSTM, p, x)).lower(params, xs).compile().as_text()
    (scan,) = [eqn for eqn in jitted.params["jaxpr"].eqns if eqn.primitive.name == "scan"]
    assert sum(eqn.primitive.name == "dot_general" for eqn in scan.params["jaxpr"].jaxpr.eqns) == in_loop
    entry = compiled[compiled.index("ENTRY") :]  # XLA removes the operations that type the carry
    assert entry.count(" while(") == 1 and (" dot(" in entry or "kind=kCustom" in entry) == (in_loop == 1)


# Meshes: two devices, the batch sharded, with a zero carry that knows nothing of the mesh.

SHARDED_XS = normal(8, T, 4, I)
SHARDED_MASK = np.arange(T)[:, None] < np.array([7, 2, 0, 5])
SHARDED_RESET = np.zeros((T, 4), bool)
SHARDED_RESET[3, 1:] = True


def sharded_loss(params, xs, mask, reset):
    carry, ys = unroll(LSTM, params, xs, mask=mask, reset=reset)
    return (ys**2).sum() + (carry.c**2).sum()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("jitted", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["jit", "eager"])
def test_a_sharded_batch_gives_the_same_and_stays_sharded(axis_type, jitted):
    params, _, _ = draw(LSTM)
    want = jax.value_and_grad(sharded_loss, (0, 1))(params, jnp.asarray(SHARDED_XS), SHARDED_MASK, SHARDED_RESET)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        put = lambda v: jax.device_put(v, NamedSharding(mesh, P(None, "data")))
        xs, mask, reset = put(SHARDED_XS), put(SHARDED_MASK), put(SHARDED_RESET)
        own = jax.device_put(params, NamedSharding(mesh, P()))
        run, gradient = (
            (lambda p, x, m, r: unroll(LSTM, p, x, mask=m, reset=r)),
            jax.value_and_grad(sharded_loss, (0, 1)),
        )
        if jitted:
            run, gradient = jax.jit(run), jax.jit(gradient)
        carry, ys = run(own, xs, mask, reset)
        assert ys.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data", None)), 3)
        assert carry.c.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None)), 2)
        got = gradient(own, xs, mask, reset)
    assert worst_error(got, want) < 1e-13


def test_under_shard_map_the_default_carry_is_typed_as_the_data():
    params, _, _ = draw(LSTM)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    run = lambda p, x, m, r: unroll(LSTM, p, x, mask=m, reset=r)
    specs = (P(), P(None, "data"), P(None, "data"), P(None, "data"))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(LSTMState(P("data"), P("data")), P(None, "data")))
    args = (params, jnp.asarray(SHARDED_XS), SHARDED_MASK, SHARDED_RESET)
    assert worst_error(jax.jit(mapped)(*args), run(*args)) < 1e-15

    def loss(run):
        return lambda p, x: jax.tree.reduce(jnp.add, jax.tree.map(lambda v: (v**2).sum(), run(p, x, *args[2:])))

    got, want = (jax.jit(jax.grad(loss(r), (0, 1)))(*args[:2]) for r in (mapped, run))
    assert worst_error(got, want) < 1e-13


# Wrong input: one clear error each.


class Given(NamedTuple):
    params: Any
    xs: jax.Array
    carry: LSTMState
    gru_params: Any
    gru_carry: Any
    flags: jax.Array
    half: Any


GIVEN = Given(
    *draw(LSTM),
    *draw(GRU)[::2],
    jnp.ones((T, B), bool),
    jax.tree.map(lambda v: v.astype("float32"), draw(LSTM)[0]),
)


def rnn_params(v):
    return RNNParams(v.params.w_ih[:, :H], v.params.w_hh[:, :H], v.params.b[:H])


OTHER_KIND = dataclasses.replace(RNN, initial_carry=LSTM.initial_carry)
COUNTING = Cell(
    init=RNN.init,
    initial_carry=lambda params, batch_shape=(): LSTMState(jnp.zeros((*batch_shape, H)), jnp.zeros(())),
    gates=lambda params, carry, z, a: (LSTMState(jnp.tanh(z + a), carry.c + 1), z),
    name="counting",
)

WRONG = {
    "rank": (lambda v: unroll(LSTM, v.params, v.xs[:, 0, 0]), ValueError, r"unroll: xs must be \[time, \*batch, input\], got \[7\]"),
    "feature count": (
        lambda v: unroll(LSTM, v.params, v.xs[..., :3]),
        ValueError,
        r"unroll: xs has 3 features, params.w_ih expects 5; xs is \[time, \*batch, input\], got \[7, 3, 3\]",
    ),
    "hidden size of the carry": (
        lambda v: unroll(LSTM, v.params, v.xs, LSTMState(v.carry.h[:, :3], v.carry.c[:, :3])),
        ValueError,
        r"unroll: carry is h float64\[3,3\], c float64\[3,3\], LSTM expects h float64\[3,4\], c float64\[3,4\]",
    ),
    "hidden size of the params": (
        lambda v: unroll(LSTM, v.params._replace(w_hh=v.params.w_hh[:, :8]), v.xs),
        ValueError,
        r"unroll: one step of LSTM fails with params .*w_hh float64\[4,8\].*another cell's params\?",
    ),
    "one column for all gates": (
        lambda v: unroll(LSTM, v.params._replace(w_hh=v.params.w_hh[:, :1]), v.xs),
        ValueError,
        r"unroll: params must have w_hh \[hidden, n\] and w_ih .*w_hh float64\[4,1\]",
    ),
    "one input column for all gates": (
        lambda v: unroll(LSTM, v.params._replace(w_ih=v.params.w_ih[:, :1], b=v.params.b[:1]), v.xs),
        ValueError,
        r"w_ih \[input, n\], got w_ih float64\[5,1\]",
    ),
    "a bias per example": (
        lambda v: unroll(LSTM, v.params._replace(b=jnp.stack([v.params.b] * B)), v.xs),
        ValueError,
        r"unroll: params must have w_ih \[input, n\] and b \[n\], got .*b float64\[3,16\]",
    ),
    "a bias for all gates": (lambda v: unroll(LSTM, v.params._replace(b=v.params.b[:1]), v.xs), ValueError, r"and b \[n\], got"),
    "cell by its name": (lambda v: unroll("LSTM", v.params, v.xs), TypeError, r"unroll: cell must be a Cell, such as .*got str"),
    "cell and params swapped": (
        lambda v: unroll(v.params, LSTM, v.xs), TypeError, r"cell must be a Cell, such as jaxlstm.LSTM, got LSTMParams\(w_ih, w_hh, b\)",
    ),
    "params of a user's cell": (
        lambda v: unroll(LEAKY, {"w": v.xs}, v.xs), ValueError, r"one step of leaky fails .*another cell's params\? 'a_into'",
    ),
    "a carry without batch axes": (
        lambda v: unroll(COUNTING, rnn_params(v), v.xs), ValueError, r"initial carry of counting is .*c float64\[\]; every leaf must start with the batch axes \[3\]",
    ),
    "a carry that changes its kind": (
        lambda v: unroll(OTHER_KIND, rnn_params(v), v.xs), ValueError, r"turns carry LSTMState\(h, c\): .* into RNNState\(h\): ",
    ),
    "old-style integer seed for training": (
        lambda v: init_train_state(v.params, optax.sgd(0.1), 0), TypeError, r"init_train_state: key must be a JAX key",
    ),
    "split_gates of another cell": (lambda v: split_gates(v.gru_params), TypeError, r"split_gates: params must be LSTMParams, got GRUParams"),
    "max_lag as text": (lambda v: initializers.chrono(jax.random.key(0), I, H, max_lag="5"), ValueError, r"max_lag must be more than 2 steps, got '5'"),
    "hidden size a bool": (lambda v: LSTM.init(jax.random.key(0), I, True), ValueError, r"must be a positive int, got True"),
    "batch of the carry": (
        lambda v: unroll(LSTM, v.params, v.xs, LSTMState(v.carry.h[:2], v.carry.c[:2])),
        ValueError,
        r"carry is h float64\[2,4\].* LSTM expects h float64\[3,4\].*batch axes of xs",
    ),
    "carry of another cell": (
        lambda v: unroll(LSTM, v.params, v.xs, v.gru_carry),
        TypeError,
        r"unroll: carry of LSTM must be LSTMState\(h, c\), got GRUState\(h\); cell.initial_carry\(params, batch_shape\)",
    ),
    "carry as a plain tuple": (
        lambda v: unroll(LSTM, v.params, v.xs, tuple(v.carry)), TypeError, r"must be LSTMState\(h, c\), got tuple",
    ),
    "params of another cell": (lambda v: unroll(LSTM, v.gru_params, v.xs), ValueError, r"one step of LSTM .*another cell's params"),
    "LSTM params for a GRU": (lambda v: unroll(GRU, v.params, v.xs), ValueError, r"one step of GRU fails .*another cell's params"),
    "GRU params for an RNN": (lambda v: unroll(RNN, v.gru_params, v.xs), ValueError, r"one step of RNN\(tanh\) .*another cell's"),
    "params without names": (
        lambda v: unroll(LSTM, {"w": v.xs}, v.xs), TypeError, r"LSTM expects params with w_ih and b, got dict; cell.init makes them",
    ),
    "features in few digits": (
        lambda v: unroll(low_precision(LSTM, "bfloat16"), v.params, v.xs[..., :3]), ValueError, r"unroll: xs has 3 features, params.w_ih expects 5",
    ),
    "several arrays for xs": (lambda v: unroll(LSTM, v.params, (v.xs, v.xs)), TypeError, r"xs must be one array .*, got tuple"),
    "float lengths": (
        lambda v: length_mask(np.array([2.0, 3.0]), T), TypeError, r"length_mask: lengths must be integers, got float64; cast",
    ),
    "traced float lengths": (
        lambda v: jax.jit(lambda n: length_mask(n, T))(jnp.array([2.0, 3.0])), TypeError, r"length_mask: lengths must be integers, got float64; cast",
    ),
    "Boolean lengths": (lambda v: length_mask([True, False], T), TypeError, r"length_mask: lengths must be integers, got bool; cast"),
    "float segment ids": (lambda v: segment_resets(v.xs[..., 0]), TypeError, r"segment_ids must be integers .*float64\[7, 3\]"),
    "mask of the wrong shape": (
        lambda v: unroll(LSTM, v.params, v.xs, mask=v.flags.T),
        ValueError,
        r"unroll: mask must be \[time, \*batch\] = \[7, 3\], got \[3, 7\]",
    ),
    "reset of the wrong shape": (
        lambda v: unroll(LSTM, v.params, v.xs, reset=v.flags[:, 0]), ValueError, r"reset must be .* = \[7, 3\], got \[7\]",
    ),
    "lengths for a mask": (
        lambda v: unroll(LSTM, v.params, v.xs, mask=jnp.array([7, 4, 5])), TypeError,
        r"unroll: mask must be bool, got int64\[3\]; length_mask\(lengths, num_steps\) makes it from lengths",
    ),
    "mask of floats": (
        lambda v: unroll(LSTM, v.params, v.xs, mask=v.flags.astype(float)), TypeError, r"mask must be bool, got float64\[7, 3\]; write mask != 0",
    ),
    "reset_carry without reset": (
        lambda v: unroll(LSTM, v.params, v.xs, reset_carry=v.carry), ValueError, r"reset_carry is given without reset",
    ),
    "reset_carry of the wrong shape": (
        lambda v: unroll(LSTM, v.params, v.xs, reset=v.flags, reset_carry=LSTMState(v.carry.h[:2], v.carry.c[:2])),
        ValueError,
        r"unroll: reset_carry is h float64\[2,4\].* expects h float64\[3,4\]",
    ),
    "reset_carry of too few steps": (
        lambda v: unroll(LSTM, v.params, v.xs, reset=v.flags, reset_carry=jax.tree.map(lambda c: jnp.stack([c] * 3), v.carry)),
        ValueError,
        r"reset_carry is h float64\[3,3,4\].* expects h float64\[7,3,4\]",
    ),
    "reset_carry of another cell": (
        lambda v: unroll(LSTM, v.params, v.xs, reset=v.flags, reset_carry=v.gru_carry), TypeError, r"reset_carry of LSTM .* got GRUState",
    ),
    "integer inputs": (
        lambda v: unroll(LSTM, v.params, v.xs.astype(int)), TypeError, r"xs must be floating, got int64; embed symbols, or use jax.nn.one",
    ),
    "mixed dtypes of params and xs": (
        lambda v: unroll(LSTM, v.half, v.xs),
        TypeError,
        r"unroll: params .*float32.* and xs .*float64.* must share one dtype; cast with .*astype\('float32'\), xs\)",
    ),
    "mixed dtypes of params and carry": (
        lambda v: unroll(LSTM, v.half, v.xs.astype("float32"), v.carry), TypeError, r"carry is h float64.* expects h float32.*; cast with .*carry",
    ),
    "mixed dtypes of reset_carry": (
        lambda v: unroll(LSTM, v.params, v.xs, reset=v.flags, reset_carry=jax.tree.map(lambda c: c.astype("float32"), v.carry)),
        TypeError,
        r"reset_carry is h float32.* expects h float64.*; cast with .*astype\('float64'\), reset_carry",
    ),
    "mixed dtypes within params": (
        lambda v: unroll(LSTM, v.params._replace(b=v.half.b), v.xs), TypeError, r"params .* must share one dtype; .*params\)",
    ),
    "unknown gradient": (lambda v: unroll(LSTM, v.params, v.xs, gradient="fast"), ValueError, r'unroll: gradient must be Bulk\(\), Scan\(\), Chunked\(\), "bulk" or "scan", got .fast'),
    "chunks of blocks of no steps": (lambda v: unroll(LSTM, v.params, v.xs, gradient=Chunked(within=Bulk(0))), ValueError, "unroll: block_size must be a positive int or None, got 0"),
    "truncate as text": (lambda v: unroll(LSTM, v.params, v.xs, gradient=Chunked(truncate="no")), ValueError, "unroll: truncate must be True or False, got 'no'"),
    "keep_gates as text": (lambda v: unroll(LSTM, v.params, v.xs, gradient=Bulk(keep_gates="x")), ValueError, "unroll: keep_gates must be True or False, got 'x'"),
    "recur of None": (lambda v: dataclasses.replace(LSTM, recur=None), TypeError, "Cell: LSTM has recur=None; pass a function that returns None"),
    "gradient as a class": (lambda v: unroll(LSTM, v.params, v.xs, gradient=Bulk), ValueError, r"gradient must be Bulk\(\), .* got <class"),
    "chunks within chunks": (lambda v: unroll(LSTM, v.params, v.xs, gradient=Chunked(within=Chunked())), ValueError, r"within must be Bulk\(\) or Scan\(\), got Chunked"),
    "block of no steps": (lambda v: unroll(LSTM, v.params, v.xs, gradient=Bulk(0)), ValueError, "unroll: block_size must be a positive int or None, got 0"),
    "half a chunk": (lambda v: unroll(LSTM, v.params, v.xs, gradient=Chunked(2.5)), ValueError, "unroll: chunk_size must be a positive int or None, got 2.5"),
    "chunked rank": (lambda v: unroll(LSTM, v.params, v.xs[:, 0, 0], gradient=Chunked()), ValueError, r"unroll: xs must be"),
    "integers to compute in": (lambda v: low_precision(LSTM, "int8"), TypeError, r'low_precision: dtype must be a floating type such as "bfloat16", got .int8'),
    "no dtype to compute in": (lambda v: low_precision(LSTM, "half16"), TypeError, "low_precision: dtype must be a floating type"),
    "old-style integer seed": (
        lambda v: LSTM.init(0, I, H), TypeError, r"LSTM.init: key must be a JAX key, got int; .*jax.random.key\(seed\)",
    ),
    "old-style raw key": (
        lambda v: GRU.init(jax.random.PRNGKey(0)[:1], I, H), TypeError, r"GRU.init: key must be a JAX key, got uint32\[1\]",
    ),
    "several keys": (lambda v: RNN.init(jax.random.split(jax.random.key(0), 3), I, H), ValueError, r"must be one key, got 3"),
    "hidden size zero": (lambda v: LSTM.init(jax.random.key(0), I, 0), ValueError, r"hidden_size must be a positive int, got 0"),
    "input size a float": (lambda v: LSTM.init(jax.random.key(0), 5.0, H), ValueError, r"input_size must be a positive int, got 5.0"),
    "integer dtype": (
        lambda v: LSTM.init(jax.random.key(0), I, H, dtype="int32"), TypeError, r"dtype must be a floating type, got int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_clear_error(name, jitted):
    call, kind, message = WRONG[name]
    with pytest.raises(kind) as raised:
        jax.jit(call)(GIVEN) if jitted else call(GIVEN)
    assert re.search(message, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)


# Chunks.


@pytest.mark.parametrize("chunk_size", some([None, 1, 3, T, T + 4], None, 3))
@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_change_neither_values_nor_gradients(chunk_size, reverse):
    params, xs, carry = draw(LSTM)
    options = {"mask": HOLES, "reset": RESET, "reset_carry": draw_reset_carry(carry, "per step"), "reverse": reverse}

    def loss(run):
        def of(params, xs, carry):
            last, ys = run(LSTM, params, xs, carry, **options)
            return (ys**2).sum() + jnp.sin(last.c).sum(), (last, ys)

        return jax.jit(jax.grad(of, (0, 1, 2), has_aux=True))(params, xs, carry)

    chunked, whole = loss(functools.partial(unroll, gradient=Chunked(chunk_size))), loss(unroll)
    assert worst_error(chunked, whole) < 1e-14


@pytest.mark.parametrize("reverse", [False, True])
def test_a_truncated_gradient_equals_pieces_with_the_carry_stopped_between(reverse):
    params, xs, carry = draw(LSTM)
    cuts = [slice(4, 7), slice(1, 4), slice(0, 1)] if reverse else [slice(0, 3), slice(3, 6), slice(6, 7)]
    weight = normal(50, T, B, H)

    def by_hand(params, xs, carry):
        total = 0.0
        for n, cut in enumerate(cuts):
            carry = jax.tree.map(jax.lax.stop_gradient, carry) if n else carry
            carry, ys = unroll(LSTM, params, xs[cut], carry, reverse=reverse, gradient="scan")
            total += (ys * weight[cut]).sum()
        return total + jnp.sin(carry.c).sum()

    def chunked(params, xs, carry, truncate=True):
        last, ys = unroll(LSTM, params, xs, carry, gradient=Chunked(3, truncate=truncate), reverse=reverse)
        return (ys * weight).sum() + jnp.sin(last.c).sum()

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(params, xs, carry) for f in (chunked, by_hand))
    assert worst_error(got, want) < 1e-14
    whole = jax.jit(jax.value_and_grad(functools.partial(chunked, truncate=False), (0, 1, 2)))(params, xs, carry)
    assert got[0] == whole[0]  # the values are the same to the last bit
    assert worst_error(got[1], whole[1]) > 1e-3


def test_an_initial_carry_may_be_made_of_numpy_arrays():
    def gates(params, state, z, a):
        state, h = LSTM.gates(params, state, z, a)
        return state._replace(c=state.c.at[..., 0].multiply(0.5)), h

    def initial_carry(params, batch_shape=()):
        return LSTMState(np.zeros((*batch_shape, H)), np.zeros((*batch_shape, H)))

    cell = dataclasses.replace(LSTM, gates=gates, initial_carry=initial_carry, gates_jvp=None)
    params, xs, _ = draw(LSTM)
    assert unroll(cell, params, xs)[1].shape == (T, B, H)


def test_no_steps_in_chunks():
    params, xs, carry = draw(LSTM)
    last, ys = unroll(LSTM, params, xs[:0], carry, gradient=Chunked())
    assert ys.shape == (0, B, H) and worst_error(last, carry) == 0


def test_an_error_outside_of_any_public_function_is_its_message():
    assert str(ArgumentValueError("no")) == "no"


@pytest.mark.parametrize("gradient", [Bulk(), Chunked(chunk_size=3)], ids=["bulk", "chunked"])
def test_a_cell_without_a_carry_has_the_right_gradient(gradient):
    cell = Cell(
        init=RNN.init,
        initial_carry=lambda params, batch_shape=(): (),
        gates=lambda params, carry, z, a: (carry, jnp.tanh(z)),
        recur=lambda params, carry: None,
        name="no carry",
    )
    params, xs, _ = draw(RNN)

    def by_unroll(params, xs):
        carry, ys = unroll(cell, params, xs, reset=RESET, gradient=gradient)
        assert carry == ()
        return (ys**2).sum()

    def by_hand(params, xs):
        return (jnp.tanh(xs @ params.w_ih + params.b[None, None]) ** 2).sum()

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, xs) for f in (by_unroll, by_hand))
    assert worst_error(got, want) < 1e-14


def test_a_cell_that_unrolls_another_one_is_differentiated_by_the_rule():
    """Its loop holds a choice by platform, which is no `cond` of the user's."""
    inner, xs_inner, _ = draw(RNN)

    def gates(params, carry, z, a):
        _, hs = unroll(RNN, params[1], jnp.tanh(z + a)[None, :, : min(I, H)], gradient=Bulk(block_size=1))
        h = jnp.tanh(z + a) * hs[0]
        return h, h

    cell = Cell(
        init=lambda key, input_size, hidden_size, *, dtype="float32": None,
        initial_carry=lambda params, batch_shape=(): jnp.zeros((*batch_shape, H), xs_inner.dtype),
        gates=gates,
        project=lambda params, x: RNN.project(params[0], x),
        recur=lambda params, h: h @ params[0].w_hh,
        name="nested",
    )
    params = (draw(RNN, seed=7)[0], inner._replace(w_ih=inner.w_ih[: min(I, H)]))
    loss = lambda how: lambda p, x: (unroll(cell, p, x, gradient=how)[1] ** 2).sum()
    got, want = (jax.jit(jax.grad(loss(how), (0, 1)))(params, xs_inner) for how in (Bulk(), Scan()))
    assert worst_error(got, want) < 1e-14
    assert make_plans(cell, params, Steps(xs_inner), jnp.zeros((B, H)), Bulk()).by_rule
