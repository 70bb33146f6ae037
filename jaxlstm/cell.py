"""The recurrent cell: the contract that every cell keeps, and tools for any cell's parameters.

One step of a recurrent cell has three parts. Only the second both waits for the step before and costs a matmul:

    z_t = project(params, x_t)                              independent of the carry: all time steps in one matmul
    a_t = recur(params, carry_{t-1})                        the sequential matmul
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
    """Return z = x W_ih + b, for one step or for all steps."""
    z = matmul(xs, params.w_ih, params.b.dtype)
    return z + jnp.broadcast_to(params.b, z.shape)  # some programs forbid implicit rank promotion


def recur(params: Any, carry: Any) -> Float[Array, "*batch gates"]:
    """Return a = h W_hh: linear in the carry and in the weights."""
    return matmul(carry.h, params.w_hh, params.b.dtype)


def matmul(x: Float[Array, "*lead m"], w: Float[Array, "m n"], dtype: DTypeLike) -> Float[Array, "*lead n"]:
    """Return x w, summed in `dtype`: under `low_precision`, x and w have fewer digits than their sum."""
    return jnp.matmul(x, w, preferred_element_type=dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False)
class Cell(Generic[Params, Carry]):
    """Describe a recurrent cell by pure functions on plain pytrees.

    A cell holds no arrays. It is hashable and a pytree without leaves: it crosses `jit`, sits as a field in Flax and
    Equinox modules, and `jax.tree.map` passes over it. `params`, `carry`, `z` and `a` are any pytrees.

    Attributes:
      init: `(key, input_size, hidden_size, *, dtype=float32, ...) -> params`.
      initial_carry: `(params, batch_shape=()) -> carry`, its leaves [*batch, ...].
      gates: `(params, carry, z, a) -> (carry, y)`: the equations.
      project: `(params, xs) -> zs`, its leaves [..., features], for one step and for a whole sequence.
        Default `xs @ params.w_ih + params.b`.
      recur: `(params, carry) -> a`, linear in the carry and in the weights. Default `carry.h @ params.w_hh`.
        A cell without a recurrent matmul returns None.
      activations: `(params, carry, z, a) -> NamedTuple` of the gates' values, the same that `gates` computes; optional.
      gates_jvp: `(params, carry, activations) -> linear`, the derivative of `gates` in closed form; optional, faster.
        Only for a cell whose gates read z + a and no parameters. `linear(d_carry, d_z) -> (d_carry, d_y)`, where d_z is
        the tangent of z + a, is a `jax.tree_util.Partial` of arrays [*batch, ...]. Without it, JAX differentiates
        `gates`.
      name: what errors and tables call the cell.
    """

    init: Callable[..., Params]
    initial_carry: Callable[..., Carry]
    gates: Callable[[Params, Carry, Any, Any], tuple[Carry, Any]]
    project: Callable[[Params, Any], Any] = project
    recur: Callable[[Params, Carry], Any] = recur
    activations: Callable[[Params, Carry, Any, Any], Any] | None = None
    gates_jvp: Callable[[Params, Carry, Any], Any] | None = None
    name: str = dataclasses.field(default="cell", kw_only=True)

    def __post_init__(self) -> None:
        # Raise this here, where the cell is made, not later in the middle of a gradient.
        if self.recur is None:
            raise TypeError(f"Cell: {self.name} has recur=None; pass a function that returns None.")
        if self.gates_jvp is not None and self.activations is None:
            raise ValueError(f"Cell: {self.name} has gates_jvp, which needs activations as well.")

    def __repr__(self) -> str:
        return f"Cell({self.name})"

    def step(self, params: Params, carry: Carry, x: Any) -> tuple[Carry, Any]:
        """Take one step, as `lax.scan` or a sampler does.

        Args:
          params: the cell's parameters.
          carry: the carry before the step.
          x: [*batch, input].

        Returns:
          The carry after the step, and the output y [*batch, hidden].
        """
        z = self.project(params, x)
        a = self.recur(params, carry)
        return self.gates(params, carry, z, a)


def num_params(params: PyTree) -> int:
    """Count the parameters in a pytree.

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
    rows = [_summary_row(leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    rows.append(("total", "", "", f"{num_params(params):,}"))
    path_width, shape_width, dtype_width, count_width = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        f"{path:<{path_width}}  {shape:<{shape_width}}  {dtype:<{dtype_width}}  {count:>{count_width}}"
        for path, shape, dtype, count in rows
    )


def _summary_row(path: str, leaf: Any) -> tuple[str, str, str, str]:
    return path, str(list(jnp.shape(leaf))), str(jnp.result_type(leaf)), f"{math.prod(jnp.shape(leaf)):,}"


# Initialization, shared by all cells.


def glorot_orthogonal(
    key: Key[Array, ""], input_size: int, hidden_size: int, num_gates: int, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Draw w_ih Glorot-uniform and w_hh orthogonal, both gate by gate (Glorot & Bengio 2010; Saxe et al. 2014)."""
    # Gate by gate: over all gates at once, the fan-out of a Glorot draw would be too large, and w_hh not orthogonal.
    key_ih, key_hh = jax.random.split(key)
    glorot = jax.nn.initializers.glorot_uniform()
    w_ih = per_gate(glorot, key_ih, (input_size, hidden_size), num_gates, dtype)
    w_hh = per_gate(orthogonal, key_hh, (hidden_size, hidden_size), num_gates, dtype)
    return w_ih, w_hh


def orthogonal(key: Key[Array, ""], shape: Sequence[int], dtype: DTypeLike) -> Float[Array, "rows columns"]:
    """Draw as `jax.nn.initializers.orthogonal` does, under `vmap` one matrix after the other.

    Two batched QR factorizations in one program can wait for each other forever on a CPU (seen with jaxlib 0.10.2).
    """
    return jax.custom_batching.sequential_vmap(lambda key: jax.nn.initializers.orthogonal()(key, shape, dtype))(key)


def per_gate(
    initializer: Callable[..., Array], key: Key[Array, ""], shape: Sequence[int], num_gates: int, dtype: DTypeLike
) -> Float[Array, "rows gates_columns"]:
    """Draw one block per gate and lay the blocks side by side; in float32, so that every dtype gets the same draw."""
    blocks = [initializer(gate_key, shape, jnp.float32) for gate_key in jax.random.split(key, num_gates)]
    return jnp.concatenate(blocks, axis=-1).astype(dtype)


def leaf_path(path: Any) -> str:
    """Return a key path as people write it: `layers.0.w_ih`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
