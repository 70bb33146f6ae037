"""Training: one step for any loss and Optax optimizer, and many steps as one scan. Nothing here depends on the cell."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

PyTree = Any
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """The whole state of a run: save it to resume the run, stack several to train many runs at once with `jax.vmap`."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]
    carry: PyTree = ()  # passed from one batch to the next: truncated BPTT, running statistics


# (params, batch, carry, key) -> (loss, (carry, metrics)); a loss without a carry returns () for it.
LossFn = Callable[[PyTree, PyTree, PyTree, Key[Array, ""]], tuple[Float[Array, ""], tuple[PyTree, Metrics]]]
TrainStep = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def init_train_state(
    params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""], *, carry: PyTree = ()
) -> TrainState:
    """Return the state before the first step.

    Raises:
      TypeError: `key` is not a typed key.
    """
    if not jnp.issubdtype(getattr(key, "dtype", object), jax.dtypes.prng_key):
        raise TypeError("init_train_state: key must be a typed key; make one with jax.random.key(seed).")
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key, carry)


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> TrainStep:
    """Make a pure training step; jit it, scan it with `fit`, vmap it over seeds.

    Args:
      loss_fn: `(params, batch, carry, key) -> (loss, (carry, metrics))`, with a fresh key at every step. The
        gradient treats the carry in the state as a constant, so passing it on *is* truncated BPTT.
      optimizer: any Optax gradient transformation. Those that need the loss, the gradient or the loss function
        (`value`, `grad`, `value_fn`: line searches, plateau schedules) get them.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. To the metrics of `loss_fn` it adds `loss`, `grad_norm` (before
      clipping) and, if the optimizer's state holds it (`optax.inject_hyperparams`), the `learning_rate`.

    Raises:
      ValueError: when the step runs, if a metric of `loss_fn` has one of these names.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        # A function of the step alone, so that a resumed run draws the same noise.
        key = jax.random.fold_in(state.key, state.step)
        (loss, (carry, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, state.carry, key
        )
        # The extra arguments serve line searches and schedules that watch the loss; other optimizers ignore them.
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            grad=grads,
            value_fn=lambda params: loss_fn(params, batch, state.carry, key)[0],
        )
        params = optax.apply_updates(state.params, updates)

        own = {"loss": loss, "grad_norm": optax.tree.norm(grads), **_learning_rate(opt_state)}
        if taken := own.keys() & metrics.keys():
            raise ValueError(
                f"train_step: loss_fn's metrics must not be named {sorted(taken)}; the training step adds these itself."
            )
        return TrainState(params, opt_state, state.step + 1, state.key, carry), {**own, **metrics}

    return train_step


def fit(train_step: TrainStep, state: TrainState, batches: PyTree) -> tuple[TrainState, Metrics]:
    """Train on one batch after another, as one `lax.scan`.

    Args:
      train_step: from `make_train_step`.
      state: the state to start from.
      batches: a pytree whose leaves stack the batches along axis 0.

    Returns:
      The state after the last batch, and the metrics of every step, stacked along axis 0.
    """
    return lax.scan(train_step, state, batches)


def _learning_rate(opt_state: PyTree) -> Metrics:
    # A schedule keeps its own state under the same name in the optimizer's state; that one is not an array.
    found = optax.tree.get_all_with_path(opt_state, "learning_rate", lambda path, value: hasattr(value, "dtype"))
    return {"learning_rate": found[0][1]} if len(found) == 1 else {}
