"""Epochs: batches in random order, a mean over a whole data set, and training with early stopping."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxlstm.cell import PyTree
from jaxlstm.checks import (
    ArgumentTypeError,
    ArgumentValueError,
    as_arrays,
    border,
    check_count,
    check_function,
    check_number,
    checked_key,
    describe,
    in_callback,
    kind_of,
)
from jaxlstm.train import Metrics, TrainState, TrainStep, fit

__all__ = ["shuffled_batches", "evaluate", "fit_epochs"]  # noqa: RUF022

# (params, batch) -> (values, mask)
Measure = Callable[[PyTree, PyTree], tuple[PyTree, Array]]


@border("shuffled_batches")
def shuffled_batches(key: Key[Array, ""], data: PyTree, batch_size: int) -> PyTree:
    """Put the items of a data set into a random order and cut them into batches: one epoch for `fit`.

    Items that do not fill a last batch are left out; another key leaves out others. The result is a copy of the data.
    If it takes too much memory, shuffle `jnp.arange(num_items)` instead, and look up the items in the loss.

    Args:
      key: a new one for every epoch.
      data: a pytree whose leaves are [item, ...], such as padded sequences, their lengths and their labels.
      batch_size: the number of items in a batch.

    Returns:
      The pytree with leaves [batch number, item, ...].

    Raises:
      TypeError: `data` are not arrays, or `key` is not a JAX key.
      ValueError: the leaves differ in their first axis, or `batch_size` is larger than the data set.

    >>> import jax, numpy as np
    >>> from jaxlstm.epochs import shuffled_batches
    >>> data = {"xs": np.zeros((10, 7, 2)), "length": np.arange(10)}  # 10 items of 7 steps
    >>> batches = shuffled_batches(jax.random.key(0), data, 4)
    >>> batches["xs"].shape, batches["length"].shape
    ((2, 4, 7, 2), (2, 4))
    """
    data, num_items = _checked_items(data, batch_size)
    order = jax.random.permutation(checked_key(key), num_items)
    order = order[: num_items - num_items % batch_size].reshape(-1, batch_size)
    return jax.tree.map(lambda leaf: leaf[order], data)


@border("evaluate")
def evaluate(measure: Measure, params: PyTree, data: PyTree, batch_size: int) -> PyTree:
    """Return the mean of values over all real entries of a data set, computed batch by batch.

    Every real step of every sequence has the same weight. In a mean of the batches' means, a step weighs more if its
    batch has few or short sequences, so the result depends on the batch size.

    Args:
      measure: `(params, batch) -> (values, mask)`. `values` is an array or a pytree of arrays, such as losses and hits;
        `mask` is a bool array of the same shape, True where a value counts. Any shape will do, such as [time, item] for
        one value per step, or [item] for one per sequence. Values outside the mask may be NaN.
      params: passed to `measure`.
      data: a pytree whose leaves are [item, ...].
      batch_size: the number of items per call of `measure`. All items count: those left over are one smaller batch.

    Returns:
      The means, with the structure of `values`, in float32 or, for float64 values, in float64. If nothing is real, NaN.

    Raises:
      TypeError: `measure` returns anything else, or `data` are not arrays.
      ValueError: the leaves of `data` differ in their first axis, `batch_size` is larger than the data set, or values
        and mask differ in shape.

    >>> import jax.numpy as jnp
    >>> from jaxlstm import length_mask
    >>> from jaxlstm.epochs import evaluate
    >>> def measure(params, batch):
    ...     steps, lengths = batch
    ...     return (steps.T - params) ** 2, length_mask(lengths, steps.shape[1])  # both [time, item]
    >>> data = jnp.array([[3.0, 9, 9], [1, 1, 1], [1, 1, 9]]), jnp.array([1, 3, 2])
    >>> print(evaluate(measure, 1.0, data, 2))  # (2² + 5 * 0²) / 6
    0.6666667
    """
    check_function("measure", measure)
    data, num_items = _checked_items(data, batch_size)
    left_over = num_items % batch_size

    def sums(batch: PyTree) -> tuple[PyTree, Array]:
        with in_callback():
            result = measure(params, batch)
        values, mask = _checked_measure(result)
        return jax.tree.map(lambda v: jnp.sum(v, where=mask, dtype=_mean_dtype(v)), values), mask.sum()

    def in_batches(leaf: Array) -> Array:
        return leaf[: num_items - left_over].reshape(-1, batch_size, *leaf.shape[1:])

    totals, count = jax.tree.map(partial(jnp.sum, axis=0), lax.map(sums, jax.tree.map(in_batches, data)))
    if left_over:
        rest = sums(jax.tree.map(lambda leaf: leaf[-left_over:], data))
        totals, count = jax.tree.map(jnp.add, (totals, count), rest)
    return jax.tree.map(lambda total: total / count.astype(total.dtype), totals)


class _Run(NamedTuple):
    """What `fit_epochs` carries from epoch to epoch."""

    state: TrainState
    best: TrainState  # without its key, which no step changes
    lowest: Float[Array, ""]
    epoch: Int[Array, ""]
    waited: Int[Array, ""]  # epochs since the best one
    history: Metrics  # [epoch, ...]


@border("fit_epochs")
def fit_epochs(
    train_step: TrainStep,
    state: TrainState,
    make_batches: Callable[[Key[Array, ""]], PyTree],
    validate: Callable[[PyTree], Array],
    *,
    key: Key[Array, ""],
    num_epochs: int,
    patience: int,
) -> tuple[TrainState, Metrics]:
    """Train epoch by epoch, stop early, and return the state after the best epoch.

    To continue training from the state that it returns, call it again with another `key`; patience starts anew.

    A pure function: `sweep` runs it for many seeds and learning rates in one program, in which each run stops on
    its own. It stops with a `lax.while_loop`, which has no reverse-mode gradient; differentiate `fit` instead.

    Args:
      train_step: from `make_train_step`.
      state: the state to start from.
      make_batches: makes the batches of an epoch from a key, for example `lambda key: shuffled_batches(key, data, 32)`.
      validate: computes a number from the parameters after each epoch, lower being better. It is often a call of
        `evaluate` on data that the batches do not contain. For an accuracy, return `-accuracy`.
      key: each epoch gets its key from this one.
      num_epochs: the largest number of epochs.
      patience: the number of epochs in a row without a new lowest number after which training stops. A NaN is not lower
        than anything. `patience` may be traced, so that a sweep can try several.

    Returns:
      The whole state after the epoch with the lowest number, so `state.params` are the best parameters. It is the state
      given if no number was lower than infinity. And a dict of arrays with one entry per epoch, [num_epochs, ...]: the
      metrics of `train_step`, each averaged over the epoch's steps; `validation`; and `ran`, False for the epochs after
      the stop, whose entries repeat the last epoch that ran.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value, `validate` does not return one floating number, a
        metric is named `validation` or `ran`, or `fit` raises an error.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxlstm import init_train_state, make_train_step
    >>> from jaxlstm.epochs import fit_epochs, shuffled_batches
    >>> xs = jax.random.normal(jax.random.key(0), (64, 3)) + 2  # a batch is [item, 3]
    >>> optimizer = optax.sgd(0.1)
    >>> loss = lambda mean, batch: ((batch - mean) ** 2).mean()
    >>> state, metrics = fit_epochs(
    ...     make_train_step(loss, optimizer),
    ...     init_train_state(jnp.zeros(3), optimizer, jax.random.key(1)),
    ...     lambda key: shuffled_batches(key, xs[:48], 8),
    ...     lambda mean: loss(mean, xs[48:]),
    ...     key=jax.random.key(2), num_epochs=50, patience=3,
    ... )
    >>> best_epoch = int(metrics["validation"].argmin())
    >>> int(metrics["ran"].sum()) == best_epoch + 1 + 3, int(state.step) == 6 * (best_epoch + 1)
    (True, True)
    """
    check_function("make_batches", make_batches)
    check_function("validate", validate)
    check_count("num_epochs", num_epochs, 1)
    if not isinstance(patience, jax.core.Tracer):
        check_count("patience", patience, 1)
    key = checked_key(key)
    if not isinstance(state, TrainState):
        raise ArgumentTypeError(f"state must be a TrainState, from init_train_state, got {kind_of(state)}.")
    (state,) = as_arrays(state=state)

    def train_and_validate(state: TrainState, epoch: Array) -> tuple[TrainState, Metrics]:
        with in_callback():
            batches = make_batches(jax.random.fold_in(key, epoch))
        state, metrics = fit(train_step, state, batches)
        with in_callback():
            value = validate(state.params)
        check_number("validate", value)
        if taken := {"validation", "ran"} & metrics.keys():
            raise ArgumentValueError(f"a metric must not be named {sorted(taken)}; fit_epochs adds these itself.")
        return state, {**jax.tree.map(partial(jnp.mean, axis=0), metrics), "validation": jnp.asarray(value)}

    def goes_on(run: _Run) -> Array:
        return (run.epoch < num_epochs) & (run.waited < patience)

    def one_epoch(run: _Run) -> _Run:
        state, metrics = train_and_validate(run.state, run.epoch)
        better = metrics["validation"] < run.lowest
        return _Run(
            state,
            jax.tree.map(partial(lax.select, better), state._replace(key=zero), run.best),
            lax.select(better, metrics["validation"], run.lowest),
            run.epoch + 1,
            jnp.where(better, 0, run.waited + 1),
            jax.tree.map(lambda all, now: all.at[run.epoch].set(now), run.history, metrics),
        )

    zero = jnp.zeros((), jnp.int32)
    _, metrics = jax.eval_shape(train_and_validate, state, zero)
    history = jax.tree.map(lambda leaf: jnp.zeros((num_epochs, *leaf.shape), leaf.dtype), metrics)
    infinite = jnp.full((), jnp.inf, metrics["validation"].dtype)
    run = lax.while_loop(goes_on, one_epoch, _Run(state, state._replace(key=zero), infinite, zero, zero, history))
    epochs = jnp.arange(num_epochs, dtype=jnp.int32)
    history = jax.tree.map(lambda leaf: leaf[jnp.minimum(epochs, run.epoch - 1)], run.history)
    return run.best._replace(key=run.state.key), {**history, "ran": epochs < run.epoch}


def _checked_items(data: PyTree, batch_size: int) -> tuple[PyTree, int]:
    """Return a data set as arrays, and its number of items."""
    (data,) = as_arrays(data=data)
    firsts = {leaf.shape[:1] for leaf in jax.tree.leaves(data)}
    if len(firsts) != 1 or firsts == {()}:
        raise ArgumentValueError(f"data must share their first axis, the number of items, got {describe(data)}.")
    ((num_items,),) = firsts
    if not num_items:
        raise ArgumentValueError(f"data must hold at least one item, got {describe(data)}.")
    check_count("batch_size", batch_size, 1, num_items)
    return data, num_items


def _checked_measure(result: Any) -> tuple[PyTree, Array]:
    """Check that values and mask have one shape."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ArgumentTypeError(f"measure must return (values, mask), got {kind_of(result)}.")
    values, mask = as_arrays(values=result[0], mask=result[1])
    if getattr(mask, "dtype", None) != jnp.bool_:
        raise ArgumentTypeError(f"measure must return its mask as one bool array, got {describe(mask)}.")
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(values)):
        raise ArgumentTypeError(f"measure must return real or bool values, got {describe(values)}.")
    if any(leaf.shape != mask.shape for leaf in jax.tree.leaves(values)):
        raise ArgumentValueError(
            f"measure must return values with the shape of their mask, {list(mask.shape)}, got {describe(values)}."
        )
    return values, mask


def _mean_dtype(values: Array) -> Any:
    return jnp.float64 if values.dtype == jnp.float64 else jnp.float32
