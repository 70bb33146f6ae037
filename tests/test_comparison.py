"""`compare_gradients`: all methods agree, and for a faulty method it names the gate and the step of the fault."""

import dataclasses
import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlstm import LSTM, LSTMState, bptt, unroll
from jaxlstm.bptt import lstm_forward
from jaxlstm.diagnostics import compare_gradients

from cells import CELLS, HOLES, RESET, B, H, I, T, draw, normal, worst_error
from sweeps import sweep

WEIGHT = jnp.asarray(normal(50, T, B, H))
MASK = np.arange(T)[:, None] < np.array([T, T, T - 2])  # the last sequence ends two steps earlier
MASK[3, 1] = False


def step_loss(y, t):
    return (jnp.sin(y) * WEIGHT[t]).sum()


def faulty(old, new):
    """Make a method of the hand-derived backward pass, with one change in its source."""
    source = inspect.getsource(bptt)
    assert source.count(old) == 1, old
    module = types.ModuleType("faulty")
    exec(compile(source.replace(old, new), "faulty", "exec"), module.__dict__)

    backward = jax.jit(module.lstm_backward)
    nothing = LSTMState(jnp.zeros((B, H)), jnp.zeros((B, H)))

    def method(params, xs, carry, d_ys):
        return backward(params, forward(params, xs, carry), (nothing, d_ys))

    return method


@jax.jit
def forward(params, xs, carry):
    return lstm_forward(params, xs, carry, mask=MASK)[1]


LAST = T - 1
IFG = ("gate i", "gate f", "gate g")
ANY = (*IFG, "gate o")
# By fault: the right source, the wrong one, the blocks that may be named, and the step, the latest with a wrong d_z.
FAULTS = {
    "sign in the input gate": ("d_i * i * (1 - i)", "d_i * i * (1 + i)", ("gate i",), LAST),
    "sign in the forget gate": ("d_f * f * (1 - f)", "d_f * f * (1 + f)", ("gate f",), LAST),
    "sign in the candidate": ("d_g * (1 - g**2)", "d_g * (1 + g**2)", ("gate g",), LAST),
    "sign in the output gate": ("d_o * o * (1 - o)", "d_o * o * (1 + o)", ("gate o",), LAST),
    "the forget gate sees c of this step": ("d_c * c_prev", "d_c * jnp.arctanh(s)", ("gate f",), LAST),
    "the input gate sees itself": ("d_i = d_c * g ", "d_i = d_c * i ", ("gate i",), LAST),
    "the output gate sees c": ("d_o = d_h * s ", "d_o = d_h * jnp.arctanh(s) ", ("gate o",), LAST),
    "two gates swapped": ("[d_z_i, d_z_f, d_z_g, d_z_o], -1", "[d_z_f, d_z_i, d_z_g, d_z_o], -1", IFG[:2], LAST),
    "candidate and output gate swapped": ("d_z_g, d_z_o], -1", "d_z_o, d_z_g], -1", ("gate g", "gate o"), LAST),
    "the derivative of tanh": ("d_s * (1 - s**2)", "d_s * (1 - s)", IFG, LAST),
    "no path from h to c": (" + d_s * (1 - s**2)", "", IFG, LAST),
    "no path back through c": ("d_c_prev = d_c * f + ", "d_c_prev = 0 * d_c + ", IFG, LAST - 1),
    "no path back through h": ("d_h_prev = d_z @ w_hh.T + ", "d_h_prev = 0 * d_c + ", ANY, LAST - 1),
    "c flows back unweighted": ("d_c_prev = d_c * f + ", "d_c_prev = d_c + ", IFG, LAST - 1),
    "w_hh not transposed by gates": ("d_z @ w_hh.T", "jnp.roll(d_z, 1, -1) @ w_hh.T", ANY, LAST - 1),
    # A fault at a masked step shows at the last real step before it, since d_xs is 0 where masked.
    "the mask is dropped for h": ("jnp.where(m, d_y + d_h_t, 0)", "d_y + d_h_t", ANY, T - 3),
    "a masked step stops h": (" + jnp.where(m, 0, d_h_t)", "", ANY, 2),
    "a masked step stops c": (" + jnp.where(m, 0, d_c_t)", "", IFG, 2),
    "w_hh one step off": ("tensordot(previous.h, d_zs", "tensordot(jnp.roll(previous.h, -1, 0), d_zs",
                          tuple(f"w_hh {gate}" for gate in "ifgo"), None),
    "w_ih one step off": ("tensordot(xs, d_zs", "tensordot(jnp.roll(xs, 1, 0), d_zs",
                          tuple(f"w_ih {gate}" for gate in "ifgo"), None),
    "the bias misses the first step": ("d_zs.sum(time_and_batch)", "d_zs[1:].sum(time_and_batch)",
                                      tuple(f"b {gate}" for gate in "ifgo"), None),
    "d_xs scaled": ("d_zs @ w_ih.T", "1.5 * d_zs @ w_ih.T", ("xs",), None),
    "h_0 and c_0 swapped": ("return d_params, d_xs, d_carry\n", "return d_params, d_xs, LSTMState(*d_carry[::-1])\n",
                            ("h_0", "c_0"), None),
}  # fmt: skip


def all_nan(params, xs, carry, d_ys):
    return jax.tree.map(lambda v: np.full(v.shape, np.nan), (params, xs, carry))


def compare(faults):
    params, xs, carry = draw(LSTM)
    methods = {
        "mine": faulty("d_s = d_h * o ", "d_s = o * d_h "),
        "nan": all_nan,
        **{name: faulty(*FAULTS[name][:2]) for name in faults},
    }
    with jax.debug_nans(False):
        return compare_gradients(LSTM, params, xs, step_loss, carry=carry, mask=MASK, methods=methods)


@pytest.fixture(scope="module")
def compared():
    return compare(list(FAULTS)[1::6])


def test_exact_methods_agree_to_rounding_and_differences_to_1e_6(compared):
    for method in ("scan", "bulk", "by hand", "rtrl", "mine"):
        assert max(compared.errors[method].values()) <= 1e-12
    assert 0 < max(compared.errors["differences"].values()) <= 1e-6
    assert all(compared.departures[method] is None for method in ("bulk", "by hand", "rtrl", "mine", "differences"))
    assert {"w_ih f", "w_hh o", "b i", "xs", "h_0", "c_0"} < compared.errors["bulk"].keys()
    assert compared.errors["rtrl"].keys() == {f"{leaf} {gate}" for leaf in ("w_ih", "w_hh", "b") for gate in "ifgo"}
    assert compared.by_step["by hand"]["o"].shape == (T,)


def assert_named(compared, faults):
    for fault in faults:
        *_, blocks, step = FAULTS[fault]
        departure = compared.departures[fault]
        assert departure is not None and not compared.agree, fault
        kind, _, names = departure.block.partition(" ")
        named = {f"gate {name}" for name in names.split(", ")} if kind in ("gate", "gates") else {departure.block}
        assert named <= set(blocks) and departure.step == step and departure.error > 1e-6, (fault, departure)
        if kind in ("gate", "gates"):
            assert (kind == "gates") == (len(named) > 1)
            # A fault in d_c or d_h reaches all gates that read it; a fault in one gate reaches no other.
            assert len(named) == 1 if len(blocks) == 1 else len(named) > 1, (fault, departure)


def test_some_faults_are_found_and_their_gates_and_steps_are_named(compared):
    assert_named(compared, list(FAULTS)[1::6])


def test_every_fault_has_one_place():
    source = inspect.getsource(bptt)
    assert [name for name, (old, *_) in FAULTS.items() if source.count(old) != 1] == []


@pytest.mark.slow
def test_all_faults_are_found_and_their_gates_and_steps_are_named():
    assert len(FAULTS) >= 15
    assert_named(compare(FAULTS), FAULTS)


def test_the_table_names_each_departure(compared):
    table = str(compared)
    assert table.endswith("DISAGREE in float64")
    assert "sign in the forget gate departs in gate f at step 6: " in table
    assert "w_ih one step off departs in w_ih " in table
    (header, first, *_) = table.splitlines()
    assert first.startswith("w_ih i") and len(first) == len(header)


@pytest.mark.parametrize("name", ["leaky", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GRU", "RNN"))])
def test_other_cells_have_every_method_except_by_hand(name):
    cell = CELLS[name][0]
    params, xs, carry = draw(cell, dtype=np.float32)
    found = compare_gradients(cell, params, xs, step_loss, carry=carry, mask=HOLES, reset=RESET)
    assert found.agree and found.dtype == "float64" and found.gradients["scan"][1].dtype == np.float64
    assert found.departures.keys() == {"bulk", "rtrl", "differences"}
    assert max(max(found.errors[method].values()) for method in ("bulk", "rtrl")) <= 1e-12
    assert str(found).endswith("\nAGREE in float64")
    assert jnp.ones(()).dtype == np.float64  # the tests' own setting is restored


@sweep("gradients by all methods equal", 100)
def test_all_methods_agree_in_random_configurations(trial, request):
    """Draw the cell, mask, resets, initial carry, batch axes, and a loss of the last step or of all steps."""
    rng = np.random.default_rng([trial, request.config.getoption("--seed")])
    choose = lambda options: options[rng.integers(len(options))]
    cell = CELLS[choose(["LSTM", "LSTM", "LSTM", "GRU", "RNN", "RNN(sigmoid)", "leaky"])][0]
    params, xs, carry = draw(cell, seed=trial)
    lengths = np.arange(T)[:, None] < rng.integers(0, T + 1, B)
    mask, reset = choose([None, lengths, HOLES]), choose([None, None, RESET])
    last_alone, axes = choose([False, True]), choose(["one", "two", "none"])
    weight = WEIGHT.at[:-1].set(0) if last_alone else WEIGHT
    if axes != "one":
        cut = lambda v, axis: None if v is None else jnp.expand_dims(v, axis) if axes == "two" else v.take(0, axis)
        xs, mask, reset, weight = (cut(v, 1) for v in (xs, mask, reset, weight))
        carry = jax.tree.map(lambda v: cut(v, 0), carry)
    found = compare_gradients(
        cell,
        params,
        xs,
        lambda y, t: (jnp.sin(y) * weight[t]).sum(),
        carry=choose([None, carry]),
        mask=mask,
        reset=reset,
    )
    assert found.agree
    for method, errors in found.errors.items():
        assert max(errors.values()) <= (1e-6 if method == "differences" else 1e-12), (cell, method)
    assert found.errors.keys() > {"bulk", "rtrl", "differences"} and ("by hand" in found.errors) == (
        cell is LSTM and reset is None
    )


@pytest.mark.slow
def test_float32_has_its_own_tolerance():
    params, xs, _ = draw(LSTM)
    found = compare_gradients(LSTM, params, xs, lambda y, t: (jnp.cos(t.astype(y.dtype)) * y).sum(), dtype="float32")
    assert found.agree and found.gradients["bulk"][0].w_hh.dtype == np.float32
    assert 1e-8 < max(found.errors["bulk"].values()) < 1e-5


def test_methods_beyond_their_limits_are_left_out():
    params, xs, _ = draw(LSTM)
    found = compare_gradients(LSTM, params, xs, step_loss, by_step=False, max_bytes=0, max_differences=0)
    assert found.agree and found.departures.keys() == {"bulk", "by hand"} and found.by_step == {}


@jax.debug_nans(False)  # where r = 0, ‖g − r‖ / ‖r‖ is computed and not used
def test_sequences_without_steps_agree():
    params, xs, _ = draw(LSTM)
    found = compare_gradients(LSTM, params, xs[:0], step_loss)
    assert found.agree and max(found.errors["bulk"].values()) == 0


def test_a_nan_counts_as_a_departure(compared):
    assert compared.departures["nan"].step == LAST and np.isnan(compared.departures["nan"].error)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step_loss": lambda ys: ys.sum()}, r"step_loss must take \(y_t, t\)"),
        ({"step_loss": lambda y, t: y.sum(-1)}, rf"step_loss must return one number.* got \[{B}\]"),
        ({"methods": ["by hand"]}, r"methods must map a name to a function .* got \['by hand'\]"),
        ({"methods": {"mine": "by hand"}}, "methods must map a name to a function"),
        ({"methods": {"bulk": len}}, "methods has bulk, a library method; choose another name"),
        ({"methods": {"mine": lambda *v: [*v[:3]]}}, "method 'mine' must return"),
        (
            {"methods": {"mine": lambda p, x, c, d: (p._replace(b=p.b[1:]), x, c)}},
            r"d_params of method 'mine' and params must be alike, .* b float64\[15\]; and .* b float64\[16\]",
        ),
        ({"dtype": "bfloat16"}, 'dtype must be "float64" or "float32", got \'bfloat16\''),
        ({"xs": np.ones((T, B, I + 1))}, "xs has 6 features, params.w_ih expects 5"),
        ({"xs": np.ones((T, B, I), int)}, "xs must be floating, got int"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    params, xs, _ = draw(LSTM)
    arguments = {"xs": xs, "step_loss": step_loss} | change
    with pytest.raises((ValueError, TypeError), match=f"compare_gradients: {message}"):
        compare_gradients(LSTM, params, **arguments)


def test_the_error_is_relative_to_the_reference():
    params, xs, carry = draw(LSTM)

    def threefold(params, xs, carry, d_ys):
        loss = lambda *variables: (unroll(LSTM, *variables)[1] * d_ys).sum()
        return jax.tree.map(lambda v: 3 * v, jax.grad(loss, (0, 1, 2))(params, xs, carry))

    found = compare_gradients(
        LSTM, params, xs, step_loss, carry=carry, methods={"threefold": threefold}, by_step=False, max_differences=0
    )
    np.testing.assert_allclose(list(found.errors["threefold"].values()), 2, rtol=1e-9)


def test_a_comparison_holds_the_gradients(compared):
    assert worst_error(compared.gradients["by hand"], compared.gradients["scan"]) < 1e-13


def normed(v):
    centred = v - v.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


# At the zero carry, the norm bends within 1e-3: a fixed step of 5e-4 saw nothing of its derivative.
LAYER_NORM = dataclasses.replace(
    LSTM, recur=lambda params, carry: normed(carry.h) @ params.w_hh, gates_jvp=None, activations=None, name="normed"
)


def test_a_correct_cell_whose_derivative_bends_within_a_step_agrees():
    params, xs, _ = draw(LSTM)
    found = compare_gradients(LAYER_NORM, params, xs, step_loss)
    assert found.agree and max(found.errors["bulk"].values()) < 1e-10
    assert max(found.errors["differences"].values()) < 1e-5


def test_what_differences_cannot_resolve_is_said_and_is_no_departure():
    rough = dataclasses.replace(  # waves as short as the steps
        LSTM, recur=lambda params, carry: (carry.h + 1e-5 * jnp.sin(6e4 * carry.h)) @ params.w_hh, gates_jvp=None
    )
    params, xs, carry = draw(LSTM)
    found = compare_gradients(rough, params, xs, step_loss, carry=carry, by_step=False)
    assert found.floors["h_0"] > 1e-6 and found.departures["differences"] is None
    assert re.search(r"^differences cannot resolve h_0: floor \S+$", str(found), re.M)
    assert set(found.floors) == set(found.errors["scan"])
