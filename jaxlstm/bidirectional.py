"""Both directions: a cell that reads a sequence forward, and another that reads it backward."""

from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import check_cell, check_key
from jaxlstm.derivative import where
from jaxlstm.recurrence import run_sequence
from jaxlstm.regularize import Noisy

Params = TypeVar("Params")
Carry = TypeVar("Carry")
Half = TypeVar("Half")


class Bidirectional(NamedTuple, Generic[Half]):
    """One thing per direction: parameters, carries, noise."""

    forward: Half
    backward: Half


Merge = Callable[[Array, Array], Array]


def concatenate(forward: Float[Array, "*lead m"], backward: Float[Array, "*lead n"]) -> Float[Array, "*lead m+n"]:
    """Put the outputs of both directions side by side: the default merge."""
    return jnp.concatenate([forward, backward], axis=-1)


def init_bidirectional(
    key: Key[Array, ""], cell: Cell[Params, Any], input_size: int, hidden_size: int, **options: Any
) -> Bidirectional[Params]:
    """Draw the parameters of both directions of a layer; `options` go to `cell.init`.

    Raises:
      TypeError, ValueError: as `cell.init`.
    """
    check_cell("init_bidirectional", cell)
    check_key("init_bidirectional", key)
    keys = jax.random.split(key)
    return Bidirectional(*(cell.init(key, input_size, hidden_size, **options) for key in keys))


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
    gradient: Literal["bulk", "scan"] = "bulk",
    block_size: int | None = None,
    compute_dtype: DTypeLike | None = None,
) -> tuple[Bidirectional[Carry], Array]:
    """Run a cell over a sequence in both directions (Schuster & Paliwal 1997; Graves & Schmidhuber 2005).

    The backward half starts at each item's own last real step, since masked steps hold its carry: nothing is flipped.

    Args:
      cell: a `Cell`, such as `LSTM`.
      params: of both directions, from `init_bidirectional`.
      xs: [time, *batch, input].
      carry: of both directions, the backward one that before the last step.
      mask: True where a step is real.
      reset: True where a new segment starts, as for `unroll`. The backward half is reset at the step before, which is
        the last of its segment; a reset at step 0 is the forward half's alone.
      reset_carry: of both directions; those of the backward half, if one per step, by the step at which it is reset.
      merge: (forward, backward) -> ys, on outputs [time, *batch, hidden]; default side by side.
      gradient, block_size, compute_dtype: as in `unroll`.

    Returns:
      The carries after the last step forward and after step 0 backward, and the merged outputs, 0 where masked.

    Raises:
      TypeError, ValueError: as `unroll`; TypeError if params, carry or reset_carry is no `Bidirectional`.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.init_bidirectional(jax.random.key(0), jaxlstm.LSTM, 5, 7)
    >>> carry, ys = jaxlstm.unroll_bidirectional(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)))
    >>> ys.shape, carry.backward.c.shape
    ((11, 3, 14), (3, 7))
    """
    return unroll_layer(
        "unroll_bidirectional",
        cell,
        _pair("unroll_bidirectional", "params", params),
        xs,
        carry,
        reset_carry,
        merge,
        mask=mask,
        reset=reset,
        gradient=gradient,
        block_size=block_size,
        compute_dtype=compute_dtype,
    )


def unroll_layer(
    function: str,
    cell: Cell[Any, Any],
    params: Any,
    xs: PyTree,
    carry: Any,
    reset_carry: Any,
    merge: Merge,
    *,
    mask: Any,
    reset: Any,
    noise: Any = None,
    **options: Any,
) -> tuple[Any, Array]:
    """Run one layer, of one direction or two."""
    noisy = lambda noise: xs if noise is None else Noisy(xs, noise)
    if not isinstance(params, Bidirectional):
        return run_sequence(
            function, cell, params, noisy(noise), carry, mask=mask, reset=reset, reset_carry=reset_carry, **options
        )

    def half(direction: str, reset: Any) -> tuple[Any, Array]:
        own, own_noise, own_carry, own_reset_carry = (
            getattr(pair, direction) for pair in (params, noises, carries, reset_carries)
        )
        return run_sequence(
            f"{function}, {direction}",
            cell,
            own,
            noisy(own_noise),
            own_carry,
            mask=mask,
            reset=reset,
            reset_carry=own_reset_carry,
            reverse=direction == "backward",
            **options,
        )

    noises = _pair(function, "noise", noise)
    carries = _pair(function, "carry", carry)
    reset_carries = _pair(function, "reset_carry", reset_carry)
    forward_carry, forward_ys = half("forward", reset)
    backward_carry, backward_ys = half("backward", None if reset is None else _last_of_segments(jnp.asarray(reset)))
    ys = merge(forward_ys, backward_ys)
    if mask is not None and merge is not concatenate:
        ys = where(jnp.asarray(mask), ys, jnp.zeros_like(ys))
    return Bidirectional(forward_carry, backward_carry), ys


def _last_of_segments(reset: Bool[Array, "time *batch"]) -> Bool[Array, "time *batch"]:
    """Mark the last steps of segments by their first ones."""
    return jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])


def _pair(function: str, name: str, pair: Any) -> Bidirectional[Any]:
    if pair is None:
        return Bidirectional(None, None)
    if not isinstance(pair, Bidirectional):
        raise TypeError(f"{function}: {name} must be Bidirectional(forward, backward), got {type(pair).__name__}.")
    return pair
