"""The experiment on agents with memory: its environments, its advantages, and how it handles the carry."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo
from experiments.ppo import EAST, NORTH, SOUTH, WEST
from jaxlstm import unroll

from cells import normal, worst_error


@pytest.fixture(autouse=True)
def default_settings():
    """JAX as a user has it, without the checks of the tests."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
        jax.debug_nans(False),
        jax.debug_key_reuse(False),  # the check takes a key that a vmapped scan reads for one read twice
    ):
        yield


# The environments.


def walk(length, sign, actions):
    """Return what an agent sees before every action, and the reward, end and cut that follow it."""
    env = ppo.t_maze(length)

    def step(maze, action):
        after, *outcome = env.step(maze, action)
        return after, (env.observe(maze), *outcome)

    start = ppo.TMaze(jnp.array(sign), jnp.array(0), jnp.array(0))
    return [np.asarray(v) for v in jax.lax.scan(step, start, jnp.array(actions))[1]]


def test_a_walk_through_the_t_maze():
    actions = [WEST, EAST, NORTH, WEST, EAST, EAST, SOUTH, EAST, EAST, WEST, EAST, SOUTH]
    places = [0, 0, 1, 1, 0, 1, 2, 2, 3, 3, 2, 3]
    # The action at place 3 that goes north or south ends the episode; all else that brings no step east costs 0.1.
    rewards = [-0.1, 0, -0.1, -0.1, 0, 0, -0.1, 0, -0.1, -0.1, 0]
    for sign, bits, last in ((0, [0, 1, 1], -0.1), (1, [1, 1, 0], 4)):
        obs, reward, terminated, truncated = walk(3, sign, actions)
        seen = {0: bits, 1: [1, 0, 1], 2: [1, 0, 1], 3: [0, 1, 0]}
        np.testing.assert_array_equal(obs, [seen[place] for place in places])
        np.testing.assert_allclose(reward, [*rewards, last], rtol=1e-6)
        assert terminated.tolist() == [False] * 11 + [True] and not truncated.any()
    assert walk(3, 0, [EAST] * 3 + [NORTH])[1][-1] == 4


def test_an_episode_in_the_t_maze_is_cut_off_after_its_limit():
    limit = 4 * 2 + 20
    _, _, terminated, truncated = walk(2, 0, [NORTH] * limit)
    assert not terminated.any() and truncated.tolist() == [False] * (limit - 1) + [True]
    # An episode that ends at the limit is over, not cut off.
    _, _, terminated, truncated = walk(2, 0, [NORTH] * (limit - 3) + [EAST, EAST, NORTH])
    assert terminated[-1] and not truncated.any()


def test_both_signs_are_drawn():
    signs = jax.vmap(ppo.t_maze(3).enter)(jax.random.split(jax.random.key(0), 400)).sign
    assert set(np.asarray(signs).tolist()) == {0, 1} and abs(float(signs.mean()) - 0.5) < 0.1


@pytest.mark.parametrize("k, num_decks", [(4, 1), (1, 2)])
def test_repeat_previous_equals_a_loop_as_in_popgym(k, num_decks):
    env, num_cards = ppo.repeat_previous(k, num_decks), 52 * num_decks

    def step(cards, action):
        after, *outcome = env.step(cards, action)
        return after, (env.observe(cards), *outcome)

    @jax.jit
    def episode(key, actions):
        return jax.lax.scan(step, env.enter(key), actions)

    first = []
    for seed in range(8):
        actions = np.random.default_rng(seed).integers(4, size=num_cards - 1)
        cards, (obs, reward, terminated, truncated) = episode(jax.random.key(seed), actions)
        deck = np.asarray(cards.hand).tolist()
        assert [deck.count(suit) for suit in range(4)] == [13 * num_decks] * 4
        hand, in_deck, want, last = deck[:1], deck[1:], [], []
        for action in actions:
            last.append(len(in_deck) == 1)
            right = len(hand) >= k and action == hand[-k]
            want.append(0 if len(hand) < k else (1 if right else -1) / (num_cards - k))
            hand.append(in_deck.pop(0))
        np.testing.assert_allclose(reward, want, rtol=1e-6)
        assert truncated.tolist() == last and not terminated.any()
        np.testing.assert_array_equal(obs, np.eye(4)[deck[:-1]])
        first.append(tuple(deck[:6]))
    assert len(set(first)) == 8
    assert sum(reward != 0) == num_cards - k


# Advantages.


def test_advantages_equal_the_sums_of_their_definition():
    rng, shape, discount, trace = np.random.default_rng(0), (9, 5), 0.9, 0.8
    reward, value, next_value = (rng.normal(size=shape) for _ in range(3))
    terminated, truncated = rng.random(shape) < 0.2, rng.random(shape) < 0.2
    truncated &= ~terminated
    blank = dict.fromkeys(ppo.Rollout._fields)
    rollout = ppo.Rollout(**blank | dict(zip(
        ("reward", "value", "next_value", "terminated", "done"),
        map(jnp.asarray, (reward, value, next_value, terminated, terminated | truncated)), strict=True)))  # fmt: skip
    got = ppo.advantages(rollout, discount, trace)
    for n in range(shape[1]):
        for t in range(shape[0]):
            want = 0.0
            for lag, s in enumerate(range(t, shape[0])):
                later = 0.0 if terminated[s, n] else next_value[s, n]
                want += (discount * trace) ** lag * (reward[s, n] + discount * later - value[s, n])
                if terminated[s, n] or truncated[s, n]:
                    break
            assert abs(got[t, n] - want) < 1e-5
    assert (terminated.any(), truncated.any()) == (True, True)


# The carry.

NUM_ENVS, NUM_STEPS = 4, 80  # long enough for a whole deck in the second rollout


@functools.cache
def experience_of(net, task):
    """Return an untrained agent with opinions, and its second rollout, which starts in the middle of episodes."""
    cell, _, _ = ppo.NETS[net]
    env = ppo.TASKS[task].make({"T-maze": 3, "RepeatPrevious": 4}[task])
    agent = ppo.init_agent(jax.random.key(0), cell, env, 5)
    agent = agent._replace(
        policy=jnp.asarray(2 * normal(1, 5, env.num_actions), jnp.float32), value=jnp.asarray(normal(2, 5), jnp.float32)
    )
    play = jax.jit(functools.partial(ppo.play, cell, env, num_steps=NUM_STEPS))
    states = jax.vmap(env.enter)(jax.random.split(jax.random.key(3), NUM_ENVS))
    world = ppo.World(
        states, cell.initial_carry(agent.cell, (NUM_ENVS,)), jnp.ones(NUM_ENVS, bool), jnp.zeros(NUM_ENVS)
    )
    world, _ = play(agent, world, jax.random.key(4))
    after, rollout = play(agent, world, jax.random.key(5))
    return cell, agent, ppo.Experience(world.carry, rollout, ppo.advantages(rollout, 0.9, 0.9)), after


def reread(cell, agent, experience, reset):
    logits, value = jax.jit(ppo.read, static_argnums=0)(cell, agent, experience.rollout.obs, experience.carry, reset)
    return ppo.chosen(logits, experience.rollout.action), value


@pytest.mark.ci
@pytest.mark.parametrize("net", ["LSTM", *(pytest.param(net, marks=pytest.mark.ci) for net in ("GRU", "RNN"))])
def test_the_policy_that_learns_is_the_policy_that_acted(net):
    cell, agent, experience, after = experience_of(net, "T-maze")
    rollout = experience.rollout
    assert rollout.done[1:-1].any() and not rollout.reset[0].all()  # episodes end inside, and go on from before
    assert (rollout.reset[1:] == rollout.done[:-1]).all() and (after.done == rollout.done[-1]).all()
    log_prob, value = reread(cell, agent, experience, rollout.reset)
    assert worst_error([log_prob, value], [rollout.log_prob, rollout.value]) < 1e-5
    wrong, _ = reread(cell, agent, experience, rollout.done)
    assert abs(wrong - rollout.log_prob).max() > 0.1
    # And so the first update starts at a ratio of 1, where nothing is clipped.
    scaled = (experience.advantage - experience.advantage.mean()) / (experience.advantage.std() + 1e-8)
    settings = ppo.Settings(value=0, entropy=0, clip=1e-4)
    loss = jax.jit(ppo.loss, static_argnums=(0, 3))
    assert abs(loss(cell, agent, experience, settings) + scaled.mean()) < 1e-5
    assert abs(loss(cell, agent, experience, settings._replace(reset_by="done")) + scaled.mean()) > 1e-3


def test_a_net_without_memory_sees_the_present_only():
    cell, agent, experience, _ = experience_of("no memory", "T-maze")
    obs = np.asarray(experience.rollout.obs).reshape(-1, 3)
    values = np.asarray(experience.rollout.value).reshape(-1)
    for seen in np.unique(obs, axis=0):
        assert np.ptp(values[(obs == seen).all(-1)]) < 1e-6
    assert np.ptp(values) > 1e-3
    log_prob, _ = reread(cell, agent, experience, experience.rollout.done)
    assert worst_error(log_prob, experience.rollout.log_prob) < 1e-5


@pytest.mark.ci
def test_the_value_of_what_follows_belongs_to_the_same_episode():
    """Where a deck ends, only the card that is left can follow."""
    cell, agent, experience, _ = experience_of("LSTM", "RepeatPrevious")
    rollout = experience.rollout
    same = np.asarray(~rollout.done[:-1])
    assert abs((rollout.next_value[:-1] - rollout.value[1:])[same]).max() < 1e-5
    inside = [(t, n) for t, n in np.argwhere(np.asarray(rollout.done)) if t >= 50]
    assert len(inside) == NUM_ENVS < rollout.done.sum()
    for t, n in inside:
        seen = rollout.obs[t - 50 : t + 1, n]
        left = 13 - seen.sum(axis=0)  # of 52 cards, 51 were seen
        assert left.sum() == 1 and left.min() == 0
        _, hs = unroll(cell, agent.cell, jnp.concatenate([seen, left[None]]))
        assert abs(hs[-1] @ agent.value - rollout.next_value[t, n]) < 1e-5
        assert abs(rollout.reward[t - 50 : t + 1, n].sum() - rollout.total[t, n]) < 1e-6
    assert (rollout.total == 0)[np.asarray(~rollout.done)].all()


def test_a_minibatch_is_a_set_of_whole_sequences_with_their_carries():
    _, _, experience, _ = experience_of("LSTM", "T-maze")
    some = ppo.of_envs(experience, jnp.array([2, 0]))
    for got, whole in zip(jax.tree.leaves(some.carry), jax.tree.leaves(experience.carry), strict=True):
        np.testing.assert_array_equal(got, whole[np.array([2, 0])])
    for got, whole in zip(jax.tree.leaves(some[1:]), jax.tree.leaves(experience[1:]), strict=True):
        np.testing.assert_array_equal(got, whole[:, np.array([2, 0])])


def test_burn_in_brings_the_carry_up_to_date_and_nothing_else():
    cell, agent, experience, _ = experience_of("LSTM", "T-maze")
    warm, plain = 7, ppo.Settings()
    gradient = jax.jit(jax.value_and_grad(ppo.loss, argnums=1), static_argnums=(0, 3))
    stale = experience._replace(carry=jax.tree.map(lambda leaf: leaf + 0.3, experience.carry))
    carry, _ = unroll(
        cell, agent.cell, stale.rollout.obs[:warm], stale.carry, reset=stale.rollout.reset[:warm]
    )  # with the agent that learns
    rest = ppo.Experience(carry, *jax.tree.map(lambda leaf: leaf[warm:], stale[1:]))
    got = gradient(cell, agent, stale, plain._replace(burn_in=warm))
    assert worst_error(got, gradient(cell, agent, rest, plain)) < 1e-6
    # Actions and advantages of the first steps do not count.
    other = stale._replace(
        rollout=stale.rollout._replace(log_prob=stale.rollout.log_prob.at[:warm].add(1.0)),
        advantage=stale.advantage.at[:warm].add(5.0),
    )
    assert worst_error(gradient(cell, agent, other, plain._replace(burn_in=warm)), got) < 1e-6
    assert worst_error(gradient(cell, agent, other, plain), gradient(cell, agent, stale, plain)) > 1e-3


# Training.


def learned(net, **settings):
    """Return the success of every seed in the last quarter of a training in the T-maze: the median of five parts."""
    settings = ppo.Settings(num_envs=16, num_steps=64, updates=150, **settings)
    row = ppo.measure("T-maze", 10, net, settings=settings, seeds=2)
    return np.median(np.array(row["success"])[:, -5:], axis=1)


@pytest.mark.ci
def test_the_lstm_learns_the_t_maze():
    assert learned("LSTM").min() >= 0.95


@pytest.mark.ci
@pytest.mark.parametrize("net", ["LSTM, reset=done", "no memory"])
def test_without_memory_at_the_junction_the_t_maze_is_not_learned(net):
    assert learned(net).max() < 0.65


@pytest.mark.slow
def test_ppo_runs_and_resumes(tmp_path):
    run = functools.partial(
        ppo.main, lengths=(3,), k=2, seeds=2, updates=20, num_envs=4, num_steps=16, burn_in=2, workdir=str(tmp_path)
    )
    result = run()
    assert {(row["task"], row["number"], row["net"]) for row in result["rows"]} == {
        (task, number, net) for net in ppo.NETS for task, number in (("T-maze", 3), ("RepeatPrevious", 2))
    }
    assert np.shape(result["rows"][0]["success"]) == (2, ppo.PARTS)
    assert ppo.table(result).count("\n") == 1 + len(ppo.NETS)
    assert (tmp_path / "ppo.png").stat().st_size > 10_000
    path = tmp_path / "result.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    kept["rows"] = kept["rows"][:-1]
    kept["rows"][0]["parameters"] = -1  # a row that is there is not trained again
    path.write_text(json.dumps(kept), encoding="utf-8")
    again = run(resume=True)
    assert again["rows"][0]["parameters"] == -1 and again["rows"][1:] == result["rows"][1:]
