"""After how many sequences does a net bridge a long lag, with the recipe of 1997 and with a modern one?

The tasks are those of Hochreiter & Schmidhuber, Long short-term memory, 1997: only a few steps of a long sequence
matter, and the net answers at its end. A net has solved a task when it answers a run of new sequences, 2000 for most
tasks, within a tolerance and with a small mean error. It answers each sequence *before* it learns from that sequence.

Two recipes run side by side. "1997" is the paper's: memory blocks without a forget gate, the truncated gradient, one
sequence per step of plain SGD, and its initial weights and biases. "today" has 32 units, the full gradient, Adam, and
eight sequences per step; chrono biases are drawn for the lag of the task, so this net knows the lag.
"""

import functools
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from experiments import plots
from experiments.harness import intervals, rows, runs
from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Cell,
    TrainState,
    fit,
    init_train_state,
    initializers,
    make_train_step,
    num_params,
    unroll,
)
from jaxlstm.variants import make_lstm_1997

log = logging.getLogger("long_lag")

Draw = Callable[[Key[Array, ""], int, int], "Batch"]


# The tasks.


class Batch(NamedTuple):
    """Sequences of a task, and the answers wanted at their last step or last few steps."""

    xs: Float[Array, "time batch 2"] | Int[Array, "time batch"]  # pairs of numbers, or symbols
    asked: Int[Array, "answer batch"]  # steps
    targets: Float[Array, "answer batch output"]


def _places(key: Key[Array, ""], low: Any, high: Any, batch: int) -> Int[Array, "batch"]:
    return jax.random.randint(key, (batch,), low, high)


def _marked_pairs(
    key: Key[Array, ""], lag: int, batch: int, low: float, neutral: float
) -> tuple[Array, Array, Array, Array]:
    """Draw pairs (value, marker): one of the first ten is marked, and another one of the first lag/2 − 1.

    As in the paper, the very first value is the operation's neutral element if it is marked.
    """
    keys = jax.random.split(key, 4)
    num_steps = lag + lag // 10
    values = jax.random.uniform(keys[0], (num_steps, batch), jnp.float32, low, 1)
    last = _places(keys[1], lag, num_steps + 1, batch) - 1
    first = _places(keys[2], 0, 10, batch)
    second = _places(keys[3], 0, lag // 2 - 2, batch)
    second = second + (second >= first)  # any place but the first one
    step, item = jnp.arange(num_steps)[:, None], jnp.arange(batch)
    values = values.at[0].set(jnp.where((first == 0) | (second == 0), neutral, values[0]))
    marked = (step == first) | (step == second)
    marker = jnp.where(marked, 1.0, jnp.where((step == 0) | (step == last), -1.0, 0.0))
    return jnp.stack([values, marker], axis=-1), last, values[first, item], values[second, item]


def adding(key: Key[Array, ""], lag: int, batch: int) -> Batch:
    """Two of the numbers in [−1, 1] are marked; the answer is their sum, scaled into [0, 1]."""
    xs, last, first, second = _marked_pairs(key, lag, batch, -1.0, neutral=0.0)
    return Batch(xs, last[None], (0.5 + (first + second) / 4)[None, :, None])


def multiplication(key: Key[Array, ""], lag: int, batch: int) -> Batch:
    """Two of the numbers in [0, 1] are marked; the answer is their product."""
    xs, last, first, second = _marked_pairs(key, lag, batch, 0.0, neutral=1.0)
    return Batch(xs, last[None], (first * second)[None, :, None])


def _temporal_order(windows: tuple[tuple[float, float], ...], key: Key[Array, ""], lag: int, batch: int) -> Batch:
    """Symbols a, b, c, d at random, and X or Y once in each window; which order of X and Y was it?

    E begins the sequence and B ends it. The windows are parts of the lag: the paper's are of 100 steps.
    """
    keys = jax.random.split(key, 3 + len(windows))
    num_steps = lag + lag // 10
    symbols = jax.random.randint(keys[0], (num_steps, batch), 0, 4)
    last = _places(keys[1], lag, num_steps + 1, batch) - 1
    signs = jax.random.randint(keys[2], (len(windows), batch), 0, 2)
    for sign, (low, high), k in zip(signs, windows, keys[3:], strict=True):
        place = _places(k, round(low * lag), round(high * lag) + 1, batch)
        symbols = symbols.at[place, jnp.arange(batch)].set(4 + sign)
    symbols = symbols.at[0].set(6).at[last, jnp.arange(batch)].set(7)
    answer = (signs * 2 ** jnp.arange(len(windows))[:, None]).sum(0)
    return Batch(symbols, last[None], jax.nn.one_hot(answer, 2 ** len(windows))[None])


order_of_two = functools.partial(_temporal_order, ((0.1, 0.2), (0.5, 0.6)))
order_of_three = functools.partial(_temporal_order, ((0.1, 0.2), (0.33, 0.43), (0.66, 0.76)))


def noise(key: Key[Array, ""], lag: int, batch: int) -> Batch:
    """Task 2c: b, then x or y, then `lag` or more random symbols of `lag` kinds, then e; was it x or y?

    After the first `lag` symbols each one is the last with probability 1/10; here at most lag/10 + 20 follow.
    """
    keys = jax.random.split(key, 3)
    tail = lag // 10 + 20
    num_steps = 2 + lag + tail + 1
    symbols = jax.random.randint(keys[0], (num_steps, batch), 4, lag + 4)
    is_y = jax.random.randint(keys[1], (batch,), 0, 2)
    more = jnp.minimum(jax.random.geometric(keys[2], 0.1, (batch,)) - 1, tail)
    last = 2 + lag + more
    symbols = symbols.at[0].set(0).at[1].set(2 + is_y).at[last, jnp.arange(batch)].set(1)
    return Batch(symbols, last[None], jax.nn.one_hot(is_y, 2)[None])


def copy(key: Key[Array, ""], lag: int, batch: int) -> Batch:
    """Ten of eight symbols, blanks, and a signal `lag` steps after the last symbol: what were the ten?"""
    symbols = jax.random.randint(key, (10, batch), 0, 8)
    blank = jnp.full((lag - 1, batch), 8)
    xs = jnp.concatenate([symbols, blank, blank[:1] + 1, jnp.full((10, batch), 8)])
    asked = jnp.broadcast_to(jnp.arange(lag + 10, lag + 20)[:, None], (10, batch))
    return Batch(xs, asked, jax.nn.one_hot(symbols, 8))


class Of1997(NamedTuple):
    """The settings of the 1997 paper for a task, and the mean number of sequences to success, by lag."""

    blocks: int
    learning_rate: float
    sequences: dict[int, int]
    input_bias: tuple[float, ...] = ()  # of the input gate of every block; (): like all weights
    block_size: int = 2
    scale: float = 0.1  # of the initial weights, drawn uniformly
    has_biases: bool = True


class Task(NamedTuple):
    """A task, and when it counts as solved."""

    draw: Draw
    num_symbols: Callable[[int], int] | None  # for a lag; None: the inputs are pairs of numbers
    tolerance: float  # of every output
    mean_error: float  # of all outputs, on the sequences in a row
    paper: Of1997 | None
    in_a_row: int = 2000  # length of the run of sequences
    misses: int = 0  # how many answers in the run may miss the tolerance


# fmt: off
TASKS = {
    "adding": Task(adding, None, 0.04, 0.01,
                   Of1997(2, 0.5, {100: 74_000, 500: 209_000, 1000: 853_000}, (-3, -6))),
    "multiplication": Task(multiplication, None, 0.04, 0.01, Of1997(2, 0.1, {100: 482_000}), misses=139),
    "order of two": Task(order_of_two, lambda lag: 8, 0.3, 0.1, Of1997(2, 0.5, {100: 31_390}, (-2, -4))),
    "order of three": Task(order_of_three, lambda lag: 8, 0.3, 0.1, Of1997(3, 0.1, {100: 571_100}, (-2, -4, -6))),
    "2c": Task(noise, lambda lag: lag + 4, 0.2, 0.2,
               Of1997(2, 0.01, {50: 30_000, 1000: 49_000}, block_size=1, scale=0.2, has_biases=False), 10_000),
    "copy": Task(copy, lambda lag: 10, 0.3, 0.1, None),
}
# fmt: on


# The recipes.


class Params(NamedTuple):
    """One layer and a readout."""

    cell: Any
    w: Float[Array, "units output"]
    b: Float[Array, "output"]


class Recipe(NamedTuple):
    """A way to train."""

    cell: Cell[Any, Any]
    init: Callable[[Key[Array, ""]], Params]
    outputs: Callable[[Array], Array]
    loss: Callable[[Array, Array], Array]  # of what goes into `outputs`, and of the targets
    optimizer: optax.GradientTransformation
    batch: int


def lookup(params: Any, xs: Array) -> Array:
    """Return z = x W_ih + b, where a symbol stands for a one-hot x: it picks a row of W_ih."""
    return (params.w_ih[xs] if jnp.issubdtype(xs.dtype, jnp.integer) else xs @ params.w_ih) + params.b


def read(cell: Cell[Any, Any], params: Params, batch: Batch) -> Float[Array, "answer batch output"]:
    """Read the sequences and return what the readout gives at the steps that are asked."""
    _, hs = unroll(replace(cell, project=lookup), params.cell, batch.xs)
    return hs[batch.asked, jnp.arange(batch.asked.shape[1])] @ params.w + params.b


def squared_error(outputs: Array, targets: Array) -> Array:
    """Return half the squared error, summed over the outputs: the gradient of 1997."""
    return ((outputs - targets) ** 2).sum(-1).mean() / 2


def _sizes(task: Task, lag: int) -> tuple[int, int]:
    """Return the numbers of inputs and outputs."""
    targets = jax.eval_shape(lambda key: task.draw(key, lag, 1).targets, jax.random.key(0))
    return (task.num_symbols(lag) if task.num_symbols else 2), targets.shape[-1]


def recipe_of_1997(task: Task, lag: int) -> Recipe:
    """The paper's net, weights, biases and optimizer: SGD on the squared error of one sequence at a time."""
    if task.paper is None:
        raise ValueError("the paper of 1997 does not contain this task")
    paper = task.paper
    cells = paper.blocks * paper.block_size
    num_inputs, num_outputs = _sizes(task, lag)
    cell = make_lstm_1997(paper.block_size, truncate=True)

    def init(key: Key[Array, ""]) -> Params:
        key_cell, key = jax.random.split(key)  # the cell's own draw only gives the shapes
        cell_params = cell.init(key_cell, num_inputs, cells)
        flat, unflatten = ravel_pytree(Params(cell_params, jnp.zeros((cells, num_outputs)), jnp.zeros(num_outputs)))
        params = unflatten(jax.random.uniform(key, flat.shape, jnp.float32, -paper.scale, paper.scale))
        b = params.cell.b
        if paper.input_bias:
            b = b.at[cells : cells + paper.blocks].set(jnp.array(paper.input_bias, jnp.float32))
        kept = 1.0 if paper.has_biases else 0.0
        return params._replace(cell=params.cell._replace(b=kept * b), b=kept * params.b)

    def loss(z: Array, targets: Array) -> Array:
        return squared_error(jax.nn.sigmoid(z), targets)

    optimizer = optax.sgd(paper.learning_rate)
    if not paper.has_biases:
        optimizer = optax.chain(optimizer, optax.masked(optax.set_to_zero(), _biases))
    return Recipe(cell, init, jax.nn.sigmoid, loss, optimizer, 1)


def _biases(params: Params) -> Any:
    nothing = jax.tree.map(lambda leaf: False, params)
    return nothing._replace(cell=nothing.cell._replace(b=True), b=True)


def num_weights(task: Task, params: Params) -> int:
    """Count the parameters that are trained."""
    fixed = (params.cell.b, params.b) if task.paper and not task.paper.has_biases else ()
    return num_params(params) - num_params(fixed)


class Net(NamedTuple):
    """A cell of today's recipe."""

    cell: Cell[Any, Any]
    init: Callable[..., Any]  # (key, input size, units)


def nets(lag: int) -> dict[str, Net]:
    """Return the cells of today's recipe for a lag."""
    return {
        "RNN": Net(RNN, RNN.init),
        "GRU": Net(GRU, GRU.init),
        "LSTM, b_f = 0": Net(LSTM, functools.partial(LSTM.init, forget_bias=0.0)),
        "LSTM, b_f = 1": Net(LSTM, LSTM.init),
        "LSTM, chrono": Net(LSTM, functools.partial(initializers.chrono, max_lag=lag)),
    }


UNITS, BATCH = 32, 8
BY_LAG = "order of two"  # the task that every cell tries at every lag


def recipe_of_today(task: Task, lag: int, net: Net, learning_rate: float) -> Recipe:
    """One layer, Adam with clipping; linear outputs for numbers, sigmoids and cross-entropy for classes."""
    num_inputs, num_outputs = _sizes(task, lag)

    def init(key: Key[Array, ""]) -> Params:
        return Params(net.init(key, num_inputs, UNITS), jnp.zeros((UNITS, num_outputs)), jnp.zeros(num_outputs))

    def cross_entropy(z: Array, targets: Array) -> Array:
        return optax.sigmoid_binary_cross_entropy(z, targets).sum(-1).mean()

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    if task.num_symbols is None:
        return Recipe(net.cell, init, lambda z: z, squared_error, optimizer, BATCH)
    return Recipe(net.cell, init, jax.nn.sigmoid, cross_entropy, optimizer, BATCH)


# Training until solved.


class Progress(NamedTuple):
    """The stopping rule, carried from step to step: the errors of the last `in_a_row` sequences."""

    largest: Float[Array, "step batch"]
    mean: Float[Array, "step batch"]
    seen: Int[Array, ""]
    solved_at: Int[Array, ""]  # sequences seen; 0: not yet


def no_progress(task: Task, batch: int) -> Progress:
    """Return the state of the stopping rule before the first sequence."""
    errors, zero = jnp.full((task.in_a_row // batch, batch), jnp.inf), jnp.zeros((), jnp.int32)
    return Progress(errors, errors, zero, zero)


def watch(task: Task, progress: Progress, errors: Float[Array, "answer batch output"]) -> Progress:
    """Note the errors of a batch, and whether the task is solved now."""
    num_steps, batch = progress.largest.shape
    at = progress.seen // batch % num_steps
    largest = progress.largest.at[at].set(errors.max((0, 2)))
    mean = progress.mean.at[at].set(errors.mean((0, 2)))
    seen = progress.seen + batch
    solved = ((largest >= task.tolerance).sum() <= task.misses) & (mean.mean() < task.mean_error)
    return Progress(largest, mean, seen, jnp.where((progress.solved_at == 0) & solved, seen, progress.solved_at))


BLOCK = 2000  # sequences of every trial between two looks at whether all trials are solved


def sequences_to_success(
    task: Task, recipe: Recipe, lag: int, keys: Key[Array, "trial"], limit: int
) -> list[int | None]:
    """Train one net for every key, all in one program; return the sequences each one needed, or None at the limit."""

    def loss_fn(params: Params, _: Any, progress: Progress, key: Key[Array, ""]) -> Any:
        batch = task.draw(key, lag, recipe.batch)
        z = read(recipe.cell, params, batch)
        errors = abs(recipe.outputs(z) - batch.targets)
        return recipe.loss(z, batch.targets), (watch(task, progress, errors), {})

    def start(key: Key[Array, ""]) -> TrainState:
        key_init, key_data = jax.random.split(key)
        progress = no_progress(task, recipe.batch)
        return init_train_state(recipe.init(key_init), recipe.optimizer, key_data, carry=progress)

    train_step = make_train_step(loss_fn, recipe.optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(states: TrainState) -> TrainState:
        steps = jnp.arange(BLOCK // recipe.batch)  # the loss draws its sequences itself
        return jax.vmap(lambda state: fit(train_step, state, steps)[0])(states)

    states = jax.jit(jax.vmap(start))(keys)
    with tqdm(total=limit, unit="sequence", leave=False, disable=None) as bar:
        for _ in range(0, limit, BLOCK):
            states = train(states)
            solved_at = states.carry.solved_at.tolist()
            bar.update(BLOCK)
            bar.set_postfix_str(f"{sum(map(bool, solved_at))} of {len(solved_at)} solved")
            if all(solved_at):
                break
    return [number or None for number in solved_at]


# The experiment.


def plans(
    tasks: tuple[str, ...], lags: tuple[int, ...], paper_lags: tuple[int, ...], cell_lags: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Return the rows: every task by both recipes, and one task, `BY_LAG`, by every cell."""
    published = [(name, lag) for name in tasks for lag in getattr(TASKS[name].paper, "sequences", ())]
    asked = [("copy", lag) for lag in (50, 100) if "copy" in tasks] + [row for row in published if row[0] != BY_LAG]
    paper_rows = [{"recipe": "1997", "task": name, "lag": lag} for name, lag in published if lag in paper_lags]
    today_rows = [{"recipe": "LSTM, chrono", "task": name, "lag": lag} for name, lag in asked if lag in lags]
    for net in nets(100) if BY_LAG in tasks else ():
        own_lags = {*lags, *cell_lags} if net == "LSTM, chrono" else cell_lags
        today_rows += [{"recipe": net, "task": BY_LAG, "lag": lag} for lag in sorted(own_lags)]
    # The longest rows last, so that an interrupted run has most of them.
    return sorted(paper_rows + today_rows, key=lambda row: (row["lag"], row["recipe"] == "1997"))


def main(
    *,
    trials: int = 10,
    tasks: tuple[str, ...] = tuple(TASKS),
    lags: tuple[int, ...] = (50, 100, 500, 1000),
    paper_lags: tuple[int, ...] = (50, 100, 500, 1000),
    cell_lags: tuple[int, ...] = (50, 100, 200),
    limit: int = 50_000,
    paper_limit: int = 1_000_000,
    learning_rate: float = 1e-2,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets until they solve their task, write the result and a picture, and log the table.

    Args:
      trials: nets per row, trained in one program.
      tasks: names of tasks.
      lags: for today's recipe.
      paper_lags: at which the recipe of 1997 is tried; 500 takes half an hour, 1000 several hours.
      cell_lags: at which every cell tries the order of two.
      limit: sequences after which a trial of today's recipe counts as failed, rounded up to a multiple of 2000.
      paper_limit: the same for the recipe of 1997.
      learning_rate: of today's recipe.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    runs.check_names("tasks", tasks, TASKS)

    def measure(recipe: str, task: str, lag: int) -> dict[str, Any]:
        of_paper = recipe == "1997"
        how = (
            recipe_of_1997(TASKS[task], lag)
            if of_paper
            else recipe_of_today(TASKS[task], lag, nets(lag)[recipe], learning_rate)
        )
        keys, most = jax.random.split(jax.random.key(0), trials), paper_limit if of_paper else limit
        weights = (
            num_weights(TASKS[task], jax.eval_shape(how.init, keys[0]))
            if of_paper
            else num_params(jax.eval_shape(how.init, keys[0]))
        )
        return {"weights": weights, "solved_at": sequences_to_success(TASKS[task], how, lag, keys, most)}

    folder, result = rows.collect(
        "long_lag", config, plans(tasks, lags, paper_lags, cell_lags), measure, workdir=workdir, resume=resume
    )
    published = {name: task.paper.sequences for name, task in TASKS.items() if task.paper}
    picture = plots.long_lag(folder / "long_lag.png", limit, result["rows"], published, BY_LAG)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def solved_share(row: dict[str, Any] | None) -> str:
    """Return how many trials were solved, and the 95 % interval of the share."""
    if row is None:
        return ""
    solved, trials = sum(map(bool, row["solved_at"])), len(row["solved_at"])
    _, low, high = intervals.of_share(solved, trials)
    return f"{solved}/{trials} ({low:.2f} to {high:.2f})"


def sequences(row: dict[str, Any] | None) -> str:
    """Return how many trials were solved, and the median and the range of the sequences that all trials needed."""
    if row is None:
        return ""
    low, *_, high = every = sorted(number or math.inf for number in row["solved_at"])
    share = f"{sum(number < math.inf for number in every)}/{len(every)}"
    if statistics.median(every) == math.inf:
        return share
    last = "the limit" if high == math.inf else f"{high:,}"
    return f"{share}: {statistics.median(every):,.0f} ({low:,} to {last})"


def table(result: dict[str, Any]) -> str:
    """Return two Markdown tables: both recipes beside the paper, and the share of solved trials by cell and lag."""
    found = {(row["recipe"], row["task"], row["lag"]): row for row in result["rows"]}
    lines = [
        "| task | lag | published: mean | recipe of 1997: median (range) | of today: median (range) |",
        "|---|---|---|---|---|",
    ]
    places = sorted(
        {(row["task"], row["lag"]) for row in result["rows"]}, key=lambda place: ([*TASKS].index(place[0]), place)
    )
    for name, lag in places:
        paper = TASKS[name].paper
        published = paper.sequences.get(lag) if paper else None
        if published or name != BY_LAG:
            own = [sequences(found.get((recipe, name, lag))) for recipe in ("1997", "LSTM, chrono")]
            lines.append(f"| {name} | {lag} | {f'{published:,}' if published else ''} | {' | '.join(own)} |")
    lags = sorted({lag for net, task, lag in found if task == BY_LAG and net in nets(100)})
    lines += ["", f"| {BY_LAG} | {' | '.join(f'lag {lag}' for lag in lags)} |", "|---" * (1 + len(lags)) + "|"]
    for net in nets(100):
        lines.append(f"| {net} | {' | '.join(solved_share(found.get((net, BY_LAG, lag))) for lag in lags)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli(
        "long_lag",
        main,
        quick={
            "trials": 2,
            "tasks": ("order of two", "2c"),
            "lags": (50,),
            "paper_lags": (50,),
            "cell_lags": (50,),
            "limit": 2000,
            "paper_limit": 2000,
        },
    )
