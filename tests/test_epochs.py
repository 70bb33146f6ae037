"""Epochs: batches, means over masks and early stopping, against loops written out in NumPy and Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlstm import LSTM, init_train_state, length_mask, make_train_step, sweep, unroll
from jaxlstm.epochs import evaluate, fit_epochs, shuffled_batches

from cells import H, I, T, draw, normal, worst_error


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax's own rules mix dtypes
        yield


ITEMS = {"xs": normal(0, 11, T, I), "length": np.arange(11) % (T + 1), "name": np.arange(11)}

# Batches.


@pytest.mark.parametrize("batch_size, num_batches", [(1, 11), (3, 3), (4, 2), (11, 1)])
def test_an_epoch_has_every_item_at_most_once_and_keeps_its_leaves_together(batch_size, num_batches):
    batches = jax.device_get(shuffled_batches(jax.random.key(0), ITEMS, batch_size))
    assert batches["xs"].shape == (num_batches, batch_size, T, I)
    names = batches["name"].ravel()
    assert len(set(names)) == num_batches * batch_size
    for leaf in ("xs", "length"):
        np.testing.assert_array_equal(batches[leaf].reshape(-1, *ITEMS[leaf].shape[1:]), ITEMS[leaf][names])


def test_another_key_gives_another_order_and_leaves_out_other_items():
    epochs = jax.vmap(lambda key: shuffled_batches(key, np.arange(11), 3))(jax.random.split(jax.random.key(0), 400))
    assert len({tuple(order) for order in epochs.reshape(400, 9).tolist()}) == 400
    present = np.bincount(epochs.ravel(), minlength=11) / 400  # 9/11, standard deviation 0.02
    assert abs(present - 9 / 11).max() < 0.08
    first = np.bincount(epochs[:, 0, 0], minlength=11) / 400  # 1/11, standard deviation 0.014
    assert abs(first - 1 / 11).max() < 0.06


def test_batches_of_indices_are_the_batches_of_the_items():
    key = jax.random.PRNGKey(3)
    of_items, of_indices = (shuffled_batches(key, data, 4) for data in (ITEMS["xs"], np.arange(11)))
    np.testing.assert_array_equal(of_items, ITEMS["xs"][of_indices])


# Evaluation.


def squares(offset, batch):
    """Return the squares of all real entries, [time, item], and whether they are large."""
    values = (batch["xs"].sum(-1).T - offset) ** 2
    return {"square": values, "large": values > 1}, length_mask(batch["length"], T)


def squares_in_numpy(offset, items):
    values = [
        (items["xs"][n, t].sum() - offset) ** 2 for n in range(len(items["length"])) for t in range(items["length"][n])
    ]
    return {"square": np.mean(values), "large": np.mean(np.array(values) > 1)}


@pytest.mark.parametrize("batch_size", [1, 4, 11])
@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "plain"])
def test_every_real_step_counts_once_whatever_the_batch_size(batch_size, jit):
    dirty = ITEMS | {"xs": np.where(np.arange(T)[:, None] < ITEMS["length"][:, None, None], ITEMS["xs"], 1e9)}
    got = jit(lambda data: evaluate(squares, 0.3, data, batch_size))(dirty)
    want = squares_in_numpy(0.3, ITEMS)
    np.testing.assert_allclose(got["square"], want["square"], rtol=1e-13)
    np.testing.assert_allclose(got["large"], want["large"], rtol=1e-6)
    assert (got["square"].dtype, got["large"].dtype) == ("float64", "float32")


@jax.debug_nans(False)
def test_nan_in_the_padding_does_not_count_and_the_mean_of_nothing_is_nan():
    padding = np.arange(T)[:, None] >= ITEMS["length"][:, None, None]
    clean, dirty = (
        evaluate(squares, 0.3, ITEMS | {"xs": np.where(padding, fill, ITEMS["xs"])}, 4) for fill in (0.0, np.nan)
    )
    assert np.isfinite(clean["square"]) and clean == dirty
    assert np.isnan(evaluate(squares, 0.3, ITEMS | {"length": 0 * ITEMS["length"]}, 4)["square"])


def test_half_precision_is_summed_in_float32():
    data = np.full((4000, 1), 0.1, np.float16)
    got = evaluate(lambda _, batch: (batch, jnp.ones(batch.shape, bool)), (), data, 1000)
    assert got.dtype == "float32"
    np.testing.assert_allclose(got, np.float32(np.float16(0.1)), rtol=1e-6)


def test_a_value_per_sequence_is_averaged_over_sequences():
    measure = lambda _, batch: (batch["length"] > 2, jnp.ones(batch["length"].shape, bool))
    np.testing.assert_allclose(evaluate(measure, None, ITEMS, 3), np.mean(ITEMS["length"] > 2), rtol=1e-6)


# Early stopping.

W, X = normal(5, 6), normal(6, 30, 6)
Y = X @ W + 2 * normal(7, 30)
TRAIN, VALIDATION = (X[:12], Y[:12]), (X[12:], Y[12:])


def regression_loss(w, batch, carry, key):
    noise = 0.1 * jax.random.normal(key, batch[1].shape)
    loss = ((batch[0] @ w - batch[1] + noise) ** 2).mean()
    return loss, (carry + 1, {"pair": jnp.stack([loss, loss**2])})


def validation_loss(w):
    return ((VALIDATION[0] @ w - VALIDATION[1]) ** 2).mean()


def make_epoch(key):
    return shuffled_batches(key, TRAIN, 4)


def regression(rate, seed=0):
    optimizer = optax.sgd(rate)
    state = init_train_state(jnp.zeros(6), optimizer, jax.random.key(seed), carry=jnp.zeros((), int))
    return make_train_step(regression_loss, optimizer), state


def stopped_early(rate, patience, num_epochs=40, seed=0, validate=validation_loss):
    step, state = regression(rate, seed)
    key = jax.random.key(100 + seed)
    return fit_epochs(step, state, make_epoch, validate, key=key, num_epochs=num_epochs, patience=patience)


def stopped_early_by_hand(rate, patience, num_epochs=40, seed=0):
    step, state = regression(rate, seed)
    step = jax.jit(step)
    best, lowest, waited, rows = state, np.inf, 0, []
    for epoch in range(num_epochs):
        batches = make_epoch(jax.random.fold_in(jax.random.key(100 + seed), epoch))
        steps = []
        for n in range(3):
            state, metrics = step(state, jax.tree.map(lambda leaf, n=n: leaf[n], batches))
            steps.append(metrics)
        value = float(validation_loss(state.params))
        means = {name: np.mean([metrics[name] for metrics in steps], axis=0) for name in steps[0]}
        rows.append(means | {"validation": value})
        if value < lowest:
            best, lowest, waited = state, value, 0
        else:
            waited += 1
        if waited == patience:
            break
    return best, rows


@pytest.mark.parametrize("rate, patience", [(0.1, 1), (0.1, 4), (0.03, 40), (0.3, 3)])
@jax.debug_key_reuse(False)  # both loops draw from the same keys
def test_early_stopping_is_the_loop_written_out(rate, patience):
    best, rows = stopped_early_by_hand(rate, patience)
    state, metrics = jax.jit(stopped_early)(rate, patience)
    assert worst_error(state.params, best.params) < 1e-12
    assert (int(state.step), int(state.carry)) == (int(best.step), int(best.carry))
    assert jax.random.key_data(state.key).tolist() == jax.random.key_data(best.key).tolist()
    assert metrics["ran"].tolist() == [True] * len(rows) + [False] * (40 - len(rows))
    assert metrics.keys() == {"loss", "grad_norm", "pair", "validation", "ran"}
    for name in rows[0]:
        want = np.array([row[name] for row in rows + [rows[-1]] * (40 - len(rows))])
        np.testing.assert_allclose(metrics[name], want, rtol=1e-11)


def test_the_cases_of_early_stopping_differ():
    """So that the test above sees runs that stop early, that wait in vain, and that never stop."""
    ran = {(rate, patience): len(stopped_early_by_hand(rate, patience)[1]) for rate, patience in
           [(0.1, 1), (0.1, 4), (0.03, 40)]}  # fmt: skip
    assert ran[0.1, 1] < ran[0.1, 4] < 40 == ran[0.03, 40]
    best, rows = stopped_early_by_hand(0.1, 4)
    assert 0 < int(best.step) == 3 * (len(rows) - 4) and worst_error(best.params, np.zeros(6)) > 0.1


@jax.debug_key_reuse(False)
def test_each_run_of_a_sweep_stops_for_itself():
    rates, seeds = np.array([0.02, 0.1, 0.3]), np.arange(3)
    together = jax.jit(functools.partial(sweep, lambda rate, seed: stopped_early(rate, 3, seed=seed)))
    states, metrics = together(rates, seeds)
    assert len(set(metrics["ran"].sum(axis=1).tolist())) == 3
    for n in range(3):
        state, alone = stopped_early(rates[n], 3, seed=seeds[n])
        assert worst_error(states.params[n], state.params) < 1e-12
        np.testing.assert_allclose(metrics["validation"][n], alone["validation"], rtol=1e-12)
        assert metrics["ran"][n].tolist() == alone["ran"].tolist()


@jax.debug_nans(False)
def test_a_run_without_any_improvement_returns_the_state_it_began_with():
    for never in (np.nan, np.inf):
        state, metrics = stopped_early(0.1, 3, validate=lambda w, never=never: jnp.asarray(never) + 0 * w.sum())
        assert int(state.step) == 0 and not np.any(state.params)
        assert int(metrics["ran"].sum()) == 3
    # The same number again is not an improvement.
    state, metrics = stopped_early(0.1, 3, validate=lambda w: 1 + 0 * w.sum())
    assert int(state.step) == 3 and int(metrics["ran"].sum()) == 4


@jax.debug_nans(False)
def test_a_run_that_diverges_keeps_its_best_state():
    validate = lambda w: jnp.where(abs(w).max() < 1e3, validation_loss(w), jnp.nan)
    state, metrics = stopped_early(3.0, 3, validate=validate)
    assert np.isfinite(state.params).all() and int(metrics["ran"].sum()) < 40


def test_padded_sequences_train_an_lstm_with_any_key():
    params = draw(LSTM)[0]

    def measure(params, batch):
        mask = length_mask(batch["length"], T)
        return (unroll(LSTM, params, batch["xs"].swapaxes(0, 1), mask=mask)[1] ** 2).mean(-1), mask

    def loss_fn(params, batch):
        losses, mask = measure(params, batch)
        return jnp.mean(losses, where=mask)

    optimizer = optax.adam(0.01)
    step, data = make_train_step(loss_fn, optimizer), {name: ITEMS[name] for name in ("xs", "length")}
    state, metrics = fit_epochs(
        step,
        init_train_state(params, optimizer, jax.random.PRNGKey(0)),
        lambda key: shuffled_batches(key, data, 3),
        lambda params: evaluate(measure, params, data, 4),
        key=jax.random.PRNGKey(1),
        num_epochs=3,
        patience=3,
    )
    assert params.w_hh.shape == (H, 4 * H)
    outputs = [unroll(LSTM, state.params, jnp.asarray(xs[:n]))[1] for xs, n in zip(*data.values(), strict=True)]
    want = np.mean(np.concatenate(outputs) ** 2)
    np.testing.assert_allclose(metrics["validation"][-1], want, rtol=1e-12)


# Errors.

LEAVES = {"xs": np.ones((4, 2)), "y": np.ones(5)}
ONES = jnp.ones(4)
KEY = jax.random.key(0)


def epochs_of(make_batches=make_epoch, validate=validation_loss, loss=regression_loss, **options):
    step = make_train_step(loss, optax.sgd(0.1))
    return fit_epochs(step, regression(0.1)[1], make_batches, validate,
                      **{"key": KEY, "num_epochs": 2, "patience": 2} | options)  # fmt: skip


ERRORS = {
    r"shuffled_batches: data must share their first axis.*xs float64\[4,2\], y float64\[5\]": (
        lambda: shuffled_batches(KEY, LEAVES, 2)),
    r"shuffled_batches: data must share their first axis, the number of items, got float64\[\]": (
        lambda: shuffled_batches(KEY, 3.0, 2)),
    r"shuffled_batches: data must hold at least one item, got float64\[0,2\]": (
        lambda: shuffled_batches(KEY, np.zeros((0, 2)), 1)),
    r"evaluate: measure must return real or bool values, got complex128\[2\]": (
        lambda: evaluate(lambda p, b: (b * 1j, b > 0), (), ONES, 2)),
    r"shuffled_batches: batch_size must be 1 to 4, got 5": lambda: shuffled_batches(KEY, ONES, 5),
    r"shuffled_batches: batch_size must be 1 to 4, got 0": lambda: shuffled_batches(KEY, ONES, 0),
    r"shuffled_batches: key must be a JAX key, got int": lambda: shuffled_batches(0, ONES, 2),
    r"shuffled_batches: data must hold arrays of numbers, got 'text'": lambda: shuffled_batches(KEY, ["text"], 1),
    r"evaluate: measure must be a function, got 3": lambda: evaluate(3, (), ONES, 2),
    r"evaluate: batch_size must be 1 to 4, got 5": lambda: evaluate(lambda p, b: (b, b > 0), (), ONES, 5),
    r"evaluate: measure must return \(values, mask\), got": lambda: evaluate(lambda p, b: b, (), ONES, 2),
    r"evaluate: measure must return its mask as one bool array, got float64\[2\]": (
        lambda: evaluate(lambda p, b: (b, b), (), ONES, 2)),
    r"evaluate: measure must return values with the shape of their mask, \[2\], got float64\[\]": (
        lambda: evaluate(lambda p, b: (b.sum(), b > 0), (), ONES, 2)),
    r"fit_epochs: make_batches must be a function, got float64\[4\]": lambda: epochs_of(make_batches=ONES),
    r"fit_epochs: validate must be a function, got None": lambda: epochs_of(validate=None),
    r"fit_epochs: validate must return one number, got \[6\]": lambda: epochs_of(validate=lambda w: w),
    r"fit_epochs: validate must return a floating number, got int": (
        lambda: epochs_of(validate=lambda w: jnp.zeros((), int))),
    r"fit_epochs: a metric must not be named \['ran', 'validation'\]": (
        lambda: epochs_of(loss=lambda w, b: (w.sum(), {"validation": w.sum(), "ran": w.sum()}))),
    r"fit_epochs: num_epochs must be at least 1, got 0": lambda: epochs_of(num_epochs=0),
    r"fit_epochs: num_epochs must be an int, at least 1, got 2.5": lambda: epochs_of(num_epochs=2.5),
    r"fit_epochs: patience must be at least 1, got 0": lambda: epochs_of(patience=0),
    r"fit_epochs: key must be a JAX key, got int": lambda: epochs_of(key=0),
    r"fit_epochs: state must be a TrainState, from init_train_state, got ": (
        lambda: fit_epochs(None, ONES, make_epoch, validation_loss, key=KEY, num_epochs=1, patience=1)),
    r"^shuffled_batches: batch_size must be 1 to 12, got 13": (
        lambda: epochs_of(make_batches=lambda key: shuffled_batches(key, TRAIN, 13))),
    r"^evaluate: batch_size": lambda: epochs_of(validate=lambda w: evaluate(squares, w, VALIDATION, 99)),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_a_wrong_argument_raises_one_clear_error(message):
    with pytest.raises((TypeError, ValueError), match=message):
        ERRORS[message]()
