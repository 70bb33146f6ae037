"""The experiment on the Lorenz system: the true map, its exponents, and the measurements on a net that knows it."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lorenz
from jaxlstm import Cell, unroll
from jaxlstm.diagnostics import ClosedLoopParams


@pytest.fixture(autouse=True)
def promotion_is_allowed():
    """For an experiment, which promotes dtypes and ranks as users do."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


STARTS = np.array([[1.0, 2.0, 20.0], [-3.0, 1.0, 15.0]])


def velocity(s):
    x, y, z = s
    return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def test_the_map_is_one_runge_kutta_step_and_close_to_the_flow():
    _, got = unroll(lorenz.LORENZ, jnp.array(lorenz.COEFFICIENTS), jnp.zeros((50, 2, 0)), lorenz.State(STARTS))

    def run(s, dt, num_steps):
        positions = []
        for _ in range(num_steps):
            k1 = velocity(s)
            k2 = velocity(s + dt / 2 * k1)
            k3 = velocity(s + dt / 2 * k2)
            k4 = velocity(s + dt * k3)
            positions.append(s := s + dt * (k1 + 2 * k2 + 2 * k3 + k4) / 6)
        return np.array(positions)

    for n, start in enumerate(STARTS):
        np.testing.assert_allclose(got[:, n], run(start, lorenz.DT, 50), rtol=1e-11)
        fine = run(start, lorenz.DT / 20, 1000)[19::20]
        assert np.abs(got[:, n] - fine).max() < 0.02  # of coordinates around 20, after one unit of time


def test_the_trajectory_is_centered_and_scaled_on_the_attractor():
    truth = np.asarray(lorenz.trajectory(jnp.asarray(STARTS), 20_000))
    assert truth.shape == (20_000, 2, 3)
    assert np.abs(truth.mean((0, 1))).max() < 0.2 and np.abs(truth.std((0, 1)) - 1).max() < 0.1
    back = truth * lorenz.SCALE + lorenz.CENTER
    _, after = unroll(lorenz.LORENZ, jnp.array(lorenz.COEFFICIENTS), jnp.zeros((1, 2, 0)), lorenz.State(back[7]))
    np.testing.assert_allclose(after[0], back[8], rtol=1e-9)
    pieces = np.asarray(lorenz.in_pieces(jnp.asarray(truth)))
    np.testing.assert_array_equal(pieces[:, 5], truth[2000:3000, 1])
    assert pieces.shape == (1000, 20, 3)


def test_the_true_map_has_the_published_exponents():
    """Their sum is the divergence of the flow, −σ − 1 − β everywhere, up to the error of one step of the map."""
    run = jax.jit(lorenz.true_exponents, static_argnums=1)
    found = np.asarray(run(jnp.asarray(STARTS), 20_000))
    np.testing.assert_allclose(found.sum(axis=1), -10 - 1 - 8 / 3, atol=3e-3)
    assert np.abs(found - lorenz.PUBLISHED).max() < 0.05


def one_true_step(params, carry, z, a):
    """Read a scaled position and return the next one."""
    state = lorenz.State(z * lorenz.SCALE + lorenz.CENTER)
    _, after = lorenz.runge_kutta(params, state, z, a)
    h = (after - lorenz.CENTER) / lorenz.SCALE
    return Hidden(h), h


class Hidden(NamedTuple):
    h: jax.Array


PERFECT = Cell(
    init=lorenz.no_init,
    initial_carry=lambda params, batch_shape=(): Hidden(jnp.zeros((*batch_shape, 3))),
    gates=one_true_step,
    project=lorenz.unchanged,
    recur=lorenz.no_recurrence,
    name="perfect",
)


def test_a_net_that_knows_the_map_has_its_exponents_and_follows_it(monkeypatch):
    monkeypatch.setattr(lorenz, "NUM_EXPONENTS", 3)
    truth = lorenz.trajectory(jnp.asarray(STARTS), 900)
    params = ClosedLoopParams(jnp.array(lorenz.COEFFICIENTS), lorenz.Readout(jnp.eye(3), jnp.zeros(3)))
    measure = jax.jit(functools.partial(lorenz.measure, PERFECT, num_steps=20_000))
    found = measure(truth=truth, params=params)
    assert np.abs(found["exponents"] - np.array(lorenz.PUBLISHED)).max() < 0.05
    np.testing.assert_allclose(found["follows"], 799 * lorenz.DT)
    np.testing.assert_allclose(found["run"][:200], truth[lorenz.READ + 1 :][:200, 0], atol=1e-8)
    # A readout that is off by half a deviation is wrong at once.
    off = params._replace(readout=params.readout._replace(b=jnp.full(3, 0.5)))
    np.testing.assert_allclose(measure(truth=truth, params=off)["follows"], 0)


@pytest.mark.slow
@jax.debug_key_reuse(False)  # the check takes a key that a vmapped scan reads for one read twice
def test_lorenz_runs_and_resumes(tmp_path):
    path = tmp_path / "result.json"
    with jax.enable_x64(False), jax.debug_nans(False):
        run = functools.partial(
            lorenz.main, hidden_size=6, steps=300, seeds=2, exponent_steps=200, workdir=str(tmp_path)
        )
        result = run()
        assert [(row["net"], row["seed"]) for row in result["rows"]] == [(n, s) for n in lorenz.NETS for s in range(2)]
        assert max(row["loss"] for row in result["rows"]) < 0.8  # predicting the mean costs 1
        assert lorenz.table(result).count("\n") == 6 and (tmp_path / "lorenz.png").stat().st_size > 10_000
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept["rows"] = kept["rows"][:2]
        kept["rows"][0]["loss"] = -1.0  # a cell that is there is not trained again
        path.write_text(json.dumps(kept), encoding="utf-8")
        again = run(resume=True)
    assert again["rows"][0]["loss"] == -1 and again["rows"][1:] == result["rows"][1:]
