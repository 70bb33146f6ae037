"""Record the gates of a recurrent net, measure how each carry depends on earlier ones, and truncate its gradient.

Most functions here run `unroll` on a modified copy of the cell; the cell itself stays unchanged. `options` are
arguments of `unroll`: mask, reset, reset_carry, reverse.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxlstm.cell import Cell, PyTree
from jaxlstm.checks import (
    ArgumentValueError,
    as_arrays,
    border,
    check_cell,
    check_count,
    check_function,
    check_number,
    check_sequence,
    in_callback,
)
from jaxlstm.lstm import LSTM, LSTMGates, LSTMParams, LSTMState
from jaxlstm.masks import where
from jaxlstm.recurrence import unroll
from jaxlstm.rtrl import cut_recurrence


class Trace(NamedTuple):
    """All steps of a recurrence: every leaf is [time, *batch, ...], and 0 at masked steps."""

    start: PyTree  # the carry that the step starts from: the carry before it, or the reset carry
    z: PyTree  # the input's part of the pre-activation
    a: PyTree  # the carry's part; None for a cell without a recurrent matmul
    gates: PyTree  # the values of the cell's `activations`
    carry: PyTree  # the carry after the step
    y: PyTree


@border("trace")
def trace(cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None = None, **options: Any) -> Trace:
    """Record every gate, pre-activation and carry of a sequence.

    Args:
      cell, params, xs, carry, options: as in `unroll`.

    Returns:
      A `Trace`. For an LSTM, the pre-activations are z + a, and the gates are an `LSTMGates(i, f, g, o)`.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if the cell has no `activations`.

    >>> import jax
    >>> from jaxlstm import LSTM
    >>> from jaxlstm.diagnostics import trace
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> trace(LSTM, params, jax.numpy.ones((11, 3, 5))).gates.f.shape
    (11, 3, 7)
    """
    check_cell(cell)
    if cell.activations is None:
        raise ArgumentValueError(f"{cell.name} does not name its gates; give the Cell `activations`.")
    return _record(cell, params, xs, carry, options)


def _record(cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None, options: dict[str, Any]) -> Trace:
    recorded: Any = unroll(_recording(cell), params, xs, carry, gradient="scan", **options)[1]
    return Trace(*recorded)


@functools.cache
def _recording(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Make the cell whose output is the record of its step."""

    def gates(params: PyTree, start: PyTree, z: PyTree, a: PyTree) -> tuple[PyTree, Trace]:
        carry, y = cell.gates(params, start, z, a)
        names = None if cell.activations is None else cell.activations(params, start, z, a)
        return carry, Trace(start, z, a, names, carry, y)

    return dataclasses.replace(cell, gates=gates, gates_jvp=None, activations=None)


@border("carry_jacobians")
def carry_jacobians(
    cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None = None, **options: Any
) -> Float[Array, "time *batch n n"]:
    """Return the Jacobian ∂carry_t / ∂carry_{t−1} of every step.

    The leaves of the carry are concatenated in their own order, for an LSTM h and then c: n = 2·hidden. The Jacobian
    is the identity at masked steps, and 0 where the carry is reset.

    Args:
      cell, params, xs, carry, options: as in `unroll`.

    Raises:
      TypeError, ValueError: as `unroll`.
    """
    check_cell(cell)
    starts = _record(cell, params, xs, carry, options).start
    one_carry = jax.eval_shape(cell.initial_carry, params)

    def jacobian(start: PyTree, x: PyTree) -> Array:
        flat, unravel = ravel_pytree(start)
        return jax.jacfwd(step_of_flat(cell, params, unravel, x))(flat)

    # Map over time and batch: the axes that the recorded carries have and a single carry does not.
    for _ in range(jax.tree.leaves(starts)[0].ndim - jax.tree.leaves(one_carry)[0].ndim):
        jacobian = jax.vmap(jacobian)
    jacobians = jacobian(starts, jax.tree.map(jnp.asarray, xs))
    mask, reset = options.get("mask"), options.get("reset")
    if mask is not None:
        jacobians = where(jnp.asarray(mask), jacobians, jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype))
    if reset is not None:
        jacobians = where(jnp.asarray(reset), jnp.zeros_like(jacobians), jacobians)
    return jacobians


def step_of_flat(
    cell: Cell[Any, Any], params: PyTree, unravel: Callable[[Array], PyTree], x: PyTree
) -> Callable[[Array], Array]:
    """Return one step as a function from carry to carry, both flat."""

    def step(flat: Array) -> Array:
        return ravel_pytree(cell.step(params, unravel(flat), x)[0])[0]

    return step


def jacobian_products(jacobians: Float[Array, "time *batch n n"]) -> Float[Array, "time *batch n n"]:
    """Return how the last carry depends on every earlier one: entry t is J_{T−1} ... J_t = ∂carry_{T−1} / ∂carry_{t−1}.

    The largest and the smallest singular value bound how much of a perturbation remains after T − t steps. Below about
    1e-300 (float64) they underflow to 0, where `lyapunov_exponents` are still accurate.

    Args:
      jacobians: from `carry_jacobians` without `reverse`.

    >>> import jax
    >>> from jaxlstm import LSTM
    >>> from jaxlstm.diagnostics import carry_jacobians, jacobian_products
    >>> params = LSTM.init(jax.random.key(0), 5, 7)
    >>> jacobians = carry_jacobians(LSTM, params, jax.numpy.ones((11, 3, 5)))
    >>> jax.numpy.linalg.svd(jacobian_products(jacobians), compute_uv=False).shape
    (11, 3, 14)
    """
    jacobians = jnp.asarray(jacobians)
    identity = jnp.broadcast_to(jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype), jacobians.shape[1:])

    def multiply(product: Array, jacobian: Array) -> tuple[Array, Array]:
        return (product @ jacobian,) * 2

    return lax.scan(multiply, identity, jacobians, reverse=True)[1]


@border("lyapunov_exponents")
def lyapunov_exponents(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    carry: PyTree | None = None,
    *,
    num_exponents: int = 1,
    num_warmup: int = 0,
) -> Float[Array, "*batch num_exponents"]:
    """Return the leading Lyapunov exponents: the mean growth of small perturbations of the carry, in nats per step.

    Each step multiplies the perturbations by its Jacobian and makes them orthonormal again (Benettin et al., Lyapunov
    characteristic exponents for smooth dynamical systems, 1980). If all exponents are below 0, all perturbations die
    out.

    Args:
      cell, params, xs, carry: as in `unroll`.
      num_exponents: number of exponents, largest first; at most the size of a carry.
      num_warmup: first steps to leave out of the mean, while the perturbations turn to the directions that grow most.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if the carry is smaller than `num_exponents`, or no step is left.
    """
    params, xs, carry = as_arrays(params=params, xs=xs, carry=carry)
    batch_shape = check_sequence(cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    carry = cell.initial_carry(params, batch_shape) if carry is None else carry
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.initial_carry, params)))
    if num_steps == 0:
        raise ArgumentValueError("xs must have at least one step, got none.")
    for name, value, low, high in (
        ("num_exponents", num_exponents, 1, size),
        ("num_warmup", num_warmup, 0, num_steps - 1),
    ):
        check_count(name, value, low, high)

    def of_one_sequence(carry: PyTree, xs: PyTree) -> Array:
        flat, unravel = ravel_pytree(carry)
        wide = jnp.float32 if flat.dtype.itemsize < 4 else flat.dtype  # JAX factors no bfloat16
        random = jax.random.normal(jax.random.key(0), (size, num_exponents), wide)

        def step(state: tuple[Array, Array], x: PyTree) -> tuple[tuple[Array, Array], Array]:
            flat, directions = state
            flat, push = jax.linearize(step_of_flat(cell, params, unravel, x), flat)
            directions, growth = jnp.linalg.qr(jax.vmap(push, 1, 1)(directions.astype(flat.dtype)).astype(wide))
            return (flat, directions), jnp.log(jnp.abs(jnp.diagonal(growth)))

        _, growths = lax.scan(step, (flat, jnp.linalg.qr(random)[0]), xs)
        return growths[num_warmup:].mean(axis=0)

    for _ in batch_shape:
        of_one_sequence = jax.vmap(of_one_sequence, (0, 1))
    return of_one_sequence(carry, xs)


class CellStateTerms(NamedTuple):
    """Four paths from c_{t−1} to c_t, each [time, *batch, hidden, hidden]: entry [j, k] is ∂c_t[j] / ∂c_{t−1}[k]."""

    carousel: Float[Array, "time *batch hidden hidden"]  # diag(f)
    forget_gate: Float[Array, "time *batch hidden hidden"]
    input_gate: Float[Array, "time *batch hidden hidden"]
    candidate: Float[Array, "time *batch hidden hidden"]


@border("cell_state_terms")
def cell_state_terms(params: LSTMParams, xs: Array, carry: LSTMState | None = None) -> CellStateTerms:
    """Return the four terms of ∂c_t / ∂c_{t−1} of an LSTM, with o_{t−1} held fixed.

    With h_{t−1} = o_{t−1} ⊙ tanh c_{t−1} and D = diag(o_{t−1} ⊙ (1 − tanh² c_{t−1})):

        diag(f)  +  diag(c_{t−1} ⊙ f(1−f)) W_fᵀ D  +  diag(g ⊙ i(1−i)) W_iᵀ D  +  diag(i ⊙ (1−g²)) W_gᵀ D

    At the first step only diag(f) remains, since h_0 does not depend on c_0. The product over steps is *not*
    ∂c_T/∂c_0: c also acts through o. Use `carry_jacobians` for products.

    Args:
      params, xs, carry: as in `unroll`, for the cell `LSTM`.

    Raises:
      TypeError, ValueError: as `unroll`.
    """
    recorded = trace(LSTM, params, xs, carry)
    i, f, g, o = recorded.gates
    c_prev, hidden = recorded.start.c, params.w_hh.shape[0]
    o_prev = jnp.concatenate([jnp.zeros_like(o[:1]), o[:-1]])
    d = o_prev * (1 - jnp.tanh(c_prev) ** 2)
    w = LSTMGates(*jnp.split(params.w_hh, 4, axis=-1))

    def through(by_gate: Array, w: Array) -> Array:
        return jnp.einsum("...j,kj,...k->...jk", by_gate, w, d)

    return CellStateTerms(
        carousel=jnp.einsum("...j,jk->...jk", f, jnp.eye(hidden, dtype=f.dtype)),
        forget_gate=through(c_prev * f * (1 - f), w.f),
        input_gate=through(g * i * (1 - i), w.i),
        candidate=through(i * (1 - g**2), w.g),
    )


def term_shares(terms: CellStateTerms) -> CellStateTerms:
    """Return the share of each of the four terms by its Frobenius norm: [time, *batch], with sum 1.

    The terms may cancel: the norm of their sum may be less than the sum of their norms.

    Args:
      terms: from `cell_state_terms`.
    """
    norms = CellStateTerms(*(jnp.linalg.norm(term, axis=(-2, -1)) for term in terms))
    return CellStateTerms(*(norm / sum(norms) for norm in norms))


@border("truncated_gradient")
def truncated_gradient(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    loss_fn: Callable[[Array], Array],
    carry: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """Return the gradient of 1997 with respect to the parameters: back along the carry, but not through `recur`.

    For an LSTM, every gate and the candidate treat h_{t−1} as a constant, so only c carries the gradient back in time
    (Hochreiter & Schmidhuber, Long short-term memory, 1997). `rtrl_gradient(cut_recurrence(cell), ...)` computes the
    same gradient forward in time, which is e-prop with true learning signals.

    Args:
      cell, params, xs, carry, options: as in `unroll`.
      loss_fn: a function of the outputs ys [time, *batch, hidden] that returns a number.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if `loss_fn` does not return a number.
    """
    check_cell(cell)

    check_function("loss_fn", loss_fn)
    (params,) = as_arrays(params=params)

    def loss(params: PyTree) -> Array:
        return in_callback()(loss_fn)(unroll(cut_recurrence(cell), params, xs, carry, **options)[1])

    check_number("loss_fn", jax.eval_shape(loss, params))
    return jax.grad(loss)(params)
