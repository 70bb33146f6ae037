"""Training: any Optax optimiser, one trace, one scan, many seeds; against steps written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlstm import LSTM, TrainState, fit, init_train_state, make_train_step, sweep, unroll

from cells import H, I, T, normal, worst_error

N, BATCH = 6, 5


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax's own rules mix dtypes
        yield


BATCHES = (jnp.asarray(normal(0, N, T, BATCH, I)), jnp.asarray(normal(1, N, BATCH, H)))


def lstm_loss(params, batch, carry, key):
    xs, targets = batch
    xs = xs + 0.1 * jax.random.normal(key, xs.shape)
    carry, ys = unroll(LSTM, params, xs, carry)
    return ((ys[-1] - targets) ** 2).mean(), (carry, {"last": ys[-1].mean()})


def new_state(optimizer, seed=0):
    model_key, train_key = jax.random.split(jax.random.key(seed))
    params = LSTM.init(model_key, I, H, dtype=jnp.float64)
    return init_train_state(params, optimizer, train_key, carry=LSTM.initial_carry(params, (BATCH,)))


def test_the_update_is_the_optimisers_on_the_gradient_of_the_loss():
    def loss_fn(w, batch, carry, key):
        return ((batch @ w) ** 2).sum() / 2, (carry + 1, {"size": jnp.abs(w).sum()})

    w, x, rate = normal(2, 4), normal(3, 3, 4), 0.01
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    step = make_train_step(loss_fn, optimizer)
    state, metrics = step(init_train_state(jnp.asarray(w), optimizer, jax.random.key(0), carry=jnp.zeros(())), x)
    gradient = x.T @ (x @ w)
    np.testing.assert_allclose(state.params, w - rate * gradient, rtol=1e-13)
    assert (int(state.step), float(state.carry)) == (1, 1.0)
    want = {
        "loss": ((x @ w) ** 2).sum() / 2,
        "grad_norm": np.linalg.norm(gradient),
        "learning_rate": rate,
        "size": np.abs(w).sum(),
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6 if name == "learning_rate" else 1e-13)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "clipped adamw on a schedule": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw)(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, N)),
    ),
    "accumulating": optax.MultiSteps(optax.rmsprop(1e-2), every_k_schedule=2),
    "reduce on plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "line search": optax.lbfgs(),
}


ALIKE = {name: [pytest.mark.slow] for name in ("sgd", "adam", "reduce on plateau")} | {"accumulating": [pytest.mark.ci]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=ALIKE.get(name, [])) for name in OPTIMIZERS])
@jax.debug_key_reuse(False)  # a line search asks for the same loss again, so with the same key
def test_any_optax_optimiser_runs_and_fit_is_the_loop(name):
    optimizer = OPTIMIZERS[name]
    step = make_train_step(lstm_loss, optimizer)
    scanned, metrics = jax.jit(functools.partial(fit, step))(new_state(optimizer), BATCHES)
    state, jitted = new_state(optimizer), jax.jit(step)
    for n in range(N):
        state, own = jitted(state, jax.tree.map(lambda v, n=n: v[n], BATCHES))
        np.testing.assert_allclose(own["loss"], metrics["loss"][n], rtol=1e-9)
    assert int(scanned.step) == N
    assert worst_error(scanned.params, state.params) < 1e-8
    assert worst_error(scanned.params, new_state(optimizer).params) > 1e-3
    assert ("learning_rate" in metrics) == (name in ("clipped adamw on a schedule", "line search"))


def test_the_learning_rate_of_a_schedule_is_the_one_used():
    schedule = optax.linear_schedule(1.0, 0.0, N)
    optimizer = optax.inject_hyperparams(optax.sgd)(schedule)
    _, metrics = fit(make_train_step(lstm_loss, optimizer), new_state(optimizer), BATCHES)
    np.testing.assert_allclose(metrics["learning_rate"], [schedule(n) for n in range(N)], rtol=1e-6)


@jax.debug_key_reuse(False)  # the loss function is asked for the same loss again
def test_optimisers_that_ask_get_the_loss_its_gradient_and_the_loss_function():
    def update(updates, state, params, *, value, grad, value_fn, **_):
        shifted = jax.tree.map(lambda p: p + 1, params)
        return jax.tree.map(jnp.zeros_like, updates), (value, optax.tree.norm(grad), value_fn(shifted))

    asking = optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()),) * 3, update)
    first, batch = new_state(asking), jax.tree.map(lambda v: v[0], BATCHES)
    state, metrics = make_train_step(lstm_loss, asking)(first, batch)
    key = jax.random.fold_in(first.key, 0)
    shifted = jax.tree.map(lambda p: p + 1, first.params)
    want = (metrics["loss"], metrics["grad_norm"], lstm_loss(shifted, batch, first.carry, key)[0])
    np.testing.assert_allclose(state.opt_state, want, rtol=1e-13)
    np.testing.assert_allclose(metrics["loss"], lstm_loss(first.params, batch, first.carry, key)[0], rtol=1e-13)


def test_one_trace_over_200_steps_with_evaluation_between():
    traces = {"train": 0, "evaluate": 0}

    def counted(params, batch, carry, key):
        traces["train"] += 1
        return lstm_loss(params, batch, carry, key)

    @jax.jit
    def evaluate(params):
        traces["evaluate"] += 1
        return unroll(LSTM, params, BATCHES[0][0])[1].mean()

    optimizer = optax.adam(1e-3)
    step, state = jax.jit(make_train_step(counted, optimizer), donate_argnums=0), new_state(optimizer)
    for n in range(200):
        state, _ = step(state, jax.tree.map(lambda v, n=n: v[n % N], BATCHES))
        if n % 50 == 0:
            evaluate(state.params)
    assert int(state.step) == 200
    assert traces == {"train": 1, "evaluate": 1}


def test_vmap_over_seeds_equals_separate_runs():
    optimizer = optax.adam(1e-2)
    run = functools.partial(fit, make_train_step(lstm_loss, optimizer))
    alone = [jax.jit(run)(new_state(optimizer, seed), BATCHES) for seed in range(3)]
    stacked = jax.vmap(functools.partial(new_state, optimizer))(jnp.arange(3))
    states, metrics = jax.vmap(run, in_axes=(0, None))(stacked, BATCHES)
    for n, (state, own) in enumerate(alone):
        assert worst_error(jax.tree.map(lambda v, n=n: v[n], states.params), state.params) < 1e-9
        np.testing.assert_allclose(metrics["loss"][n], own["loss"], rtol=1e-10)
    assert worst_error(alone[0][0].params, alone[1][0].params) > 0.1


def test_the_carry_passes_to_the_next_batch_without_its_gradient():
    optimizer = optax.sgd(0.0)
    quiet = lambda params, batch, carry, key: lstm_loss_without_noise(params, batch, carry)
    first = new_state(optimizer)
    state, metrics = fit(make_train_step(quiet, optimizer), first, BATCHES)
    whole, _ = unroll(LSTM, first.params, BATCHES[0].reshape(N * T, BATCH, I))
    assert worst_error(state.carry, whole) < 1e-13
    # The second step's gradient is the one at a constant carry: truncated at the border of the batches.
    carry, _ = unroll(LSTM, first.params, BATCHES[0][0])
    second = jax.tree.map(lambda v: v[1], BATCHES)
    gradient = jax.grad(lambda p: lstm_loss_without_noise(p, second, carry)[0])(first.params)
    np.testing.assert_allclose(metrics["grad_norm"][1], optax.tree.norm(gradient), rtol=1e-12)


def lstm_loss_without_noise(params, batch, carry):
    carry, ys = unroll(LSTM, params, batch[0], carry)
    return ((ys[-1] - batch[1]) ** 2).mean(), (carry, {})


def test_every_step_has_its_own_key_and_a_rerun_the_same():
    loss_fn = lambda w, batch, carry, key: (w.sum(), (carry, {"noise": jax.random.uniform(key)}))
    optimizer = optax.sgd(0.1)
    draws = [
        fit(
            make_train_step(loss_fn, optimizer),
            init_train_state(jnp.ones(2), optimizer, jax.random.key(s)),
            jnp.zeros(N),
        )
        for s in (0, 0, 1)
    ]
    noise = [metrics["noise"].tolist() for _, metrics in draws]
    assert len(set(noise[0])) == N and noise[0] == noise[1] and not set(noise[0]) & set(noise[2])


def test_a_metric_that_hides_ours_is_refused():
    loss_fn = lambda w, batch, carry, key: (w.sum(), (carry, {"loss": w.sum(), "grad_norm": w.sum()}))
    step = make_train_step(loss_fn, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"must not be named \['grad_norm', 'loss'\]"):
        step(init_train_state(jnp.ones(2), optax.sgd(0.1), jax.random.key(0)), jnp.zeros(1))


def test_a_state_is_a_plain_pytree_with_an_empty_carry_by_default():
    state = TrainState(jnp.ones(2), (), jnp.zeros((), jnp.int32), jax.random.key(0))
    assert state.carry == () and len(jax.tree.leaves(state)) == 3


# What people write first, and what goes wrong.


def square(w, batch):
    return ((batch @ w) ** 2).sum() / 2


LOSSES = {
    "a number": square,
    "metrics": lambda w, batch: (square(w, batch), {"size": jnp.abs(w).sum()}),
    "carry and metrics": lambda w, batch: (square(w, batch), ((), {})),
    "more arguments with defaults": lambda w, batch, train=True, rate=0.1: square(w, batch) if train else rate,
    "all arguments": lambda w, batch, carry, key: square(w, batch),
    "all arguments, with defaults": lambda w, batch, carry=None, key=None: square(w, batch) + 0 * (carry is None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_may_be_written_in_several_ways(name):
    w, x, optimizer = normal(2, 4), normal(3, 2, 3, 4), optax.sgd(0.01)
    state = init_train_state(jnp.asarray(w), optimizer, jax.random.key(0))
    state, metrics = fit(make_train_step(LOSSES[name], optimizer), state, x)
    for batch in x:
        w = w - 0.01 * batch.T @ (batch @ w)
    np.testing.assert_allclose(state.params, w, rtol=1e-13)
    assert ("size" in metrics) == (name == "metrics") and metrics["loss"].shape == (2,)


W, BATCH_OF_TWO = np.ones(4), np.ones((2, 3, 4))


def steps_of(loss_fn, w=W, batches=BATCH_OF_TWO):
    optimizer = optax.sgd(0.01)
    state = init_train_state(jnp.asarray(w), optimizer, jax.random.key(0))
    return fit(make_train_step(loss_fn, optimizer), state, batches)


# By name: what goes wrong, and the error.
WRONG_LOSSES = {
    r"train_step: loss_fn must return one number.*got \[3\]": lambda w, b: b @ w,
    "train_step: loss_fn must return a floating number.*, got int64": lambda w, b: (b @ w).sum().astype(int),
    "train_step: loss_fn must return its metrics as a dict of arrays": lambda w, b: (square(w, b), w),
    r"make_train_step: loss_fn must take \(params, batch\) or .*, got \(w, b, key\)": lambda w, b, key: square(w, b),
    "make_train_step: loss_fn must be a function, got int": 3,
    r"fit: train_step must return a carry like the one it is given, tuple: .*float64\[4\]. Pass the first carry": (
        lambda w, b, carry, key: (square(w, b), (w, {}))
    ),
}


@pytest.mark.parametrize("message", WRONG_LOSSES)
def test_a_wrong_loss_raises_one_clear_error(message):
    with pytest.raises((TypeError, ValueError), match=message):
        steps_of(WRONG_LOSSES[message])


def test_wrong_parameters_and_batches_raise_one_clear_error():
    with pytest.raises(TypeError, match=r"train_step: params must be floating, got .*int64"):
        steps_of(square, np.ones(4, int))
    with pytest.raises(TypeError, match=r"fit: batches must be arrays that stack .*, got generator; stack a list"):
        steps_of(square, batches=(b for b in BATCH_OF_TWO))
    with pytest.raises(ValueError, match=r"fit: batches must share their first axis, .*\[2,3,4\], 1 float64\[3\]"):
        steps_of(lambda w, b: square(w, b[0]), batches=(BATCH_OF_TWO, np.ones(3)))
    with pytest.raises(ValueError, match="fit: batches must share their first axis"):
        steps_of(square, batches=np.ones(()))


# Many runs in one program.


def run_of(key, learning_rate):
    weight_key, train_key = jax.random.split(key)
    params = LSTM.init(jax.random.key(0), I, H, dtype="float64")
    params = params._replace(b=jax.random.normal(weight_key, params.b.shape))
    optimizer = optax.sgd(learning_rate)
    state = init_train_state(params, optimizer, train_key)
    return fit(make_train_step(plain_loss, optimizer), state, BATCHES)[0].params


def swept(run):
    """Do for a sweep what `jax.vmap(run)` does."""
    return functools.partial(sweep, run)


def plain_loss(params, batch):
    return (unroll(LSTM, params, batch[0])[1] ** 2).mean()


def num_loops(function, *arguments, platform="cpu"):
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return program.as_text().count("stablehlo.while")


@pytest.mark.parametrize(
    "rows, at_once", [(10, 6), *(pytest.param(*case, marks=pytest.mark.ci) for case in [(250, 3), (600, 1)])]
)
@jax.debug_key_reuse(False)
def test_a_sweep_gives_what_vmap_gives(rows, at_once):
    def run(key, rate):
        return run_of(key, rate), jnp.full((rows, rows), rate).sum()  # its largest array: 800 B, 0.5 MB, 2.9 MB

    keys, rates = jax.random.split(jax.random.key(0), 6), jnp.linspace(0.01, 0.6, 6)
    assert (f"length={6 // at_once}" in str(jax.make_jaxpr(swept(run))(keys, rates))) == (at_once < 6)
    got = jax.jit(swept(run))(keys, rates)
    want = jax.jit(jax.vmap(run))(keys, rates)
    assert worst_error(got, want) < 1e-13
    assert worst_error(jax.tree.map(lambda v: v[5], got), run(keys[5], rates[5])) < 1e-13


def test_a_sweep_runs_large_entries_one_by_one_on_a_cpu_and_all_at_once_elsewhere():
    run = lambda x: jnp.tanh(x @ x.T).sum()
    for rows, loops in ((100, 0), (400, 1), (600, 1)):  # of float64: 8 entries of 80 kB, of 1.3 MB, of 2.9 MB
        xs = jax.ShapeDtypeStruct((8, rows, 3), "float64")
        assert num_loops(swept(run), xs) == loops
        assert num_loops(swept(run), xs, platform="tpu") == 0
    lengths = lambda rows: str(jax.make_jaxpr(swept(run))(jnp.ones((8, rows, 3), "float64")))
    assert "length=4" in lengths(300)  # 720 kB: two at a time
    assert "length=8" in lengths(600)


def test_a_sweep_takes_less_memory_than_vmap():
    xs = jax.ShapeDtypeStruct((8, 100, 32, 64), "float32")
    params = jax.eval_shape(lambda: LSTM.init(jax.random.key(0), 64, 64))

    def temporaries(over):
        gradient = jax.grad(lambda params, x: unroll(LSTM, params, x)[1].sum())
        program = jax.jit(lambda params, xs: over(lambda x: gradient(params, x))(xs))
        return program.lower(params, xs).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(swept) < 0.25 * temporaries(jax.vmap)


@pytest.mark.parametrize("rows", [3, 600])
def test_a_sweep_can_be_differentiated(rows):
    xs, scale = jnp.asarray(normal(3, 8, rows, 2)), jnp.asarray(0.7)

    def gradients(over):
        def loss(scale, xs):
            return over(lambda x: jnp.sin(scale * x @ x.T).sum())(
                xs
            ).sum()  # it closes over `scale`, which is differentiated too

        return jax.jit(jax.grad(loss, (0, 1)))(scale, xs)

    assert worst_error(gradients(swept), gradients(jax.vmap)) < 1e-12


MESH = jax.make_mesh((2,), ("runs",), axis_types=(AxisType.Explicit,))
AUTO = jax.make_mesh((2,), ("runs",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("rows", [3, 600])
def test_a_sweep_inside_shard_map_has_the_gradient_of_vmap(rows):
    xs, scale = jnp.asarray(normal(4, 4, rows, 2)), jnp.asarray([0.5, 0.7])

    def of_one(scale, x):
        return jax.lax.psum(x.sum(), "runs") * jnp.cos(scale * x @ x.T).sum() + jax.grad(jnp.vdot)(scale, scale).sum()

    def gradient(over):
        inside = lambda scale, xs: over(functools.partial(of_one, scale.sum()))(xs)
        sharded = jax.shard_map(inside, mesh=AUTO, in_specs=(P(), P("runs")), out_specs=P("runs"))
        return jax.jit(jax.value_and_grad(lambda scale, xs: sharded(scale, xs).sum(), (0, 1)))(scale, xs)

    assert worst_error(gradient(swept), gradient(jax.vmap)) < 1e-12


def test_runs_that_are_sharded_over_devices_all_run_at_once():
    run = lambda x: jnp.tanh(x @ x.T).sum()
    xs = jax.device_put(jnp.asarray(normal(5, 4, 800, 4)), NamedSharding(MESH, P("runs")))
    assert "while" not in jax.jit(swept(run)).lower(xs).as_text()
    with jax.set_mesh(MESH):
        got = jax.jit(swept(run))(xs)
    np.testing.assert_allclose(jax.device_get(got), jax.vmap(run)(jax.device_get(xs)), rtol=1e-12)


def test_a_sweep_of_unknown_size_can_be_exported():
    of = lambda xs: sweep(lambda x: jnp.sin(x).sum(), xs)
    for shape in ("n, 3", "4, n"):
        symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), "float64")
        exported = export.export(jax.jit(of))(symbolic)
        xs = normal(6, 4, 3)
        np.testing.assert_allclose(exported.call(xs), np.sin(xs).sum(1), rtol=1e-12)


def test_a_sweep_keeps_the_dtype_that_vmap_gives():
    run = lambda x: x * jnp.ones((), "bfloat16")
    rates = lambda over: jax.eval_shape(lambda: over(run)(jnp.broadcast_to(2.0, (4,))))
    assert rates(swept).dtype == rates(jax.vmap).dtype


def test_a_sweep_of_nothing_is_empty():
    assert sweep(lambda x: x @ x, jnp.ones((0, 3))).shape == (0,)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((3, jnp.ones(2)), TypeError, r"sweep: run must be a function, got 3"),
        ((jnp.sin,), ValueError, r"sweep: arguments must share their first axis, one entry per run"),
        ((jnp.sin, 1.0), ValueError, r"sweep: arguments must share .*got argument 0 float64\[\]\."),
        (
            (jnp.add, jnp.ones(2), jnp.ones(3)),
            ValueError,
            r"sweep: .*got argument 0 float64\[2\], argument 1 float64\[3\]\.",
        ),
        ((jnp.sin, "text"), TypeError, r"sweep: argument 0 must hold arrays of numbers, got 'text'"),
    ],
)
def test_errors_of_a_sweep(arguments, kind, message):
    with pytest.raises(kind, match=message):
        sweep(*arguments)


def test_an_error_in_a_swept_run_names_its_own_function():
    with pytest.raises(ValueError, match=r"^LSTM.init: hidden_size"):
        sweep(lambda key: LSTM.init(key, 3, 0), jax.random.split(jax.random.key(0), 2))
