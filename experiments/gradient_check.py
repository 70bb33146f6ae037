"""Is the gradient that trains char_lm right? Compare it with the hand-derived gradient, per weight and per gate."""

import functools
import logging
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from jaxlstm import TrainState, lstm_bptt, split_gates
from jaxlstm.diagnostics import gradient_error
from jaxlstm.regularize import dropout_mask

TOLERANCE = {"float64": 1e-12, "float32": 1e-4}  # largest relative error at which the gradients agree

log = logging.getLogger("char_lm")


def loss_by_hand(
    model: Any, batch: Int[Array, "time+1 batch"], carries: Any, key: Key[Array, ""], dropout: float
) -> Float[Array, ""]:
    """Return the loss of `char_lm.loss_fn`; its gradient runs through `lstm_bptt`, whose backward pass is hand-written.

    The layers, the dropout and the loss are written out here, so this code shares nothing with char_lm.
    """

    def drop(xs: Array, depth: int) -> Array:
        if dropout == 0:
            return xs
        return xs * dropout_mask(jax.random.fold_in(key, depth), dropout, xs.shape, xs.dtype)

    xs = drop(model.embedding[batch[:-1]], 0)
    for depth, (params, carry) in enumerate(zip(model.layers, carries, strict=True), 1):
        _, ys = lstm_bptt(params, xs, carry)
        xs = drop(ys, depth)
    return cross_entropy(xs @ model.w + model.b, batch[1:]).mean()


@functools.partial(jax.jit, static_argnames=("loss_fn", "dropout"))
def gradient_errors(loss_fn: Any, model: Any, batch: Array, carries: Any, key: Key[Array, ""], dropout: float) -> Any:
    """Return the relative error of the hand-derived gradient against autodiff, per weight and per gate of a layer."""
    by_hand = jax.grad(loss_by_hand)(model, batch, carries, key, dropout)
    autodiff = jax.grad(loss_fn, has_aux=True)(model, batch, carries, key, dropout=dropout)[0]
    return gradient_error(_by_gate(by_hand), _by_gate(autodiff))


def _by_gate(model: Any) -> Any:
    return model._replace(layers=[split_gates(layer)._asdict() for layer in model.layers])


def check(when: str, loss_fn: Any, state: TrainState, batch: Array, dropout: float) -> dict[str, Any]:
    """Compare both gradients on one batch, in float64 and in float32, and log the verdict.

    Args:
      when: name of the check in the log and in the result.
      loss_fn: `(model, batch, carries, key, *, dropout) -> (loss, aux)`.
      state: the training state that holds the model and its carries.
      batch: token indices [time+1, batch].
      dropout: dropout rate.

    Returns:
      {when: {dtype: row}}; each row holds the largest error, the weight and gate it is in, and whether it is tolerated.
    """
    worst = {}
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            cast = functools.partial(np.asarray, dtype=dtype)
            model, carries = jax.tree.map(cast, jax.device_get((state.params, state.carry)))
            key = jax.random.fold_in(state.key, state.step)
            errors = jax.device_get(gradient_errors(loss_fn, model, batch, carries, key, dropout))
        named = [
            (float(error), jax.tree_util.keystr(path, simple=True, separator="."))
            for path, error in jax.tree.leaves_with_path(errors)
        ]
        error, name = max(named, key=_nan_is_largest)
        worst[dtype] = {"error": error, "weight": name, "agrees": error <= tolerance}
    log.info(
        "gradient check %s: %s; largest relative error of the hand-derived gradient: %s",
        when,
        "AGREE" if all(row["agrees"] for row in worst.values()) else "DISAGREE",
        "; ".join(f"{row['error']:.0e} in {row['weight']} ({dtype})" for dtype, row in worst.items()),
    )
    return {when: worst}


def _nan_is_largest(named: tuple[float, str]) -> tuple[bool, float]:
    return math.isnan(named[0]), named[0]
