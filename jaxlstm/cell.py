"""The recurrent cell: the contract every cell keeps, and what can be said of any cell's parameters.

One step of a recurrent cell has three parts, and only the middle one is sequential work that costs:

    z_t = project(params, x_t)                              needs no carry: may be had for all t at once
    a_t = recur(params, carry_{t-1})                        the matmul that has to wait for the step before
    (carry_t, y_t) = gates(params, carry_{t-1}, z_t, a_t)   element-wise; this is where cells differ
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

Params = TypeVar("Params")
Carry = TypeVar("Carry")
PyTree = Any


def project(params: Any, xs: Float[Array, "*time_batch input"]) -> Float[Array, "*time_batch gates"]:
    """Return z = x W_ih + b, for one step or for all steps at once."""
    return matmul(xs, params.w_ih, params.b.dtype) + params.b


def recur(params: Any, carry: Any) -> Float[Array, "*batch gates"]:
    """Return a = h W_hh: linear in the carry and in the weights."""
    return matmul(carry.h, params.w_hh, params.b.dtype)


def matmul(x: Float[Array, "*lead m"], w: Float[Array, "m n"], dtype: DTypeLike) -> Float[Array, "*lead n"]:
    """Return x w summed in the dtype named: with `compute_dtype`, x and w have fewer digits than their sum."""
    return jnp.matmul(x, w, preferred_element_type=dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Cell(Generic[Params, Carry]):
    """Describe a recurrent cell by pure functions on plain pytrees.

    A cell holds no arrays: it is hashable and a pytree without leaves, so it crosses `jit`, sits as a field in Flax and
    Equinox modules, and `jax.tree.map` passes over it. `params`, `carry`, `z` and `a` are any pytrees.

    Attributes:
      init: `(key, input_size, hidden_size, *, dtype=float32, ...) -> params`.
      initial_carry: `(params, batch_shape=()) -> carry`, its leaves [*batch, ...].
      gates: `(params, carry, z, a) -> (carry, y)`: the equations.
      project: `(params, xs) -> zs`, its leaves [..., features], for one step and for a sequence alike.
        Default `xs @ params.w_ih + params.b`.
      recur: `(params, carry) -> a`, linear in the carry and in the weights. Default `carry.h @ params.w_hh`;
        `None` for a cell whose gates do not see h through a matmul.
      activations: `(params, carry, z, a) -> NamedTuple` of the gates' values; `gates` calls it; optional.
      gates_jvp: `(params, carry, activations) -> linear`, the linearisation of `gates` in closed form, for a cell whose
        gates read z and a by their sum and no parameters: `linear(d_carry, d_z) -> (d_carry, d_y)`, with d_z for the
        sum, is a `jax.tree_util.Partial` of arrays [*batch, ...]. `gradient="bulk"` finds its own where there is none.
      name: what errors and tables call the cell.
    """

    init: Callable[..., Params]
    initial_carry: Callable[..., Carry]
    gates: Callable[[Params, Carry, Any, Any], tuple[Carry, Any]]
    project: Callable[[Params, Any], Any] = project
    recur: Callable[[Params, Carry], Any] | None = recur
    activations: Callable[[Params, Carry, Any, Any], Any] | None = None
    gates_jvp: Callable[[Params, Carry, Any], Any] | None = None
    name: str = dataclasses.field(default="cell", kw_only=True)

    def __repr__(self) -> str:
        return f"Cell({self.name})"

    def step(self, params: Params, carry: Carry, x: Any) -> tuple[Carry, Any]:
        """Take one step: what `lax.scan` or a sampler calls.

        Args:
          params: the cell's parameters.
          carry: the carry before the step.
          x: [*batch, input], the input of the step.

        Returns:
          The carry after the step, and the step's output y [*batch, hidden].
        """
        z = self.project(params, x)
        a = None if self.recur is None else self.recur(params, carry)
        return self.gates(params, carry, z, a)


def num_params(params: PyTree) -> int:
    """Count the numbers in a pytree of parameters.

    >>> import jax, jaxlstm
    >>> jaxlstm.num_params(jaxlstm.LSTM.init(jax.random.key(0), 80, 12))   # 4·(80·12 + 12·12 + 12)
    4464
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


def summary(params: PyTree) -> str:
    """Return a table of a pytree of parameters: path, shape, dtype and count of every leaf, and the total.

    >>> import jax, jaxlstm
    >>> print(jaxlstm.summary(jaxlstm.LSTM.init(jax.random.key(0), 80, 12)))
    w_ih   [80, 48]  float32  3,840
    w_hh   [12, 48]  float32    576
    b      [48]      float32     48
    total                     4,464
    """
    rows = [
        (leaf_path(path), str(list(jnp.shape(leaf))), str(jnp.result_type(leaf)), f"{math.prod(jnp.shape(leaf)):,}")
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
    rows.append(("total", "", "", f"{num_params(params):,}"))
    path_width, shape_width, dtype_width, count_width = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        f"{path:<{path_width}}  {shape:<{shape_width}}  {dtype:<{dtype_width}}  {count:>{count_width}}"
        for path, shape, dtype, count in rows
    )


# Initialisation, shared by the cells.


def glorot_orthogonal(
    key: Key[Array, ""], input_size: int, hidden_size: int, num_gates: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Draw w_ih Glorot-uniform and w_hh orthogonal, both gate by gate (Glorot & Bengio 2010; Saxe et al. 2014)."""
    key_ih, key_hh = jax.random.split(key)
    glorot, orthogonal = jax.nn.initializers.glorot_uniform(), jax.nn.initializers.orthogonal()
    w_ih = per_gate(glorot, key_ih, (input_size, hidden_size), num_gates, dtype)
    w_hh = per_gate(orthogonal, key_hh, (hidden_size, hidden_size), num_gates, dtype)
    return w_ih, w_hh


def per_gate(
    initializer: Callable[..., Array], key: Key[Array, ""], shape: Sequence[int], num_gates: int, dtype: DTypeLike
) -> Float[Array, "rows gates_columns"]:
    """Draw one block per gate and lay them side by side; made in float32, so every dtype starts from the same draw."""
    blocks = [initializer(gate_key, shape, jnp.float32) for gate_key in jax.random.split(key, num_gates)]
    return jnp.concatenate(blocks, axis=-1).astype(dtype)


def leaf_path(path: Any) -> str:
    """Return a key path as a person writes it: `layers.0.w_ih`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
