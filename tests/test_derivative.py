"""The derivative rule against plain autodiff of the scan: every cell, every transformation, and its costs.

Other tests check the scan itself, by NumPy loops, complex steps and torch.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlstm import LSTM, Bulk, Cell, Chunked, Scan, unroll
from jaxlstm.bulk import How, run_in_bulk
from jaxlstm.masks import Steps, zeros_where_masked
from jaxlstm.tuning import Plan, make_plans, size_without_remainder

from cells import CELLS, HOLES, RESET, B, H, I, T, draw, normal, worst_error
from sweeps import some, sweep

OPEN = dataclasses.replace(LSTM, gates_jvp=None, name="open LSTM")  # the general rule on the LSTM's equations
ALL = {name: cell for name, (cell, _) in CELLS.items()} | {"open LSTM": OPEN}


@pytest.fixture(params=["gates again", "gates kept", "gates again, z in the loop"])
def kept(request):
    """A way to differentiate. The last one is how long sequences run: with z in the loop, because it names a size."""
    block_size = T if request.param.endswith("loop") else None
    return Bulk(block_size=block_size, keep_gates=request.param == "gates kept")


def unroll_by(plan, cell, params, xs, carry, *, mask=None, reset=None, reset_carry=None, reverse=False):
    """Do what `unroll` does after its checks, by a plan that it would not make for arrays this small."""
    initial = cell.initial_carry(params, xs.shape[1:-1])
    per_step = reset_carry is not None and jax.tree.leaves(reset_carry)[0].ndim > jax.tree.leaves(initial)[0].ndim
    steps = Steps(zeros_where_masked(mask, xs), mask, reset, reset_carry if per_step else None)
    reset_carry = None if per_step else initial if reset_carry is None else reset_carry
    return run_in_bulk(How(cell, plan, reverse), params, steps, carry, reset_carry)[:2]


def make_loss(cell, gradient, weight=None, **options):
    """Return a loss of (params, xs, carry), differentiated by a way to differentiate or by a plan."""
    weight = normal(50, T, B, H) if weight is None else weight
    by_plan = isinstance(gradient, Plan)
    run = functools.partial(unroll_by, gradient) if by_plan else functools.partial(unroll, gradient=gradient)

    def loss(params, xs, carry):
        last, ys = run(cell, params, xs, carry, **options)
        return (ys * weight).sum() + sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(last))

    return loss


def stacked(tree):
    return jax.tree.map(lambda v: jnp.stack([v, 0.7 * v]), tree)


def gradient(loss):
    return jax.grad(loss, (0, 1, 2))


def grad_of_grad(loss, params, xs, carry):
    """Reverse over reverse, along the gradient itself."""
    squares = lambda v: sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient(loss)(*v)))
    return jax.grad(squares)((params, xs, carry))


def in_outer_scan(loss, params, xs, carry):
    def total(params):
        return lax.scan(lambda s, x: (s + loss(params, x, carry), None), 0.0, stacked(xs))[0]

    return jax.grad(total)(params)


# Every one of (loss, params, xs, carry) -> a tree of numbers.
TRANSFORMS = {
    "value": lambda f, *v: f(*v),
    "grad": lambda f, *v: gradient(f)(*v),
    "grad, params alone": lambda f, *v: jax.grad(f)(*v),
    "grad, xs alone": lambda f, *v: jax.grad(f, 1)(*v),
    "grad, carry alone": lambda f, *v: jax.grad(f, 2)(*v),
    "jvp": lambda f, *v: jax.jvp(f, v, v)[1],
    "jvp of xs": lambda f, p, x, c: jax.jvp(lambda x: f(p, x, c), (x,), (x,))[1],
    "forward over reverse": lambda f, *v: jax.jvp(gradient(f), v, v)[1],
    "reverse over forward": lambda f, *v: gradient(lambda *u: jax.jvp(f, u, v)[1])(*v),
    "forward over forward": lambda f, *v: jax.jvp(lambda *u: jax.jvp(f, u, v)[1], v, v)[1],
    "reverse over reverse": grad_of_grad,
    "vmap over params": lambda f, p, x, c: jax.vmap(lambda p: gradient(f)(p, x, c))(stacked(p)),
    "vmap over data": lambda f, p, x, c: jax.vmap(lambda x: gradient(f)(p, x, c))(stacked(x)),
    "vmap over both": lambda f, *v: jax.vmap(gradient(f))(*stacked(v)),
    "checkpoint": lambda f, *v: gradient(jax.checkpoint(f))(*v),
    "outer scan": in_outer_scan,
    "closed-over params": lambda f, p, x, c: jax.grad(lambda s: f(jax.tree.map(lambda v: s * v, p), x, c))(0.9),
    "eager grad": lambda f, *v: gradient(f)(*v),
}


# z in the loop, gates computed again; z in pieces before the loop, gates kept, no checkpoint. The sweep draws the rest.
LONG_PLAN = Plan(T, merged_axes=2)  # `closed_form` has no effect on a cell without one
SHORT_PLAN = Plan(T, merged_axes=2, pieces=4, keep_gates=True, checkpoint_step=False)
WITH_GATES_KEPT = ("grad", "jvp", "forward over reverse", "reverse over reverse", "vmap over both")


@pytest.mark.parametrize("cell", [LSTM, pytest.param(ALL["leaky"], marks=pytest.mark.ci)], ids=["LSTM", "leaky"])
@pytest.mark.parametrize("transform", some(TRANSFORMS, "grad, xs alone", "eager grad", *WITH_GATES_KEPT))
def test_every_transformation_gives_the_result_of_the_scan(transform, cell):  # with a closed form, and without
    def result(cell, how):
        of = functools.partial(TRANSFORMS[transform], make_loss(cell, how, mask=HOLES, reset=RESET))
        return (of if transform == "eager grad" else jax.jit(of))(*draw(cell))

    scan = result(cell, "scan")
    for plan in (LONG_PLAN, SHORT_PLAN) if transform in WITH_GATES_KEPT and cell is LSTM else (LONG_PLAN,):
        assert worst_error(result(cell, plan), scan) < 1e-12, plan


@pytest.mark.parametrize("by", [jax.hessian, jax.jacfwd, jax.jacrev], ids=["hessian", "jacfwd", "jacrev"])
def test_jacobians_and_hessians_equal_those_of_the_scan(by, kept):
    params, xs, carry = draw(LSTM)
    loss = lambda how: lambda b: make_loss(LSTM, how, reset=RESET)(params._replace(b=b), xs, carry)
    outputs = lambda how: lambda b: unroll(LSTM, params._replace(b=b), xs, carry, gradient=how)[1]
    of = loss if by is jax.hessian else outputs
    assert worst_error(jax.jit(by(of(kept)))(params.b), jax.jit(by(of("scan")))(params.b)) < 1e-12


def test_per_example_gradients_add_up_to_the_gradient(kept):
    params, xs, carry = draw(LSTM)
    weight = normal(50, T, B, H)
    one = lambda x, c, w: jax.grad(make_loss(LSTM, kept, w))(params, x, c)
    each = jax.jit(jax.vmap(one, (1, 0, 1)))(xs, carry, weight)
    whole = jax.jit(jax.grad(make_loss(LSTM, "scan", weight)))(params, xs, carry)
    assert worst_error(jax.tree.map(lambda g: g.sum(0), each), whole) < 1e-13


@sweep("bulk gradients equal to those of the scan", 200)
def test_random_configurations_are_equal(trial, request):
    """Draw cell, mask, resets, direction, plan, batch rank and transformation; the shapes are a fixed few."""
    rng = np.random.default_rng([trial, request.config.getoption("--seed")])
    choose = lambda options: options[rng.integers(len(options))]
    name, transform = choose(list(ALL)), choose(list(TRANSFORMS))
    cell = ALL[name]
    params, xs, carry = draw(cell, seed=trial)
    options = {
        "mask": choose([None, HOLES]),
        "reset": choose([None, RESET]),
        "reverse": choose([False, True]),
    }
    if options["reset"] is not None:
        options["reset_carry"] = choose([None, jax.tree.map(lambda c: c - 1, carry), stacked_in_time(carry)])
    weight = normal(50, T, B, H)
    rank = choose(["one batch axis", "two", "none"])
    if rank != "one batch axis":
        reshape = (lambda v, axis: np.expand_dims(v, axis + 1)) if rank == "two" else (lambda v, axis: v.take(0, axis))
        xs, weight = (jnp.asarray(reshape(np.asarray(v), 1)) for v in (xs, weight))
        carry = jax.tree.map(lambda c: jnp.asarray(reshape(np.asarray(c), 0)), carry)
        options |= {k: reshape(options[k], 1) for k in ("mask", "reset") if options[k] is not None}
        if options.get("reset_carry") is not None:
            per_step = jax.tree.leaves(options["reset_carry"])[0].ndim > jax.tree.leaves(draw(cell)[2])[0].ndim
            back = lambda c: jnp.asarray(reshape(np.asarray(c), 1 if per_step else 0))
            options["reset_carry"] = jax.tree.map(back, options["reset_carry"])
    closed = cell.gates_jvp is not None
    plan = Plan(
        block_size=choose([2, 3, T]),
        merged_axes=choose([0, xs.ndim - 1]),
        pieces=choose([0, 1, params.b.shape[0] // H] if closed else [0, 1]),
        closed_form=closed,
        keep_gates=choose([False, closed]),
        checkpoint_step=choose([True, False]),
        unroll=choose([1, 2, T]),
    )
    how = choose(["bulk", Bulk(block_size=3), plan, plan, plan])
    bulk, scan = (
        jax.jit(functools.partial(TRANSFORMS[transform], make_loss(cell, how, weight, **options)))(params, xs, carry)
        for how in (how, "scan")
    )
    assert worst_error(bulk, scan) < 1e-12, (name, transform, rank, how, options)


def stacked_in_time(carry):
    return jax.tree.map(lambda c: jnp.stack([jnp.cos(c + t) for t in range(T)]), carry)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "leaky"])
def test_a_masked_gradient_has_two_loops_and_stores_no_flags_of_the_carrys_shape(name):
    params, xs, carry = draw(ALL[name])
    for options in ({}, {"mask": HOLES, "reset": RESET}):
        loss = make_loss(ALL[name], "bulk", **options)
        program = jax.jit(gradient(loss)).lower(params, xs, carry).as_text()
        assert program.count("stablehlo.while") == 2
        assert not re.search(rf"tensor<{T}x{B}x{H}xi1>", program)


def test_the_comparison_notices_a_wrong_closed_form():
    def wrong(params, state, gates):
        return LSTM.gates_jvp(params, state, gates._replace(f=gates.f * (1 + 1e-9)))

    params, xs, carry = draw(LSTM)
    broken = dataclasses.replace(LSTM, gates_jvp=wrong)
    got, want = (
        gradient(make_loss(LSTM if how == "scan" else broken, how))(params, xs, carry) for how in ("bulk", "scan")
    )
    assert 1e-12 < worst_error(got, want) < 1e-8


def test_z_need_not_consist_of_gates():
    """One cell's z is [time, 0]; the other's has a leaf [time], and its recurrent weight is a number."""
    w, xs = jnp.asarray(0.7), jnp.asarray(normal(1, 12, 5))
    for project, of_z in (
        (lambda w, xs: xs[..., :0], lambda z: 0.0),
        (lambda w, xs: (w * xs, jnp.sin(xs).sum(-1)), lambda z: z[0].sum() * z[1]),
    ):
        cell = Cell(
            init=lambda key, input_size, hidden_size: w,
            initial_carry=lambda w, batch_shape=(): jnp.zeros((*batch_shape, 3)),
            project=project,
            recur=lambda params, carry: None,
            gates=lambda w, s, z, a, of_z=of_z: (jnp.tanh(w * s + 0.1 + of_z(z)),) * 2,
        )

        def loop(w, project=project, of_z=of_z):
            s, total = jnp.zeros(3), 0.0
            for x in xs:
                s = jnp.tanh(w * s + 0.1 + of_z(project(w, x)))
                total += (s**2).sum()
            return total

        loss = lambda w, cell=cell: (unroll(cell, w, xs)[1] ** 2).sum()
        assert worst_error(jax.value_and_grad(loss)(w), jax.value_and_grad(loop)(w)) < 1e-13


def test_a_closed_form_needs_the_activations_it_reads():
    with pytest.raises(ValueError, match="Cell: half a cell has gates_jvp, which needs activations"):
        dataclasses.replace(LSTM, activations=None, name="half a cell")


def test_a_closed_form_without_a_recurrent_matmul():
    """z is two gates wide, as if it could be cut into pieces, but there is no a to add to them."""

    def activations(w, carry, z, a):
        return {"i": jax.nn.sigmoid(z[..., :H]), "g": jnp.tanh(z[..., H:])}

    def gates(w, carry, z, a):
        v = activations(w, carry, z, a)
        h = 0.5 * carry + v["i"] * v["g"]
        return h, h

    def linear(by_i, by_g, d_carry, d_z):
        d_h = 0.5 * d_carry + by_i * d_z[..., :H] + by_g * d_z[..., H:]
        return d_h, d_h

    def gates_jvp(w, carry, v):
        by_i, by_g = v["g"] * v["i"] * (1 - v["i"]), v["i"] * (1 - v["g"] ** 2)
        return jax.tree_util.Partial(linear, by_i, by_g)

    cell = Cell(
        init=None,
        initial_carry=lambda w, batch_shape=(): jnp.zeros((*batch_shape, H)),
        project=lambda w, xs: xs @ w,
        recur=lambda w, carry: None,
        gates=gates,
        activations=activations,
        gates_jvp=gates_jvp,
    )
    w, xs = jnp.asarray(normal(1, I, 2 * H)), jnp.asarray(normal(2, T, B, I))
    loss = lambda w, how: (unroll(cell, w, xs, gradient=how)[1] ** 2).sum()
    bulk, scan = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(w, how) for how in ("bulk", "scan"))
    assert worst_error(bulk, scan) < 1e-13


def test_gates_that_read_parameters_are_not_differentiated_by_the_closed_form():
    def gates(params, state, z, a):
        state, h = LSTM.gates(params, state, z, a)
        return state, h + params.b[None, :H]

    cell = dataclasses.replace(LSTM, gates=gates)  # keeps the LSTM's closed form, which knows nothing of b
    got, want = (jax.jit(gradient(make_loss(cell, how)))(*draw(LSTM)) for how in ("bulk", "scan"))
    assert worst_error(got, want) < 1e-12


# How a recurrence is run.


def plans_of(cell, shape, gradient=None, hidden=64):
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), I, hidden))
    carry = jax.eval_shape(lambda p: cell.initial_carry(p, shape[1:]), params)
    return make_plans(cell, params, Steps(jax.ShapeDtypeStruct((*shape, I), "float32")), carry, gradient or Bulk())


def on_a_cpu(*args, **kwargs):
    return plans_of(*args, **kwargs).on_a_cpu


def elsewhere(*args, **kwargs):
    return plans_of(*args, **kwargs).elsewhere


def test_the_plans_depend_on_size_cell_and_what_the_caller_asks_for():
    short, long = (100, 16), (5000, 16)  # 1.6 and 82 MB of z
    assert on_a_cpu(LSTM, short) == Plan(merged_axes=2, pieces=4, keep_gates=True)
    size = on_a_cpu(LSTM, long).block_size
    assert on_a_cpu(LSTM, long) == Plan(size, merged_axes=2)
    assert 100 <= size <= 250  # some 3 MB
    assert on_a_cpu(LSTM, (450, 16)).pieces == 4 and on_a_cpu(LSTM, (550, 16)).pieces == 0  # 7.4 and 9 MB
    assert on_a_cpu(LSTM, (4000, 16)).keep_gates and not on_a_cpu(LSTM, (4200, 16)).keep_gates  # 65.5 and 68.8 MB
    gru = on_a_cpu(ALL["GRU"], short)
    assert (gru.pieces, gru.closed_form, gru.keep_gates) == (0, False, False)
    assert on_a_cpu(LSTM, short, Bulk(block_size=10)) == Plan(10, keep_gates=True)

    assert elsewhere(LSTM, short) == Plan(pieces=1, unroll=5)
    assert elsewhere(LSTM, (4096, 16)) == Plan(pieces=1, unroll=4)  # 64 MB
    assert elsewhere(LSTM, long) == Plan(625, pieces=1, unroll=5)  # an eighth
    assert elsewhere(LSTM, (101, 16)).unroll == 6  # none of 4, 5 and 6 divides 101
    assert elsewhere(LSTM, long, Bulk(block_size=8)) == Plan(8, pieces=1, unroll=4)
    for keep in (False, True):
        for shape in (short, long):
            assert [plan.keep_gates for plan in plans_of(LSTM, shape, Bulk(keep_gates=keep))[:2]] == [keep, keep]


def test_z_may_be_one_number_per_step():
    cell = Cell(
        name="sum",
        init=lambda *_: {"w": jnp.ones(())},
        initial_carry=lambda params, batch_shape=(): jnp.zeros(()),
        project=lambda params, xs: xs * params["w"],
        recur=lambda params, carry: carry * params["w"],
        gates=lambda params, carry, z, a: (jnp.tanh(z + a), z + a),
    )
    xs = jnp.asarray(normal(3, T))
    loss = lambda how: lambda params: unroll(cell, params, xs, jnp.zeros(()), gradient=how)[1].sum()
    gradients = [jax.grad(loss(how))({"w": jnp.asarray(0.7)}) for how in ("bulk", "scan")]
    assert worst_error(*gradients) < 1e-13


def test_wide_layers_keep_the_gates_longer():
    assert on_a_cpu(LSTM, (3000, 8), hidden=512).keep_gates and not on_a_cpu(LSTM, (3000, 8), hidden=500).keep_gates
    assert on_a_cpu(LSTM, (32000, 1), hidden=512).keep_gates and not on_a_cpu(LSTM, (33000, 1), hidden=512).keep_gates


@pytest.mark.parametrize(
    "shape, hidden, size",
    [
        ((1000, 16), 128, 50),  # 3 MB are 96 steps, and 50 divide 1000
        ((100, 64), 512, 10),  # 3 MB are 6 steps of 64 rows; 1024 rows are 16, and 10 divide 100
        ((64, 2048), 1024, 4),  # never less than four steps
        ((190, 16), 128, None),  # less than two blocks
    ],
)
def test_on_a_cpu_a_block_fills_the_cache_and_its_matmuls_are_not_small(shape, hidden, size):
    assert on_a_cpu(LSTM, shape, hidden=hidden).block_size == size


@pytest.mark.parametrize("num_steps, keep_gates, barrier", [(T, None, False), (90_000, None, False), (T, False, True)])
def test_a_barrier_is_only_where_nothing_else_keeps_xla_from_merging_the_passes(num_steps, keep_gates, barrier):
    params = draw(LSTM)[0]
    loss = lambda p, x: unroll(LSTM, p, x, gradient=Bulk(keep_gates=keep_gates))[1].sum()
    program = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((num_steps, 16, I))).as_text()
    assert ("optimization_barrier" in program) == barrier


def test_blocks_have_the_size_that_the_caller_names():
    params, xs, carry = draw(LSTM)
    loss = lambda p, how: unroll(LSTM, p, xs, carry, gradient=how)[1].sum()
    text = lambda size: str(jax.make_jaxpr(jax.grad(lambda p: loss(p, Bulk(block_size=size))))(params))
    assert "length=2" in text(3) and "length=3" in text(3)  # T = 7: two blocks of three steps, and one step
    assert "length=2" not in text(T)


def test_chunks_are_differentiated_as_within_says():
    params, xs, carry = draw(LSTM)
    run = lambda within: lambda p: unroll(LSTM, p, xs, carry, gradient=Chunked(3, within=within))[1].sum()
    forward = lambda within: str(jax.make_jaxpr(run(within))(params))
    backward = lambda within: str(jax.make_jaxpr(jax.grad(run(within)))(params))
    assert "custom_jvp_call" in forward(Bulk()) and "custom_jvp_call" not in forward(Scan())
    assert backward(Bulk(block_size=1)) != backward(Bulk(block_size=3)) != backward(Scan())


# What is kept, and what is in the loops.


def test_keep_gates_keeps_the_gates(kept):
    params, xs, carry = draw(LSTM)
    _, pullback = jax.vjp(lambda p, x: unroll(LSTM, p, x, carry, gradient=kept)[1], params, xs)
    in_time = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.shape == (T, B, H)]
    assert len(in_time) >= (6 if kept.keep_gates else 2)  # h, c and i, f, g, o; or h, c
    assert kept.keep_gates or len(in_time) < 6


@pytest.mark.parametrize("cell", ALL.values(), ids=ALL)
def test_no_residual_has_a_time_axis_and_a_weights_shape(cell, kept):
    params, xs, carry = draw(cell)
    _, pullback = jax.vjp(lambda p, x: unroll(cell, p, x, carry, mask=HOLES, gradient=kept)[1], params, xs)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert any(shape[:2] == (T, B) for shape in shapes)
    assert not [
        s for s in shapes if any(s[-len(w) :] == w and s[: -len(w)] in ((T,), (T, B)) for w in weights if len(w) > 1)
    ]
    assert not [s for s in shapes if s[:1] == (T,) and s[1:] in weights]


def test_blocks_keep_only_the_input_and_the_carry():
    params, xs, carry = draw(LSTM)
    _, pullback = jax.vjp(lambda p, x: unroll_by(LONG_PLAN, LSTM, p, x, carry)[1], params, xs)
    in_time = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.ndim and T in leaf.shape[:1]]
    assert sorted(in_time) == [(T, B, H), (T, B, H), (T, B, I)]  # h, c, x


@pytest.mark.parametrize("plan, names", [(LONG_PLAN, "hc"), (SHORT_PLAN, "hcifgo")], ids=["gates again", "gates kept"])
def test_a_custom_policy_can_save_kept_values_by_name(plan, names):
    """Under `jax.checkpoint` the forward loop is run again, unless the policy saves what the backward pass reads."""
    params, xs, carry = draw(LSTM)

    def loops(of_ys, *names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        loss = jax.checkpoint(lambda p: of_ys(unroll_by(plan, LSTM, p, xs, carry)[1]).sum(), policy=policy)
        return jax.jit(jax.value_and_grad(loss)).lower(params).compile().as_text().count(" while(")

    for of_ys, read in ((lambda ys: 2 * ys, ""), (jnp.sin, "y")):
        assert loops(of_ys) == 3  # forward, forward again, backward
        assert loops(of_ys, *names, *read) == 2


@pytest.fixture(scope="module")
def sharded_program():
    """The gradient of a batch sharded over two devices, compiled."""
    params, _, _ = draw(LSTM, dtype=np.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = (NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data")))
    loss = lambda p, x: (unroll(LSTM, p, x, gradient=Bulk(block_size=11))[1] ** 2).sum()
    program = jax.jit(jax.grad(loss, (0, 1)), in_shardings=shardings)
    return program.lower(params, jnp.zeros((11, 4, I), np.float32)).compile().as_text()


def test_no_collective_is_inside_a_loop_when_the_batch_is_sharded(sharded_program):
    collective = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)")
    computations = {
        text.split()[text.startswith("ENTRY")]: text for text in re.split(r"\n(?=%|ENTRY)", sharded_program)
    }
    in_loops = set(re.findall(r"body=(%[\w.-]+)", sharded_program))
    assert in_loops
    while called := {name for loop in in_loops for name in re.findall(r"%[\w.-]+", computations[loop])} & (
        computations.keys() - in_loops
    ):
        in_loops |= called
    assert not [name for name in in_loops if collective.search(computations[name])]
    assert [name for name in computations.keys() - in_loops if collective.search(computations[name])]  # the sums


def test_a_mesh_in_use_makes_blocks_large():
    params, _, _ = draw(LSTM)
    carry = LSTM.initial_carry(params, (64,))
    plans = lambda steps: make_plans(LSTM, params, Steps(jnp.zeros((steps, 64, I))), carry, Bulk())
    assert plans(3000).on_a_cpu.block_size < 1000 and plans(3000).on_a_cpu.merged_axes == 2
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert plans(3000)[:2] == (Plan(keep_gates=True), Plan(pieces=1, unroll=6))
        # 64 MB hold 8192 steps. A longer sequence is cut into eight blocks.
        assert [[plan.block_size for plan in plans(size)[:2]] for size in (8000, 40_000)] == [[None] * 2, [5000] * 2]


@pytest.mark.parametrize("most, size", [(4, 4), (7, 5), (16, 10), (3, 2)])
def test_blocks_divide_the_sequence_where_they_can(most, size):
    assert size_without_remainder(20, most) == size
    assert size_without_remainder(997, most) == most


# Memory and compile time, as compiled programs state them.

WIDE = (2000, 16, 256, 256)


@functools.cache
def temporaries(run, shape=WIDE):
    num_steps, batch, input_size, hidden = shape
    params = jax.eval_shape(lambda: LSTM.init(jax.random.key(0), input_size, hidden))
    xs = jax.ShapeDtypeStruct((num_steps, batch, input_size), np.float32)
    weight = jax.eval_shape(run, params, xs)
    loss = lambda p, x, w: ((run(p, x) - w) ** 2).sum()
    return jax.jit(jax.grad(loss, (0, 1))).lower(params, xs, weight).compile().memory_analysis().temp_size_in_bytes


def plain_scan(params, xs):
    """The fifteen lines everyone writes."""
    carry = LSTM.initial_carry(params, xs.shape[1:2])
    return lax.scan(lambda carry, x: LSTM.step(params, carry, x), carry, xs)[1]


def bulk(params, xs):
    return unroll(LSTM, params, xs)[1]


def chunked(params, xs):
    return unroll(LSTM, params, xs, gradient=Chunked())[1]


def test_temporaries_are_a_fraction_of_the_plain_scans():
    plain = temporaries(plain_scan)
    assert temporaries(bulk) <= 0.45 * plain
    assert temporaries(chunked) <= 0.20 * plain


def test_the_chunked_gradient_keeps_less_per_step_than_one_carry():
    num_steps, batch, _, hidden = WIDE
    growth = (temporaries(chunked) - temporaries(chunked, (500, *WIDE[1:]))) / (num_steps - 500)
    assert growth < 4 * batch * hidden * 2.2  # the outputs and their cotangents, which this loss reads itself


def test_the_chunked_gradient_of_the_last_carry_grows_with_the_root_of_the_steps():
    def last(params, xs):
        return unroll(LSTM, params, xs, gradient=Chunked())[0].h

    sizes = [temporaries(last, (num_steps, *WIDE[1:])) for num_steps in (500, 2000, 8000)]
    assert sizes[2] - sizes[1] < 3 * (sizes[1] - sizes[0])  # 2 times for the root, 4 times for linear growth
