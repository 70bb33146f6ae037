"""Ways to differentiate a recurrence, as values for `gradient=`.

All of them are hashable, compare by their settings, and compute the same function. `Bulk` and `Scan` also compute the
same gradient, up to rounding; `Chunked` does unless it truncates.
"""

import dataclasses
from typing import Any, Literal

from jaxlstm.checks import ArgumentValueError, check_flag, check_size, shown


@dataclasses.dataclass(frozen=True)
class Bulk:
    """The library's own rule (see `jaxlstm/bulk.py`): only the linear recurrence is a loop, the rest is bulk matmuls.

    Attributes:
      block_size: steps differentiated at once. Default on a CPU: as many as fill about 3 MB of pre-activations, or
        about 1,000 rows in time and batch if that is more. On an accelerator or a mesh: the whole sequence if it takes
        at most 64 MB, else about an eighth of it. A size that you name also turns off the reshaping that makes a CPU
        faster, so name one only for a reason.
      keep_gates: keep the gates' values for the backward pass instead of computing them again, for cells with a
        closed-form `gates_jvp`. Default: never on an accelerator; on a CPU, if the pre-activations of all steps take at
        most 64 MB, or 256 MB in layers of 512 units or more.

    >>> import jaxlstm
    >>> jaxlstm.Bulk(block_size=10)
    Bulk(block_size=10, keep_gates=None)
    """

    block_size: int | None = None
    keep_gates: bool | None = None


@dataclasses.dataclass(frozen=True)
class Scan:
    """Plain backpropagation through time: JAX differentiates `lax.scan`.

    It adds to the weights' gradient at every step and keeps about 12 numbers per unit and step.
    """


@dataclasses.dataclass(frozen=True)
class Chunked:
    """Keep one carry per chunk of steps and run each chunk again in the backward pass.

    Chen et al., Training deep nets with sublinear memory cost, 2016. With `truncate`, this is truncated backpropagation
    through time (Williams & Peng, An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories, 1990): the carry passes from chunk to chunk, its gradient does not.

    Attributes:
      chunk_size: steps of one chunk; default near √T. If it does not divide T, the last chunk processed is shorter.
      truncate: stop the gradient where one chunk passes its carry to the next.
      within: how to differentiate each chunk.
    """

    chunk_size: int | None = None
    truncate: bool = False
    within: Bulk | Scan = Bulk()


# Strings stand for the values people use most, and keep calls short.
Gradient = Bulk | Scan | Chunked
GradientOrName = Gradient | Literal["bulk", "scan"]
NAMED: dict[str, Gradient] = {"bulk": Bulk(), "scan": Scan()}


def checked_gradient(gradient: Any) -> Gradient:
    """Turn the `gradient` argument, a value or a name, into a checked `Bulk`, `Scan` or `Chunked`.

    Raises:
      ValueError: it is another value, or a size in it is not a positive integer.
    """
    named = NAMED.get(gradient) if isinstance(gradient, str) else gradient
    if not isinstance(named, Gradient):
        raise ArgumentValueError(
            f'gradient must be Bulk(), Scan(), Chunked(), "bulk" or "scan", got {shown(gradient)}.'
        )
    inner = named
    if isinstance(named, Chunked):
        check_size("chunk_size", named.chunk_size)
        inner = named.within
        check_flag("truncate", named.truncate)
        if not isinstance(inner, Bulk | Scan):
            raise ArgumentValueError(f"gradient: within must be Bulk() or Scan(), got {shown(inner)}.")
    if isinstance(inner, Bulk):
        check_size("block_size", inner.block_size)
        if inner.keep_gates is not None:
            check_flag("keep_gates", inner.keep_gates)
    return named
