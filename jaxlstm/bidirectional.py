"""Both directions: one cell reads a sequence forward, another reads it backward."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import ArgumentTypeError, at, border, check_cell, check_function, checked_key
from jaxlstm.gradients import GradientOrName
from jaxlstm.masks import where
from jaxlstm.recurrence import Options, run_sequence
from jaxlstm.regularize import Noisy

Params = TypeVar("Params")
Carry = TypeVar("Carry")
Half = TypeVar("Half")


class Bidirectional(NamedTuple, Generic[Half]):
    """One value per direction: parameters, carries, noise."""

    forward: Half
    backward: Half


Merge = Callable[[Array, Array], Array]


def concatenate(forward: Float[Array, "*lead m"], backward: Float[Array, "*lead n"]) -> Float[Array, "*lead m+n"]:
    """Put the outputs of both directions side by side: the default merge."""
    return jnp.concatenate([forward, backward], axis=-1)


@border("init_bidirectional")
def init_bidirectional(
    key: Key[Array, ""], cell: Cell[Params, Any], input_size: int, hidden_size: int, **options: Any
) -> Bidirectional[Params]:
    """Draw the parameters of both directions of a layer; `options` go to `cell.init`.

    `hidden_size` is the units of each direction, so by default the layer outputs 2·hidden_size features.

    Raises:
      TypeError, ValueError: as `cell.init`.
    """
    check_cell(cell)
    key = checked_key(key)
    keys = jax.random.split(key)
    return Bidirectional(*(cell.init(key, input_size, hidden_size, **options) for key in keys))


@border("unroll_bidirectional")
def unroll_bidirectional(
    cell: Cell[Params, Carry],
    params: Bidirectional[Params],
    xs: PyTree,
    carry: Bidirectional[Carry] | None = None,
    *,
    mask: Bool[Array, "time *batch"] | None = None,
    reset: Bool[Array, "time *batch"] | None = None,
    reset_carry: Bidirectional[Carry] | None = None,
    merge: Merge = concatenate,
    gradient: GradientOrName = "bulk",
) -> tuple[Bidirectional[Carry], Array]:
    """Run a cell over a sequence in both directions (Schuster & Paliwal 1997; Graves & Schmidhuber 2005).

    The backward half starts at each item's own last real step, because masked steps hold its carry. Nothing is flipped.

    Args:
      cell: a `Cell`, such as `LSTM`.
      params: of both directions, from `init_bidirectional`.
      xs: [time, *batch, input].
      carry: of both directions; the backward half enters the last step with its carry.
      mask: True where a step is real.
      reset: True where a new segment starts, as in `unroll`. The backward half is reset at the step before, the last of
        its segment; a reset at step 0 affects the forward half only.
      reset_carry: of both directions; if the backward half has one per step, it takes the one at the last step of each
        segment, which it enters first.
      merge: (forward, backward) -> ys, on outputs [time, *batch, hidden]; default side by side.
      gradient: how to differentiate, as in `unroll`.

    Returns:
      The carries after the last step forward and after step 0 backward, and the merged outputs, 0 where masked.

    Raises:
      TypeError, ValueError: as `unroll`; TypeError if params, carry or reset_carry is not a `Bidirectional`.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.init_bidirectional(jax.random.key(0), jaxlstm.LSTM, 5, 7)
    >>> carry, ys = jaxlstm.unroll_bidirectional(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)))
    >>> ys.shape, carry.backward.c.shape
    ((11, 3, 14), (3, 7))
    """
    _check_pair("params", params)
    check_function("merge", merge)
    return run_layer(cell, params, xs, carry, Options(mask, reset, reset_carry, gradient=gradient), merge=merge)


def run_layer(
    cell: Cell[Any, Any],
    params: Any,
    xs: PyTree,
    carry: Any,
    options: Options,
    *,
    merge: Merge,
    noise: Any = None,
) -> tuple[Any, Array]:
    """Run one layer, in one direction or in both, as its parameters say."""
    if not isinstance(params, Bidirectional):
        return run_sequence(cell, params, _noisy(xs, noise), carry, options)

    def half(direction: str, options: Options) -> tuple[Any, Array]:
        with at(direction):
            own_params, own_noise, own_carry, own_reset_carry = (getattr(pair, direction) for pair in pairs)
            own_options = options._replace(reset_carry=own_reset_carry)
            return run_sequence(cell, own_params, _noisy(xs, own_noise), own_carry, own_options)

    # Absent pairs become pairs of None, so that both halves are run alike.
    named = {"noise": noise, "carry": carry, "reset_carry": options.reset_carry}
    pairs = (params, *(_checked_pair(name, pair) for name, pair in named.items()))
    forward_carry, forward_ys = half("forward", options)
    # Backward in time, a segment is entered at its last step.
    reset = None if options.reset is None else _last_of_segments(jnp.asarray(options.reset))
    backward_carry, backward_ys = half("backward", options._replace(reset=reset, reverse=True))
    ys = merge(forward_ys, backward_ys)
    if options.mask is not None and merge is not concatenate:
        ys = where(jnp.asarray(options.mask), ys, jnp.zeros_like(ys))  # a merge may make something of two zeros
    return Bidirectional(forward_carry, backward_carry), ys


def _noisy(xs: PyTree, noise: Any) -> PyTree:
    return xs if noise is None else Noisy(xs, noise)


def _last_of_segments(reset: Bool[Array, "time *batch"]) -> Bool[Array, "time *batch"]:
    """Mark the last steps of segments, given the first ones."""
    return jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])


def _check_pair(name: str, pair: Any) -> None:
    if not isinstance(pair, Bidirectional):
        raise ArgumentTypeError(f"{name} must be Bidirectional(forward, backward), got {type(pair).__name__}.")


def _checked_pair(name: str, pair: Any) -> Bidirectional[Any]:
    if pair is None:
        return Bidirectional(None, None)
    _check_pair(name, pair)
    return pair
