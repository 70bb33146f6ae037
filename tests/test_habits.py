"""Other people's habits: cells with custom derivatives in them, legacy keys, exports, empty batches, eager calls."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax

from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Bulk,
    Cell,
    Chunked,
    LSTMGates,
    LSTMState,
    Scan,
    diagnostics,
    fit,
    generate,
    init_bidirectional,
    init_stack,
    init_train_state,
    initializers,
    length_mask,
    low_precision,
    lstm_bptt,
    make_train_step,
    regularize,
    rtrl,
    segment_resets,
    step_stack,
    unroll,
    unroll_stack,
)
from jaxlstm.adapters import linen
from jaxlstm.diagnostics import check_gradients

from cells import B, H, I, T, draw, normal, worst_error
from sweeps import some

OPEN = {"gates_jvp": None, "activations": None}
MODES = [Bulk(), Bulk(block_size=3), Chunked(3), Chunked(3, within=Scan())]


# Cells with other derivatives in them.


@jax.custom_vjp
def fire(v):
    return (v > 0).astype(v.dtype)


fire.defvjp(lambda v: (fire(v), v), lambda v, d: (d / (1 + jnp.abs(v)) ** 2,))


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (v, None), lambda _, d: (jnp.clip(d, -0.05, 0.05),))


@jax.custom_vjp
def rounded(w):
    return jnp.round(w * 8) / 8


rounded.defvjp(lambda w: (rounded(w), None), lambda _, d: (d,))


@jax.custom_jvp
def doubled(v):
    return v


doubled.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


@jax.custom_vjp
def called_back(v):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(v.shape, v.dtype), v)


called_back.defvjp(lambda v: (called_back(v), v), lambda v, d: (d * (1 - jnp.tanh(v) ** 2),))


def spiking(params, s, z, a):
    c = 0.9 * s.c + (z + a)[..., :H]
    y = fire(c - 0.1)
    return LSTMState(y, c * (1 - y)), y


def after_step(change):
    """Make gates whose new carry goes through a function."""

    def gates(params, s, z, a):
        new, y = LSTM.gates(params, s, z, a)
        return LSTMState(change(new.h), change(new.c)), y

    return gates


def by_switch(v):
    return lax.switch(jnp.clip((v.sum() > 0).astype(int) + 1, 0, 2), [jnp.sin, jnp.tanh, jnp.cos], v)


def by_while(v):
    """Halve until small, which only forward mode differentiates; the gradient stops."""
    return v + lax.stop_gradient(lax.while_loop(lambda u: jnp.abs(u).max() > 0.1, lambda u: u / 2, v))


CELLS = {
    "a surrogate gradient": {"gates": spiking},
    "a clipped gradient": {"gates": after_step(clipped)},
    "a clipped gradient in recur": {"recur": lambda p, s: clipped(s.h) @ p.w_hh},
    "a clipped gradient inside jit": {"gates": after_step(jax.jit(lambda v: 2 * clipped(v)))},
    "straight through in project": {
        "project": lambda p, x: x @ rounded(p.w_ih) + jnp.expand_dims(p.b, range(x.ndim - 1))
    },
    "straight through in recur": {"recur": lambda p, s: s.h @ rounded(p.w_hh)},
    "custom_jvp": {"gates": after_step(doubled)},
    "a checkpoint": {"gates": jax.checkpoint(LSTM.gates)},
    "a callback with a derivative": {"gates": after_step(called_back)},
    "cond": {"gates": after_step(lambda v: lax.cond(v.sum() > 0, jnp.sin, jnp.tanh, v))},
    "switch": {"gates": after_step(by_switch)},
    "scan": {"gates": after_step(lambda v: lax.scan(lambda u, _: (jnp.sin(u), None), v, length=3)[0])},
    "fori_loop": {"gates": after_step(lambda v: lax.fori_loop(0, 3, lambda _, u: jnp.sin(u), v))},
    "while_loop": {"gates": after_step(by_while)},
    "debug.print": {"gates": after_step(lambda v: jax.debug.callback(lambda u: None, v) or v)},
}


@pytest.mark.parametrize("modes", [MODES[:1], pytest.param(MODES[1:], marks=pytest.mark.ci)], ids=["", "others"])
@pytest.mark.parametrize(
    "name", some(CELLS, "a surrogate gradient", "straight through in project", "a checkpoint", "scan", "while_loop")
)
# JAX cannot differentiate jit(f) if f has a callback and a Boolean argument while it looks for leaks.
@jax.check_tracer_leaks(False)
def test_a_cell_with_other_derivatives_in_it_has_the_gradient_of_the_scan(name, modes):
    cell = dataclasses.replace(LSTM, **OPEN, **CELLS[name])
    params, xs, carry = draw(LSTM)

    def loss(variables, gradient):
        params, xs, carry = variables
        carry, ys = unroll(cell, params, xs, carry, mask=length_mask([7, 4, 5], T), gradient=gradient)
        return (ys**2).sum() + (carry.c**2).sum()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want = value_and_grad((params, xs, carry), "scan")
    for gradient in modes:
        assert worst_error(value_and_grad((params, xs, carry), gradient), want) < 1e-13, gradient


def learned_temperature(t, part):
    """Make a cell inside the loss; one of its functions closes over t, which is differentiated."""
    if part == "gates":
        gates = lambda p, s, z, a: LSTM.gates(p, s, t * z, a)
        return dataclasses.replace(LSTM, gates=gates, **OPEN)
    if part == "recur":
        return dataclasses.replace(LSTM, recur=lambda p, s: t * (s.h @ p.w_hh))
    return dataclasses.replace(LSTM, project=jax.jit(lambda p, xs: t * LSTM.project(p, xs)))


@pytest.mark.parametrize("gradient", [Bulk(), pytest.param(Chunked(3), marks=pytest.mark.ci)], ids=str)
@pytest.mark.parametrize("part", some(["gates", "recur", "project"], "gates"))
def test_a_cell_that_closes_over_what_is_differentiated_has_the_gradient_of_the_scan(part, gradient):
    params, xs, carry = draw(LSTM)

    def loss(t, gradient):
        return (unroll(learned_temperature(t, part), params, xs, carry, gradient=gradient)[1] ** 2).sum()

    want = jax.grad(loss)(0.9, "scan")
    difference = (loss(0.9 + 1e-6, "scan") - loss(0.9 - 1e-6, "scan")) / 2e-6
    assert abs(want - difference) < 1e-7 * abs(want)
    of_t = functools.partial(loss, gradient=gradient)
    for derivative in (jax.grad(of_t), jax.jit(jax.grad(of_t)), jax.grad(jax.jit(of_t)), jax.jacfwd(of_t)):
        assert abs(derivative(0.9) - want) < 1e-13


@pytest.mark.parametrize("part", ["gates", "recur", "project"])
def test_no_compiled_function_remembers_what_a_cell_closes_over(part):
    params, xs, _ = draw(LSTM)
    loss = lambda t: (unroll(learned_temperature(t, part), params, xs[:, 0])[1] ** 2).sum()
    with jax.checking_leaks():
        jax.jit(jax.grad(loss))(0.9)


# Leaves that have no gradient.


class Mixed(NamedTuple):
    h: jax.Array
    key: jax.Array
    count: jax.Array
    odd: jax.Array


def noisy_gates(params, carry, z, a):
    """Add noise drawn with a key in the carry, and count the steps."""
    z, token, key = z
    draw_one = lambda key, h: jax.random.normal(key, h.shape, h.dtype)
    noise = jax.vmap(draw_one)(jax.vmap(jax.random.fold_in)(carry.key, token), carry.h)
    other = jax.vmap(draw_one)(key, carry.h)
    h = jnp.tanh(
        z + a + 0.1 * noise + 0.1 * other * jnp.cos(carry.count)[:, None] + jnp.where(carry.odd[:, None], 0.5, 0.0)
    )
    return Mixed(h, jax.vmap(jax.random.fold_in)(carry.key, carry.count), carry.count + 1, ~carry.odd), h


def mixed_carry(params, batch_shape=()):
    keys = jax.random.split(jax.random.key(5), batch_shape)
    return Mixed(jnp.zeros((*batch_shape, H)), keys, jnp.zeros(batch_shape, int), jnp.zeros(batch_shape, bool))


MIXED = Cell(
    name="mixed",
    init=RNN.init,
    initial_carry=mixed_carry,
    gates=noisy_gates,
    project=lambda params, xs: (RNN.project(params, xs[0]), *xs[1:]),
)


@pytest.mark.ci
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@jax.debug_key_reuse(False)
def test_keys_integers_and_flags_may_be_leaves_of_the_input_and_of_the_carry(reverse):
    params, xs, _ = draw(RNN)
    tokens = jnp.asarray(np.random.default_rng(0).integers(9, size=(T, B)))
    keys = jax.random.split(jax.random.key(6), (T, B))
    mask, reset = length_mask([7, 4, 5], T), jnp.zeros((T, B), bool).at[3, 1].set(True)
    options = {"mask": mask, "reset": reset, "reverse": reverse}

    def loss(params, xs, gradient):
        carry, ys = unroll(MIXED, params, (xs, tokens, keys), gradient=gradient, **options)
        return (ys**2).sum() + (carry.h**3).sum(), (carry.count, carry.odd.astype(int), jax.random.key_data(carry.key))

    by = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    want = by(params, xs, "scan")
    (_, (count, odd, _)), _ = want
    assert count.tolist() == [7, 4 if reverse else 1, 5] and odd.tolist() == [n % 2 == 1 for n in count.tolist()]
    for gradient in MODES:
        assert worst_error(by(params, xs, gradient), want) < 1e-13, gradient
    truncated = by(params, xs, Chunked(T, truncate=True))
    assert worst_error(truncated, want) < 1e-13
    by(params, xs, Chunked(2, truncate=True))


# Legacy keys.

LEGACY = jax.random.PRNGKey(0)
TAKES_A_KEY = {
    "LSTM.init": lambda key: LSTM.init(key, I, H),
    "GRU.init": lambda key: GRU.init(key, I, H),
    "RNN.init": lambda key: RNN.init(key, I, H),
    "initializers.torch": lambda key: initializers.torch(key, I, H),
    "initializers.keras": lambda key: initializers.keras(key, I, H),
    "initializers.flax": lambda key: initializers.flax(key, I, H),
    "initializers.chrono": lambda key: initializers.chrono(key, I, H, max_lag=9),
    "init_bidirectional": lambda key: init_bidirectional(key, LSTM, I, H),
    "init_stack": lambda key: init_stack(key, LSTM, I, [H, H]),
    "unroll_stack": lambda key: unroll_stack(LSTM, STACK, jnp.ones((T, B, I)), dropout=0.5, key=key)[1],
    "generate": lambda key: generate(lambda s, x, k: (s, x + jax.random.normal(k)), (), jnp.zeros(()), key, 3)[1],
    "dropout_mask": lambda key: regularize.dropout_mask(key, 0.5, (T, H)),
    "zoneout_noise": lambda key: regularize.zoneout_noise(key, 0.5, jnp.ones((B, H)), T).astype(int),
    "weight_drop": lambda key: regularize.weight_drop(key, 0.5, STACK[0]),
    "check_gradients": lambda key: jnp.asarray(check_gradients(jnp.sum, jnp.ones(3), key=key).worst.differences),
    "init_train_state": lambda key: jax.random.normal(init_train_state(STACK, optax.sgd(0.1), key).key),
    "flax.linen": lambda key: linen.Recurrent(H).init(key, jnp.ones((B, T, I))),
}
STACK = init_stack(jax.random.key(1), LSTM, I, [H, H], dtype="float64")


@pytest.mark.parametrize("name", some(TAKES_A_KEY, *list(TAKES_A_KEY)[::3]))
@jax.debug_key_reuse(False)
def test_a_legacy_key_draws_what_the_typed_key_draws(name):
    run = TAKES_A_KEY[name]
    want = run(jax.random.key(0))
    assert worst_error(run(LEGACY), want) == 0
    assert worst_error(run(np.asarray(LEGACY)), want) == 0
    if name != "check_gradients":  # it computes numbers outside of `jit`
        assert worst_error(jax.jit(run)(LEGACY), want) < 1e-15
    if name != "flax.linen":  # Flax checks its keys itself
        for wrong in (0, LEGACY[:1], jnp.zeros(2), jax.random.split(LEGACY)):
            with pytest.raises(
                (TypeError, ValueError), match=r": key must be (a JAX key, got .*jax.random.key\(seed\)|one key)"
            ):
                run(wrong)


# Calls outside of `jit`.

EAGER = {
    "unroll": lambda p, xs, carry: unroll(LSTM, p, xs, mask=length_mask([7, 4, 5], T)),
    "gradient": lambda p, xs, carry: jax.grad(lambda p: unroll(LSTM, p, xs)[1].sum())(p),
    "gradient in chunks": lambda p, xs, carry: jax.grad(
        lambda p: unroll(LSTM, p, xs, gradient=Chunked(3, truncate=True))[1].sum()
    )(p),
    "a stack": lambda p, xs, carry: unroll_stack(LSTM, STACK, xs),
    "low precision": lambda p, xs, carry: unroll(low_precision(LSTM, "bfloat16"), p, xs),
    "by hand": lambda p, xs, carry: jax.grad(lambda p: lstm_bptt(p, xs, carry)[1].sum())(p),
}


@pytest.mark.parametrize("name", EAGER)
def test_a_second_eager_call_compiles_nothing(name):
    events = []

    def listen(event, *_, **__):
        events.append(event)

    first, second = draw(LSTM, seed=0), draw(LSTM, seed=1)
    jax.clear_caches()  # other tests make such calls too
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        EAGER[name](*first)
        assert [event for event in events if "compile" in event]
        events.clear()
        EAGER[name](*second)
        assert [event for event in events if "compile" in event] == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Exports.


def exported(function, *args):
    structs = jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)), args)
    return export.deserialize(export.export(jax.jit(function))(*structs).serialize())


@pytest.mark.parametrize(
    "params",
    [
        *(cell.init(jax.random.key(0), I, H) for cell in (LSTM, GRU, RNN)),
        LSTMState(*jnp.ones((2, B))),
        LSTMGates(*jnp.ones((4, B))),
        STACK,
        init_stack(jax.random.key(0), GRU, I, [H], bidirectional=True),
        regularize.Locked(jnp.ones(2), jnp.ones(3), None),
        regularize.Noisy(jnp.ones(2), jnp.ones(3)),
        init_train_state(jnp.ones(3), optax.sgd(0.1), jax.random.key(0))._replace(opt_state=(), key=None),
        rtrl.init_rtrl(LSTM, STACK[0], (B,)),
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_what_takes_the_librarys_named_tuples_can_be_exported(params):
    double = lambda tree: jax.tree.map(lambda v: 2 * v, tree)
    got = exported(double, params).call(params)
    assert type(got) is type(params) and worst_error(got, double(params)) == 0


SYMBOLIC_BATCH, SYMBOLIC_TIME = export.symbolic_shape("b, t")
OF_ANY_SIZE = [
    (SYMBOLIC_TIME, Bulk()),
    *(
        pytest.param(time, gradient, marks=pytest.mark.ci)
        for time, gradient in [
            (SYMBOLIC_TIME, Bulk(block_size=2)),
            (SYMBOLIC_TIME, Scan()),
            (T, Chunked(2)),
            (T, Chunked()),
        ]
    ),
]


@pytest.mark.parametrize("time, gradient", OF_ANY_SIZE, ids=str)
def test_one_export_serves_every_batch_and_every_length(time, gradient):
    both = init_stack(jax.random.key(2), LSTM, I, [H, H], bidirectional=True, dtype="float64")

    def loss(params, xs, lengths):
        mask = length_mask(lengths, xs.shape[0])
        options = {"mask": mask, "reset": ~mask, "gradient": gradient, "dropout": 0.5, "key": jax.random.key(3)}
        return (unroll_stack(LSTM, params, xs, **options)[1] ** 2).sum()

    xs, lengths = jax.ShapeDtypeStruct((time, SYMBOLIC_BATCH, I), float), jax.ShapeDtypeStruct((SYMBOLIC_BATCH,), int)
    of_any = exported(jax.value_and_grad(loss), both, xs, lengths)
    args = (both, jnp.asarray(normal(0, T, B, I)), jnp.array([7, 0, 4]))
    assert worst_error(of_any.call(*args), jax.jit(jax.value_and_grad(loss))(*args)) < 1e-13


def test_chunks_need_a_known_number_of_steps():
    xs = jax.ShapeDtypeStruct((SYMBOLIC_TIME, SYMBOLIC_BATCH, I), float)
    with pytest.raises(ValueError, match=r"unroll: gradient=Chunked\(.*\) needs a known number of steps, got t"):
        export.export(jax.jit(lambda p, x: unroll(LSTM, p, x, gradient=Chunked())))(STACK[0], xs)


# Empty batches, and no steps.


@pytest.mark.parametrize("shape", some([(T, 0), (T, 2, 0), (0, B), (0, 0), (T, 0, 2)], (T, 0), (0, B)), ids=str)
@pytest.mark.parametrize(
    "gradient", ["bulk", *(pytest.param(g, marks=pytest.mark.ci) for g in ("scan", *MODES[1:]))], ids=str
)
def test_nothing_in_gives_nothing_out_and_a_gradient_of_0(shape, gradient):
    both = init_stack(jax.random.key(2), LSTM, I, [H, H], bidirectional=True, dtype="float64")
    xs, mask = jnp.ones((*shape, I)), jnp.ones(shape, bool)

    def run(params, xs):
        return unroll_stack(LSTM, params, xs, mask=mask, reset=mask, gradient=gradient)

    carries, ys = run(both, xs)
    assert ys.shape == (*shape, 2 * H) and carries[0].backward.c.shape == (*shape[1:], H)
    gradients = jax.grad(lambda params, xs: run(params, xs)[1].sum(), (0, 1))(both, xs)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def step_loss(y, t):
    return (y**2).sum()


def loss_of(ys):
    return (ys**2).sum()


def of_unroll(cell, params, xs):
    return jax.grad(lambda params: unroll(cell, params, xs)[1].sum())(params)


def trained(p, xs):
    step = make_train_step(lambda p, xs: loss_of(unroll(LSTM, p, xs)[1]), optax.sgd(0.1))
    return fit(step, init_train_state(p, optax.sgd(0.1), jax.random.key(0)), jnp.stack([xs, xs]))[0].params


# By name: a function of the parameters p of an LSTM, inputs xs, its carry c, and a mask m.
OF_NOTHING = {
    "lstm_bptt": lambda p, xs, c, m: jax.grad(lambda p: lstm_bptt(p, xs, c, mask=m)[1].sum())(p),
    "step_stack": lambda p, xs, c, m: step_stack(LSTM, [p], [c], jnp.ones((*c.h.shape[:-1], I))),
    "generate": lambda p, xs, c, m: generate(lambda s, x, k: (s, x), c, c.h, jax.random.key(0), len(xs)),
    "segment_resets": lambda p, xs, c, m: segment_resets(m.astype(int)),
    "dropout_mask": lambda p, xs, c, m: regularize.dropout_mask(jax.random.key(0), 0.5, m.shape),
    "zoneout": lambda p, xs, c, m: of_unroll(
        regularize.zoneout(LSTM, 0.1),
        p,
        regularize.Noisy(xs, regularize.zoneout_noise(jax.random.key(0), 0.1, c, len(xs))),
    ),
    "variational_dropout": lambda p, xs, c, m: of_unroll(
        regularize.variational_dropout(LSTM), regularize.Locked(p, h=jnp.ones_like(c.h)), xs
    ),
    "low_precision": lambda p, xs, c, m: of_unroll(low_precision(LSTM, "bfloat16"), p, xs),
    "rtrl_gradient": lambda p, xs, c, m: rtrl.rtrl_gradient(LSTM, p, xs, step_loss, mask=m),
    "snap1": lambda p, xs, c, m: rtrl.rtrl_gradient(
        LSTM, p, xs, step_loss, pattern=rtrl.snap1_pattern(LSTM, p, jnp.ones(I))
    ),
    "trace": lambda p, xs, c, m: diagnostics.trace(LSTM, p, xs),
    "jacobians": lambda p, xs, c, m: diagnostics.jacobian_products(diagnostics.carry_jacobians(LSTM, p, xs)),
    "term_shares": lambda p, xs, c, m: diagnostics.term_shares(diagnostics.cell_state_terms(p, xs)),
    "truncated_gradient": lambda p, xs, c, m: diagnostics.truncated_gradient(LSTM, p, xs, loss_of),
    "gradient_flow": lambda p, xs, c, m: diagnostics.gradient_flow(LSTM, p, xs, loss_of),
    "gradient_sources": lambda p, xs, c, m: diagnostics.gradient_sources(LSTM, p, xs, step_loss)[:4],
    "compare_gradients": lambda p, xs, c, m: diagnostics.compare_gradients(LSTM, p, xs, step_loss).gradients["bulk"],
    "gradient_error": lambda p, xs, c, m: diagnostics.gradient_error(xs, xs),
    "check_gradients": lambda p, xs, c, m: (
        diagnostics.check_gradients(lambda p: unroll(LSTM, p, xs)[1].sum(), p, key=jax.random.key(0)).worst.autodiff
    ),
    "fit": lambda p, xs, c, m: trained(p, xs),
}


@pytest.mark.parametrize("name", OF_NOTHING)
@jax.debug_key_reuse(False)
@jax.debug_nans(False)  # a relative error of nothing is 0 / 0 on the way
def test_every_function_takes_no_steps_and_an_empty_batch(name):
    params = draw(LSTM)[0]
    for shape in ((0, B), (T, 0)):
        xs, mask = jnp.ones((*shape, I)), jnp.ones(shape, bool)
        result = OF_NOTHING[name](params, xs, LSTM.initial_carry(params, shape[1:]), mask)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result) if np.asarray(leaf).dtype.kind == "f")


@jax.debug_nans(False)
def test_what_has_no_value_without_steps_says_so():
    with pytest.raises(ValueError, match="lyapunov_exponents: xs must have at least one step"):
        diagnostics.lyapunov_exponents(LSTM, draw(LSTM)[0], jnp.ones((0, B, I)))
    assert np.isnan(diagnostics.gradient_cosine(jnp.ones((0, 2)), jnp.ones((0, 2))))


@pytest.mark.parametrize("lengths", [[], (), np.array([]), np.zeros((0, 2), int), jnp.zeros(0, int)], ids=str)
def test_the_mask_of_no_lengths(lengths):
    assert length_mask(lengths, 4).shape == (4, *np.shape(lengths)) and length_mask(lengths, 4).dtype == bool
