"""The experiments on gradients: their data, their measurements, and small runs of each one."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import pyplot as plt

from experiments import agreement, autodiff_vs_analytic, flip_flop, gradient_flow, grammar, plots
from experiments.harness import trainer
from jaxlstm import GRU, LSTM, RNN, LSTMGates, LSTMState, unroll
from jaxlstm.diagnostics import Trace, trace

from cells import draw, normal, worst_error

pytestmark = pytest.mark.usefixtures("ranks_may_be_promoted")


@pytest.fixture
def default_settings():
    """JAX as a user has it, without the checks of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False), jax.debug_nans(False):
        yield


# The grammar.


NOUNS = {*grammar.NOUNS, *map(grammar.plural, grammar.NOUNS)}


@pytest.mark.parametrize("distance", [0, 2, 3, 7, 12, 60])
def test_a_clause_has_the_given_distance_and_agrees_with_its_subject(distance):
    rng, counts = np.random.default_rng(distance), set()
    for number in (0, 1) * 40:
        words, verb, pronoun = grammar.clause(rng, distance, number=number)
        assert verb - 2 == distance and words[verb] == ("was", "were")[number]
        subject = words[1]
        assert (subject in grammar.NOUNS) == (number == 0) and words[-1] == "." and words[0] == "the"
        assert words[pronoun] == ("they" if number else grammar.PRONOUN[subject])
        assert not any(word in ("was", "were") for word in words[:verb])
        counts.add(len([word for word in words[2:verb] if word in NOUNS]))
    assert counts == set(range(min(4, max(distance - 1, 0) // 2) + 1))  # every possible count, up to four


def test_a_clause_contains_the_given_nouns():
    rng = np.random.default_rng(0)
    for between in ([], [0], [1, 1], [0, 1, 1, 0]):
        words, verb, _ = grammar.clause(rng, 12, between, number=0)
        found = [word for word in words[2:verb] if word in NOUNS]
        assert sorted(word not in grammar.NOUNS for word in found) == sorted(map(bool, between)) and verb == 14
    with pytest.raises(ValueError, match="4 nouns need a distance of at least 9, got 8"):
        grammar.clause(rng, 8, [0] * 4)


def test_questions_have_the_given_number_of_attractors():
    words = np.array(grammar.WORDS)
    for count in range(5):
        asked = agreement.questions("number", agreement.ATTRACTORS_AT, 0, count)
        for n in range(0, 100, 9):
            own, many = words[asked.tokens[: asked.last[n] + 1, n]], words[asked.right[n]] == "were"
            assert sum((word not in grammar.NOUNS) != many for word in own[2:] if word in NOUNS) == count
            assert sum(word in NOUNS for word in own[2:]) == 4


def test_the_grammar_has_many_words_and_texts():
    assert len(grammar.NOUNS) >= 40 and len(grammar.VERBS) >= 40
    assert len({*grammar.NOUNS, *map(grammar.plural, grammar.NOUNS)}) == 2 * len(grammar.NOUNS)
    tokens, real = grammar.corpus(0, 50, 12)
    assert tokens.shape == real.shape == (50, 40) and tokens.max() < len(grammar.WORDS)
    texts = [" ".join(grammar.WORDS[n] for n in row[own]) for row, own in zip(tokens, real, strict=True)]
    assert all(text.count(" .") == 2 and len(re.findall(r"\b(?:was|were)\b", text)) == 2 for text in texts)
    assert len({len(text.split()) for text in texts}) > 10


def test_the_right_answer_is_the_word_that_agrees():
    for question, answers in (("number", {"was", "were"}), ("gender", {"he", "she"})):
        asked = agreement.questions(question, 8, 0)
        words = np.array(grammar.WORDS)
        assert {*words[asked.right]} == {*words[asked.wrong]} == answers and (asked.right != asked.wrong).all()
        assert np.mean(words[asked.right] == min(answers)) == 0.5  # so chance is one half
        after = asked.tokens[asked.last + 1, np.arange(len(asked.last))]
        assert (after == asked.right).all()
    asked = agreement.second_subject(5, 0)
    first = [
        [w for w in words[asked.tokens[: place + 1, n]] if w in ("was", "were")] for n, place in enumerate(asked.last)
    ]
    assert all(own == [words[wrong]] for own, wrong in zip(first, asked.wrong, strict=True))


# The measurements.


def net_of(cell, draw):
    """Return a net for an experiment on agreement, each leaf `draw(shape)`; compiling its `init_net` takes seconds."""
    like = jax.eval_shape(functools.partial(agreement.init_net, cell=cell, hidden_size=6), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), leaf.dtype), like)


@pytest.mark.usefixtures("default_settings")
def test_accuracy_counts_the_questions_answered_correctly():
    nets, asked = net_of(GRU, lambda shape: normal(len(shape), 2, *shape)), agreement.questions("number", 4, 0)
    part = agreement.Questions(asked.tokens[:, :50], *(v[:50] for v in asked[1:]))
    got = agreement.accuracy(GRU, nets, part)
    (last,) = set(part.last)  # at one distance, all answers have the same index

    @jax.jit
    def read(net, words):
        return unroll(GRU, net.cell, net.embedding[words])[1][-1] @ net.w + net.b

    for n in range(2):
        net = jax.tree.map(lambda leaf, n=n: leaf[n], nets)
        each = [read(net, column[: last + 1]) for column in part.tokens.T]
        right = [logits[yes] > logits[no] for logits, yes, no in zip(each, part.right, part.wrong, strict=True)]
        assert float(got[n]) == pytest.approx(np.mean(right))


@pytest.mark.parametrize("cell", [LSTM, GRU], ids=["LSTM", "GRU"])
def test_clamping_fixes_one_unit_and_changes_no_other(cell):
    params, xs, carry = draw(cell)
    held = jnp.arange(4) == 2
    to = jax.tree.map(lambda leaf: 0.3 + leaf[0], carry)
    new, y = agreement.clamp(cell).step(agreement.Clamped(params, held, to), carry, xs[0])
    free, _ = cell.step(params, carry, xs[0])
    for leaf, value, other in zip(*map(jax.tree.leaves, (new, to, free)), strict=True):
        assert (leaf[:, 2] == value[2]).all() and (leaf[:, ~held] == other[:, ~held]).all()
    assert (y == new.h).all()


FILLER, LENGTH = 5, agreement.MAX_DISTANCE + 2


def a_latch(copies):
    """Make an RNN in which unit 3 (or units 3 and 4) alone remembers which word came first and decides the answer."""
    was, were = grammar.NUMBER["was"], grammar.NUMBER["were"]
    units = [3, 4][:copies]
    net = net_of(RNN, np.zeros)
    net = net._replace(embedding=net.embedding.at[was, 0].set(1.0).at[were, 0].set(-1.0).at[:, 1].set(1.0))
    cell = net.cell._replace(w_hh=net.cell.w_hh.at[jnp.array(units), jnp.array(units)].set(3.0))
    cell = cell._replace(
        w_ih=cell.w_ih.at[0, jnp.array(units)].set(5.0).at[1, 0].set(1.0)
    )  # unit 0 is active but has no effect
    return net._replace(cell=cell, w=net.w.at[jnp.array(units), was].set(5.0), b=net.b.at[was].set(0.1))


@pytest.mark.usefixtures("default_settings")
@pytest.mark.parametrize("copies, without_one", [(1, 0.5), pytest.param(2, 1.0, marks=pytest.mark.ci)])
def test_the_deciding_units_are_found_and_tested_on_other_questions(copies, without_one, monkeypatch):
    """In a toy question, the answer is the first word."""
    seen = []

    def toy(question, distance, seed):
        seen.append(seed)
        answers = np.array([grammar.NUMBER["was"], grammar.NUMBER["were"]])
        right = np.random.default_rng(seed).permutation(np.tile([0, 1], 10))
        tokens = np.concatenate([answers[right][None], np.full((LENGTH, 20), FILLER)])
        return agreement.Questions(tokens, np.full(20, LENGTH - 1), answers[right], answers[1 - right])

    monkeypatch.setattr(agreement, "questions", toy)
    (row,) = agreement.clamping("RNN", jax.tree.map(lambda leaf: leaf[None], a_latch(copies)), 7)
    assert seen == [7, 8]
    assert set(row["units"][:copies]) == {3, 4}.intersection(range(3, 3 + copies)) and len(set(row["units"])) == 2
    assert sorted(row["rank"][:copies]) == [1, 2][:copies]
    assert (row["free"], row["without one"], row["without two"]) == (1.0, without_one, 0.5)
    assert min(row["random"]) == 1.0


def test_each_net_of_a_stack_trains_as_if_alone():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    nets = {
        name: {"w": jnp.asarray(normal(k, 3, 4)), "b": jnp.asarray(normal(9 + k, 3))} for k, name in enumerate("ab")
    }
    gradients = jax.tree.map(lambda v: 3 * v**2 + 1, nets)
    together = trainer.each_alone(optimizer)
    with jax.numpy_dtype_promotion("standard"):
        got, _ = jax.jit(together.update)(gradients, together.init(nets), nets)
        update = jax.jit(optimizer.update)
        for name, own in nets.items():
            for n in range(3):
                net, gradient = (jax.tree.map(lambda v, n=n: v[n], tree) for tree in (own, gradients[name]))
                want, _ = update(gradient, optimizer.init(net), net)
                assert worst_error(jax.tree.map(lambda v, n=n: v[n], got[name]), want) < 1e-13


def test_the_80_bit_backward_pass_equals_autodiff():
    params, xs, _ = draw(LSTM)
    weights = normal(3, 7, 3, 4)
    want = jax.grad(lambda p: (unroll(LSTM, p, xs)[1] * weights).sum())(params)
    got = autodiff_vs_analytic.with_more_digits(params, xs, weights)
    assert worst_error([g.astype(float) for g in got], list(want)) < 1e-14


def test_a_verdict_must_hold_for_all_seeds():
    def row(cell, at_lag):
        setting = {"cell": cell, "recurrent": "r", "scale": 1.0, "forget": None}
        return {**setting, "flow": [[1, v] for v in at_lag]}

    def verdict(at_lag):
        return gradient_flow.verdicts([row("RNN", [2, 4]), row("LSTM", at_lag)], 1)[0]["than the RNN's"]

    assert [verdict(at_lag) for at_lag in ([5, 9], [0.1, 1.9], [3.9, 9], [0.1, 5])] == [
        "larger", "smaller", "not told apart", "not told apart"
    ]  # fmt: skip


@pytest.mark.ci
def test_gradient_by_lag_equals_autodiff_from_each_state():
    key = jax.random.key(0)
    net = gradient_flow.init_net(key, gradient_flow.Setting("RNN", "uniform", 1.0, None), 11, 5)
    net = jax.tree.map(lambda v: v.astype("float64"), net)
    tokens = jnp.asarray(np.random.default_rng(0).integers(11, size=(gradient_flow.LAGS + 2, 1)))
    flow = gradient_flow.flow_by_lag(RNN, net, tokens)
    states = trace(RNN, net.cell, net.embedding[tokens[:-1]]).carry.h

    def loss(h, after):
        rest = net.embedding[tokens[after + 1 : -1]]
        carry = RNN.initial_carry(net.cell, (1,))._replace(h=h)
        ys = jnp.concatenate([h[None], unroll(RNN, net.cell, rest, carry)[1]])
        return -jax.nn.log_softmax(ys[-1] @ net.w + net.b)[0, tokens[-1, 0]]

    by_lag = [jnp.linalg.norm(jax.grad(loss)(states[-1 - lag], len(states) - 1 - lag)) for lag in (0, 4)]
    assert worst_error(flow[jnp.array([0, 4])], jnp.stack(by_lag) / by_lag[0]) < 1e-12


# The flip-flop.


def test_a_memory_is_the_last_pulse_of_its_input():
    xs, memories = map(np.asarray, flip_flop.pulses(jax.random.key(0), 40, 6))
    last = np.zeros((6, 3))
    for x, memory in zip(xs, memories, strict=True):
        last[x != 0] = x[x != 0]
        np.testing.assert_array_equal(memory, last)
    assert set(np.unique(xs)) == {-1, 0, 1} and (xs[0] != 0).all()
    assert abs((xs[1:] != 0).mean() - flip_flop.PULSE_RATE) < 0.05


def a_perfect_net():
    """Three units that latch, s' = tanh(4 s + 8 x), one for each bit."""
    eye = jnp.eye(3)
    return {"cell": RNN.init(jax.random.key(0), 3, 3)._replace(w_ih=8 * eye, w_hh=4 * eye), "readout": eye}


@pytest.mark.ci
@pytest.mark.usefixtures("default_settings")
def test_a_net_built_by_hand_is_right_and_has_a_cube_of_points():
    assert flip_flop.share_right(RNN, a_perfect_net()) == 1
    blind = a_perfect_net() | {"readout": jnp.eye(3)[::-1]}
    assert flip_flop.share_right(RNN, blind) < 0.6
    found = flip_flop.portrait(RNN, a_perfect_net(), 1000)
    assert (found["points"], found["by_unstable"], found["memories"]) == (27, [8, 12, 6, 1], 8)
    assert np.shape(found["coordinates"]) == (27, 3) and found["largest_speed"] < 1e-25
    # Along an axis of a unit; the other half of the principal components is rotated.
    for number, directions in zip(found["num_unstable"], found["unstable_directions"], strict=True):
        assert len(directions) == number
        assert all(abs(np.linalg.norm(direction) - 1) < 1e-3 for direction in directions)


@pytest.mark.slow
@pytest.mark.usefixtures("default_settings")
@jax.debug_key_reuse(False)  # the check takes a key that a vmapped scan reads for one read twice
def test_flip_flop_runs(tmp_path):
    result = flip_flop.main(hidden_size=4, steps=30, seeds=2, starts=20, workdir=str(tmp_path / "new"))
    assert [(row["cell"], row["seed"]) for row in result["rows"]] == [(c, s) for c in flip_flop.CELLS for s in (0, 1)]
    assert result["rows"][0]["loss"] < 1.2 and flip_flop.table(result).count("\n") == 7
    assert (tmp_path / "new" / "flip_flop.png").stat().st_size > 10_000


# Pictures from the committed results.


def committed(*place):
    folder = Path(__file__).parents[1] / "experiments" / "results"
    return json.loads(folder.joinpath(*place, "result.json").read_text(encoding="utf-8"))


@pytest.fixture
def figure_of(monkeypatch):
    """Return a function that draws a picture and returns its figure."""
    monkeypatch.setattr(plots, "_save", lambda figure, path, dpi: figure)
    yield lambda draw, *data: draw(Path("unused.png"), *data)
    plt.close("all")


@pytest.mark.ci
@pytest.mark.parametrize("recurrent", ["orthogonal", "uniform"])
def test_the_picture_of_the_gradient_by_lag_has_the_medians_and_ranges_of_the_result(figure_of, recurrent):
    measured = committed("gradient_flow")["measured"]
    figure = figure_of(plots.gradient_flow, measured, recurrent)
    panels = [(step, scale) for step in ("0", "600") for scale in (0.1, 1.0)]
    for axes, (step, scale) in zip(figure.axes, panels, strict=True):
        rows = [row for row in measured[step] if (row["recurrent"], row["scale"]) == (recurrent, scale)]
        assert len(axes.lines) == len(axes.collections) == len(rows) == 6
        for line, bars, row in zip(axes.lines, axes.collections, rows, strict=True):
            flow = np.array(row["flow"])
            np.testing.assert_allclose(line.get_ydata(), np.median(flow, axis=0))
            for (lag, low), (_, high) in bars.get_segments():
                assert (low, high) == (flow[:, int(lag)].min(), flow[:, int(lag)].max())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [label for label, _ in plots.NETS.values()]


@pytest.mark.ci
def test_the_picture_of_the_gates_has_twenty_units_and_its_sentence(figure_of):
    read = committed("char_lm")["read"]
    figure = figure_of(plots.gate_maps, read)
    images = [axes.images[0].get_array() for axes in figure.axes[:5]]
    for image, name in zip(images, "ifgoc", strict=True):
        np.testing.assert_allclose(image, np.array(read[name]).T)
        assert image.shape == (20, len(read["sentence"]))
    shown = "".join(tick.get_text() for tick in figure.axes[4].get_xticklabels())
    assert shown.replace("·", " ") == read["sentence"]
    kept = np.array(read["f"]).mean(axis=0)
    assert (np.diff(kept) < 1e-3).all() and len(set(read["units"])) == 20


def test_units_are_spread_over_the_order_by_mean_forget_gate():
    f = np.linspace(0, 1, 50)[np.random.default_rng(0).permutation(50)]
    gates = LSTMGates(*[np.tile(f, (3, 1))] * 4)
    read = plots.read_aloud("abc", Trace(None, None, None, gates, LSTMState(gates.f, gates.f), None))
    assert f[read["units"]][[0, -1]].tolist() == [1, 0] and len(read["units"]) == 20 and read["of"] == 50
    assert abs(np.diff(f[read["units"]]) + 1 / 19).max() < 0.02


@pytest.mark.ci
def test_the_picture_of_the_attention_has_two_texts(figure_of):
    attended = committed("dates", "functions")["attended"]
    figure = figure_of(plots.attention, attended, 1.0)
    assert len(attended) == 2 and len(figure.axes) == 3
    for axes, (text, found) in zip(figure.axes, attended.items(), strict=False):
        np.testing.assert_array_equal(axes.images[0].get_array(), found["weights"])
        assert axes.get_title().startswith(text) and np.shape(found["weights"]) == (10, len(text))
        np.testing.assert_allclose(np.sum(found["weights"], axis=1), 1, atol=0.02)


@pytest.mark.ci
def test_the_picture_of_the_flip_flop_has_every_point_of_the_first_nets(figure_of):
    rows = committed("flip_flop")["rows"]
    figure = figure_of(plots.flip_flop, rows)
    portraits = [axes for axes in figure.axes if axes.name == "3d"]
    for axes, cell in zip(portraits, ("RNN", "GRU", "LSTM"), strict=True):
        (first,) = [row for row in rows if row["cell"] == cell and row["seed"] == 0]
        drawn = np.concatenate([np.array(dots._offsets3d).T for dots in axes.collections])
        np.testing.assert_allclose(sorted(drawn.tolist()), sorted(first["coordinates"]))
        assert len(axes.lines) == len(first["trajectories"]) + sum(first["num_unstable"])


# Small runs.


@pytest.mark.slow
@pytest.mark.usefixtures("default_settings")
def test_autodiff_vs_analytic_runs(tmp_path):
    result = autodiff_vs_analytic.main(
        lengths=(5,), widths=(3,), rounds=1, workdir=str(tmp_path / "new"), dtypes=("float64", "float32", "bfloat16")
    )
    worst = {
        d: max(r["error"] for r in result["rows"] if r["dtype"] == d and r["road"] != "differences")
        for d in result["config"]["dtypes"]
    }
    assert worst["float64"] < 1e-14 and worst["float32"] < 1e-5 and 1e-4 < worst["bfloat16"] < 1e-1
    assert (tmp_path / "new" / "autodiff_vs_analytic.png").stat().st_size > 10_000
    assert autodiff_vs_analytic.table(result).count("\n| ") == 5


@pytest.mark.slow
@pytest.mark.usefixtures("default_settings")
def test_gradient_flow_runs_and_resumes(tmp_path):
    run = functools.partial(
        gradient_flow.main, hidden_size=4, batch_size=2, seq_len=8, seeds=2, workdir=str(tmp_path / "new")
    )
    result = run(milestones=(2, 4))
    assert result["measured"].keys() == {"0", "2", "4"} and len(result["measured"]["0"]) == len(gradient_flow.SETTINGS)
    again = run(milestones=(2, 4), resume=True)
    assert again == result
    assert len(list((tmp_path / "new").glob("*.png"))) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("default_settings")
def test_agreement_runs_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "NUM_TEXTS", 100)
    monkeypatch.setattr(agreement, "NUM_QUESTIONS", 20)
    run = functools.partial(
        agreement.main, hidden_size=16, batch_size=4, seeds=2, steps=4, block=2, workdir=str(tmp_path / "new")
    )
    result = run()
    assert run(resume=True) == result
    assert all(len(right) == 2 for right in result["number"][60].values())
    assert {path.name for path in (tmp_path / "new").glob("*.png")} == {"agreement.png", "unit.png"}
