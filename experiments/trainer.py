"""The loop that every experiment trains in: blocks of steps, metrics, evaluations, checkpoints, and a stop that saves.

It knows no model; what it is asked to do at a step is a function of that step alone, so a run that was stopped, killed
or resumed ends in the bits of one that was not.
"""

import functools
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments import checkpoints, devices, runs
from jaxlstm import TrainState, TrainStep, fit

log = logging.getLogger("trainer")

Metrics = dict[str, np.ndarray]  # of a block: a row a step


def each_alone(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make the optimiser of a dict of stacks of nets that treats every net as if it were alone, clipping included."""
    return optax.GradientTransformation(
        lambda nets: {name: jax.vmap(optimizer.init)(own) for name, own in nets.items()},
        lambda updates, state, nets=None: _split(
            {name: jax.vmap(optimizer.update)(own, state[name], nets and nets[name]) for name, own in updates.items()}
        ),
    )


def _split(pairs: dict[str, tuple[Any, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def train(
    experiment: str,
    folder: Path,
    train_step: TrainStep,
    state: TrainState,
    batches: Callable[[range], Any],
    examine: Callable[[TrainState, Metrics, float], runs.Row],
    *,
    score: str,
    steps: int,
    block: int,
    evaluate_every: int,
    save_every: int,
    keep: int,
    tensorboard: bool = False,
    mesh: Mesh | None = None,
) -> TrainState:
    """Train from `state.step` to `steps`.

    Args:
      experiment: its name, for what it says when it stops.
      folder: of the run, from `runs.open_folder`.
      state: from `runs.restore`; its buffers are used up.
      batches: the batches of some steps, stacked along axis 0; a pure function.
      examine: `(whole state, metrics of the last block, steps per second) -> row`, called every `evaluate_every` steps
        and after the last; the row goes to metrics.jsonl.
      score: the name in that row by which checkpoints are compared, lower being better.
      block: steps in one call of `fit`: only between two is anything examined, saved or stopped.
      save_every: steps between two checkpoints; there is one at each evaluation as well.
      mesh: that on which state and batches are; the state stays where it is.

    Raises:
      SystemExit: the run was asked to stop (128 + the signal, as a shell says it), its numbers are no longer finite, or
        the disk took no more. The newest checkpoint is named.
    """
    train_block = jax.jit(functools.partial(fit, train_step), donate_argnums=0, out_shardings=_shardings(state, mesh))
    done = first = int(state.step)
    if devices.agree(first) + devices.agree(-first):
        sys.exit(f"{experiment}: not all processes find the same checkpoints in {folder}; use a folder that all see.")
    quiet = None if devices.is_first() else True  # None: if there is no terminal
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
                read, since = batches(now), time.perf_counter()
                state, metrics = jax.block_until_ready(train_block(state, read))
                seconds += time.perf_counter() - since
                stopping = devices.agree(max(stop, default=0))  # a signal from here on is for the next block
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
                    checkpoints.save(folder / "checkpoints", whole, step=done, keep=keep, score=row.get(score))
                if stopping:
                    break
            # In the last block too: what follows the training waits for --resume.
            if stopping := devices.agree(max(stop, default=0)):
                log.info("stopped after step %d; %s", done, runs.go_on(experiment, folder))
                sys.exit(128 + stopping)
    except OSError as error:
        sys.exit(f"{experiment}: at step {done}: {error}; {runs.go_on(experiment, folder)}")
    return state


def _shardings(state: TrainState, mesh: Mesh | None) -> Any:
    """Return where the state stays, and its metrics are, so that a block is compiled once."""
    if mesh is None:
        return None
    return jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, PartitionSpec())


def _check_finite(experiment: str, folder: Path, state: TrainState, metrics: Metrics, done: int) -> None:
    """Stop before a state that is lost is saved over one that is not."""
    bad = [
        (done - len(values) + int(at) + 1, f"{name} is {values[at]}")
        for name, values in metrics.items()
        for at in np.flatnonzero(~np.isfinite(values))[:1]
    ]
    if not bad and not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)):
        bad = [(done, "a parameter is no longer finite")]
    if bad:
        step, what = min(bad)
        sys.exit(f"{experiment}: at step {step} {what}; {runs.last_good(folder)}. Try smaller steps in a new run.")
