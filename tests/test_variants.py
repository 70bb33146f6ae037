"""The LSTM family keeps the contract of every cell, equals NumPy loops, and reduces to the LSTM where it should."""

import dataclasses
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxlstm import (
    LSTM,
    Chunked,
    LSTMParams,
    diagnostics,
    init_bidirectional,
    init_stack,
    low_precision,
    num_params,
    regularize,
    unroll,
    unroll_bidirectional,
    unroll_stack,
    variants,
)

import oracles
from cells import CELLS, FAMILY, HOLES, RESET, B, H, I, T, draw, normal, worst_error
from sweeps import some

ALL = CELLS | FAMILY
IN_MAKE_TEST = ("peephole", "projected", "1997")
every_cell = pytest.mark.parametrize("name", some(ALL, *IN_MAKE_TEST))
SHAPES = {
    "peephole": {"w_ih": (I, 16), "w_hh": (H, 16), "b": (16,), "p": (12,)},
    "no input gate": {"w_ih": (I, 12), "w_hh": (H, 12), "b": (12,), "p": (8,)},
    "no forget gate": {"w_ih": (I, 12), "w_hh": (H, 12), "b": (12,), "p": (8,)},
    "no output gate": {"w_ih": (I, 12), "w_hh": (H, 12), "b": (12,), "p": (8,)},
    "no input activation": {"w_ih": (I, 16), "w_hh": (H, 16), "b": (16,), "p": (12,)},
    "no output activation": {"w_ih": (I, 16), "w_hh": (H, 16), "b": (16,), "p": (12,)},
    "full gate recurrence": {"w_ih": (I, 16), "w_hh": (H, 16), "w_gates": (12, 12), "b": (16,), "p": (12,)},
    "coupled": {"w_ih": (I, 12), "w_hh": (H, 12), "b": (12,)},
    "layer norm": {
        "w_ih": (I, 16),
        "w_hh": (H, 16),
        "b": (16,),
        "scale_x": (16,),
        "scale_h": (16,),
        "scale_c": (4,),
        "shift_c": (4,),
    },
    "projected": {"w_ih": (I, 16), "w_hh": (2, 16), "b": (16,), "w_hr": (H, 2)},
    "projected, 3": {"w_ih": (I, 16), "w_hh": (3, 16), "b": (16,), "w_hr": (H, 3)},
    "1997": {"w_ih": (I, 8), "w_hh": (8, 8), "b": (8,)},
    "1997, alone": {"w_ih": (I, 12), "w_hh": (12, 12), "b": (12,)},
    "sLSTM": {"w_ih": (I, 16), "w_hh": (H, 16), "b": (16,)},
}


def weight_of(ys):
    return normal(50, *ys.shape)


def loss_of(cell, gradient="bulk", **options):
    def loss(params, xs, carry):
        last, ys = unroll(cell, params, xs, carry, gradient=gradient, **options)
        return (ys * weight_of(ys)).sum() + sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(last))

    return loss


def with_params_as_a_list(cell):
    params, xs, carry = draw(cell)
    return params, xs, carry, [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("name", some(FAMILY, *IN_MAKE_TEST))
def test_values_and_gradients_equal_those_of_a_numpy_loop(name):
    """With a mask and resets, in both modes; the loop's gradient is taken by complex steps."""
    cell, step = FAMILY[name]
    params, xs, carry, leaves = with_params_as_a_list(cell)
    zero = tuple(np.asarray(leaf) for leaf in cell.initial_carry(params, (B,)))

    def loop(*variables):
        of_params, of_xs, of_carry = variables[: len(leaves)], variables[len(leaves)], variables[len(leaves) + 1 :]
        last, ys = oracles.loop(step, of_params, of_xs, of_carry, mask=HOLES, reset=RESET, reset_carry=zero)
        return (ys * weight_of(ys)).sum() + sum(np.sin(leaf).sum() for leaf in last)

    variables = [*leaves, np.asarray(xs), *map(np.asarray, carry)]
    want = loop(*variables), oracles.complex_step_gradient(loop, variables)
    for how in ("bulk", "scan", Chunked(3)):
        value, gradients = jax.jit(jax.value_and_grad(loss_of(cell, how, mask=HOLES, reset=RESET), (0, 1, 2)))(
            params, xs, carry
        )
        assert worst_error(value, want[0]) < 1e-12
        assert worst_error(jax.tree.leaves(gradients), want[1]) < 1e-12, how
    # A central difference of the library's own loss along a random direction, for those who trust no complex steps.
    arguments, tree = jax.tree.flatten((params, xs, carry))
    direction = [normal(60 + k, *leaf.shape) for k, leaf in enumerate(arguments)]
    loss = jax.jit(loss_of(cell, mask=HOLES, reset=RESET))
    up, down = (loss(*jax.tree.unflatten(tree, [v + e * d for v, d in zip(arguments, direction, strict=True)]))
                for e in (2e-6, -2e-6))  # fmt: skip
    slope = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradients), direction, strict=True))
    assert worst_error((up - down) / 4e-6, slope) < 1e-8


@every_cell
def test_second_derivatives_are_equal_in_both_modes(name):
    cell = ALL[name][0]
    arguments = draw(cell)

    def second(how):
        gradient = jax.grad(loss_of(cell, how), (0, 1, 2))
        return jax.jit(lambda *v: jax.jvp(gradient, v, v)[1])(*arguments)

    assert worst_error(second("bulk"), second("scan")) < 1e-12


@every_cell
def test_a_batch_is_vmapped_sequences_and_steps_are_a_sequence(name):
    cell = ALL[name][0]
    params, xs, carry = draw(cell)
    last, ys = unroll(cell, params, xs, carry)
    one = functools.partial(unroll, cell, params)
    assert worst_error(jax.vmap(one, (1, 0), (0, 1))(xs, carry), (last, ys)) < 1e-14
    for x, y in zip(xs, ys, strict=True):
        carry, stepped = cell.step(params, carry, x)
        assert worst_error(stepped, y) < 1e-13
    assert worst_error(carry, last) < 1e-13


@every_cell
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_and_shapes_stay_what_they_are(name, dtype):
    cell = ALL[name][0]
    parameters = inspect.signature(cell.init).parameters
    assert [*parameters][:3] == ["key", "input_size", "hidden_size"]
    params = cell.init(jax.random.key(0), I, H, dtype=dtype)
    if name in SHAPES:
        assert {field: leaf.shape for field, leaf in params._asdict().items()} == SHAPES[name]
    carry = cell.initial_carry(params, (B,))
    traces = []

    @jax.jit
    def run(params, xs):
        traces.append(1)
        return jax.value_and_grad(lambda p: unroll(cell, p, xs)[1].astype("float32").sum())(params), unroll(
            cell, params, xs
        )

    for seed in (0, 1):
        (_, gradient), (last, ys) = run(params, jnp.asarray(normal(seed, T, B, I), dtype))
    assert len(traces) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient, last, ys))} == {jnp.dtype(dtype)}
    assert [leaf.shape for leaf in jax.tree.leaves(last)] == [leaf.shape for leaf in jax.tree.leaves(carry)]
    assert np.isfinite(np.asarray(ys, "float32")).all() and np.abs(np.asarray(ys, "float32")).max() > 0


@every_cell
def test_a_gradient_is_exported_for_any_batch(name):
    cell = ALL[name][0]
    params, xs, _ = draw(cell)
    run = jax.jit(jax.grad(lambda p, xs: (unroll(cell, p, xs)[1] ** 2).sum()))
    (batch,) = export.symbolic_shape("batch")
    leaves, treedef = jax.tree.flatten(params)
    flat = jax.jit(lambda leaves, xs: jax.tree.leaves(run(treedef.unflatten(leaves), xs)))
    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    saved = export.export(flat)(structs, jax.ShapeDtypeStruct((T, batch, I), xs.dtype)).serialize()
    assert worst_error(export.deserialize(bytearray(saved)).call(leaves, xs), jax.tree.leaves(run(params, xs))) < 1e-12


@every_cell
def test_layers_and_regularizers_take_every_cell(name):
    cell = ALL[name][0]
    xs = jnp.asarray(normal(3, T, B, I))
    pair = init_bidirectional(jax.random.key(1), cell, I, H, dtype="float64")
    both = unroll_bidirectional(cell, pair, xs, mask=HOLES)[1]
    forward = unroll(cell, pair.forward, xs, mask=HOLES)[1]
    backward = unroll(cell, pair.backward, xs, mask=HOLES, reverse=True)[1]
    assert worst_error(both, jnp.concatenate([forward, backward], -1)) < 1e-14

    layers = init_stack(jax.random.key(2), cell, I, [H, 6], dtype="float64")
    below = unroll(cell, layers[0], xs)[1]
    assert worst_error(unroll_stack(cell, layers, xs)[1], unroll(cell, layers[1], below)[1]) < 1e-14

    params, xs, carry = draw(cell)
    hold_all = jax.tree.map(lambda leaf: jnp.ones((T, *leaf.shape), bool), carry)
    output = lambda carry: jax.tree.leaves(carry)[0]
    held, _ = unroll(regularize.zoneout(cell, 0.5, output=output), params, regularize.Noisy(xs, hold_all), carry)
    assert worst_error(held, carry) == 0

    rounded = unroll(low_precision(cell, "bfloat16"), params, xs, carry)[1]
    assert 0 < worst_error(rounded, unroll(cell, params, xs, carry)[1]) < 0.3


@pytest.mark.parametrize("name", some(FAMILY, *IN_MAKE_TEST))
def test_a_trace_has_the_carries_and_gates_of_every_step(name):
    cell = ALL[name][0]
    params, xs, carry = draw(cell)
    traced, (last, _) = diagnostics.trace(cell, params, xs, carry), unroll(cell, params, xs, carry)
    assert worst_error(jax.tree.map(lambda leaf: leaf[-1], traced.carry), last) < 1e-14
    z = cell.project(params, xs[0])
    gates = cell.activations(params, carry, z, cell.recur(params, carry))
    assert worst_error(jax.tree.map(lambda leaf: leaf[0], traced.gates), gates) < 1e-14


@pytest.mark.ci
@pytest.mark.parametrize("name", ["peephole", "projected", "full gate recurrence", "sLSTM"])
def test_every_method_computes_the_same_gradient(name):
    cell = FAMILY[name][0]
    params, xs, carry = draw(cell)
    found = diagnostics.compare_gradients(cell, params, xs, lambda y, t: (y**2).sum(), carry=carry, by_step=False)
    assert found.agree, str(found)


@every_cell
def test_parameters_and_carry_may_be_donated(name):
    cell = ALL[name][0]
    params = cell.init(jax.random.key(0), I, H, dtype="float64")
    fresh = jax.tree.map(jnp.copy, (params, cell.initial_carry(params, (B,))))
    step = jax.jit(lambda params, carry, x: (params, cell.step(params, carry, x)), donate_argnums=(0, 1))
    x = jnp.asarray(normal(3, B, I))
    assert worst_error(step(params, cell.initial_carry(params, (B,)), x)[1], cell.step(*fresh, x)) < 1e-14


# What a cell is in a special case.


def lstm_case():
    params, xs, carry = draw(LSTM)
    return params, xs, carry, unroll(LSTM, params, xs, carry)


def test_without_peepholes_it_is_the_lstm():
    params, xs, carry, want = lstm_case()
    peephole = variants.PeepholeParams(*params, p=jnp.zeros(3 * H))
    assert worst_error(unroll(variants.PeepholeLSTM, peephole, xs, carry), want) < 1e-14
    zero = jnp.zeros((B, H))
    full = variants.FullGateRecurrenceParams(params.w_ih, params.w_hh, jnp.zeros((12, 12)), params.b, jnp.zeros(12))
    state = variants.FullGateRecurrenceState(*carry, zero, zero, zero)
    last, ys = unroll(variants.FullGateRecurrenceLSTM, full, xs, state)
    assert worst_error((last.h, last.c, ys), (*want[0], want[1])) < 1e-14


def test_with_the_identity_as_projection_it_is_the_lstm():
    params, xs, carry, want = lstm_case()
    projected = variants.ProjectedParams(*params, w_hr=jnp.eye(H))
    assert worst_error(unroll(variants.ProjectedLSTM, projected, xs, carry), want) < 1e-14


def test_coupled_gates_are_an_lstm_whose_forget_gate_has_the_negative_weights():
    coupled, xs, carry = draw(variants.CoupledLSTM)

    def widened(leaf):
        i, g, o = jnp.split(leaf, 3, axis=-1)
        return jnp.concatenate([i, -i, g, o], axis=-1)

    want = unroll(LSTM, LSTMParams(*map(widened, coupled)), xs, carry)
    assert worst_error(unroll(variants.CoupledLSTM, coupled, xs, carry), want) < 1e-14


@pytest.mark.parametrize("gate, cell", list(zip("ifo", list(FAMILY.values())[1:4], strict=True)))
def test_without_a_gate_it_is_the_peephole_lstm_with_that_gate_open(gate, cell):
    full, xs, carry = draw(variants.PeepholeLSTM)
    k, at = "ifgo".index(gate), "ifo".index(gate)
    without = lambda leaf, n, k: jnp.delete(leaf, jnp.arange(k * H, (k + 1) * H), axis=-1)
    fewer = variants.PeepholeParams(*(without(leaf, 4, k) for leaf in full[:3]), p=without(full.p, 3, at))
    opened = full._replace(
        w_ih=full.w_ih.at[:, k * H : (k + 1) * H].set(0),
        w_hh=full.w_hh.at[:, k * H : (k + 1) * H].set(0),
        b=full.b.at[k * H : (k + 1) * H].set(80.0),
        p=full.p.at[at * H : (at + 1) * H].set(0),
    )
    assert worst_error(unroll(cell[0], fewer, xs, carry), unroll(variants.PeepholeLSTM, opened, xs, carry)) < 1e-14


def test_a_layer_norm_does_not_see_the_size_of_its_weights():
    params, xs, carry = draw(variants.LayerNormLSTM)
    sized = lambda by_x, by_h: params._replace(w_ih=by_x * params.w_ih, w_hh=by_h * params.w_hh)
    outputs = [unroll(variants.LayerNormLSTM, p, xs, carry)[1] for p in (sized(100, 100), sized(300, 700))]
    assert worst_error(*outputs) < 1e-6  # up to the 1e-5 beside the variance


def test_slstm_equals_its_definition_without_the_stabilizer():
    params, xs, _ = draw(variants.SLSTM)
    ys = unroll(variants.SLSTM, params, xs)[1]
    for row in range(B):
        h, c, n = np.zeros(H), np.zeros(H), np.zeros(H)
        for t in range(T):
            z_i, z_f, z_g, z_o = np.split(xs[t, row] @ params.w_ih + h @ params.w_hh + params.b, 4)
            c = oracles.sigmoid(z_f) * c + np.exp(z_i) * np.tanh(z_g)
            n = oracles.sigmoid(z_f) * n + np.exp(z_i)
            h = oracles.sigmoid(z_o) * c / n
            np.testing.assert_allclose(ys[t, row], h, rtol=1e-12)


def test_slstm_stays_finite_where_its_gates_would_overflow():
    params = variants.SLSTM.init(jax.random.key(0), I, H)
    for shift in (-1e4, 1e4):
        far = params._replace(b=jnp.concatenate([jnp.full(2 * H, shift), params.b[2 * H :]]).astype("float32"))
        run = jax.value_and_grad(lambda p: unroll(variants.SLSTM, p, jnp.ones((T, B, I), "float32"))[1].sum())
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(run(far)))


# Gates forced open or shut by large biases.

OPEN, SHUT = 100.0, -100.0


def forced(cell, gates, **biases):
    """Draw parameters whose gates are what the biases say, whatever the input."""
    params, xs, carry = draw(cell)
    columns = jnp.concatenate([jnp.full(H, float(gate not in biases)) for gate in gates])
    b = jnp.concatenate([jnp.full(H, biases.get(gate, 0.3)) for gate in gates])
    changed = {"w_ih": params.w_ih * columns[None], "w_hh": params.w_hh * columns[None], "b": b}
    if hasattr(params, "p"):
        changed["p"] = jnp.zeros_like(params.p)
    return params._replace(**changed), xs, carry


@pytest.mark.parametrize("name", ["peephole", "no output gate", "no output activation", "projected"])
def test_a_cell_holds_c_when_only_the_forget_gate_is_open(name):
    cell = FAMILY[name][0]
    gates = {"no output gate": "ifg"}.get(name, "ifgo")
    params, xs, carry = forced(cell, gates, i=SHUT, f=OPEN)
    assert worst_error(unroll(cell, params, xs, carry)[0].c, carry.c) < 1e-14
    if "o" in gates:
        params, xs, carry = forced(cell, gates, o=SHUT)
        assert float(jnp.abs(unroll(cell, params, xs, carry)[1]).max()) < 1e-30  # puts nothing out
    params, xs, carry = forced(cell, gates, i=SHUT, f=SHUT)
    assert float(jnp.abs(unroll(cell, params, xs, carry)[0].c).max()) < 1e-30  # forgets at once


def test_coupled_gates_hold_or_replace():
    cell = variants.CoupledLSTM
    params, xs, carry = forced(cell, "igo", i=SHUT)
    assert worst_error(unroll(cell, params, xs, carry)[0].c, carry.c) < 1e-14
    params, xs, carry = forced(cell, "igo", i=OPEN)
    traced = diagnostics.trace(cell, params, xs, carry)
    assert worst_error(traced.carry.c, traced.gates.g) < 1e-14


# The original.


@pytest.mark.parametrize("inputs, outputs, weights", [(2, 1, 93), (8, 4, 156)])
def test_the_nets_of_1997_have_the_papers_number_of_weights(inputs, outputs, weights):
    params = variants.make_lstm_1997(block_size=2).init(jax.random.key(0), inputs, 4)
    readout = {"w": jnp.zeros((4, outputs)), "b": jnp.zeros(outputs)}
    assert num_params(params) + num_params(readout) == weights


def test_the_truncated_gradient_of_1997_is_that_with_all_unit_outputs_held_fixed():
    """The NumPy loop reads the outputs of all units from an ordinary run, so no derivative passes through them."""
    cell = variants.make_lstm_1997(2, truncate=True)
    params, xs, carry, leaves = with_params_as_a_list(cell)
    step, numbers = oracles.lstm_1997_step(2), [np.asarray(leaf) for leaf in carry]
    fixed = []
    for row in range(B):
        state, fixed_row = tuple(leaf[row] for leaf in numbers), []
        for t in range(T):
            fixed_row.append(state)
            state, _ = step(leaves, state, np.asarray(xs)[t, row])
        fixed.append(fixed_row)

    def loop(*of_params):
        total = 0
        for row in range(B):
            c = numbers[1][row]
            for t in range(T):
                h, _, i, o = fixed[row][t]
                (_, c, _, _), y = step(of_params, (h, c, i, o), np.asarray(xs)[t, row])
                total = total + (y * normal(50, T, B, H)[t, row]).sum()
        return total

    def loss(params, how):
        return (unroll(cell, params, xs, carry, gradient=how)[1] * normal(50, T, B, H)).sum()

    want = oracles.complex_step_gradient(loop, leaves)
    for how in ("bulk", "scan"):
        assert worst_error(jax.tree.leaves(jax.grad(loss)(params, how)), want) < 1e-12
    full = jax.grad(lambda p: (unroll(variants.make_lstm_1997(2), p, xs, carry)[1] * normal(50, T, B, H)).sum())(params)
    assert worst_error(jax.tree.leaves(full), want) > 1e-3


@pytest.mark.ci
@pytest.mark.documented
def test_the_page_has_the_cells_costs_and_examples_that_are_right():
    """The examples compute what plain loops compute, in float64; the page holds the table that its program prints."""
    page = Path(__file__).parents[1] / "docs" / "variants.md"
    printed = subprocess.run([sys.executable, "docs/cells.py"], cwd=page.parents[1], capture_output=True, text=True)
    assert printed.stdout.count("\n") == 17 and printed.stdout in page.read_text(encoding="utf-8")
    made = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)), made)
    with jax.enable_x64(True):
        xs = jnp.asarray(np.abs(normal(1, T, B, I)))
        weight = normal(2, T, B, H)
        for smallest, parts in ((made["MinLSTM"], made["min_lstm"]), (made["MinGRU"], made["min_gru"])):
            params = smallest.init(jax.random.key(0), I, H, dtype="float64")
            gradients = [
                jax.grad(lambda p, run=run: (run(p) * weight).sum())(params)
                for run in (
                    lambda p, cell=smallest: unroll(cell, p, xs)[1],
                    lambda p, parts=parts: made["in_parallel"](parts, p, xs),
                )
            ]
            assert worst_error(*gradients) < 1e-12
        # minGRU against its definition, h_t = (1 - u) h_{t-1} + u (x W + b), step by step.
        h, (w_u, w), b = np.zeros((B, H)), np.split(np.asarray(params["w_ih"]), 2, -1), normal(4, 2 * H)
        params, hs = params | {"b": jnp.asarray(b)}, []
        for x in np.asarray(xs):
            u = oracles.sigmoid(x @ w_u + b[:H])
            h = (1 - u) * h + u * (x @ w + b[H:])
            hs.append(h)
        assert worst_error(unroll(made["MinGRU"], params, xs)[1], np.stack(hs)) < 1e-13

        assert made["metrics"]["loss"][-1] < 0.1 < 0.4 < made["metrics"]["loss"][0]
        decaying = made["DecayLSTM"]
        params = decaying.init(jax.random.key(0), I, H, dtype="float64")
        params["rate"] = jnp.asarray(normal(3, H))
        rate, of_lstm = np.log1p(np.exp(np.asarray(params["rate"]))), list(map(np.asarray, params["lstm"]))

        def step(_, state, x):
            return oracles.lstm_step(of_lstm, (state[0], np.exp(-x[-1] * rate) * state[1]), x[:-1])

        want = oracles.loop(step, None, np.asarray(xs), [np.zeros((B, H))] * 2)
        assert worst_error(unroll(decaying, params, xs), want) < 1e-13


# Builders.


def test_builders_return_the_same_cell_for_the_same_arguments():
    assert variants.make_lstm_1997(2) is variants.make_lstm_1997(2)
    assert variants.make_projected_lstm(3) is variants.make_projected_lstm(3)
    assert variants.make_lstm(cell_clip=3.0) is variants.make_lstm(cell_clip=3.0)
    assert variants.make_lstm() is LSTM


def test_other_activations_and_clipping():
    params, xs, carry = draw(LSTM)
    hard = lambda v: np.clip(v / 6 + 0.5, 0, 1)
    cell = variants.make_lstm(
        gate=jax.nn.hard_sigmoid, candidate=jax.nn.relu, output=jnp.sin, cell_clip=0.4, gate_clip=0.8
    )

    def step(params, state, x):
        w_ih, w_hh, b = params
        h, c = state
        z_i, z_f, z_g, z_o = np.split(np.clip(x @ w_ih + h @ w_hh + b, -0.8, 0.8), 4)
        c = np.clip(hard(z_f) * c + hard(z_i) * np.maximum(z_g, 0), -0.4, 0.4)
        h = hard(z_o) * np.sin(c)
        return (h, c), h

    want = oracles.loop(step, list(map(np.asarray, params)), np.asarray(xs), [np.asarray(leaf) for leaf in carry])
    assert worst_error(unroll(cell, params, xs, carry), want) < 1e-13


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: variants.make_lstm_1997(0), "make_lstm_1997: block_size must be at least 1, got 0"),
        (
            lambda: variants.make_lstm_1997(3).init(jax.random.key(0), 2, 4),
            "make_lstm_1997: hidden_size 4 must be a multiple of block_size 3",
        ),
        (lambda: variants.make_projected_lstm(0), "make_projected_lstm: proj_size must be at least 1, got 0"),
        (
            lambda: variants.ProjectedLSTM.init(jax.random.key(0), 2, 4, proj_size=-1),
            "ProjectedLSTM.init: proj_size must be at least 1, got -1",
        ),
        (lambda: variants.make_lstm(gate="relu"), "make_lstm: gate must be a function, got 'relu'"),
        (lambda: variants.make_lstm(cell_clip=-1.0), "make_lstm: cell_clip must be a positive number or None"),
        (lambda: variants.PeepholeLSTM.init(0, 2, 4), "PeepholeLSTM.init: key must be a JAX key, got int"),
        (lambda: variants.SLSTM.init(jax.random.key(0), 2, 0), "SLSTM.init: hidden_size must be a positive int"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_slstm_learns_its_forget_gate_when_it_is_almost_1(dtype, tolerance):
    """1 - σ(z_f) has no correct digits there in low precision."""
    params = variants.SLSTM.init(jax.random.key(0), I, H, forget_bias=12.0, dtype=dtype)
    xs = normal(1, T, B, I)

    def of_forget_bias(cell, params, xs):
        run = lambda p: unroll(cell, p, xs.astype(p.b.dtype))[1].astype("float32").sum()
        return np.float64(jax.grad(run)(params).b[H : 2 * H])

    exact = dataclasses.replace(variants.SLSTM, gates_jvp=None)
    want = of_forget_bias(exact, jax.tree.map(lambda v: v.astype("float64"), params), xs)
    got = of_forget_bias(variants.SLSTM, params, xs)
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("name", ["coupled", "1997", "sLSTM"])
def test_the_closed_forms_are_used_and_are_right(name):
    cell = FAMILY[name][0]
    assert cell.gates_jvp is not None
    arguments = draw(cell)
    without = dataclasses.replace(cell, gates_jvp=None)
    gradients = [jax.grad(loss_of(cell), (0, 1, 2))(*arguments) for cell in (cell, without)]
    assert worst_error(*gradients) < 1e-13
