"""Training: a step that drives any loss with any Optax optimiser, and many steps in one scan. It knows no cell."""

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
    """Everything a run is: save it, and the run can go on; stack it, and `jax.vmap` trains many runs at once."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]
    carry: PyTree = ()  # what one batch hands to the next: truncated BPTT, running statistics


# (params, batch, carry, key) -> (loss, (carry, metrics)); a loss without a carry passes () through.
LossFn = Callable[[PyTree, PyTree, PyTree, Key[Array, ""]], tuple[Float[Array, ""], tuple[PyTree, Metrics]]]
TrainStep = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def init_train_state(
    params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""], *, carry: PyTree = ()
) -> TrainState:
    """Return the state before the first step.

    Raises:
      TypeError: `key` is no typed key.
    """
    if not jnp.issubdtype(getattr(key, "dtype", object), jax.dtypes.prng_key):
        raise TypeError("init_train_state: key must be a typed key; make one with jax.random.key(seed).")
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key, carry)


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> TrainStep:
    """Make a pure step of training; jit it, scan it with `fit`, vmap it over seeds.

    Args:
      loss_fn: `(params, batch, carry, key) -> (loss, (carry, metrics))`, with a fresh key at every step. The carry that
        came with the state is a constant to the gradient, so handing it on *is* truncated BPTT.
      optimizer: any Optax gradient transformation; those that ask for the loss, the gradient or the loss function
        (`value`, `grad`, `value_fn`: line searches, plateau schedules) get them.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. The metrics are the loss's own and `loss`, `grad_norm` (before any
      clipping) and, where the optimiser's state holds it (`optax.inject_hyperparams`), the `learning_rate` used.

    Raises:
      ValueError: when the step runs, if `loss_fn` names a metric like one of these.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, (carry, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, state.carry, key
        )
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
            raise ValueError(f"train_step: loss_fn's metrics must not be named {sorted(taken)}; these are added here.")
        return TrainState(params, opt_state, state.step + 1, state.key, carry), {**own, **metrics}

    return train_step


def fit(train_step: TrainStep, state: TrainState, batches: PyTree) -> tuple[TrainState, Metrics]:
    """Train on one batch after another, as one `lax.scan`.

    Args:
      train_step: from `make_train_step`.
      state: where to start.
      batches: a pytree whose leaves have the batches along axis 0.

    Returns:
      The state after the last batch, and the metrics of every step, stacked along axis 0.
    """
    return lax.scan(train_step, state, batches)


def _learning_rate(opt_state: PyTree) -> Metrics:
    # A schedule's own state stands in the optimiser's under the same name; it is no array.
    found = optax.tree.get_all_with_path(opt_state, "learning_rate", lambda path, value: hasattr(value, "dtype"))
    return {"learning_rate": found[0][1]} if len(found) == 1 else {}
