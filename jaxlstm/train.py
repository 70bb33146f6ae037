"""Training: one step for any loss and Optax optimizer, and many steps as one scan. Nothing here depends on the cell."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, Key

from jaxlstm.cell import leaf_path
from jaxlstm.checks import (
    ArgumentTypeError,
    ArgumentValueError,
    alike,
    as_arrays,
    border,
    check_function,
    check_number,
    check_optimizer,
    checked_key,
    describe,
    in_callback,
    kind_of,
    shown,
)

PyTree = Any
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """The whole state of a run: save it to resume the run, stack several to train many runs with `sweep`."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]
    carry: PyTree = ()  # passed from one batch to the next: truncated BPTT, running statistics


# (params, batch) or (params, batch, carry, key) -> loss, (loss, metrics) or (loss, (carry, metrics)).
LossFn = Callable[..., Any]
TrainStep = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


@border("init_train_state")
def init_train_state(
    params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""], *, carry: PyTree = ()
) -> TrainState:
    """Return the state before the first step.

    Raises:
      TypeError: `key` is not a JAX key.
    """
    check_optimizer(optimizer)
    (params,) = as_arrays(params=params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), checked_key(key), carry)


@border("make_train_step")
def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> TrainStep:
    """Make a pure training step; jit it, scan it with `fit`, run it for many seeds with `sweep`.

    Args:
      loss_fn: `(params, batch)` or `(params, batch, carry, key)`, with a fresh key at every step. It returns the
        loss, a number, or `(loss, metrics)` with a dict of arrays, or `(loss, (carry, metrics))`. The gradient treats
        the carry in the state as a constant, so passing it on *is* truncated BPTT.
      optimizer: any Optax gradient transformation. Those that need the loss, the gradient or the loss function
        (`value`, `grad`, `value_fn`: line searches, plateau schedules) get them.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. To the metrics of `loss_fn` it adds `loss`, `grad_norm` (before
      clipping) and, if the optimizer's state holds it (`optax.inject_hyperparams`), the `learning_rate`.

    Raises:
      TypeError: `loss_fn` takes other arguments, or `optimizer` is not an Optax optimizer.
      TypeError, ValueError: when the step runs, if `loss_fn` returns anything else, if a parameter is not floating, or
        if a metric has a name that the step adds.
    """
    loss_fn = _full_loss(loss_fn)
    check_optimizer(optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    @border("train_step")
    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        for path, leaf in jax.tree.leaves_with_path(state.params):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                got = f"{leaf_path(path)} {jnp.result_type(leaf)}"
                raise ArgumentTypeError(f"params must be floating, got {got}; move untrained leaves into the carry.")
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
            raise ArgumentValueError(
                f"loss_fn's metrics must not be named {sorted(taken)}; the training step adds these itself."
            )
        return TrainState(params, opt_state, state.step + 1, state.key, carry), {**own, **metrics}

    return train_step


@border("fit")
def fit(train_step: TrainStep, state: TrainState, batches: PyTree) -> tuple[TrainState, Metrics]:
    """Train on one batch after another, as one `lax.scan`.

    Args:
      train_step: from `make_train_step`.
      state: the state to start from.
      batches: a pytree whose leaves stack the batches along axis 0.

    Returns:
      The state after the last batch, and the metrics of every step, stacked along axis 0.

    Raises:
      TypeError: `batches` are not arrays, or a step returns a state unlike the one it is given.
      ValueError: the leaves of `batches` differ in their first axis.
    """
    if isinstance(batches, Iterator) or not all(map(_is_array, jax.tree.leaves(batches))):
        raise ArgumentTypeError(
            f"batches must be arrays that stack the batches along axis 0, got {type(batches).__name__}; stack a list "
            "of them with jax.tree.map(lambda *leaves: jnp.stack(leaves), *list_of_batches)."
        )
    check_function("train_step", train_step)
    if not isinstance(state, TrainState):
        raise ArgumentTypeError(f"state must be a TrainState, from init_train_state, got {kind_of(state)}.")
    state, batches = as_arrays(state=state, batches=batches)
    firsts = {leaf.shape[:1] for leaf in jax.tree.leaves(batches)}
    if len(firsts) != 1 or firsts == {()}:
        raise ArgumentValueError(f"batches must share their first axis, the number of steps, got {describe(batches)}.")
    try:
        return lax.scan(in_callback()(train_step), state, batches)
    except TypeError as error:
        if not isinstance(error, ArgumentTypeError):
            _check_step(train_step, state, batches)  # only now, since it traces the step again
        raise


def _check_step(train_step: Any, state: TrainState, batches: PyTree) -> None:
    """Check that a step returns a state like the one it is given, and metrics."""
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
    result = jax.eval_shape(train_step, state, batch)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], TrainState):
        raise ArgumentTypeError(f"train_step must return (TrainState, metrics), got {kind_of(result)}.")
    after, _ = result
    if not alike(after, state):
        name = next(name for name in TrainState._fields if not alike(getattr(after, name), getattr(state, name)))
        given, got = (f"{kind_of(tree)}: {describe(tree)}" for tree in (getattr(state, name), getattr(after, name)))
        raise ArgumentTypeError(
            f"train_step must return a {name} like the one it is given, {given}; got {got}. Pass the first carry to "
            "init_train_state."
        )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def _full_loss(loss_fn: LossFn) -> LossFn:
    """Return a loss as (params, batch, carry, key) -> (loss, (carry, metrics))."""
    takes = _num_arguments(loss_fn)

    def full(params: PyTree, batch: PyTree, carry: PyTree, key: Key[Array, ""]) -> Any:
        with in_callback():
            out = loss_fn(*(params, batch, carry, key)[:takes])
        loss, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
        carry, metrics = aux if isinstance(aux, tuple) and len(aux) == 2 else (carry, aux)
        check_number("loss_fn", loss, ", (loss, metrics) or (loss, (carry, metrics)), with a number as the loss")
        if not isinstance(metrics, dict):
            raise ArgumentTypeError(f"loss_fn must return its metrics as a dict of arrays, got {kind_of(metrics)}.")
        return loss, (carry, metrics)

    return full


def _num_arguments(loss_fn: Any) -> int:
    """Return how many of (params, batch, carry, key) a loss takes: 2 or 4."""
    if not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn must be a function, got {kind_of(loss_fn)}.")
    try:
        signature = inspect.signature(loss_fn)
    except ValueError as error:
        raise ArgumentTypeError(f"loss_fn must be a function of (params, batch), got {shown(loss_fn)}.") from error
    required = [p for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    # Further arguments with defaults are the loss's own, unless their names say that they are these two.
    own = len(required) == 2 and not {"carry", "key", "rng"} & set([*signature.parameters][2:4])
    for number in (2, 4) if own else (4, 2):
        with contextlib.suppress(TypeError):
            signature.bind(*range(number))
            return number
    raise ArgumentTypeError(f"loss_fn must take (params, batch) or (params, batch, carry, key), got {signature}.")


def _learning_rate(opt_state: PyTree) -> Metrics:
    # A schedule keeps its own state under the same name in the optimizer's state; that one is not an array.
    found = optax.tree.get_all_with_path(opt_state, "learning_rate", lambda path, value: hasattr(value, "dtype"))
    return {"learning_rate": found[0][1]} if len(found) == 1 else {}
