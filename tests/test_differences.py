"""`check_gradients`: right gradients of any model pass, and of a wrong one it names the leaf and the entry."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import LSTM, unroll
from jaxlstm.diagnostics import central_differences, check_gradients
from jaxlstm.diagnostics.differences import adaptive_differences

from cells import normal


class Model(nn.Module):
    """An embedding, attention, our LSTM and a readout."""

    @nn.compact
    def __call__(self, symbols):
        x = nn.Embed(11, 6)(symbols)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)(x)
        lstm = self.param("lstm", lambda key: LSTM.init(key, 6, 5))
        return nn.Dense(3)(unroll(LSTM, lstm, x.astype(lstm.b.dtype))[1])


SYMBOLS = jnp.asarray(np.random.default_rng(0).integers(0, 11, 9))


def loss_of_model(params, symbols):
    logits = Model().apply(params, symbols)
    return -jax.nn.log_softmax(logits)[:, 1].mean()


@pytest.fixture(scope="module")
def params():
    return Model().init(jax.random.key(0), SYMBOLS)


@pytest.mark.slow
def test_a_flax_model_with_embedding_attention_and_lstm_passes(params):
    found = check_gradients(loss_of_model, params, SYMBOLS, key=jax.random.key(3))
    assert found.agree and found.wrong == ()
    assert {"params.lstm.w_hh", "params.Embed_0.embedding"} < found.leaves.keys()
    assert max(leaf.error for name, leaf in found.leaves.items() if "key.bias" not in name) < 1e-8
    assert all(leaf.given is None for leaf in found.leaves.values())
    assert str(found).endswith("AGREE")


@pytest.mark.slow
def test_a_given_gradient_is_judged_by_its_own_dtype(params):
    gradients = jax.grad(loss_of_model)(jax.tree.map(lambda v: v.astype("float32"), params), SYMBOLS)
    found = check_gradients(loss_of_model, params, SYMBOLS, gradients=gradients, key=jax.random.key(3))
    lstm = found.leaves["params.lstm.w_ih"]
    assert found.leaves["params.Dense_0.kernel"].given < 1e-6
    assert 1e-9 < lstm.given < 1e-5


@pytest.mark.ci
def test_one_wrong_entry_is_named(params):
    gradients = jax.grad(loss_of_model)(params, SYMBOLS)
    lstm = gradients["params"]["lstm"]
    right = float(lstm.w_hh[2, 7])
    gradients["params"]["lstm"] = lstm._replace(w_hh=lstm.w_hh.at[2, 7].multiply(-1))
    found = check_gradients(loss_of_model, params, SYMBOLS, gradients=gradients, key=jax.random.key(3))
    assert found.wrong == ("params.lstm.w_hh",) and not found.agree
    assert (found.worst.leaf, found.worst.at) == ("params.lstm.w_hh", (2, 7))
    assert found.worst.autodiff == pytest.approx(right, rel=1e-5)
    assert found.worst.differences == pytest.approx(right, rel=1e-5)
    assert found.worst.given == pytest.approx(-right)
    assert "worst entry: params.lstm.w_hh[2, 7]: autodiff " in str(found)
    assert str(found).endswith("DISAGREE on params.lstm.w_hh")


@jax.custom_jvp
def cube(x):
    return x**3


@cube.defjvp
def _(primals, tangents):
    (x,), (d,) = primals, tangents
    return x**3, jnp.where(x == x.max(), 2, 3) * x**2 * d  # wrong at the largest entry


def test_differences_alone_find_a_wrong_custom_rule():
    w = {"right": jnp.asarray(normal(1, 4)), "wrong": jnp.asarray(normal(2, 3, 5))}
    found = check_gradients(lambda w: (w["right"] ** 3).sum() + cube(w["wrong"]).sum(), w, key=jax.random.key(3))
    assert found.wrong == ("wrong",)
    largest = np.unravel_index(np.argmax(w["wrong"]), (3, 5))
    assert (found.worst.leaf, found.worst.at) == ("wrong", largest)
    assert found.worst.autodiff == pytest.approx(2 / 3 * found.worst.differences)
    assert found.leaves["right"].error < 1e-10


def test_a_model_that_rounds_is_checked_up_to_the_resolution_of_differences():
    w = jnp.asarray(normal(1, 20))
    in_float32 = lambda w: jnp.tanh(w.astype("float32")).sum()
    found = check_gradients(in_float32, w, key=jax.random.key(3))
    assert found.agree and 1e-7 < found.leaves["params"].floor < 1e-2
    wrong = check_gradients(in_float32, w, gradients=1.5 * jax.grad(in_float32)(w), key=jax.random.key(3))
    assert wrong.wrong == ("params",)


def test_integer_leaves_are_skipped_and_settings_restored():
    with jax.enable_x64(False):
        params = {"n": jnp.arange(3), "w": jnp.ones(3, "float32")}
        found = check_gradients(
            lambda p, s: (p["n"].astype(p["w"].dtype) * jnp.exp(s * p["w"])).sum(), params, 0.5, key=jax.random.key(3)
        )
        assert found.agree and list(found.leaves) == ["w"]
        assert jnp.ones(()).dtype == np.float32


def test_an_error_where_the_differences_are_0_is_absolute():
    @jax.custom_jvp
    def constant(w):
        return jnp.zeros_like(w)

    constant.defjvp(lambda primals, tangents: (constant(*primals), 3 * tangents[0]))
    found = check_gradients(lambda w: constant(w).sum(), jnp.ones(1), num_directions=4000, key=jax.random.key(3))
    # Over many normal directions d, the norm of 3 d.
    assert found.leaves["params"].error == pytest.approx(3 * np.sqrt(4000), rel=0.05)
    assert found.wrong == ("params",)


def test_a_given_gradient_near_0_is_judged_by_the_rounding_of_all_leaves():
    params = {"large": jnp.ones(4), "small": jnp.ones(3)}
    loss = lambda p: 1e3 * (p["large"] ** 2).sum() + 0 * p["small"].sum()
    # In float32, the rounding of ‖(2000, 2000, 2000, 2000)‖ is 5e-4.
    for off, wrong in ((1e-4, ()), (1e-1, ("small",))):
        given = {"large": np.full(4, 2e3, "float32"), "small": np.full(3, off, "float32")}
        found = check_gradients(loss, params, gradients=given, key=jax.random.key(3))
        assert found.wrong == wrong
        assert [len(row.split()) for row in str(found).splitlines()[1:3]] == [4, 4]  # the given gradient has an error
    found = check_gradients(loss, params, key=jax.random.key(3))
    assert [len(row.split()) for row in str(found).splitlines()[1:3]] == [3, 3]


@jax.debug_nans(False)
def test_a_nan_in_a_large_leaf_is_its_worst_entry():
    w = jnp.ones(3000).at[7].set(0.0)
    found = check_gradients(lambda w: jnp.where(w > 0, jnp.sqrt(w), 0.0).sum(), w, key=jax.random.key(3))
    assert found.worst.at == (7,) and np.isnan(found.worst.autodiff)


@pytest.mark.parametrize(
    "dtype, sizes, largest, frequency, tolerance",
    [("float64", (1, 8, 64), 1e-3, 3e5, 1e-9), ("float32", (1, 2, 4), 0.1, 100, 1e-3)],
)
def test_of_three_step_sizes_the_two_that_agree_best_are_trusted(dtype, sizes, largest, frequency, tolerance):
    """One entry bends within the largest step, four have waves shorter than the smallest, four are smooth."""
    x = jnp.array([0.2 * largest, *np.linspace(0.3, 1.1, 8)], dtype)
    scale, waves = jnp.array([5 / largest, *[1] * 8], dtype), jnp.array([0, *[largest / 10] * 4, *[0] * 4], dtype)
    loss = lambda x: (jnp.tanh(scale * x) + waves * jnp.sin(jnp.asarray(frequency, dtype) * x)).sum()
    first, second, third = (np.asarray(central_differences(loss, x, largest / size)) for size in sizes)
    got, floor = adaptive_differences(loss, x, largest)
    coarse = abs(second - first) <= abs(third - second)
    assert coarse.any() and not coarse.all()
    # The losses are rounded alike up to the order of the operations; the step divides their rounding.
    np.testing.assert_allclose(got, np.where(coarse, second, third), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(floor, abs(third - second), rtol=tolerance, atol=tolerance)


def test_a_nan_is_wrong():
    with jax.debug_nans(False):
        found = check_gradients(lambda w: jnp.sqrt(w).sum(), jnp.array([1.0, 0.0]), key=jax.random.key(3))
    assert found.wrong == ("params",) and found.worst.at == (1,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss_fn": lambda w: w}, "loss_fn must return one number"),
        ({"gradients": {"w": 0}}, "gradients and params must be alike"),
        ({"gradients": np.ones(4)}, r"gradients and params must be alike, got .* float64\[4\]; and .* float64\[3\]"),
        ({"params": jnp.arange(3)}, "params have no floating leaf"),
        ({"num_directions": 0}, "num_directions must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"loss_fn": lambda w: (w**2).sum(), "params": jnp.ones(3), "key": jax.random.key(3)} | change
    with pytest.raises(ValueError, match=f"check_gradients: {message}"):
        check_gradients(**arguments)
