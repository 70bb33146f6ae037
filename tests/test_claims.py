"""Common claims about LSTMs, tested; docs/claims.md cites these tests."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import autodiff_vs_analytic, flip_flop, lorenz, ppo, tagging
from experiments.harness import intervals
from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    LSTMParams,
    LSTMState,
    init_bidirectional,
    num_params,
    unroll,
    unroll_bidirectional,
)
from jaxlstm.diagnostics import carry_jacobians, cell_state_terms, gradient_flow, lyapunov_exponents

from cells import B, H, I, T, draw, normal, worst_error

ROOT = Path(__file__).parents[1]
CLAIMS = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")


def with_biases(i=0.0, f=0.0, g=0.0, o=0.0):
    """Return one unit whose gates depend on their biases alone."""
    return LSTMParams(jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.array([i, f, g, o]))


@pytest.mark.parametrize(
    "bias, f, half_life, left",
    [(0, 0.5, 1.0, 7.9e-31), (1, 0.731, 2.2, 2.5e-14), (2, 0.881, 5.5, 3.1e-6), (5, 0.993, 103, 0.51)],
)
def test_the_gradient_along_the_cell_state_decays_by_the_product_of_forget_gates(bias, f, half_life, left):
    xs = jnp.zeros((101, 1))
    of_c = gradient_flow(LSTM, with_biases(f=bias), xs, lambda ys: ys[-1].sum()).c[:, 0]
    lag = lambda n: float(of_c[-1 - n] / of_c[-1])
    assert abs(lag(1) - f) < 5e-4
    assert abs(math.log(0.5) / math.log(lag(1)) / half_life - 1) < 0.02
    assert abs(lag(100) / left - 1) < 0.05
    assert f"| {bias} | {f:.3f} | {half_life:.1f} | {left:.1e} |" in CLAIMS


def test_the_gradient_of_an_lstm_vanishes_and_explodes():
    params, xs = LSTM.init(jax.random.key(0), I, 16, dtype="float64", forget_bias=0.0), jnp.asarray(normal(1, 51, 4, I))
    norm = lambda params: np.asarray(jnp.linalg.norm(jnp.concatenate(
        gradient_flow(LSTM, params, 0.1 * xs, lambda ys: ys[-1].sum()), axis=-1).reshape(51, -1), axis=-1))  # fmt: skip
    assert norm(params)[0] < 1e-6 * norm(params)[-1]
    wild = params._replace(w_hh=8 * params.w_hh)
    assert norm(wild)[0] > 1e3 * norm(wild)[-1]
    assert lyapunov_exponents(LSTM, params, xs).max() < 0 < lyapunov_exponents(LSTM, wild, 0.1 * xs).min()


@pytest.mark.ci
def test_clipping_keeps_a_step_along_an_exploding_gradient_short():
    params, xs = LSTM.init(jax.random.key(0), I, 16, dtype="float64", forget_bias=0.0), jnp.asarray(normal(1, 51, 4, I))
    wild = params._replace(w_hh=8 * params.w_hh)
    loss = lambda params: (unroll(LSTM, params, 0.1 * xs)[1][-1] ** 2).sum()
    gradient = jax.grad(loss)(wild)
    moved = {}
    for name, clip in (("free", optax.identity()), ("clipped", optax.clip_by_global_norm(1.0))):
        optimizer = optax.chain(clip, optax.sgd(0.1))
        updates, _ = optimizer.update(gradient, optimizer.init(wild))
        moved[name] = float(optax.tree.norm(updates) / optax.tree.norm(wild))
    assert moved["free"] > 1 and moved["clipped"] < 0.01
    tame = jax.grad(loss)(params)
    assert optax.tree.norm(gradient) > 1e3 * optax.tree.norm(tame)


def test_the_derivative_of_c_by_the_c_before_is_a_matrix_with_entries_of_either_sign():
    params, xs, carry = draw(LSTM)
    whole = np.asarray(sum(cell_state_terms(params, xs, carry)))[1:]
    off = whole[..., ~np.eye(H, dtype=bool)]
    assert (off > 0.001).any() and (off < -0.001).any()
    assert np.asarray(cell_state_terms(params, xs, carry).carousel).max() <= 1


@pytest.mark.parametrize(
    "i, f, after", [(-5, 5, {1: 0.993, 10: 0.935, 100: 0.511}), (-5, -5, {1: 0.007, 10: 0, 100: 0})]
)
def test_memory_holds_with_the_input_gate_shut_and_the_forget_gate_open(i, f, after):
    carry = LSTMState(jnp.zeros(1), jnp.ones(1))
    for num_steps, left in after.items():
        final, _ = unroll(LSTM, with_biases(i=i, f=f, g=0.0), jnp.zeros((num_steps, 1)), carry)
        assert abs(float(final.c[0]) - left) < 1e-3
    row = " | ".join(f"{left:.3f}" for left in after.values())
    assert f"| {'shut' if i < 0 else 'open'} | {'shut' if f < 0 else 'open'} | {row} |" in CLAIMS


def test_an_open_input_gate_overwrites_or_adds():
    carry = LSTMState(jnp.zeros(1), jnp.ones(1))
    for f, sums in ((5, {1: 1.986, 10: 10.645, 100: 73.51}), (-5, {1: 0.999, 10: 0.999, 100: 0.999})):
        for num_steps, value in sums.items():
            final, _ = unroll(LSTM, with_biases(i=5, f=f, g=20.0), jnp.zeros((num_steps, 1)), carry)
            assert abs(float(final.c[0]) / value - 1) < 2e-2, (f, num_steps, final.c)


def test_weights_multiply_as_matrices_and_gates_element_by_element():
    params, xs, carry = draw(LSTM)
    z_by_h = jax.jacobian(lambda h: LSTM.recur(params, carry._replace(h=h))[0])(carry.h)[:, 0]
    assert (np.asarray(z_by_h) != 0).all()  # [4H, H]: every unit reaches every gate
    kept = jax.jacobian(
        lambda c: LSTM.gates(params, carry._replace(c=c), LSTM.project(params, xs[0]), LSTM.recur(params, carry))[0].c[
            0
        ]
    )
    own = np.asarray(kept(carry.c)[:, 0])
    assert (own[~np.eye(H, dtype=bool)] == 0).all() and (np.diag(own) > 0).all()


def test_the_cell_state_is_a_vector_per_example_and_the_width_is_free():
    for hidden in (1, 50):
        params = LSTM.init(jax.random.key(0), I, hidden)
        carry, ys = unroll(LSTM, params, jnp.ones((T, B, I), jnp.float32))
        assert carry.c.shape == (B, hidden) and ys.shape == (T, B, hidden)
        assert np.abs(ys).max() < 1


def test_four_is_the_number_of_gate_blocks():
    count = {cell.name: num_params(cell.init(jax.random.key(0), 80, 12)) for cell in (RNN, GRU, LSTM)}
    assert count == {"RNN(tanh)": 1116, "GRU": 3360, "LSTM": 4464}
    assert count["LSTM"] == 4 * count["RNN(tanh)"] == 4 * (80 * 12 + 12 * 12 + 12)
    assert count["LSTM"] + 48 == 4512  # with torch's second bias
    for number in ("1,116", "3,360", "4,464", "4,512"):
        assert number in CLAIMS


def test_an_lstm_has_three_sigmoids_and_two_tanhs():
    params, xs, carry = draw(LSTM)
    jaxpr = jax.make_jaxpr(LSTM.gates)(params, carry, LSTM.project(params, xs[0]), LSTM.recur(params, carry))

    def names(jaxpr):
        for equation in jaxpr.eqns:
            inner = [v for v in equation.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
            for v in inner:
                yield from names(getattr(v, "jaxpr", v))
            if not inner:
                yield equation.primitive.name

    found = list(names(jaxpr.jaxpr))
    assert (found.count("logistic"), found.count("tanh")) == (3, 2)


def test_a_sum_over_time_is_a_mean_with_a_larger_learning_rate_for_sgd_and_not_for_adam():
    params, xs, _ = draw(LSTM)
    losses = lambda params: (unroll(LSTM, params, xs)[1] ** 2).sum(axis=(1, 2))
    of_sum, of_mean = (jax.grad(lambda params, by=by: by(losses(params)))(params) for by in (jnp.sum, jnp.mean))
    assert worst_error(of_sum, jax.tree.map(lambda g: T * g, of_mean)) < 1e-13
    steps = {}
    for name, optimizer in (("sgd", optax.sgd(1e-2)), ("adam", optax.adam(1e-2, eps=1e-30))):
        with jax.numpy_dtype_promotion("standard"):
            steps[name] = [optimizer.update(g, optimizer.init(params))[0] for g in (of_sum, of_mean)]
    assert worst_error(steps["adam"][0], steps["adam"][1]) < 1e-12
    assert worst_error(steps["sgd"][0], jax.tree.map(lambda g: T * g, steps["sgd"][1])) < 1e-13


def test_the_last_carry_does_not_depend_on_the_first_by_the_cell_states_alone():
    """The product of dc_t/dc_{t-1} at fixed o is not dc_T/dc_0: c also acts through o."""
    params, xs, carry = draw(LSTM)
    whole = np.asarray(carry_jacobians(LSTM, params, xs, carry))[:, 0]
    terms = np.asarray(sum(cell_state_terms(params, xs, carry)))[:, 0]
    from_c = np.linalg.multi_dot(list(whole[::-1]))[H:, H:]
    assert worst_error(np.linalg.multi_dot(list(terms[::-1])), from_c) > 0.01


# Results of the experiments.


def result(experiment):
    return json.loads((ROOT / "experiments" / "results" / experiment / "result.json").read_text(encoding="utf-8"))


def found_of(rows, **setting):
    (row,) = [row for row in rows if all(row[key] == value for key, value in setting.items())]
    return row


def test_training_brings_the_reaches_together():
    measured = result("gradient_flow")["measured"]
    at_50 = lambda row: np.median(np.array(row["flow"])[:, 50])
    assert list(measured) == ["0", "10", "100", "600"]
    gained = []
    for before, after in zip(measured["0"], measured["600"], strict=True):
        if before["forget"] in (3.0, "chrono"):
            assert 0.06 < at_50(before) < 0.32 and 5e-5 < at_50(after) / at_50(before) < 1e-2
        if before["forget"] == 0.0:
            assert np.median(after["mean_f"]) > 0.57 > 0.52 > np.median(before["mean_f"])
            gained.append(np.log10(at_50(after) / at_50(before)))
    assert min(gained) > 0 and 6.5 < max(gained) < 7.5
    left = [at_50(row) for row in measured["600"] if row["cell"] == "LSTM"]
    assert min(left) > 2e-5 and max(left) < 9e-4


def test_after_training_with_large_inputs_the_gru_reaches_further_than_the_lstms():
    rows = result("gradient_flow")["measured"]["600"]
    page = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    apart = []
    for recurrent in ("orthogonal", "uniform"):
        for scale in (0.1, 1.0):
            own = [row for row in rows if (row["recurrent"], row["scale"]) == (recurrent, scale)]
            (gru,) = [np.array(row["flow"])[:, 50] for row in own if row["cell"] == "GRU"]
            lstms = {row["forget"]: np.array(row["flow"])[:, 50] for row in own if row["cell"] == "LSTM"}
            highest = max(np.median(at_50) for at_50 in lstms.values())
            assert (np.median(gru) > highest) == (scale == 1.0)
            if scale == 1.0:
                assert f"{np.median(gru):.0e}" in page and f"at most {highest:.0e}" in page
                apart += [(recurrent, forget) for forget, at_50 in lstms.items() if gru.min() > at_50.max()]
    assert apart == [("uniform", 0.0)]


def test_the_figures_about_gradient_flow_are_in_the_result():
    found = result("gradient_flow")
    at_50 = {
        f: [np.median(np.array(r["flow"])[:, 50]) for r in found["measured"]["0"] if r["forget"] == f] for f in (0, 1)
    }
    assert max(at_50[0]) < 1.5e-5 and f"{max(at_50[1]):.2f}" == "0.04" and f"{min(at_50[1]):.0e}" == "2e-04"
    lstms = {
        step: [r["than the RNN's"] for r in rows if r["cell"] == "LSTM"] for step, rows in found["verdicts"].items()
    }
    assert lstms["600"].count("larger") == 15 and lstms["600"].count("not told apart") == 1
    small = {"recurrent": "orthogonal", "scale": 0.1}
    verdict = lambda **setting: found_of(found["verdicts"]["0"], **setting)
    row = verdict(cell="LSTM", forget=0.0, **small)
    assert row["than the RNN's"] == "smaller" and row["lag"] == 50
    assert (f"{row['median']:.0e}", f"{row['''RNN's median''']:.0e}") == ("8e-08", "5e-02")
    assert lstms["0"].count("smaller") == 1
    assert verdict(cell="LSTM", forget=1.0, **small)["than the RNN's"] == "not told apart"
    assert verdict(cell="GRU", forget=None, **small)["than the RNN's"] == "smaller"
    assert verdict(cell="LSTM", forget=0.0, recurrent="uniform", scale=0.1)["than the RNN's"] == "not told apart"
    grown = np.array(found_of(found["measured"]["0"], cell="LSTM", forget=3.0, **small)["flow"])
    assert np.median(grown[:, 100]) > np.median(grown[:, 50]) and round(grown[:, 100].max(), 1) == 8.7
    for rows in found["measured"].values():
        for row in rows:
            if row["cell"] == "LSTM":
                shares = {name: np.mean(own) for name, own in row["shares"].items()}
                assert shares["carousel"] == max(shares.values())
    for before, after in zip(found["measured"]["0"], found["measured"]["600"], strict=True):
        if before["cell"] == "LSTM":
            assert np.mean(before["shares"]["forget_gate"]) < np.mean(after["shares"]["forget_gate"])


def test_how_many_gates_are_nearly_shut_or_open():
    measured = result("gradient_flow")["measured"]
    for step, said in (("0", "0.02 of i, 0.10 of f, 0.02 of o"), ("600", "0.76 of i, 0.51 of f, 0.66 of o")):
        row = found_of(measured[step], cell="LSTM", forget=1.0, recurrent="orthogonal", scale=1.0)
        shares = {name: np.mean(row["shut"][name]) + np.mean(row["open"][name]) for name in "ifo"}
        assert ", ".join(f"{share:.2f} of {name}" for name, share in shares.items()) == said
        assert said in CLAIMS
    assert all(np.mean(row["open"][name]) > 0.5 for name in "io")  # after training


def of_cell(found, cell):
    return np.array(found[cell])


def means(found, question, distance):
    return {cell: f"{np.mean(right):.2f}" for cell, right in found[question][distance].items()}


def ends(values, digits=2):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def test_a_simple_rnn_carries_number_across_sixty_words_but_hardly_gender():
    found = result("agreement")
    far = found["number"]["60"]
    assert means(found, "number", "60") == {"RNN": "0.90", "GRU": "0.91", "LSTM": "0.98"}
    assert [ends(far[cell]) for cell in ("RNN", "GRU", "LSTM")] == ["0.75 to 1.00", "0.73 to 1.00", "0.94 to 1.00"]
    assert min(far["LSTM"]) < max(far["RNN"])  # not told apart
    learned, *others = sorted(zip(*(found["gender"][d]["RNN"] for d in ("2", "12", "20")), strict=True), reverse=True)
    assert [f"{right:.2f}" for right in learned] == ["1.00", "0.77", "0.56"]
    assert max(max(other) for other in others) < 0.55
    assert all(of_cell(found["second subject"]["12"], cell).min() > 0.99 for cell in ("RNN", "GRU", "LSTM"))


def test_an_lstm_carries_number_and_gender_where_it_was_trained():
    found = result("agreement")
    within = ("2", "4", "8", "12")
    assert all(of_cell(found["number"][d], cell).min() > 0.995 for d in within for cell in ("RNN", "GRU", "LSTM"))
    assert all(of_cell(found["gender"][d], "LSTM").min() > 0.995 for d in within)
    assert sum(of_cell(found["gender"]["12"], "GRU") > 0.995) == 4
    assert means(found, "gender", "60")["LSTM"] == "0.94"
    for distance in ("12", "60"):
        assert min(found["gender"][distance]["LSTM"]) > max(found["gender"][distance]["RNN"])
    assert f"{min(min(right) for right in found['attractors']['4'].values()):.2f}" == "0.92"


def test_the_unit_that_carries_number_is_found_and_held_still():
    found = result("agreement")["clamping"]
    assert all(row["free"] > 0.995 and len(set(row["units"])) == 2 for rows in found.values() for row in rows)
    one = {cell: ends([row["without one"] for row in rows]) for cell, rows in found.items()}
    assert one == {"LSTM": "0.39 to 0.65", "GRU": "0.48 to 0.53", "RNN": "0.43 to 0.59"}
    two = {cell: max(row["without two"] for row in rows) for cell, rows in found.items()}
    assert f"{max(two.values()):.2f}" == "0.54" and f"{two['LSTM']:.2f}" == "0.51"
    assert sum(row["rank"][0] == 1 for rows in found.values() for row in rows) == 12
    worst = {cell: min(min(row["random"]) for row in rows) for cell, rows in found.items()}
    assert min(worst["LSTM"], worst["GRU"]) > 0.965 and f"{worst['RNN']:.2f}" == "0.71"
    inside = {name: ends([row["inside"][name] for row in found["LSTM"]]) for name in "if"}
    assert inside == {"f": "0.93 to 1.00", "i": "0.19 to 0.80"}
    page = " ".join((ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").split())
    between = [f"between {span.replace(' to ', ' and ')}" for span in one.values()]
    assert all(said in page for said in (*inside.values(), *between))


def test_the_figures_about_methods_are_in_the_result():
    found = result("autodiff_vs_analytic")
    assert autodiff_vs_analytic.table(found) in (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = [row | {"method": row["road"]} for row in found["rows"]]  # the committed results use an earlier word
    exact = ("autodiff", "rule", "by hand", "rtrl")
    widest = {method: max(r["hidden"] for r in rows if r["method"] == method) for method in (*exact, "differences")}
    assert widest == {"autodiff": 128, "rule": 128, "by hand": 128, "rtrl": 64, "differences": 32}
    sizes = [r["temporaries"] for r in rows if (r["method"], r["num_steps"], r["dtype"]) == ("rtrl", 100, "float32")]
    assert all(5 < b / a < 7 for a, b in itertools.pairwise(sorted(sizes)))
    assert {r["num_steps"] for r in rows} == {10, 30, 100, 300, 1000}
    assert {r["hidden"] for r in rows} == {8, 16, 32, 64, 128}
    worst = lambda dtype, *methods: max(r["error"] for r in rows if r["dtype"] == dtype and r["method"] in methods)
    said = [worst(dtype, *methods) for methods in (exact, ("differences",)) for dtype in ("float64", "float32")]
    assert [f"{error:.0e}" for error in said] == ["1e-15", "6e-07", "1e-11", "2e-04"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        "at most 1e-15 in float64 and 6e-07 in float32" in readme
        and "Finite differences have 1e-11 and 2e-04" in readme
    )
    at = {(r["method"], r["num_steps"]): r for r in rows if r["hidden"] == 16 and r["dtype"] == "float32"}
    assert round(at["rtrl", 100]["seconds"] / at["rule", 100]["seconds"]) == 62
    assert at["differences", 100]["seconds"] / at["rule", 100]["seconds"] > 1000
    assert at["rtrl", 1000]["temporaries"] < 1.01 * at["rtrl", 10]["temporaries"]


def test_the_figures_about_the_flip_flop_are_in_the_result():
    found = result("flip_flop")
    page = " ".join((ROOT / "docs" / "fixed-points.md").read_text(encoding="utf-8").split())
    assert " ".join(flip_flop.table(found).split()) in page
    assert {row["right"] for row in found["rows"]} == {1.0} and "every net is always right" in page
    cube = [8, 12, 6, 1]
    of = lambda cell: [row for row in found["rows"] if row["cell"] == cell]
    assert all(row["by_unstable"][0] >= 8 and row["memories"] == 8 for row in found["rows"])
    whole = {
        cell: sum(row["points"] == 27 and row["by_unstable"] == cube for row in of(cell)) for cell in flip_flop.CELLS
    }
    said = ", ".join(f"{number} of {len(of(cell))} {cell}s" for cell, number in whole.items())
    assert f"All 27 points of a cube: {said}" in page and whole["LSTM"] >= 4
    assert [row["points"] for row in of("RNN")].count(26) == 2 and [row["points"] for row in of("GRU")].count(43) == 1
    (ridge,) = [row for row in of("GRU") if row["points"] == 43]
    assert max(row["largest_speed"] for row in found["rows"] if row != ridge) < 1e-31 < 1e-27 < ridge["largest_speed"]
    lost = {cell: max(1 - row["converged"] / 2048 for row in of(cell)) for cell in flip_flop.CELLS}
    assert 0.16 < lost["GRU"] < 0.17 and max(lost["RNN"], lost["LSTM"]) < 0.003


def test_the_figures_about_the_lorenz_system_are_in_the_result():
    found = result("lorenz")
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert lorenz.table(found) in page
    true = np.array(found["true"]["exponents"])
    assert np.abs(true - lorenz.PUBLISHED).max() < 0.01
    of = {net: np.array([row["exponents"] for row in found["rows"] if row["net"] == net]) for net in lorenz.NETS}
    assert {net: len(exponents) for net, exponents in of.items()} == {"LSTM": 5, "GRU": 5, "RNN": 5}
    (at_rest,) = [row for row in found["rows"] if row["exponents"][0] < 0]
    assert at_rest["net"] == "GRU" and f"{at_rest['follows']:.1f}" == "1.8"
    assert [f"{value:.2f}" for value in at_rest["exponents"][:2]] == ["-0.06", "-0.06"]
    chaotic = np.concatenate([of["LSTM"], of["GRU"][of["GRU"][:, 0] > 0]])
    assert (f"{chaotic[:, 0].min():.3f}", f"{chaotic[:, 0].max():.3f}") == ("0.870", "0.903")
    assert len(chaotic) == 9 and np.abs(chaotic[:, 1]).max() < 0.001
    first = {net: exponents[:, 0] for net, exponents in of.items()}
    assert {net: int((np.abs(own / 0.906 - 1) < 0.04).sum()) for net, own in first.items()} == {
        "LSTM": 5, "GRU": 4, "RNN": 0
    }  # fmt: skip
    inside = {net: int(((own >= true[:, 0].min()) & (own <= true[:, 0].max())).sum()) for net, own in first.items()}
    assert inside == {"LSTM": 0, "GRU": 1, "RNN": 0} and "the range of the true\n  map, 0.901 to 0.907" in page
    assert chaotic[:, 0].mean() < true[:, 0].min() and ends(of["RNN"][:, 0], 3) == "0.535 to 0.761"
    assert sorted(of["RNN"][:, 1].round(3))[:2] == [-0.036, -0.027] and sorted(of["RNN"][:, 1])[2] > -0.0015
    thirds = {net: ends(exponents[:, 2], 1).replace("-", "−") for net, exponents in of.items()}
    assert thirds == {"LSTM": "−8.7 to −7.2", "GRU": "−7.0 to −4.3", "RNN": "−16.7 to −9.2"}
    assert all(said in page for said in thirds.values()) and "0.870 to 0.903" in page and "0.535 to 0.761" in page
    assert np.sort(np.abs(of["RNN"][:, 2] + 14.57))[:2].round(2).tolist() == [0.54, 1.94]


def test_the_figures_about_agents_with_memory_are_in_the_result():
    found = result("ppo")
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    config = found["config"]
    assert ppo.table(found) in page and config["seeds"] == 5 and config["burn_in"] == 0
    experience = config["updates"] * config["num_envs"] * config["num_steps"]
    assert f"{experience:,} steps of experience" in page
    maze = {
        (net, length): [
            curve[-1] for curve in found_of(found["rows"], net=net, number=length, task="T-maze")["success"]
        ]
        for net in ppo.NETS
        for length in config["lengths"]
    }
    assert all(min(maze[net, 10]) > 0.995 for net in ("LSTM", "GRU", "RNN"))
    solved = lambda net: [sum(value > ppo.SOLVED for value in maze[net, length]) for length in config["lengths"]]
    assert (solved("LSTM"), solved("GRU"), solved("RNN")) == ([5, 5, 4, 3, 3], [5, 5, 5, 5, 4], [3, 5, 5, 0, 0])
    assert f"{sorted(maze['LSTM', 80])[1]:.2f} {max(maze['RNN', 40]):.2f}" == "0.94 0.67"
    low_gru, high_lstm = intervals.of_share(5, 5)[1], intervals.of_share(3, 5)[2]
    assert low_gru < high_lstm  # at 40 steps
    guessed = {net: ends(np.ravel([maze[net, length] for length in config["lengths"]])) for net in ppo.NETS}
    assert guessed["no memory"] == "0.48 to 0.53" and guessed["LSTM, reset=done"] == "0.47 to 0.59"
    repeated = {row["net"]: np.array(row["return"]) for row in found["rows"] if row["task"] == "RepeatPrevious"}
    assert ends(repeated["LSTM, reset=done"][:, -1]) == "0.88 to 0.93" and min(repeated["LSTM"][:, -1]) > 0.995
    assert all(repeated[net][:, -1].min() > 0.975 for net in ("LSTM", "GRU", "RNN"))
    assert repeated["RNN"][:, 1].min() > max(repeated[net][:, 1].max() for net in ppo.NETS if net != "RNN")
    assert f"{repeated['no memory'][:, -1].mean():.2f}" == "-0.50"
    assert all(said in page for said in (guessed["no memory"], guessed["LSTM, reset=done"], "0.88 to 0.93"))
    assert all(4750 < row["parameters"] < 5100 for row in found["rows"])


def test_a_bidirectional_net_is_two_nets_that_meet_at_the_same_step():
    params = init_bidirectional(jax.random.key(0), LSTM, I, H, dtype=jnp.float64)
    assert num_params(params) == 2 * num_params(params.forward)
    xs = jnp.asarray(normal(0, T, I))
    ys = unroll_bidirectional(LSTM, params, xs)[1]
    assert (ys[:, :H] == unroll(LSTM, params.forward, xs)[1]).all()
    # One net that reads the reversed sequence gives other values, in either order.
    other_way = unroll(LSTM, params.forward, xs[::-1])[1]
    assert not np.allclose(ys[:, H:], other_way) and not np.allclose(ys[:, H:], other_way[::-1])

    jacobian = jax.jacobian(lambda xs: unroll_bidirectional(LSTM, params, xs)[1])(xs)  # [t, unit, s, feature]
    reach = lambda units: np.linalg.norm(jacobian[:, units], axis=(1, 3))
    forward, backward, both = reach(slice(H)), reach(slice(H, None)), reach(slice(None))
    later = np.triu(np.ones((T, T), bool), 1)  # s > t
    assert (forward[later] == 0).all() and (forward[~later] > 0).all()
    assert (backward[later.T] == 0).all() and (backward[~later.T] > 0).all()
    assert (both > 0).all()


def test_the_lstms_count_further_than_the_grus():
    rows = {row["cell"]: row["reach"] for row in result("counting")["rows"] if row["language"] == "aⁿbⁿ"}
    lstms = rows["LSTM"]
    claims = " ".join((ROOT / "docs" / "claims.md").read_text(encoding="utf-8").split())
    spread = f"{np.median(lstms):.0f} in the median, {min(lstms)} to {max(lstms)}"
    assert f"ten LSTMs are right up to n = {spread}, and no GRU beyond 67" in claims
    assert max(rows["GRU"]) == 67 and len(lstms) == 10
    assert np.median(rows["RNN"]) < 50 < np.median(rows["GRU"]) < np.median(lstms)


def test_reading_backward_helps_and_needs_the_future():
    rows = {row["name"]: row for row in result("tagging")["rows"]}
    one, both = (np.array(rows[name]["f1"]) for name in ("LSTM", "bidirectional LSTM"))
    pages = [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("claims", "published")]
    for page in pages:
        assert f"{both.mean():.3f}" in page and f"{one.mean():.3f}" in page
    (_, _, high), (_, low, _) = (intervals.of_mean(scores.mean(1)) for scores in (one, both))
    assert high < low, "the intervals are apart"
    gains = both.mean(0) - one.mean(0)
    assert gains.argmax() == tagging.CLASSES.index("keyword") and abs(gains[tagging.CLASSES.index("number")]) < 0.01
    assert f"{both.mean(0)[0]:.3f} against {one.mean(0)[0]:.3f}" in " ".join(pages[1].split())
    for name, future in (("LSTM", False), ("bidirectional LSTM", True)):
        assert (np.triu(rows[name]["sensitivity"], 1) > 0).any() == future


def test_a_tagger_forgets_for_one_step_at_a_border():
    (row,) = (row for row in result("tagging")["rows"] if row["name"] == "LSTM")
    f, i, change = (
        np.mean([seed[name] for seed in row["around borders"]], axis=0) for name in ("f", "i", "change of c")
    )
    assert (f"{f[0]:.2f}", f"{f[10]:.2f}", f"{i[0]:.2f}", f"{i[10]:.2f}") == ("0.66", "0.51", "0.64", "0.71")
    assert f[11] > f[0] and f[10] == f.min() and row["borders"] == 769
    assert round(change[10] / change[:9].mean()) == 6
