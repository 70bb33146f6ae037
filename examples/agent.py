"""Can an agent act on what it saw some steps ago? Policy gradient, with an LSTM as the memory.

A T-maze: a sign at the entrance says left or right, and four to eight steps later comes a junction without a sign. The
turn on the sign is worth 1, the other 0. An agent without memory gets 0.5 per episode.

    python examples/agent.py

Expect 0.5 per episode in the first five rollouts and 1.0 in the last ten, after about ten seconds.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlstm import LSTM, LSTMParams, LSTMState, fit, init_train_state, make_train_step, step_stack, unroll

NUM_MAZES, NUM_STEPS, NUM_UPDATES, HIDDEN_SIZE, DISCOUNT = 64, 32, 100, 32, 0.9


class Maze(NamedTuple):
    sign: jax.Array  # [maze], the turn that is rewarded: 0 or 1
    length: jax.Array  # [maze], steps from the entrance to the junction
    place: jax.Array  # [maze], steps made since the entrance


def enter(key: jax.Array) -> Maze:
    sign_key, length_key = jax.random.split(key)
    length = jax.random.randint(length_key, (NUM_MAZES,), 4, 9)
    return Maze(jax.random.randint(sign_key, (NUM_MAZES,), 0, 2), length, jnp.zeros_like(length))


def look(maze: Maze) -> jax.Array:
    """Return what the agent sees, [maze, 4]: a sign to the left, a sign to the right, the junction, or a corridor."""
    return jax.nn.one_hot(jnp.where(maze.place == 0, maze.sign, jnp.where(maze.place == maze.length, 2, 3)), 4)


def move(maze: Maze, action: jax.Array, key: jax.Array) -> tuple[Maze, jax.Array, jax.Array]:
    """Return the mazes after the action, the rewards, and which episodes are done; new ones begin in their place."""
    done, onward = maze.place == maze.length, maze._replace(place=maze.place + 1)
    reward = (done & (action == maze.sign)).astype(float)
    return jax.tree.map(functools.partial(jnp.where, done), enter(key), onward), reward, done


class Agent(NamedTuple):
    lstm: LSTMParams
    policy: jax.Array  # [hidden, action]


class Rollout(NamedTuple):  # its leaves [time, maze, ...]
    obs: jax.Array
    first: jax.Array  # of an episode: `done` of the step before
    action: jax.Array
    reward: jax.Array
    done: jax.Array


def play(agent: Agent, world: tuple[Maze, LSTMState], key: jax.Array) -> tuple[tuple[Maze, LSTMState], Rollout]:
    (maze, memory), (action_key, maze_key) = world, jax.random.split(key)
    obs, first = look(maze), maze.place == 0
    (memory,), h = step_stack(LSTM, [agent.lstm], [memory], obs, reset=first)  # an episode starts with no memory
    action = jax.random.categorical(action_key, h @ agent.policy)
    maze, reward, done = move(maze, action, maze_key)
    return (maze, memory), Rollout(obs, first, action, reward, done)


def add_reward(later: jax.Array, now: Rollout) -> tuple[jax.Array, jax.Array]:
    total = now.reward + DISCOUNT * jnp.where(now.done, 0.0, later)
    return total, total


def loss_fn(agent: Agent, _: Any, world: tuple[Maze, LSTMState], key: jax.Array) -> tuple[jax.Array, Any]:
    """Play a rollout, and return the loss of REINFORCE (Williams 1992)."""
    act = functools.partial(play, jax.lax.stop_gradient(agent))
    next_world, rollout = jax.lax.scan(act, world, jax.random.split(key, NUM_STEPS))
    # The same memory and resets as in `play`, so the policy that learns is the policy that acted.
    _, hs = unroll(LSTM, agent.lstm, rollout.obs, world[1], reset=rollout.first)
    _, returns = jax.lax.scan(add_reward, jnp.zeros(NUM_MAZES), rollout, reverse=True)
    minus_log_policy = optax.softmax_cross_entropy_with_integer_labels(hs @ agent.policy, rollout.action)
    loss = ((returns - returns.mean()) * minus_log_policy).mean()
    return loss, (next_world, {"reward": rollout.reward.sum() / rollout.done.sum()})


def main() -> dict[str, float]:
    maze_key, agent_key, train_key = jax.random.split(jax.random.key(0), 3)
    agent = Agent(LSTM.init(agent_key, 4, HIDDEN_SIZE), jnp.zeros((HIDDEN_SIZE, 2)))
    world = enter(maze_key), LSTM.initial_carry(agent.lstm, (NUM_MAZES,))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
    train = jax.jit(functools.partial(fit, make_train_step(loss_fn, optimizer)))
    # `fit` passes the world on, so an episode may begin in one rollout and end in the next. It needs no data.
    _, metrics = train(init_train_state(agent, optimizer, train_key, carry=world), jnp.arange(NUM_UPDATES))
    before, after = float(metrics["reward"][:5].mean()), float(metrics["reward"][-10:].mean())
    print(f"reward per episode: {before:.2f} in the first five rollouts, {after:.2f} in the last ten, 0.50 by chance")
    return {"before": before, "after": after, "chance": 0.5}


if __name__ == "__main__":
    main()
