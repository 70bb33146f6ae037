"""Dependence found by tracing, against Jacobians at many points: no entry of a Jacobian is missing, none too many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlstm import GRU, LSTM, low_precision, make_rnn
from jaxlstm.rtrl import cut_recurrence, rtrl_gradient, snap1_pattern
from jaxlstm.structure import dependence

from cells import H, I, draw, normal, worst_error
from sweeps import some

N = 6
W = jnp.asarray(normal(0, N, 4))
FEW = jnp.asarray(np.eye(N, 4, k=1))  # the structure of a matmul ignores which weights are 0

# Functions whose structure is found exactly.
EXACT = {
    "relu": jax.nn.relu,
    "dead units": lambda x: jax.nn.relu(x - 100) + jnp.where(x > 5, x**3, 0.0),
    "softplus and powers": lambda x: jax.nn.softplus(x) * jnp.abs(x) ** 1.5 / (1 + x**2),
    "halves": lambda x: jnp.split(x, 2)[1] * jnp.tanh(x[:3]),
    "a matmul": lambda x: jnp.tanh(x @ W),
    "a product of matmuls": lambda x: (x[:3].reshape(3, 1) @ x[3:5].reshape(1, 2)).ravel(),
    "reversed and padded": lambda x: jnp.pad(x[::-1], (2, 1))[:-3],
    "a sum": lambda x: x.reshape(2, 3).sum(0),
    "a maximum": lambda x: x.reshape(2, 3).max(1),
    "a cumulative sum": jnp.cumsum,
    "a cumulative maximum": lambda x: lax.cummax(x, reverse=True),
    "stopped": lambda x: x[:2] * lax.stop_gradient(x[2:4]),
    "a branch": lambda x: lax.cond(x.sum() > 0, lambda v: v[:3], lambda v: v[2:5], x),
    "a checkpoint in jit": jax.jit(jax.checkpoint(lambda x: jnp.sin(x[1:]) * 2.0)),
    "a constant": lambda x: jnp.ones(2),
    "moved axes": lambda x: jnp.concatenate([x.reshape(2, 3).T.ravel(), jnp.zeros(1)]),
}
# Operations it does not know: every result depends on every input.
UNKNOWN = {
    "a scan": lambda x: lax.scan(lambda c, v: (c + v, c), jnp.zeros(()), x)[1],
    "sorted": jnp.sort,
    "an index that is traced": lambda x: lax.dynamic_slice(x, ((x[0] > 0).astype(int),), (2,)),
}


def structure(function):
    return np.asarray(jax.jacobian(dependence(function, jnp.ones(N)))(jnp.ones(N)))


def seen(function):
    """Return where the Jacobian is not 0 at one of many points, some of them far from 0."""
    points = jnp.asarray(normal(1, 400, N) * 10.0 ** np.random.default_rng(2).integers(-1, 3, size=(400, 1)))
    return (np.asarray(jax.vmap(jax.jacobian(function))(points)) != 0).any(axis=0)


@pytest.mark.parametrize("name", some(EXACT, *list(EXACT)[::6]))
def test_the_structure_is_where_a_jacobian_is_not_0(name):
    found = structure(EXACT[name])
    assert (found >= 0).all() and ((found > 0) == seen(EXACT[name])).all()


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_depends_on_everything(name):
    assert (structure(UNKNOWN[name]) > 0).all() and seen(UNKNOWN[name]).any()


def test_weights_that_are_0_do_not_hide_a_dependence():
    assert (structure(lambda x: x @ FEW) > 0).all()


@pytest.mark.parametrize("cell", some([make_rnn("relu"), LSTM, GRU, low_precision(LSTM, "bfloat16")], LSTM), ids=str)
def test_snap1_is_exact_for_one_step_wherever_the_parameters_are(cell):
    params, xs, carry = draw(cell)
    dead = jax.tree.map(lambda w: w.at[..., 1::H].add(-100.0), params)  # unit 1 outputs 0
    step_loss = lambda y, t: jnp.sin(y).sum()
    for own in (params, dead, jax.tree.map(jnp.zeros_like, params)):
        own_cell = cell if cell is not GRU else cut_recurrence(GRU)
        pattern = snap1_pattern(own_cell, own, xs[0, 0])
        assert worst_error(pattern, snap1_pattern(own_cell, params, jnp.zeros(I))) == 0
        exact, snap1 = (rtrl_gradient(own_cell, own, xs[:1], step_loss, carry, pattern=p) for p in (None, pattern))
        assert worst_error(snap1, exact) < 1e-13
