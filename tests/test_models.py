"""LSTMs inside larger models: the date reader in three forms, an agent with memory, learned initial carries."""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dates, dates_functions
from jaxlstm import LSTM, LSTMParams, LSTMState, split_gates, unroll
from jaxlstm.diagnostics import check_gradients

from cells import HOLES, RESET, B, H, I, T, draw, normal, worst_error

ROOT = Path(__file__).parents[1]


@pytest.fixture
def default_settings():
    """JAX as a user has it, without the checks of the tests."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.enable_x64(False),
        jax.debug_nans(False),
        jax.debug_key_reuse(False),
    ):
        yield


pytestmark = pytest.mark.usefixtures("ranks_may_be_promoted")

# Dates.


def test_no_held_out_day_occurs_in_training():
    training, held_out = dates.days(False), dates.days(True)
    assert not set(training) & set(held_out) and len(training) + len(held_out) == 21_915
    assert 0.08 < len(held_out) / len(training) < 0.14
    texts, answers = dates.strings(3, 500, held_out=True)
    assert set(answers) <= {day.isoformat() for day in held_out}
    assert max(map(len, texts)) <= dates.WIDTH
    rng = np.random.default_rng(0)
    said = {dates.say(dates.FIRST, rng) for _ in range(2000)}
    assert {"1 January 1970", "the 1st of january, 1970", "01/01/70", "THURSDAY, 1 JANUARY 1970", "Jan. 1, '70"} <= said
    assert len(said) > 2 * len(dates.FORMATS)


def test_every_form_of_the_reader_has_at_most_120_lines():
    for form in dates.FORMS.values():
        assert len(Path(form.__file__).read_text(encoding="utf-8").splitlines()) <= 120


SIZES = (9, 6, 5)  # symbols, outputs, hidden
LENGTHS = np.array([7, 1, 4])


def draw_reader(dtype):
    """Draw a reader whose weights are exact in float32; compiling `dates_functions.init` takes seconds."""
    init = functools.partial(dates_functions.init, num_symbols=SIZES[0], num_outputs=SIZES[1], hidden_size=SIZES[2])
    like = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda v: jnp.asarray(normal(v.size, *v.shape).astype("float32"), dtype), like)


def in_linen(reader, decoder):
    names = {"bridge", "query", "combine", "readout"}
    return {
        **{name: {"kernel": getattr(reader, name)} for name in names},
        **{name: {"embedding": getattr(reader, name)} for name in ("read", "written")},
        "encoder": {"layers": {"layer_0": {way: half._asdict() for way, half in reader.encoder._asdict().items()}}},
        "decoder": {"cell": decoder},
    }


def forms_of(reader):
    """Return the same weights in the layout of each form."""
    gates = split_gates(reader.decoder)._asdict()
    as_linen = {f"i{name}": {"kernel": gate.w_ih} for name, gate in gates.items()}
    as_linen |= {f"h{name}": {"kernel": gate.w_hh, "bias": gate.b} for name, gate in gates.items()}
    w_ih, w_hh, b = reader.decoder
    as_nnx = {"dense_i": {"kernel": w_ih}, "dense_h": {"kernel": w_hh, "bias": b}}
    return {"functions": reader, "linen": in_linen(reader, as_linen), "nnx": in_linen(reader, as_nnx)}


@pytest.mark.ci
def test_the_reader_is_the_same_in_every_form():
    with jax.numpy_dtype_promotion("standard"), jax.debug_key_reuse(False):
        reader = draw_reader("float64")  # float32 values, since nnx.Embed rounds embeddings and their gradients
        chars = np.random.default_rng(0).integers(SIZES[0], size=(3, 7))
        previous = np.random.default_rng(1).integers(SIZES[1] + 1, size=(3, 4))
        weight = normal(2, 3, 4, SIZES[1])
        outs = {}
        for form, params in forms_of(reader).items():
            module = dates.FORMS[form]
            like = jax.eval_shape(
                functools.partial(module.init, num_symbols=9, num_outputs=6, hidden_size=5), jax.random.key(0)
            )
            assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, params)

            @jax.jit
            def run(params, module=module):
                logits, attention = module.predict(params, chars, LENGTHS, previous)
                written = module.write(params, chars, LENGTHS, 4)
                return (weight * logits).sum() + (attention**2).sum(), (logits, attention, written)

            (_, outputs), gradient = jax.value_and_grad(run, has_aux=True)(params)
            outs[form] = (*outputs, gradient)
        want = forms_of(outs["functions"][3])
        for form in ("linen", "nnx"):
            assert worst_error(outs[form][:2], outs["functions"][:2]) < 1e-12
            assert (outs[form][2] == outs["functions"][2]).all()
            for name, gradient in outs[form][3].items():
                rounded = form == "nnx" and name in ("read", "written")
                assert worst_error(gradient, want[form][name]) < (1e-6 if rounded else 1e-11)
        attention = np.asarray(outs["functions"][1])
        assert (attention[:, :, 4:][[1, 2]] == 0).all(), "padding gets attention"
        np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-12)


def test_the_content_of_padding_has_no_effect(default_settings):
    reader = draw_reader("float32")
    write = jax.jit(dates_functions.write, static_argnums=3)
    chars = np.random.default_rng(0).integers(SIZES[0], size=(3, 7))
    other = np.where(np.arange(7) < LENGTHS[:, None], chars, (chars + 1) % SIZES[0])
    out = [write(reader, c, LENGTHS, 5) for c in (chars, other)]
    assert (out[0] == out[1]).all()


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=pytest.mark.ci if form == "functions" else pytest.mark.slow) for form in dates.FORMS],
)
def test_more_than_99_percent_of_held_out_strings_are_read_correctly(form, tmp_path, default_settings):
    with jax.check_tracer_leaks(False):  # this check traces functions anew, which takes minutes here
        result = dates.main(form=form, steps=300, block=300, workdir=str(tmp_path / "run"))  # evaluated only once
    assert result["held-out strings"] == 5000 and result["exact match"] >= 0.99
    assert (tmp_path / "run" / "attention.png").stat().st_size > 20_000


def test_the_page_on_dates_quotes_the_committed_results():
    page = (ROOT / "docs" / "dates.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:pure |flax\.)(\w+) \| ([\d.]+) % \|", page, re.M)
    assert [form for form, _ in rows] == list(dates.FORMS)
    for form, figure in rows:
        result = json.loads((ROOT / "experiments" / "results" / "dates" / form / "result.json").read_text("utf-8"))
        assert figure == f"{100 * result['exact match']:.2f}" and result["held-out strings"] == 5000
        assert result["config"]["form"] == form and len(result["wrong"]) == min(
            10, round(5000 * (1 - result["exact match"]))
        )
    assert f"in {len(dates.FORMATS)} formats" in page


# An agent with memory: the code of docs/reinforcement-learning.md.

(CORRIDOR,) = re.findall(
    r"```python\n(from typing.*?)```", (ROOT / "docs" / "reinforcement-learning.md").read_text(encoding="utf-8"), re.S
)
RIGHT, WRONG = "reset=rollout.done_prev)", "reset=rollout.done)"


@pytest.fixture(scope="module")
def corridor():
    """The definitions of the page, without its training."""
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        exec(CORRIDOR.split("train = jax.jit(")[0], namespace)
    return namespace


@pytest.mark.ci
def test_the_policy_that_learns_is_the_policy_that_acted(corridor, default_settings):
    """Episodes end in the middle of a rollout, and rollouts start in the middle of an episode."""
    agent = corridor["agent"]._replace(policy=jax.random.normal(jax.random.key(3), (32, 2)))
    env, carry, done = corridor["state"].carry
    jitted = jax.jit(corridor["play"])
    (env, carry, done), _ = jitted(agent, env, carry, done, jax.random.key(4))
    (_, last, _), rollout = jitted(agent, env, carry, done, jax.random.key(5))
    assert 0 < rollout.done_prev[0].mean() < 1 and rollout.done[-1].any() and not rollout.done[-1].all()
    assert (rollout.done_prev[1:] == rollout.done[:-1]).all() and (rollout.done_prev[0] == done).all()
    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.key(5), len(rollout.obs)))[:, 0]

    def reread(reset):
        """Unroll the rollout as the loss does; draw the actions with the keys that `play` used."""
        final, hs = unroll(LSTM, agent.lstm, rollout.obs, carry, reset=reset)
        return final, jax.vmap(jax.random.categorical)(keys, hs @ agent.policy)

    final, actions = reread(rollout.done_prev)
    assert worst_error(final, last) < 1e-5
    assert (actions == rollout.action).all()
    assert not (reread(rollout.done)[1] == rollout.action).all()


def rewards(code):
    namespace = {}
    exec(code, namespace)
    return namespace["metrics"]["reward per episode"]


@pytest.mark.ci
def test_the_corridor_is_learned_by_a_policy_gradient(default_settings):
    learned = rewards(CORRIDOR)
    assert abs(learned[:3].mean()) < 0.3 and learned[-20:].mean() > 0.95


@pytest.mark.ci
def test_with_the_done_of_the_same_step_the_corridor_is_not_learned(default_settings):
    assert CORRIDOR.count(RIGHT) == 1
    assert rewards(CORRIDOR.replace(RIGHT, WRONG))[-20:].mean() < 0.5


# Learned initial carries.


class Model(NamedTuple):
    layer: LSTMParams
    start: LSTMState
    after_reset: LSTMState


def draw_state(seed):
    return LSTMState(jnp.asarray(normal(seed, H)), jnp.asarray(normal(seed + 1, H)))


def one_per_row(leaf):
    return jnp.broadcast_to(leaf, (B, H))


@pytest.mark.ci
def test_learned_initial_and_reset_carries_have_correct_gradients():
    params, xs, _ = draw(LSTM)
    model = Model(params, draw_state(3), draw_state(5))
    weight = normal(7, T, B, H)

    def loss(model):
        start, after_reset = (jax.tree.map(one_per_row, state) for state in (model.start, model.after_reset))
        _, ys = unroll(LSTM, model.layer, xs, start, mask=HOLES, reset=RESET, reset_carry=after_reset)
        return (weight * ys).sum()

    assert check_gradients(loss, model, key=jax.random.key(0)).agree
    gradient = jax.grad(loss)(model)
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(gradient)) and xs.shape[-1] == I
