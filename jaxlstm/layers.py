"""Stacks of any cell, in one direction or both, with dropout between layers; one step of a stack; generation.

A stack is a list, and a layer in it is what it has for parameters: the cell's own, or `Bidirectional` pairs of them.
Its carries are a list alike. So the pytree is the model: cut it, reverse it, put a layer of your own between two.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Key

from jaxlstm.bidirectional import Bidirectional, Merge, concatenate, init_bidirectional, unroll_layer
from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import (
    alike,
    check_carry,
    check_cell,
    check_compute_dtype,
    check_init,
    check_key,
    check_num_steps,
    check_sequence,
    checked_flags,
    checked_rate,
    describe,
    kind_of,
)
from jaxlstm.derivative import Steps, hold, start_of, where
from jaxlstm.precision import in_compute_dtype
from jaxlstm.regularize import Noisy, draw_mask

Params = TypeVar("Params")
Carry = TypeVar("Carry")
State = TypeVar("State")


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
    """Draw the parameters of layers that stand one upon another.

    Args:
      key: a typed key.
      cell: a `Cell`, such as `LSTM`.
      input_size: features of the input of the first layer.
      hidden_sizes: units of each layer.
      bidirectional: every layer runs in both directions.
      merge: as in `unroll_stack`; it decides how many features the next layer reads.
      **options: go to `cell.init`, such as `dtype`; another initialiser is
        `dataclasses.replace(LSTM, init=init_torch)`.

    Returns:
      A list of each layer's parameters, or of `Bidirectional` pairs of them.

    Raises:
      TypeError: `key` is no typed key, or `hidden_sizes` are no sequence.
      ValueError: a size is no positive integer.

    >>> import jax, jaxlstm
    >>> layers = jaxlstm.init_stack(jax.random.key(0), jaxlstm.LSTM, 5, [7, 3], bidirectional=True)
    >>> layers[1].backward.w_ih.shape
    (14, 12)
    """
    check_cell("init_stack", cell)
    if not hasattr(hidden_sizes, "__len__"):
        raise TypeError(f"init_stack: hidden_sizes must be a sequence, one size a layer, got {hidden_sizes!r}.")
    for hidden_size in (1, *hidden_sizes):  # the key and the input size, also where there is no layer
        check_init("init_stack", key, input_size, hidden_size, jnp.float32)
    layers: list[Any] = []
    for layer_key, hidden_size in zip(jax.random.split(key, len(hidden_sizes)), hidden_sizes, strict=True):
        init = init_bidirectional if bidirectional else _init_layer
        layers.append(init(layer_key, cell, input_size, hidden_size, **options))
        input_size = _output_size(cell, layers[-1], input_size, merge)
    return layers


def _init_layer(key: Any, cell: Cell[Params, Any], input_size: int, hidden_size: int, **options: Any) -> Params:
    return cell.init(key, input_size, hidden_size, **options)


def _output_size(cell: Cell[Any, Any], layer: Any, input_size: int, merge: Merge) -> int:
    """Return the number of features that a layer puts out; for all a stack knows, that is not its hidden size."""

    def step(params: Any) -> Array:
        x = jnp.zeros(input_size, jax.tree.leaves(params)[0].dtype)
        return cell.step(params, cell.initial_carry(params), x)[1]

    def outputs(layer: Any) -> Array:
        return merge(*map(step, layer)) if isinstance(layer, Bidirectional) else step(layer)

    return int(jax.eval_shape(outputs, layer).shape[-1])


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
    gradient: Literal["bulk", "scan"] = "bulk",
    block_size: int | None = None,
    compute_dtype: DTypeLike | None = None,
) -> tuple[list[Any], Array]:
    """Run layers one upon another over a sequence; each reads the outputs of the one below.

    Args:
      cell: a `Cell`, such as `LSTM`.
      params: one entry a layer, from `init_stack`: the cell's parameters, or `Bidirectional` ones.
      xs: [time, *batch, input].
      carries: one a layer, `Bidirectional` where the layer is; default the cell's initial carry.
      mask: True where a step is real, in every layer.
      reset: True where a new segment or episode starts, in every layer.
      reset_carries: what a reset puts in place of the carries, one a layer; default the cell's initial carry.
      dropout: rate at which outputs of a layer are dropped before the next one reads them, anew at every step; not
        before the first layer nor after the last (Zaremba, Sutskever & Vinyals, Recurrent neural network
        regularization, 2014). 0: evaluation.
      key: for dropout; a layer draws with `jax.random.fold_in(key, layer)`.
      noise: for a regularised cell, one a layer: what `Noisy` has beside x. None: evaluation.
      merge: of the outputs of both directions.
      gradient, block_size, compute_dtype: as in `unroll`.

    Returns:
      A list of the carries after the sequence, one a layer, and the outputs of the last layer.

    Raises:
      TypeError: `params` are no list of layers; else as `unroll`, the layer named.
      ValueError: there are not as many carries as layers, `dropout` lies outside [0, 1), or it lacks a key.

    >>> import jax, jaxlstm
    >>> layers = jaxlstm.init_stack(jax.random.key(0), jaxlstm.LSTM, 5, [7, 3])
    >>> carries, ys = jaxlstm.unroll_stack(jaxlstm.LSTM, layers, jax.numpy.ones((11, 2, 5)))
    >>> ys.shape, carries[0].c.shape
    ((11, 2, 3), (2, 7))
    """
    function = "unroll_stack"
    num_layers = _checked_layers(function, params)
    dropout = checked_rate(function, "dropout", dropout)
    if isinstance(xs, Noisy) and num_layers > 1:
        raise ValueError(
            f"{function}: xs is Noisy, which the first layer alone would take; pass noise=[...], one a layer."
        )
    drops = num_layers > 1 and not (isinstance(dropout, float) and dropout == 0)
    if drops:
        if key is None:
            raise ValueError(f"{function}: dropout={dropout!r} needs a key; pass key=..., or dropout=0 for evaluation.")
        check_key(function, key)
    each = zip(
        params,
        _one_a_layer(function, "carries", carries, num_layers),
        _one_a_layer(function, "reset_carries", reset_carries, num_layers),
        _one_a_layer(function, "noise", noise, num_layers),
        strict=True,
    )
    last_carries = []
    for depth, (layer, carry, reset_carry, layer_noise) in enumerate(each):
        if depth and drops:
            xs = _drop(key, dropout, xs, depth)
        carry, xs = unroll_layer(
            f"{function}, layer {depth}",
            cell,
            layer,
            xs,
            carry,
            reset_carry,
            merge,
            noise=layer_noise,
            mask=mask,
            reset=reset,
            gradient=gradient,
            block_size=block_size,
            compute_dtype=compute_dtype,
        )
        last_carries.append(carry)
    return last_carries, xs


def _drop(key: Any, rate: float, xs: Array, depth: int) -> Array:
    return xs * draw_mask("unroll_stack", jax.random.fold_in(key, depth), rate, xs.shape, xs.dtype)


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
    compute_dtype: DTypeLike | None = None,
) -> tuple[list[Carry], Array]:
    """Take one step of a stack: what a stream, a sampler or an environment calls. Steps equal `unroll_stack`.

    Args:
      cell, params: as in `unroll_stack`; no layer is bidirectional.
      carries: one a layer; `[cell.initial_carry(layer, batch_shape) for layer in params]` to start with.
      x: [*batch, input].
      mask: True where the step is real; elsewhere the carries are held and the output is 0.
      reset: True where the carries are replaced before the step.
      reset_carries: by what, one a layer; default the cell's initial carry.
      noise: for a regularised cell, one a layer: what `Noisy` has beside x, of this step. None: evaluation.
      compute_dtype: as in `unroll`.

    Returns:
      A list of the carries after the step, one a layer, and the output of the last layer [*batch, hidden].

    Raises:
      TypeError, ValueError: as `unroll_stack`; TypeError for a bidirectional layer, which must see the future.

    >>> import jax, jaxlstm
    >>> layers = jaxlstm.init_stack(jax.random.key(0), jaxlstm.LSTM, 5, [7, 3])
    >>> carries = [jaxlstm.LSTM.initial_carry(layer, (2,)) for layer in layers]
    >>> carries, y = jaxlstm.step_stack(jaxlstm.LSTM, layers, carries, jax.numpy.ones((2, 5)))
    >>> y.shape
    (2, 3)
    """
    function = "step_stack"
    num_layers = _checked_layers(function, params)
    if carries is None:
        raise TypeError(f"{function}: carries must be a list with one entry a layer, such as cell.initial_carry makes.")
    carries, reset_carries, x = jax.tree.map(jnp.asarray, (carries, reset_carries, x))
    each = zip(
        params,
        _one_a_layer(function, "carries", carries, num_layers),
        _one_a_layer(function, "reset_carries", reset_carries, num_layers),
        _one_a_layer(function, "noise", noise, num_layers),
        strict=True,
    )
    stepped = []
    for depth, (layer, carry, reset_carry, layer_noise) in enumerate(each):
        x = x if layer_noise is None else Noisy(x, layer_noise)
        carry, x = _step_layer(
            f"{function}, layer {depth}", cell, layer, carry, x, mask, reset, reset_carry, compute_dtype
        )
        stepped.append(carry)
    return stepped, x


def _step_layer(
    function: str,
    cell: Cell[Params, Carry],
    params: Params,
    carry: Carry | None,
    x: PyTree,
    mask: Any,
    reset: Any,
    reset_carry: Carry | None,
    compute_dtype: DTypeLike | None,
) -> tuple[Carry, Array]:
    """Take one step of one layer."""
    if isinstance(params, Bidirectional):
        raise TypeError(f"{function}: a bidirectional layer has no step, its backward half starts at the end.")
    if carry is None:
        raise TypeError(f"{function}: carry is None; {cell.name}.initial_carry(params, batch_shape) makes one.")
    if reset_carry is not None and reset is None:
        raise ValueError(f"{function}: reset_carry is given without reset, which says where it applies.")
    batch_shape = check_sequence(function, cell, params, jax.tree.map(_as_sequence, x), carry, one_step=True)
    mask, reset = checked_flags(function, mask, reset, None, batch_shape)
    initial_carry = cell.initial_carry(params, batch_shape)
    if reset_carry is not None:
        check_carry(function, "reset_carry", cell, reset_carry, initial_carry)
    if compute_dtype is not None:
        check_compute_dtype(function, compute_dtype)
        cell = in_compute_dtype(cell, jnp.dtype(compute_dtype))
    if mask is not None:
        x = jax.tree.map(lambda v: where(mask, v, jnp.zeros_like(v)), x)
    now = Steps(x, mask, reset)
    start = start_of(now, carry, initial_carry if reset_carry is None else reset_carry)
    carry, y = cell.step(params, start, x)
    return hold(now, start, carry, y)


def _as_sequence(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *x.shape), x.dtype)


def generate(
    step_fn: Callable[[State, Any, Key[Array, ""]], tuple[State, Any]],
    carry: State,
    x0: PyTree,
    key: Key[Array, ""],
    num_steps: int,
) -> tuple[State, PyTree]:
    """Let a model read what it wrote: x_{t+1} by step_fn(carry_t, x_t, key_t), as one scan.

    Args:
      step_fn: `(carry, x, key) -> (carry, x)`: reads one x, draws the next, which has its shape and dtype.
      carry: whatever it hands from step to step.
      x0: what it reads first; [*batch, ...] for many sequences at once.
      key: a typed key; step t has `jax.random.fold_in(key, t)`, so a longer sequence begins like a shorter one.
      num_steps: how many to write.

    Returns:
      The carry after the last step, and what was written, [num_steps, *batch, ...], x0 not among it. The last of it has
      been written and not read: to go on, pass it as x0.

    Raises:
      TypeError: `key` is no typed key, or what `step_fn` returns is not like what it was given.
      ValueError: `num_steps` is negative.

    >>> import jax, jaxlstm
    >>> count = lambda carry, x, key: (carry, x + 1)
    >>> print(jaxlstm.generate(count, (), jax.numpy.array(7), jax.random.key(0), 3)[1])
    [ 8  9 10]
    """
    check_key("generate", key)
    check_num_steps("generate", num_steps)
    carry, x0 = jax.tree.map(jnp.asarray, (carry, x0))
    for name, given, got in zip(("carry", "x"), (carry, x0), jax.eval_shape(step_fn, carry, x0, key), strict=True):
        if not alike(given, got):
            like, came = (f"{kind_of(tree)}: {describe(tree)}" for tree in (given, got))
            raise TypeError(f"generate: step_fn must return a {name} like the one it is given, {like}; got {came}.")

    def step(state: Any, t: Array) -> Any:
        state = step_fn(state[0], state[1], jax.random.fold_in(key, t))
        return state, state[1]

    (carry, _), xs = lax.scan(step, (carry, x0), jnp.arange(num_steps))
    return carry, xs


# What a stack is given, one entry a layer.


def _checked_layers(function: str, params: Any) -> int:
    if not isinstance(params, list | tuple) or hasattr(params, "_fields"):
        raise TypeError(
            f"{function}: params must be a list with one entry a layer, from init_stack, got {type(params).__name__}."
        )
    return len(params)


def _one_a_layer(function: str, name: str, entries: Any, num_layers: int) -> Sequence[Any]:
    if entries is None:
        return [None] * num_layers
    if not isinstance(entries, list | tuple) or hasattr(entries, "_fields"):
        raise TypeError(f"{function}: {name} must be a list with one entry a layer, got {type(entries).__name__}.")
    if len(entries) != num_layers:
        raise ValueError(f"{function}: params have {num_layers} layers, {name} {len(entries)}.")
    return entries
