"""The training loop of every experiment: blocks of steps, metrics, evaluations, checkpoints, and a clean stop.

The loop knows nothing about the model. Everything it does at a step depends on that step alone, so an interrupted and
resumed run is bitwise identical to an uninterrupted one.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.harness import checkpoints, devices, runs
from jaxlstm import TrainState, fit
from jaxlstm.train import TrainStep

log = logging.getLogger("trainer")

Metrics = dict[str, np.ndarray]  # the metrics of a block, one row per step


class Schedule(NamedTuple):
    """When a run evaluates, saves and ends, counted in optimizer steps."""

    steps: int  # train up to this step
    block: int  # steps in one compiled call of `fit`; a run is evaluated, saved or stopped only between two blocks
    evaluate_every: int  # a multiple of `block`
    save_every: int  # steps between two checkpoints; every evaluation saves one as well
    keep: int = 3  # how many of the newest checkpoints are kept; the best one is always kept


def interval(steps: int, block: int, times: int) -> int:
    """Return how many steps apart `times` evaluations of a run are: a multiple of `block`, and at least one block."""
    return max(block, steps // times // block * block)


def each_alone(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply an optimizer to every net in a dict of stacked nets separately: each net's gradient is clipped alone."""

    def init(nets: Any) -> Any:
        return {name: jax.vmap(optimizer.init)(stack) for name, stack in nets.items()}

    def update(updates: Any, state: Any, nets: Any = None) -> Any:
        pairs = {
            name: jax.vmap(optimizer.update)(stack, state[name], nets and nets[name]) for name, stack in updates.items()
        }
        return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}

    return optax.GradientTransformation(init, update)


def train(
    experiment: str,
    folder: Path,
    train_step: TrainStep,
    state: TrainState,
    batches: Callable[[range], Any],
    examine: Callable[[TrainState, Metrics, float], runs.Row],
    schedule: Schedule,
    *,
    score: str = "",
    tensorboard: bool = False,
    mesh: Mesh | None = None,
) -> TrainState:
    """Train from `state.step` to `schedule.steps`.

    Args:
      experiment: the experiment's name, used in messages.
      folder: the run's folder, from `runs.open_folder`.
      train_step: a step from `jaxlstm.make_train_step`.
      state: the state to start from, from `runs.restore`; its buffers are donated.
      batches: a pure function from some steps to their batches, stacked along axis 0.
      examine: `(whole state, metrics of the last block, steps per second) -> row`, called every
        `schedule.evaluate_every` steps and after the last step; the row is written to metrics.jsonl.
      schedule: when to evaluate, save and end.
      score: the entry of that row that ranks checkpoints, lower being better; empty: none.
      tensorboard: also write TensorBoard event files.
      mesh: the mesh that holds the state and the batches; the state keeps its sharding.

    Returns:
      The state after the last step.

    Raises:
      SystemExit: the run was asked to stop (with code 128 + the signal, as shells report it), a metric or parameter is
        not finite, or the disk is full. The message names the newest checkpoint.
    """
    steps, block, evaluate_every, save_every, keep = schedule
    # `train_step` is static, so that another call of `train` with the same step reuses the compiled blocks.
    train_block = jax.jit(fit, static_argnums=0, donate_argnums=1, out_shardings=_shardings(state, mesh))
    done = first = int(state.step)
    run = runs.identity(folder)
    if devices.agree(first) + devices.agree(-first):
        sys.exit(f"{experiment}: the processes found different checkpoints in {folder}; use a folder they all share.")
    quiet = None if devices.is_first() else True  # None hides the bar only if there is no terminal
    seconds = 0.0
    try:
        with (
            runs.stop_signals() as stop,
            runs.metrics_writer(folder, after=first, tensorboard=tensorboard) as write,
            tqdm(total=steps, initial=first, unit="step", disable=quiet, dynamic_ncols=True) as bar,
            logging_redirect_tqdm(),
        ):
            for start in range(first, steps, block):
                now = range(start, min(start + block, steps))
                done = now[-1] + 1
                batch, began = batches(now), time.perf_counter()
                state, metrics = jax.block_until_ready(train_block(train_step, state, batch))
                seconds += (took := time.perf_counter() - began)
                if start == first + block and done < steps:  # the second block: the first one compiles
                    _log_time_left(len(now), took, steps - done)
                # All processes must agree, so they ask once per block: a later signal is for the next block.
                stopping = devices.agree(max(stop, default=0))
                metrics = jax.device_get(metrics)
                bar.update(len(now))
                bar.set_postfix_str(f"loss {metrics['loss'].mean():.3f}")
                write([{"step": step + 1, **{k: float(v[step - start]) for k, v in metrics.items()}} for step in now])
                _check_finite(experiment, folder, state, metrics, done)
                row: runs.Row = {}
                evaluating = done % evaluate_every == 0 or done == steps
                saving = evaluating or stopping or done // save_every > start // save_every
                whole = devices.gather(state, mesh) if saving else state
                if evaluating:
                    row = {"step": done, **examine(whole, metrics, (done - first) / seconds)}
                    write([row])
                if saving and devices.is_first():
                    checkpoints.save(folder / "checkpoints", whole, step=done, keep=keep, score=row.get(score), run=run)
                if stopping:
                    break
            # A signal in the last block stops the run too: --resume then does what comes after the training.
            if stopping := devices.agree(max(stop, default=0)):
                log.info("stopped after step %d; %s", done, runs.how_to_resume(experiment, folder))
                sys.exit(128 + stopping)
    except OSError as error:
        sys.exit(f"{experiment}: at step {done}: {error}; {runs.how_to_resume(experiment, folder)}")
    return state


def _log_time_left(num_steps: int, seconds: float, left: int) -> None:
    time_left = seconds * left / num_steps
    shown = f"{time_left / 60:.0f} min" if time_left >= 90 else f"{time_left:.0f} s"
    log.info("%d steps take %.1f s on this machine: the %d steps left take about %s", num_steps, seconds, left, shown)


def _shardings(state: TrainState, mesh: Mesh | None) -> Any:
    """Return the shardings of a block's results. Without them JAX may choose others and compile the block twice."""
    if mesh is None:
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, PartitionSpec())


def _check_finite(experiment: str, folder: Path, state: TrainState, metrics: Metrics, done: int) -> None:
    """Stop at the first number that is not finite, before a checkpoint of it could replace a good one."""
    bad = [
        (done - len(values) + int(at) + 1, f"{name} is {values[at]}")
        for name, values in metrics.items()
        for at in np.flatnonzero(~np.isfinite(values))[:1]
    ]
    if not bad and not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)):
        bad = [(done, "a parameter is no longer finite")]
    if bad:
        step, reason = min(bad)
        last = runs.last_good(folder)
        sys.exit(f"{experiment}: at step {step} {reason}; {last}. Try a smaller learning rate in a new run.")
