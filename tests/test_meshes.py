"""Arrays on a mesh of two devices: sharded by their types alone, or different on each device under `shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlstm import GRU, LSTM, Bulk, Chunked, LSTMState, Scan, init_stack, unroll, unroll_stack
from jaxlstm.regularize import (
    Locked,
    Noisy,
    dropout_mask,
    variational_dropout,
    zoneout,
    zoneout_noise,
)

from cells import B, H, I, T, draw, normal, worst_error
from sweeps import some

EXPLICIT = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
XS = normal(8, T, 4, I)
STACK = init_stack(jax.random.key(0), LSTM, I, [H, H], bidirectional=True, dtype="float64")


def on_mesh(tree, *spec):
    return jax.device_put(tree, NamedSharding(EXPLICIT, P(*spec)))


@pytest.mark.parametrize(
    "params, run",
    [
        (draw(LSTM)[0], lambda p, x: unroll(LSTM, p, x)),
        pytest.param(draw(GRU)[0], lambda p, x: unroll(GRU, p, x, gradient=Chunked(3)), marks=pytest.mark.ci),
        (STACK, lambda p, x: unroll_stack(LSTM, p, x)),
    ],
    ids=["LSTM", "GRU in chunks", "stack"],
)
def test_arrays_on_an_explicit_mesh_need_no_mesh_in_use(params, run):
    loss = lambda p, x: (run(p, x)[1] ** 2).sum()
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    got = jax.device_get(gradient(on_mesh(params), on_mesh(XS, None, "data")))
    assert worst_error(got, gradient(params, jnp.asarray(XS))) < 1e-13


def test_errors_say_how_to_shard():
    params, time_sharded = draw(LSTM)[0], on_mesh(normal(9, 4, B, I), "data")
    with pytest.raises(ValueError, match=r"unroll: xs, mask or reset is sharded along its time axis"):
        unroll(LSTM, params, time_sharded)
    xs = on_mesh(XS, None, "data")
    for own, gradient in ((params, "bulk"), (on_mesh(params), "scan"), (on_mesh(params), Chunked(within=Scan()))):
        with pytest.raises(ValueError, match=r"unroll: params and xs are sharded over a mesh .*jax.set_mesh\(mesh\)"):
            unroll(LSTM, own, xs, gradient=gradient)
        with jax.set_mesh(EXPLICIT):
            unroll(LSTM, on_mesh(params), xs, gradient=gradient)


# Under shard_map: the input is the same everywhere, something else differs. As `vmap` over what differs.

KEYS = jax.random.split(jax.random.key(3), (3, 2))
FLAGS = np.random.default_rng(4).random((2, T, 4)) < 0.5
CARRIES = LSTMState(normal(5, 2, 4, H), normal(6, 2, 4, H))
RATES = LSTMState(h=0.3, c=0.4)


def noise(key):
    return zoneout_noise(key, RATES, LSTMState(*[jnp.zeros((4, H))] * 2), T)


DIFFERS = {
    "zoneout": (jax.vmap(noise)(KEYS[0]), lambda p, n: (zoneout(LSTM, RATES), p, Noisy(XS, n), {})),
    "mask of h": (
        jax.vmap(lambda key: dropout_mask(key, 0.3, (4, H), "float64"))(KEYS[1]),
        lambda p, m: (variational_dropout(LSTM), Locked(p, h=m), XS, {}),
    ),
    "dropped weights": (
        jax.vmap(lambda key: dropout_mask(key, 0.4, (H, 4 * H), "float64"))(KEYS[2]),
        lambda p, m: (LSTM, p._replace(w_hh=p.w_hh * m), XS, {}),
    ),
    "resets": (FLAGS, lambda p, flags: (LSTM, p, XS, {"reset": flags})),
    "mask": (FLAGS, lambda p, flags: (LSTM, p, XS, {"mask": flags})),
    "reset carry": (CARRIES, lambda p, carry: (LSTM, p, XS, {"reset": FLAGS[0], "reset_carry": carry})),
    "carry": (CARRIES, lambda p, carry: (LSTM, p, XS, {"carry": carry})),
}


WAYS = ["bulk", *(pytest.param(way, marks=pytest.mark.ci) for way in ("scan", Chunked(2), Bulk(block_size=2)))]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", some(DIFFERS, *list(DIFFERS)[::2]))
def test_what_differs_by_device_gives_what_vmap_gives(name, way):
    differs, arguments = DIFFERS[name]
    params = draw(LSTM)[0]

    def of_one(params, differs):
        def loss(params):
            cell, own, xs, options = arguments(params, differs)
            return (unroll(cell, own, xs, gradient=way, **options)[1] ** 2).sum()

        return jax.value_and_grad(loss)(params)

    def of_device(params, differs):
        params = jax.lax.pcast(params, ("data",), to="varying")
        found = of_one(params, jax.tree.map(lambda v: v[0], differs))
        return jax.tree.map(lambda v: v[None], found)

    want = jax.vmap(of_one, (None, 0))(params, differs)
    mapped = jax.shard_map(of_device, mesh=EXPLICIT, in_specs=(P(), P("data")), out_specs=P("data"))
    got = jax.jit(mapped)(params, on_mesh(differs, "data"))
    assert worst_error(jax.device_get(got), want) < 1e-13
