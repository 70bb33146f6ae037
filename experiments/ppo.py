"""How long does an agent remember a sign? Recurrent PPO with an LSTM, a GRU, an RNN and a net without memory.

The T-maze (Bakker, Reinforcement learning with long short-term memory, 2001) has a sign at its entrance, a corridor,
and a junction where the sign says which arm is right. RepeatPrevious (Morad et al., POPGym, 2023) asks for the suit of
an earlier card. The agent learns by proximal policy optimization (Schulman et al. 2017). Three things differ from PPO
without memory: the previous `done` resets the carry, a sequence is read from the carry that its rollout began with, and
a minibatch is a set of whole sequences.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from experiments import plots
from experiments.harness import intervals, rows, runs
from jaxlstm import GRU, LSTM, RNN, Cell, fit, init_train_state, make_train_step, num_params, step_stack, unroll

PARTS = 20  # of the training, in a learning curve; the last one is the result
SOLVED = 0.95  # an agent whose success is larger remembers the sign

log = logging.getLogger("ppo")

# Environments: pure functions of one environment, which `jax.vmap` maps over many.


class Env(NamedTuple):
    """An environment whose state is a pytree of arrays."""

    enter: Callable[[Key[Array, ""]], Any]  # key -> the state at the start of a new episode
    observe: Callable[[Any], Float[Array, "obs"]]
    # (state, action) -> (state, reward, terminated, truncated): over, or only cut off by a limit of time
    step: Callable[[Any, Int[Array, ""]], tuple[Any, Array, Array, Array]]
    obs_size: int
    num_actions: int


class TMaze(NamedTuple):
    sign: Int[Array, ""]  # the arm that is right: 0 north, 1 south
    place: Int[Array, ""]  # steps from the entrance
    time: Int[Array, ""]  # steps taken


NORTH, EAST, SOUTH, WEST = range(4)


def t_maze(length: int | Array) -> Env:
    """Make a T-maze whose junction lies `length` steps east of the entrance.

    The agent sees Bakker's three bits: 011 or 110 at the entrance (the sign), 101 in the corridor, 010 at the junction.
    Going north or south at the junction ends the episode; the right arm is worth 4, the wrong one −0.1. As in Bakker's
    maze a step that leaves the agent where it is costs 0.1. Here a step back costs 0.1 too: the junction is easy to
    find at any length, and the agent only has to remember. After 4 · length + 20 steps the episode is cut off.
    """

    def enter(key: Key[Array, ""]) -> TMaze:
        return TMaze(jax.random.randint(key, (), 0, 2), jnp.zeros((), int), jnp.zeros((), int))

    def observe(maze: TMaze) -> Array:
        signs = jnp.array([[0.0, 1, 1], [1, 1, 0]])[maze.sign]
        elsewhere = jnp.where(maze.place == length, jnp.array([0.0, 1, 0]), jnp.array([1.0, 0, 1]))
        return jnp.where(maze.place == 0, signs, elsewhere)

    def step(maze: TMaze, action: Array) -> tuple[TMaze, Array, Array, Array]:
        terminated = (maze.place == length) & ((action == NORTH) | (action == SOUTH))
        right = action == jnp.where(maze.sign == 0, NORTH, SOUTH)
        place = jnp.clip(maze.place + (action == EAST).astype(int) - (action == WEST).astype(int), 0, length)
        reward = jnp.where(terminated & right, 4.0, jnp.where(place > maze.place, 0.0, -0.1))
        after = TMaze(maze.sign, place, maze.time + 1)
        return after, reward, terminated, ~terminated & (after.time == 4 * length + 20)

    return Env(enter, observe, step, obs_size=3, num_actions=4)


class Cards(NamedTuple):
    left: Int[Array, "4"]  # cards of each suit in the deck
    hand: Int[Array, "cards"]  # suits dealt so far
    dealt: Int[Array, ""]
    key: Key[Array, ""]  # draws the cards to come


def repeat_previous(k: int | Array, num_decks: int = 1) -> Env:
    """Make POPGym's RepeatPrevious: after every card, play the suit of the card dealt k − 1 cards before it.

    The agent sees the suit of one card after the other from shuffled decks of 52. From the k-th card on, the right suit
    is worth 1 / (52 · decks − k) and every other costs as much, so a return lies in [−1, 1] and guessing is worth −0.5.
    When the last card is shown, the episode is cut off. POPGym's easy level has k = 4 and one deck.
    """
    num_cards = 52 * num_decks

    def deal(cards: Cards) -> Cards:
        key, key_card = jax.random.split(cards.key)
        suit = jax.random.categorical(key_card, jnp.log(cards.left))
        return Cards(cards.left.at[suit].add(-1), cards.hand.at[cards.dealt].set(suit), cards.dealt + 1, key)

    def enter(key: Key[Array, ""]) -> Cards:
        return deal(Cards(jnp.full(4, num_cards // 4), jnp.zeros(num_cards, int), jnp.zeros((), int), key))

    def observe(cards: Cards) -> Array:
        return jax.nn.one_hot(cards.hand[cards.dealt - 1], 4)

    def step(cards: Cards, action: Array) -> tuple[Cards, Array, Array, Array]:
        right = action == cards.hand[cards.dealt - k]
        reward = jnp.where(cards.dealt < k, 0.0, jnp.where(right, 1.0, -1.0)) / (num_cards - k)
        after = deal(cards)
        return after, reward, jnp.zeros((), bool), after.dealt == num_cards

    return Env(enter, observe, step, obs_size=4, num_actions=4)


class Task(NamedTuple):
    make: Callable[[int | Array], Env]
    discount: float  # an answer in RepeatPrevious is rewarded at once


TASKS = {"T-maze": Task(t_maze, 0.99), "RepeatPrevious": Task(repeat_previous, 0.9)}

# The agent: one recurrent layer, and two linear readouts.


def no_carry(params: Any, batch_shape: tuple[int, ...] = ()) -> tuple[()]:
    """Return the carry of a net without memory."""
    return ()


def no_recurrence(params: Any, carry: tuple[()]) -> None:
    """Read nothing from the carry."""


def two_layers(params: Any, carry: tuple[()], z: Array, a: None) -> tuple[tuple[()], Array]:
    """Use the recurrent weights of an RNN as a second layer, so that the net sees the present observation only."""
    return carry, jnp.tanh(jnp.tanh(z) @ params.w_hh)


MEMORYLESS = Cell(RNN.init, no_carry, two_layers, recur=no_recurrence, name="no memory")


class Net(NamedTuple):
    cell: Cell[Any, Any]
    units: int
    reset_by: Literal["previous done", "done"] = "previous done"


NETS = {  # with these numbers of units, all have about 5,000 parameters
    "LSTM": Net(LSTM, 32),
    "GRU": Net(GRU, 37),
    "RNN": Net(RNN, 66),
    "no memory": Net(MEMORYLESS, 66),
    "LSTM, reset=done": Net(LSTM, 32, "done"),  # a common mistake, to see what it costs
}


class Agent(NamedTuple):
    cell: Any
    policy: Float[Array, "hidden action"]
    value: Float[Array, "hidden"]


def init_agent(key: Key[Array, ""], cell: Cell[Any, Any], env: Env, units: int) -> Agent:
    """Draw an agent that begins with the uniform policy."""
    return Agent(cell.init(key, env.obs_size, units), jnp.zeros((units, env.num_actions)), jnp.zeros(units))


def read(
    cell: Cell[Any, Any], agent: Agent, obs: Array, carry: Any, reset: Array
) -> tuple[Float[Array, "time env action"], Float[Array, "time env"]]:
    """Return the log-probabilities of all actions and the values of a rollout, read anew."""
    _, hs = unroll(cell, agent.cell, obs, carry, reset=reset)
    return jax.nn.log_softmax(hs @ agent.policy), hs @ agent.value


# The rollout.


class World(NamedTuple):
    """What passes from one rollout to the next, each leaf [env, ...]."""

    env: Any
    carry: Any
    done: Bool[Array, "env"]  # of the previous step: the next observation is the first of an episode
    total: Float[Array, "env"]  # reward so far in this episode


class Rollout(NamedTuple):
    """The experience of all environments, each leaf [time, env, ...]."""

    obs: Array
    reset: Array  # `done` of the previous step
    action: Array
    log_prob: Array
    value: Array
    next_value: Array  # of the observation that follows in the same episode, also where the episode is cut off
    reward: Array
    terminated: Array
    done: Array  # terminated or truncated
    total: Array  # the return of the episode, where it is done


def play(
    cell: Cell[Any, Any], env: Env, agent: Agent, world: World, key: Key[Array, ""], num_steps: int
) -> tuple[World, Rollout]:
    """Act for some steps in all environments; an episode that is done gives way to a new one."""

    def step(world: World, key: Key[Array, ""]) -> tuple[World, Rollout]:
        key_act, key_env = jax.random.split(key)
        obs = jax.vmap(env.observe)(world.env)
        (carry,), h = step_stack(cell, [agent.cell], [world.carry], obs, reset=world.done)
        logits = jax.nn.log_softmax(h @ agent.policy)
        action = jax.random.categorical(key_act, logits)
        after, reward, terminated, truncated = jax.vmap(env.step)(world.env, action)
        _, next_h = step_stack(cell, [agent.cell], [carry], jax.vmap(env.observe)(after))
        done, total = terminated | truncated, world.total + reward
        rollout = Rollout(
            obs, world.done, action, chosen(logits, action), h @ agent.value, next_h @ agent.value,
            reward, terminated, done, jnp.where(done, total, 0.0),
        )  # fmt: skip
        fresh = jax.vmap(env.enter)(jax.random.split(key_env, len(done)))
        now = jax.tree.map(functools.partial(jax.vmap(jnp.where), done), fresh, after)
        return World(now, carry, done, jnp.where(done, 0.0, total)), rollout

    return lax.scan(step, world, jax.random.split(key, num_steps))


def chosen(logits: Float[Array, "*batch action"], action: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the entry of each action."""
    return jnp.take_along_axis(logits, action[..., None], axis=-1)[..., 0]


def advantages(rollout: Rollout, discount: float, trace: float) -> Float[Array, "time env"]:
    """Return the generalized advantage estimates (Schulman et al. 2016).

    An episode that is over is worth nothing more. One that is cut off is worth the value of its last observation.
    Neither learns from the episode after it.
    """
    later = jnp.where(rollout.terminated, 0.0, rollout.next_value)
    surprise = rollout.reward + discount * later - rollout.value

    def step(advantage: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        surprise, done = now
        advantage = surprise + discount * trace * jnp.where(done, 0.0, advantage)
        return advantage, advantage

    return lax.scan(step, jnp.zeros_like(surprise[0]), (surprise, rollout.done), reverse=True)[1]


# The update.


class Settings(NamedTuple):
    """The settings of PPO."""

    num_envs: int = 32
    num_steps: int = 128  # of a rollout
    updates: int = 200
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-3  # falls to 0
    discount: float = 0.99
    trace: float = 0.95  # λ of the advantages
    clip: float = 0.2
    entropy: float = 0.03
    value: float = 0.1
    burn_in: int = 0  # first steps of a sequence that only bring the carry up to date, without loss or gradient
    reset_by: Literal["previous done", "done"] = "previous done"


class Experience(NamedTuple):
    """What an update learns from."""

    carry: Any  # at the start of the rollout, its leaves [env, ...]
    rollout: Rollout
    advantage: Float[Array, "time env"]


def of_envs(experience: Experience, envs: Int[Array, "some"]) -> Experience:
    """Return the whole sequences of some environments."""
    carry = jax.tree.map(lambda leaf: leaf[envs], experience.carry)
    rest = jax.tree.map(lambda leaf: leaf[:, envs], experience[1:])
    return Experience(carry, *rest)


def loss(cell: Cell[Any, Any], agent: Agent, experience: Experience, settings: Settings) -> Float[Array, ""]:
    """Return the loss of PPO on whole sequences, each read from the carry that its rollout began with."""
    carry, rollout, advantage = experience
    reset = rollout.reset if settings.reset_by == "previous done" else rollout.done
    if warm := settings.burn_in:
        carry, _ = unroll(cell, lax.stop_gradient(agent.cell), rollout.obs[:warm], carry, reset=reset[:warm])
        rollout, advantage, reset = jax.tree.map(lambda leaf: leaf[warm:], (rollout, advantage, reset))
    logits, value = read(cell, agent, rollout.obs, carry, reset)
    ratio = jnp.exp(chosen(logits, rollout.action) - rollout.log_prob)
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gain = jnp.minimum(ratio * scaled, jnp.clip(ratio, 1 - settings.clip, 1 + settings.clip) * scaled)
    error = (rollout.value + advantage - value) ** 2
    entropy = -(jnp.exp(logits) * logits).sum(-1)
    return (-gain + settings.value * error - settings.entropy * entropy).mean()


def train(
    cell: Cell[Any, Any], env: Env, settings: Settings, agent: Agent, key: Key[Array, ""]
) -> tuple[Agent, dict[str, Float[Array, "update"]]]:
    """Train one agent; return it and, for every update, the episodes that ended, the sum of their returns, and how many
    ended with a reward.
    """
    key_env, key_updates = jax.random.split(key)
    batches = settings.epochs * settings.minibatches
    rate = optax.linear_schedule(settings.learning_rate, 0.0, settings.updates * batches)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate, eps=1e-5))

    def update(state: Any, key: Key[Array, ""]) -> tuple[Any, dict[str, Array]]:
        learner, world = state
        key_play, key_batches = jax.random.split(key)
        carry = world.carry
        world, rollout = play(cell, env, learner.params, world, key_play, settings.num_steps)
        experience = Experience(carry, rollout, advantages(rollout, settings.discount, settings.trace))

        def loss_fn(agent: Agent, envs: Array) -> Array:  # a batch is a set of environments
            return loss(cell, agent, of_envs(experience, envs), settings)

        orders = jax.vmap(jax.random.permutation, (0, None))(
            jax.random.split(key_batches, settings.epochs), settings.num_envs
        )
        learner, _ = fit(make_train_step(loss_fn, optimizer), learner, orders.reshape(batches, -1))
        rewarded = (rollout.done & (rollout.reward > 0)).sum()
        return (learner, world), {"episodes": rollout.done.sum(), "returns": rollout.total.sum(), "rewarded": rewarded}

    learner = init_train_state(agent, optimizer, key)  # its key is not used: the loss draws nothing
    states = jax.vmap(env.enter)(jax.random.split(key_env, settings.num_envs))
    carry = cell.initial_carry(agent.cell, (settings.num_envs,))
    world = World(states, carry, jnp.ones(settings.num_envs, bool), jnp.zeros(settings.num_envs))
    (learner, _), metrics = lax.scan(update, (learner, world), jax.random.split(key_updates, settings.updates))
    return learner.params, metrics


# The experiment.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_seeds(
    task: str, net: str, settings: Settings, number: int | Array, keys: Key[Array, "seed"]
) -> tuple[Agent, dict[str, Float[Array, "seed update"]]]:
    """Train one agent for every key, in one program for all corridor lengths (or all k)."""
    cell, units, reset_by = NETS[net]
    env = TASKS[task].make(number)
    settings = settings._replace(discount=TASKS[task].discount, reset_by=reset_by)
    keys_init, keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    agents = jax.vmap(functools.partial(init_agent, cell=cell, env=env, units=units))(keys_init)
    return jax.vmap(functools.partial(train, cell, env, settings))(agents, keys)


def measure(task: str, number: int, net: str, *, settings: Settings, seeds: int) -> dict[str, Any]:
    """Train all seeds of a net on a task; return what the result keeps of them, in `PARTS` parts of the training."""
    keys = jax.random.split(jax.random.key(1), seeds)  # the settings were chosen with the keys of jax.random.key(0)
    agents, metrics = train_seeds(task, net, settings, number, keys)
    episodes, returns, rewarded = (
        np.stack([part.sum(axis=1) for part in np.array_split(np.asarray(metrics[name], float), PARTS, axis=1)], axis=1)
        for name in ("episodes", "returns", "rewarded")
    )
    return {
        "parameters": num_params(agents) // seeds,
        "return": np.round(returns / np.maximum(episodes, 1), 4).tolist(),
        "success": np.round(rewarded / np.maximum(episodes, 1), 4).tolist(),
    }


def main(
    *,
    lengths: tuple[int, ...] = (5, 10, 20, 40, 80),
    k: int = 4,
    seeds: int = 5,
    updates: int = 200,
    num_envs: int = 32,
    num_steps: int = 128,
    burn_in: int = 0,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets on all tasks, write the result and a picture, and log the table.

    Args:
      lengths: corridors of the T-maze, in steps.
      k: of RepeatPrevious.
      seeds: agents of each net and task, trained in one program.
      updates: rollouts of each agent.
      num_envs: environments of each agent, a multiple of 4.
      num_steps: steps of a rollout.
      burn_in: first steps of every sequence that only bring its carry up to date.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    settings = Settings(num_envs, num_steps, updates, burn_in=burn_in)
    measure_row = functools.partial(measure, settings=settings, seeds=seeds)
    numbers = [("RepeatPrevious", k), *(("T-maze", length) for length in lengths)]
    plans = [{"task": task, "number": number, "net": net} for net in NETS for task, number in numbers]
    folder, result = rows.collect("ppo", config, plans, measure_row, workdir=workdir, resume=resume)
    picture = plots.ppo(folder / "ppo.png", result["rows"], updates * num_envs * num_steps)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table with a row for every net, at the end of the training.

    Of the T-maze: the mean success, and how many seeds end above `SOLVED`, with the interval of that share. Of
    RepeatPrevious: the mean return and its interval.
    """
    config = result["config"]
    lines = [
        f"| net | parameters | {' | '.join(f'corridor {length}' for length in config['lengths'])} "
        f"| RepeatPrevious, k = {config['k']} |",
        "|---" * (3 + len(config["lengths"])) + "|",
    ]
    for net in NETS:
        own = {(row["task"], row["number"]): row for row in result["rows"] if row["net"] == net}
        cells = [_solved(own["T-maze", length]["success"]) for length in config["lengths"]]
        repeated = own["RepeatPrevious", config["k"]]
        returns = intervals.shown([curve[-1] for curve in repeated["return"]])
        lines.append(f"| {net} | {repeated['parameters']} | {' | '.join(cells)} | {returns} |")
    return "\n".join(lines)


def _solved(curves: list[list[float]]) -> str:
    last = np.array(curves)[:, -1]
    solved = int((last > SOLVED).sum())
    _, low, high = intervals.of_share(solved, len(last))
    return f"{last.mean():.2f}; {solved}/{len(last)} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    runs.cli("ppo", main, quick={"lengths": (5,), "seeds": 1, "updates": 2})
