"""The experiments on gradients: their data, what they measure with, and that each runs and draws."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import agreement, autodiff_vs_analytic, gradient_flow, grammar, trainer
from jaxlstm import GRU, LSTM, RNN, trace, unroll

from cells import draw, normal, worst_error


@pytest.fixture
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False), jax.debug_nans(False):
        yield


# The small English.


@pytest.mark.parametrize("distance", [0, 2, 3, 7, 12, 60])
def test_a_clause_has_the_distance_asked_for_and_agrees(distance):
    rng = np.random.default_rng(distance)
    for number in (0, 1) * 20:
        words, verb, pronoun = grammar.clause(rng, distance, number=number)
        assert verb - 2 == distance and words[verb] == ("was", "were")[number]
        subject = words[1]
        assert (subject in grammar.NOUNS) == (number == 0) and words[-1] == "." and words[0] == "the"
        assert words[pronoun] == ("they" if number else grammar.PRONOUN[subject])
        between = [word for word in words[2:verb] if word in {*grammar.NOUNS, *map(grammar.plural, grammar.NOUNS)}]
        assert len(between) <= 4 and not any(word in ("was", "were") for word in words[:verb])


def test_attractors_are_as_many_as_asked_for_and_of_the_other_number():
    rng = np.random.default_rng(0)
    for number in (0, 1):
        for count in range(5):
            words, verb, _ = grammar.clause(rng, 20, count, number=number)
            between = [word for word in words[2:verb] if word in {*grammar.NOUNS, *map(grammar.plural, grammar.NOUNS)}]
            assert len(between) == count and all((word in grammar.NOUNS) == (number == 1) for word in between)
    with pytest.raises(ValueError, match="4 nouns take a distance of 13, got 12"):
        grammar.clause(rng, 12, 4)


def test_the_language_is_as_rich_as_it_should_be():
    assert len(grammar.NOUNS) >= 40 and len(grammar.VERBS) >= 40
    assert len({*grammar.NOUNS, *map(grammar.plural, grammar.NOUNS)}) == 2 * len(grammar.NOUNS)
    tokens, real = grammar.corpus(0, 50, 12)
    assert tokens.shape == real.shape == (50, 40) and tokens.max() < len(grammar.WORDS)
    texts = [" ".join(grammar.WORDS[n] for n in row[own]) for row, own in zip(tokens, real, strict=True)]
    assert all(text.count(" .") == 2 and len(re.findall(r"\b(?:was|were)\b", text)) == 2 for text in texts)
    assert len({len(text.split()) for text in texts}) > 10


def test_questions_ask_for_the_word_that_agrees():
    for question, answers in (("number", {"was", "were"}), ("gender", {"he", "she"})):
        asked = agreement.questions(question, 8, 0)
        words = np.array(grammar.WORDS)
        assert {*words[asked.right]} == {*words[asked.wrong]} == answers and (asked.right != asked.wrong).all()
        assert np.mean(words[asked.right] == min(answers)) == 0.5  # so that chance is a half
        after = asked.tokens[asked.last + 1, np.arange(len(asked.last))]
        assert (after == asked.right).all()
    asked = agreement.second_subject(5, 0)
    first = [
        [w for w in words[asked.tokens[: place + 1, n]] if w in ("was", "were")] for n, place in enumerate(asked.last)
    ]
    assert all(own == [words[wrong]] for own, wrong in zip(first, asked.wrong, strict=True))


# What they measure with.


def a_net(cell, hidden=6):
    return jax.vmap(lambda key: agreement.init_net(key, cell, hidden))(jax.random.split(jax.random.key(0), 2))


@pytest.mark.usefixtures("as_users_have_it")
def test_accuracy_counts_the_questions_answered_rightly():
    nets, asked = a_net(GRU), agreement.questions("number", 4, 0)
    got = agreement.accuracy(GRU, nets, asked)
    for n in range(2):
        net = jax.tree.map(lambda leaf, n=n: leaf[n], nets)
        right = 0
        for column, last, yes, no in zip(asked.tokens.T[:50], asked.last, asked.right, asked.wrong, strict=False):
            _, ys = unroll(GRU, net.cell, net.embedding[column[: last + 1]])
            logits = ys[-1] @ net.w + net.b
            right += int(logits[yes] > logits[no])
        part = agreement.Questions(asked.tokens[:, :50], *(v[:50] for v in asked[1:]))
        assert float(agreement.accuracy(GRU, nets, part)[n]) == pytest.approx(right / 50)
    assert got.shape == (2,)


@pytest.mark.parametrize("cell", [LSTM, GRU], ids=["LSTM", "GRU"])
def test_a_clamped_unit_is_still_and_nothing_else_is_changed_by_hand(cell):
    params, xs, carry = draw(cell)
    units, to = np.arange(4) == 2, np.full(4, 0.3)
    held = agreement.clamp(cell, jnp.asarray(units), jnp.asarray(to))
    new, y = held.step(params, carry, xs[0])
    free, _ = cell.step(params, carry, xs[0])
    memory = np.asarray(agreement.memory(new))
    assert (memory[:, 2] == 0.3).all() and worst_error(memory[:, ~units], agreement.memory(free)[:, ~units]) < 1e-15
    gates = cell.activations(params, carry, cell.project(params, xs[0]), cell.recur(params, carry))
    want = np.asarray(gates.o) * np.tanh(memory) if cell is LSTM else memory
    assert worst_error(y, want) < 1e-15 and worst_error(new.h, want) < 1e-15


@pytest.mark.usefixtures("as_users_have_it")
def test_the_unit_that_decides_is_found():
    """Of a net whose answer hangs on unit 3 alone, made so by hand."""
    net = jax.tree.map(lambda leaf: leaf[0], a_net(RNN))
    was, were = grammar.NUMBER["was"], grammar.NUMBER["were"]
    net = net._replace(w=net.w.at[:, was].set(0).at[:, were].set(0).at[3, was].set(5.0))
    attributed, _ = agreement.attribution(RNN, net._replace(cell=net.cell._replace(w_hh=jnp.eye(6))),
                                          agreement.questions("number", agreement.MAX_DISTANCE, 0))  # fmt: skip
    assert np.argmax(attributed) == 3 and np.delete(np.asarray(attributed), 3).max() == 0


def test_each_net_of_a_stack_is_trained_as_if_alone():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    nets = {
        name: {"w": jnp.asarray(normal(k, 3, 4)), "b": jnp.asarray(normal(9 + k, 3))} for k, name in enumerate("ab")
    }
    gradients = jax.tree.map(lambda v: 3 * v**2 + 1, nets)
    together = trainer.each_alone(optimizer)
    with jax.numpy_dtype_promotion("standard"):
        got, _ = together.update(gradients, together.init(nets), nets)
        for name, own in nets.items():
            for n in range(3):
                net, gradient = (jax.tree.map(lambda v, n=n: v[n], tree) for tree in (own, gradients[name]))
                want, _ = optimizer.update(gradient, optimizer.init(net), net)
                assert worst_error(jax.tree.map(lambda v, n=n: v[n], got[name]), want) < 1e-13


def test_the_backward_pass_with_more_digits_is_the_gradient():
    params, xs, _ = draw(LSTM)
    weights = normal(3, 7, 3, 4)
    want = jax.grad(lambda p: (unroll(LSTM, p, xs)[1] * weights).sum())(params)
    got = autodiff_vs_analytic.with_more_digits(params, xs, weights)
    assert worst_error([g.astype(float) for g in got], list(want)) < 1e-14


def test_a_verdict_takes_all_seeds():
    row = lambda cell, at_lag: {
        "cell": cell,
        "recurrent": "r",
        "scale": 1.0,
        "forget": None,
        "flow": [[1, v] for v in at_lag],
    }
    said = lambda own: gradient_flow.verdicts([row("RNN", [2, 4]), row("LSTM", own)], 1)[0]["than the RNN's"]
    assert [said(own) for own in ([5, 9], [0.1, 1.9], [3.9, 9], [0.1, 5])] == [
        "larger", "smaller", "not told apart", "not told apart"
    ]  # fmt: skip


def test_gradient_by_lag_is_that_of_differences():
    key = jax.random.key(0)
    net = gradient_flow.init_net(key, gradient_flow.Setting("RNN", "uniform", 1.0, None), 11, 5)
    net = jax.tree.map(lambda v: v.astype("float64"), net)
    tokens = jnp.asarray(np.random.default_rng(0).integers(11, size=(gradient_flow.LAGS + 2, 1)))
    flow = gradient_flow.flow_by_lag(RNN, net, tokens)
    states = trace(RNN, net.cell, net.embedding[tokens[:-1]]).carry.h

    def loss(h, after):
        ys = jnp.concatenate(
            [
                h[None],
                unroll(
                    RNN,
                    net.cell,
                    net.embedding[tokens[after + 1 : -1]],
                    RNN.initial_carry(net.cell, (1,))._replace(h=h),
                )[1],
            ]
        )
        return -jax.nn.log_softmax(ys[-1] @ net.w + net.b)[0, tokens[-1, 0]]

    by_lag = [jnp.linalg.norm(jax.grad(loss)(states[-1 - lag], len(states) - 1 - lag)) for lag in (0, 1, 4)]
    assert worst_error(flow[jnp.array([0, 1, 4])], jnp.stack(by_lag) / by_lag[0]) < 1e-12


# Each runs, and draws.


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
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
@pytest.mark.usefixtures("as_users_have_it")
def test_gradient_flow_runs_and_goes_on(tmp_path):
    run = functools.partial(
        gradient_flow.main, hidden_size=4, batch_size=2, seq_len=8, seeds=2, workdir=str(tmp_path / "new")
    )
    result = run(milestones=(2, 4))
    assert result["measured"].keys() == {"0", "2", "4"} and len(result["measured"]["0"]) == len(gradient_flow.SETTINGS)
    again = run(milestones=(2, 4), resume=True)
    assert again == result
    assert len(list((tmp_path / "new").glob("*.png"))) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_agreement_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "NUM_TEXTS", 100)
    monkeypatch.setattr(agreement, "NUM_QUESTIONS", 20)
    run = functools.partial(
        agreement.main, hidden_size=16, batch_size=4, seeds=2, steps=4, block=2, workdir=str(tmp_path / "new")
    )
    result = run()
    assert run(resume=True) == result
    assert all(len(right) == 2 for right in result["number"][60].values())
    assert {path.name for path in (tmp_path / "new").glob("*.png")} == {"agreement.png", "unit.png"}
