"""Stacks of any cell, in one direction or both, with dropout between layers; one step of a stack; generation.

A stack is a list of the layers' parameters: the cell's own, or `Bidirectional` pairs of them. Its carries are a list
too. So the pytree is the model: slice it, reverse it, or run its parts with layers of another kind in between.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Key

from jaxlstm.bidirectional import Bidirectional, Merge, concatenate, init_bidirectional, run_layer
from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import (
    ArgumentTypeError,
    ArgumentValueError,
    alike,
    as_arrays,
    as_sequence,
    at,
    border,
    check_cell,
    check_count,
    check_flag,
    check_function,
    check_sequence,
    checked_flags,
    checked_init,
    checked_key,
    checked_layers,
    checked_rate,
    checked_reset_carry,
    describe,
    in_callback,
    kind_of,
    one_per_layer,
    shown,
)
from jaxlstm.gradients import GradientOrName
from jaxlstm.masks import Steps, hold, start_of, zeros_where_masked
from jaxlstm.recurrence import Options
from jaxlstm.regularize import Noisy, dropout_mask

Params = TypeVar("Params")
Carry = TypeVar("Carry")
State = TypeVar("State")


@border("init_stack")
def init_stack(
    key: Key[Array, ""],
    cell: Cell[Params, Any],
    input_size: int,
    hidden_sizes: Sequence[int],
    *,
    bidirectional: bool = False,
    merge: Merge = concatenate,
    **options: Any,
) -> list[Any]:
    """Draw the parameters of layers stacked on one another.

    Args:
      key: a JAX key.
      cell: a `Cell`, such as `LSTM`.
      input_size: features of the first layer's input.
      hidden_sizes: units of each layer.
      bidirectional: run every layer in both directions.
      merge: as in `unroll_stack`; it determines how many features the next layer reads.
      **options: passed to `cell.init`, such as `dtype`. For another initializer, pass
        `dataclasses.replace(LSTM, init=initializers.torch)` as the cell.

    Returns:
      A list with each layer's parameters, or `Bidirectional` pairs of them.

    Raises:
      TypeError: `key` is not a JAX key, or `hidden_sizes` is not a sequence.
      ValueError: a size is not a positive integer.

    >>> import jax, jaxlstm
    >>> layers = jaxlstm.init_stack(jax.random.key(0), jaxlstm.LSTM, 5, [7, 3], bidirectional=True)
    >>> layers[1].backward.w_ih.shape
    (14, 12)
    """
    check_cell(cell)
    if not isinstance(hidden_sizes, Sequence | np.ndarray) or isinstance(hidden_sizes, str | bytes):
        raise ArgumentTypeError(f"hidden_sizes must be a sequence, one size per layer, got {shown(hidden_sizes)}.")
    check_flag("bidirectional", bidirectional)
    check_function("merge", merge)
    for hidden_size in (1, *hidden_sizes):  # 1: check the key and the input size even if there is no layer
        key = checked_init(key, input_size, hidden_size)
    layers: list[Any] = []
    # Each layer reads what the one below outputs, so its width is known only once that one is drawn.
    for layer_key, hidden_size in zip(jax.random.split(key, len(hidden_sizes)), hidden_sizes, strict=True):
        if bidirectional:
            layers.append(init_bidirectional(layer_key, cell, input_size, hidden_size, **options))
        else:
            layers.append(cell.init(layer_key, input_size, hidden_size, **options))
        input_size = _output_size(cell, layers[-1], input_size, merge)
    return layers


def _output_size(cell: Cell[Any, Any], layer: Any, input_size: int, merge: Merge) -> int:
    """Return the number of features that a layer outputs, which need not be its hidden size."""

    def step(params: Any) -> Array:
        # Traced on shapes alone, by `eval_shape` below.
        x = jnp.zeros(input_size, jax.tree.leaves(params)[0].dtype)
        return cell.step(params, cell.initial_carry(params), x)[1]

    def outputs(layer: Any) -> Array:
        return merge(*map(step, layer)) if isinstance(layer, Bidirectional) else step(layer)

    return int(jax.eval_shape(outputs, layer).shape[-1])


@border("unroll_stack")
def unroll_stack(
    cell: Cell[Params, Carry],
    params: Sequence[Params | Bidirectional[Params]],
    xs: PyTree,
    carries: Sequence[Any] | None = None,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
    reset_carries: Sequence[Any] | None = None,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    noise: Sequence[Any] | None = None,
    merge: Merge = concatenate,
    gradient: GradientOrName = "bulk",
) -> tuple[list[Any], Array]:
    """Run a stack of layers over a sequence; each layer reads the outputs of the one below.

    Args:
      cell: a `Cell`, such as `LSTM`.
      params: one entry per layer, from `init_stack`: the cell's parameters, or `Bidirectional` pairs of them.
      xs: [time, *batch, input].
      carries: one per layer, `Bidirectional` where the layer is; default the cell's initial carry.
      mask: True where a step is real, in every layer.
      reset: True where a new segment or episode starts, in every layer.
      reset_carries: the carries after a reset, one per layer; default the cell's initial carry.
      dropout: rate at which a layer's outputs are dropped before the next layer reads them, anew at every step; never
        before the first layer or after the last (Zaremba, Sutskever & Vinyals, Recurrent neural network regularization,
        2014). 0: evaluation.
      key: for dropout; before layer n, the mask is drawn with `jax.random.fold_in(key, n)`.
      noise: for a regularized cell, one per layer: the `noise` of its `Noisy` input. None: evaluation.
      merge: merges the outputs of both directions.
      gradient: how to differentiate every layer, as in `unroll`.

    Returns:
      A list of the carries after the sequence, one per layer, and the outputs of the last layer.

    Raises:
      TypeError: `params` is not a list of layers; else as `unroll`, naming the layer.
      ValueError: carries and layers differ in number, `dropout` is not in [0, 1), or has no `key`.

    >>> import jax, jaxlstm
    >>> layers = jaxlstm.init_stack(jax.random.key(0), jaxlstm.LSTM, 5, [7, 3])
    >>> carries, ys = jaxlstm.unroll_stack(jaxlstm.LSTM, layers, jax.numpy.ones((11, 2, 5)))
    >>> ys.shape, carries[0].c.shape
    ((11, 2, 3), (2, 7))
    """
    num_layers = checked_layers(params)
    check_function("merge", merge)
    if isinstance(xs, Noisy) and num_layers > 1:
        raise ArgumentValueError("xs is Noisy, which only the first layer would read; pass noise=[...], one per layer.")
    dropout = checked_rate("dropout", dropout)
    # A rate that `jit` traces may be 0, but that is not known here.
    drops = num_layers > 1 and not (isinstance(dropout, float) and dropout == 0)
    if drops:
        if key is None:
            raise ArgumentValueError(f"dropout={dropout} needs a key; pass key=..., or dropout=0 for evaluation.")
        key = checked_key(key)
    last_carries = []
    each = _layers(params, carries=carries, reset_carries=reset_carries, noise=noise)
    for depth, (layer, carry, reset_carry, layer_noise) in enumerate(each):
        if depth and drops and key is not None:
            xs = xs * dropout_mask(jax.random.fold_in(key, depth), dropout, xs.shape, xs.dtype)
        options = Options(mask, reset, reset_carry, gradient=gradient)
        with at(f"layer {depth}"):
            carry, xs = run_layer(cell, layer, xs, carry, options, merge=merge, noise=layer_noise)
        last_carries.append(carry)
    return last_carries, xs


def _layers(params: Sequence[Any], **of_layers: Any) -> list[tuple[Any, ...]]:
    """Return for every layer its parameters and its entry of every other list; each list may be None."""
    entries = [one_per_layer(name, given, len(params)) for name, given in of_layers.items()]
    return list(zip(params, *entries, strict=True))


@border("step_stack")
def step_stack(
    cell: Cell[Params, Carry],
    params: Sequence[Params],
    carries: Sequence[Carry],
    x: PyTree,
    *,
    mask: Bool[Array, "*batch"] | None = None,
    reset: Bool[Array, "*batch"] | None = None,
    reset_carries: Sequence[Carry] | None = None,
    noise: Sequence[Any] | None = None,
) -> tuple[list[Carry], Array]:
    """Take one step of a stack, for streams, samplers and environments. Stepping through xs equals `unroll_stack`.

    Args:
      cell, params: as in `unroll_stack`; no layer is bidirectional.
      carries: one per layer; start with `[cell.initial_carry(layer, batch_shape) for layer in params]`.
      x: [*batch, input].
      mask: True where the step is real; elsewhere the carries are held and the output is 0.
      reset: True where the carries are replaced before the step.
      reset_carries: the carries after a reset, one per layer; default the cell's initial carry.
      noise: for a regularized cell, one per layer: the `noise` of its `Noisy` input, of this step. None: evaluation.

    Returns:
      A list of the carries after the step, one per layer, and the output of the last layer [*batch, hidden].

    Raises:
      TypeError, ValueError: as `unroll_stack`; TypeError for a bidirectional layer, which must see the future.

    >>> import jax, jaxlstm
    >>> layers = jaxlstm.init_stack(jax.random.key(0), jaxlstm.LSTM, 5, [7, 3])
    >>> carries = [jaxlstm.LSTM.initial_carry(layer, (2,)) for layer in layers]
    >>> carries, y = jaxlstm.step_stack(jaxlstm.LSTM, layers, carries, jax.numpy.ones((2, 5)))
    >>> y.shape
    (2, 3)
    """
    checked_layers(params)
    if carries is None:
        raise ArgumentTypeError("carries is None; pass [cell.initial_carry(layer, batch_shape) for layer in params].")
    params, carries, reset_carries, x = as_arrays(params=params, carries=carries, reset_carries=reset_carries, x=x)
    stepped = []
    each = _layers(params, carries=carries, reset_carries=reset_carries, noise=noise)
    for depth, (layer, carry, reset_carry, layer_noise) in enumerate(each):
        x = x if layer_noise is None else Noisy(x, layer_noise)
        with at(f"layer {depth}"):
            carry, x = _step_layer(cell, layer, carry, x, Options(mask, reset, reset_carry))
        stepped.append(carry)
    return stepped, x


def _step_layer(
    cell: Cell[Params, Carry], params: Params, carry: Carry | None, x: PyTree, options: Options
) -> tuple[Carry, Array]:
    """Take one step of one layer."""
    if isinstance(params, Bidirectional):
        raise ArgumentTypeError("a bidirectional layer has no step, because its backward half starts at the end.")
    if carry is None:
        raise ArgumentTypeError("carry is None; cell.initial_carry(params, batch_shape) makes one.")
    batch_shape = check_sequence(cell, params, as_sequence(x), carry, one_step=True)
    mask, reset = checked_flags(options.mask, options.reset, None, batch_shape)
    initial_carry = cell.initial_carry(params, batch_shape)
    reset_carry, _ = checked_reset_carry(cell, reset, options.reset_carry, initial_carry, None)
    x = zeros_where_masked(mask, x)
    now = Steps(x, mask, reset)
    start = start_of(now, carry, reset_carry)
    carry, y = cell.step(params, start, x)
    return hold(now, start, carry, y)


@border("generate")
def generate(
    step_fn: Callable[[State, Any, Key[Array, ""]], tuple[State, Any]],
    carry: State,
    x0: PyTree,
    key: Key[Array, ""],
    num_steps: int,
) -> tuple[State, PyTree]:
    """Let a model read its own outputs, x_{t+1} from step_fn(carry_t, x_t, key_t), as one scan.

    Args:
      step_fn: `(carry, x, key) -> (carry, x)`: reads one x and draws the next, of the same shape and dtype.
      carry: any pytree that it passes from step to step.
      x0: the first x it reads; [*batch, ...] for many sequences at once.
      key: a JAX key; step t gets `jax.random.fold_in(key, t)`, so a longer sequence begins like a shorter one.
      num_steps: how many to write.

    Returns:
      The carry after the last step, and the outputs [num_steps, *batch, ...], without x0. The last output has not been
      read yet: to continue, pass it as x0.

    Raises:
      TypeError: `key` is not a JAX key, or `step_fn` returns another structure, shape or dtype than it was given.
      ValueError: `num_steps` is negative.

    >>> import jax, jaxlstm
    >>> count = lambda carry, x, key: (carry, x + 1)
    >>> print(jaxlstm.generate(count, (), jax.numpy.array(7), jax.random.key(0), 3)[1])
    [ 8  9 10]
    """
    key = checked_key(key)
    check_function("step_fn", step_fn)
    step_fn = in_callback()(step_fn)
    check_count("num_steps", num_steps)
    carry, x0 = as_arrays(carry=carry, x0=x0)
    result = jax.eval_shape(step_fn, carry, x0, key)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ArgumentTypeError(f"step_fn must return (carry, x), got {kind_of(result)}.")
    for name, given, got in zip(("carry", "x"), (carry, x0), result, strict=True):
        if not alike(given, got):
            like, came = (f"{kind_of(tree)}: {describe(tree)}" for tree in (given, got))
            raise ArgumentTypeError(f"step_fn must return a {name} like the one it is given, {like}; got {came}.")

    def step(state: Any, t: Array) -> Any:
        state = step_fn(state[0], state[1], jax.random.fold_in(key, t))
        return state, state[1]

    (carry, _), xs = lax.scan(step, (carry, x0), jnp.arange(num_steps))
    return carry, xs
