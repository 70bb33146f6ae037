"""What every cell must keep: one contract over the table of all cells."""

import dataclasses
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlstm import GRU, LSTM, RNN, Cell, initializers, make_rnn, num_params, summary, unroll

from cells import CELLS, FAMILY, LEAKY, B, H, I, T, draw, worst_error
from sweeps import some

every_cell = pytest.mark.parametrize("cell", [cell for cell, _ in CELLS.values()], ids=CELLS)


@every_cell
def test_a_cell_is_static_hashable_and_has_no_leaves(cell):
    assert jax.tree.leaves(cell) == []
    assert hash(cell) == hash(dataclasses.replace(cell)) and cell == dataclasses.replace(cell)
    assert jax.tree.map(lambda leaf: leaf + 1, {"cell": cell, "w": 1}) == {"cell": cell, "w": 2}


def test_the_name_of_a_cell_is_given_by_keyword():
    with pytest.raises(TypeError, match="positional arguments"):
        Cell(None, None, None, LSTM.project, LSTM.recur, None, None, "lstm")


@every_cell
def test_a_cell_crosses_jit_as_an_argument_and_compiles_once(cell):
    params, xs, carry = draw(cell)
    traces = []

    @jax.jit
    def step(cell, params, carry, x):
        traces.append(1)
        return cell.step(params, carry, x)

    for n in range(3):
        jitted = step(cell, params, carry, xs[n])
    assert len(traces) == 1
    assert worst_error(jitted, cell.step(params, carry, xs[2])) < 1e-15


@every_cell
def test_step_after_step_is_the_sequence(cell):
    params, xs, carry = draw(cell)
    final, ys = unroll(cell, params, xs, carry)
    for x, y in zip(xs, ys, strict=True):
        carry, stepped = cell.step(params, carry, x)
        np.testing.assert_allclose(stepped, y, rtol=0, atol=1e-14)
    assert worst_error(carry, final) < 1e-14


@every_cell
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_the_dtype_of_the_parameters_is_kept_everywhere(cell, dtype):
    params = cell.init(jax.random.key(0), I, H, dtype=dtype)
    carry, ys = unroll(cell, params, jnp.ones((T, B, I), dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, carry, ys))} == {jnp.dtype(dtype)}
    assert ys.shape == (T, B, H)
    np.testing.assert_array_less(0.0, np.abs(ys).sum().astype(float))


@every_cell
def test_init_differs_by_key_and_only_by_key(cell):
    one, same, other = (cell.init(jax.random.key(seed), I, H) for seed in (0, 0, 1))
    assert worst_error(one, same) == 0
    assert worst_error(one, other) > 0.1


@every_cell
def test_init_draws_in_float32_and_casts(cell):
    single, double, half = (cell.init(jax.random.key(0), I, H, dtype=d) for d in ("float32", "float64", "bfloat16"))
    assert worst_error(jax.tree.map(lambda v: v.astype("float64"), single), double) == 0
    assert worst_error(jax.tree.map(lambda v: v.astype("bfloat16"), single), half) == 0


@every_cell
def test_a_carry_may_be_donated(cell):
    params, xs, _ = draw(cell)
    step = jax.jit(cell.step, donate_argnums=1)
    carry, _ = step(params, cell.initial_carry(params, (B,)), xs[0])
    assert worst_error(carry, cell.step(params, cell.initial_carry(params, (B,)), xs[0])[0]) < 1e-15


@every_cell
def test_a_cell_sits_in_linen_nnx_and_equinox_modules(cell):
    params, xs, _ = draw(cell)
    want = unroll(cell, params, xs)[1]

    class Linen(nn.Module):
        cell: Cell

        @nn.compact
        def __call__(self, xs):
            params = self.param("layer", lambda key: self.cell.init(key, I, H, dtype=jnp.float64))
            return unroll(self.cell, params, xs)[1]

    module = Linen(cell)
    variables = module.init(jax.random.key(0), xs)
    assert module.apply(variables, xs).shape == want.shape
    assert worst_error(module.apply({"params": {"layer": params}}, xs), want) < 1e-15

    class Nnx(nnx.Module):
        def __init__(self):
            self.cell = cell
            self.params = nnx.data(jax.tree.map(nnx.Param, params))

        def __call__(self, xs):
            return unroll(self.cell, jax.tree.map(lambda p: p[...], self.params, is_leaf=_is_param), xs)[1]

    assert worst_error(nnx.jit(lambda module, xs: module(xs))(Nnx(), xs), want) < 1e-15

    class Equinox(eqx.Module):
        cell: Cell
        params: object

        def __call__(self, xs):
            return unroll(self.cell, self.params, xs)[1]

    assert worst_error(eqx.filter_jit(Equinox(cell, params))(xs), want) < 1e-15
    assert jax.tree.leaves(eqx.filter_grad(lambda module: module(xs).sum())(Equinox(cell, params)))


def _is_param(leaf):
    return isinstance(leaf, nnx.Param)


def test_the_same_nonlinearity_is_the_same_cell():
    assert make_rnn("relu") is make_rnn("relu")
    assert make_rnn("tanh") is RNN
    assert len({make_rnn("tanh"), make_rnn("relu"), make_rnn("sigmoid"), LSTM, GRU, LEAKY}) == 6
    with pytest.raises(ValueError, match="nonlinearity must be one of tanh, relu, sigmoid, got 'gelu'"):
        make_rnn("gelu")


def test_worked_dimensions_of_80_features_and_12_units():
    counts = {cell.name: num_params(cell.init(jax.random.key(0), 80, 12)) for cell in (RNN, GRU, LSTM)}
    assert counts == {"RNN(tanh)": 1116, "GRU": 3360, "LSTM": 4464}
    params = LSTM.init(jax.random.key(0), 80, 12)
    assert (params.w_ih.shape, params.w_hh.shape, params.b.shape) == ((80, 48), (12, 48), (48,))
    assert num_params({"layer": params, "torch's second bias": jnp.zeros(48)}) == 4512


def test_summary_names_every_leaf_of_any_tree():
    text = summary({"embedding": jnp.zeros((3, 2), "float32"), "layers": [LSTM.init(jax.random.key(0), 2, 5)]})
    assert re.search(r"embedding +\[3, 2\] +float32 +6\n", text)
    assert re.search(r"layers\.0\.w_hh +\[5, 20\] +float32 +100\n", text)
    assert re.search(r"total +166$", text)


EVERY_INIT = {name: cell.init for name, (cell, _) in (CELLS | FAMILY).items() if name != "leaky"} | {
    name: getattr(initializers, name) for name in initializers.__all__ if name != "chrono"
}


@pytest.mark.parametrize("name", some(EVERY_INIT, "LSTM", "GRU", "projected", "sLSTM", "torch"))
def test_seeds_under_vmap_draw_what_they_draw_alone_and_no_factorization_is_batched(name):
    """Two batched QR factorizations in one program can wait for each other forever (jaxlib 0.10.2, two cores)."""
    keys = jax.random.split(jax.random.key(3), 2)
    draw_all = jax.jit(jax.vmap(lambda key: EVERY_INIT[name](key, I, H)))
    want = jax.tree.map(lambda *drawn: jnp.stack(drawn), *(EVERY_INIT[name](key, I, H) for key in keys))
    assert all(map(jnp.array_equal, jax.tree.leaves(draw_all(keys)), jax.tree.leaves(want)))
    assert not batched_factorizations(draw_all, keys)


def test_a_batched_factorization_is_found():
    keys = jax.random.split(jax.random.key(3), 2)
    draw_all = jax.jit(jax.vmap(lambda key: jax.nn.initializers.orthogonal()(key, (H, H))))
    assert batched_factorizations(draw_all, keys)


def batched_factorizations(function, *arguments):
    return re.findall(r'geqrf.*num_batch_dims = "[1-9]', function.lower(*arguments).as_text())
