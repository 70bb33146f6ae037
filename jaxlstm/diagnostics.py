"""Look inside a recurrent net: its gates, how a carry depends on the one before, and the gradient of 1997.

Everything here runs `unroll` on a cell that has something added, and leaves the cell itself as it is. `options` are
`unroll`'s own: mask, reset, reset_carry, reverse.
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
from jaxlstm.checks import check_number, check_sequence
from jaxlstm.derivative import where
from jaxlstm.lstm import LSTM, LSTMGates, LSTMParams, LSTMState
from jaxlstm.recurrence import unroll
from jaxlstm.rtrl import cut_recurrence


class Trace(NamedTuple):
    """Every step of a recurrence: all leaves [time, *batch, ...], and 0 at masked steps."""

    start: PyTree  # the carry the step starts from: the one before it, or what a reset puts in its place
    z: PyTree  # the input's part of the pre-activation
    a: PyTree  # the carry's part; None for a cell without `recur`
    gates: PyTree  # what the cell's `activations` names
    carry: PyTree  # the carry after the step
    y: PyTree


def trace(cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None = None, **options: Any) -> Trace:
    """Record every gate, pre-activation and carry of a sequence.

    Args:
      cell, params, xs, carry, options: as in `unroll`.

    Returns:
      A `Trace`; for an LSTM its pre-activations are z + a, and its gates an `LSTMGates(i, f, g, o)`.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if the cell has no `activations`.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> jaxlstm.trace(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5))).gates.f.shape
    (11, 3, 7)
    """
    if cell.activations is None:
        raise ValueError(f"trace: {cell.name} does not name its gates; give the Cell `activations`.")
    check_sequence("trace", cell, params, *jax.tree.map(jnp.asarray, (xs, carry)))
    return _record(cell, params, xs, carry, options)


def _record(cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None, options: dict[str, Any]) -> Trace:
    recorded: Any = unroll(_recording(cell), params, xs, carry, gradient="scan", **options)[1]
    return Trace(*recorded)


@functools.cache
def _recording(cell: Cell[Any, Any]) -> Cell[Any, Any]:
    """Make the cell whose output is everything about its step."""

    def gates(params: PyTree, start: PyTree, z: PyTree, a: PyTree) -> tuple[PyTree, Trace]:
        carry, y = cell.gates(params, start, z, a)
        names = None if cell.activations is None else cell.activations(params, start, z, a)
        return carry, Trace(start, z, a, names, carry, y)

    return dataclasses.replace(cell, gates=gates, gates_jvp=None, activations=None)


def carry_jacobians(
    cell: Cell[Any, Any], params: PyTree, xs: PyTree, carry: PyTree | None = None, **options: Any
) -> Float[Array, "time *batch n n"]:
    """Return ∂carry_t / ∂carry_{t−1} of every step.

    The leaves of the carry are joined in their own order, for an LSTM h and then c: n = 2·hidden. The identity at
    masked steps, 0 where the carry is reset.

    Args:
      cell, params, xs, carry, options: as in `unroll`.

    Raises:
      TypeError, ValueError: as `unroll`.
    """
    xs, carry = jax.tree.map(jnp.asarray, (xs, carry))
    batch_shape = check_sequence("carry_jacobians", cell, params, xs, carry)
    starts = _record(cell, params, xs, carry, options).start

    def of_one_step(start: PyTree, x: PyTree) -> Array:
        flat, unravel = ravel_pytree(start)
        return jax.jacfwd(lambda flat: ravel_pytree(cell.step(params, unravel(flat), x)[0])[0])(flat)

    for _ in range(1 + len(batch_shape)):
        of_one_step = jax.vmap(of_one_step)
    jacobians = of_one_step(starts, xs)
    mask, reset = options.get("mask"), options.get("reset")
    if mask is not None:
        jacobians = where(jnp.asarray(mask), jacobians, jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype))
    if reset is not None:
        jacobians = where(jnp.asarray(reset), jnp.zeros_like(jacobians), jacobians)
    return jacobians


def jacobian_products(jacobians: Float[Array, "time *batch n n"]) -> Float[Array, "time *batch n n"]:
    """Return how the last carry depends on every one before: at t, the product J_T ... J_t = ∂carry_T / ∂carry_{t−1}.

    Their singular values say how much of a perturbation is left after T − t + 1 steps, at most and at least; below some
    1e-300 (float64) they are 0, where `lyapunov_exponents` still are numbers.

    Args:
      jacobians: from `carry_jacobians`, not reversed.

    >>> import jax, jaxlstm
    >>> params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
    >>> jacobians = jaxlstm.carry_jacobians(jaxlstm.LSTM, params, jax.numpy.ones((11, 3, 5)))
    >>> jax.numpy.linalg.svd(jaxlstm.jacobian_products(jacobians), compute_uv=False).shape
    (11, 3, 14)
    """
    jacobians = jnp.asarray(jacobians)
    identity = jnp.broadcast_to(jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype), jacobians.shape[1:])
    multiply = lambda product, jacobian: (product @ jacobian,) * 2
    return lax.scan(multiply, identity, jacobians, reverse=True)[1]


def lyapunov_exponents(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    carry: PyTree | None = None,
    *,
    num_exponents: int = 1,
    num_warmup: int = 0,
) -> Float[Array, "*batch num_exponents"]:
    """Return the leading Lyapunov exponents: the mean growth per step, in nats, of small perturbations of the carry.

    Perturbations are pushed through every step by its derivative and made orthonormal again (Benettin et al., Lyapunov
    characteristic exponents for smooth dynamical systems, 1980). Below 0 all of them die out.

    Args:
      cell, params, xs, carry: as in `unroll`.
      num_exponents: how many, the largest first; at most the numbers in a carry.
      num_warmup: steps at the start that do not count, in which the perturbations turn to where they grow.

    Raises:
      TypeError, ValueError: as `unroll`; ValueError if there are not so many exponents, or no step is left.
    """
    xs, carry = jax.tree.map(jnp.asarray, (xs, carry))
    batch_shape = check_sequence("lyapunov_exponents", cell, params, xs, carry)
    num_steps = jax.tree.leaves(xs)[0].shape[0]
    carry = cell.initial_carry(params, batch_shape) if carry is None else carry
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(cell.initial_carry, params)))
    if not 1 <= num_exponents <= size:
        raise ValueError(f"lyapunov_exponents: num_exponents must be 1 to {size}, got {num_exponents}.")
    if not 0 <= num_warmup < num_steps:
        raise ValueError(f"lyapunov_exponents: num_warmup must be 0 to {num_steps - 1}, got {num_warmup}.")

    def of_one_sequence(carry: PyTree, xs: PyTree) -> Array:
        flat, unravel = ravel_pytree(carry)
        random = jax.random.normal(jax.random.key(0), (size, num_exponents), flat.dtype)

        def step(state: tuple[Array, Array], x: PyTree) -> tuple[tuple[Array, Array], Array]:
            flat, directions = state
            advance = lambda flat: ravel_pytree(cell.step(params, unravel(flat), x)[0])[0]
            flat, push = jax.linearize(advance, flat)
            directions, growth = jnp.linalg.qr(jax.vmap(push, 1, 1)(directions))
            return (flat, directions), jnp.log(jnp.abs(jnp.diagonal(growth)))

        _, growths = lax.scan(step, (flat, jnp.linalg.qr(random)[0]), xs)
        return growths[num_warmup:].mean(axis=0)

    for _ in batch_shape:
        of_one_sequence = jax.vmap(of_one_sequence, (0, 1))
    return of_one_sequence(carry, xs)


class CellStateTerms(NamedTuple):
    """The four ways from c_{t−1} to c_t, each [time, *batch, hidden, hidden]: entry [j, k] is ∂c_t[j] / ∂c_{t−1}[k]."""

    carousel: Float[Array, "time *batch hidden hidden"]  # diag(f)
    forget_gate: Float[Array, "time *batch hidden hidden"]
    input_gate: Float[Array, "time *batch hidden hidden"]
    candidate: Float[Array, "time *batch hidden hidden"]


def cell_state_terms(params: LSTMParams, xs: Array, carry: LSTMState | None = None) -> CellStateTerms:
    """Return the four terms of ∂c_t / ∂c_{t−1} of an LSTM, o_{t−1} held fixed.

    With h_{t−1} = o_{t−1} ⊙ tanh c_{t−1} and D = diag(o_{t−1} ⊙ (1 − tanh² c_{t−1})):

        diag(f)  +  diag(c_{t−1} ⊙ f(1−f)) W_fᵀ D  +  diag(g ⊙ i(1−i)) W_iᵀ D  +  diag(i ⊙ (1−g²)) W_gᵀ D

    At the first step only diag(f) is left, since h_0 does not depend on c_0. The product over steps is *not*
    ∂c_T/∂c_0: c also acts through o. For products take `carry_jacobians`.

    Args:
      params, xs, carry: as in `unroll`, of the cell `LSTM`.

    Raises:
      TypeError, ValueError: as `unroll`.
    """
    recorded = trace(LSTM, params, xs, carry)
    i, f, g, o = recorded.gates
    c_prev, hidden = recorded.start.c, params.w_hh.shape[0]
    o_prev = jnp.concatenate([jnp.zeros_like(o[:1]), o[:-1]])
    d = o_prev * (1 - jnp.tanh(c_prev) ** 2)
    w = LSTMGates(*jnp.split(params.w_hh, 4, axis=-1))
    through = lambda by_gate, w: by_gate[..., :, None] * w.T * d[..., None, :]
    return CellStateTerms(
        carousel=f[..., :, None] * jnp.eye(hidden, dtype=f.dtype),
        forget_gate=through(c_prev * f * (1 - f), w.f),
        input_gate=through(g * i * (1 - i), w.i),
        candidate=through(i * (1 - g**2), w.g),
    )


def term_shares(terms: CellStateTerms) -> CellStateTerms:
    """Return what share each of the four terms has, by its Frobenius norm: [time, *batch], their sum 1.

    The terms may cancel, so that the norm of their sum may be less than the sum of their norms.

    Args:
      terms: from `cell_state_terms`.
    """
    norms = CellStateTerms(*(jnp.linalg.norm(term, axis=(-2, -1)) for term in terms))
    return CellStateTerms(*(norm / sum(norms) for norm in norms))


def truncated_gradient(
    cell: Cell[Any, Any],
    params: PyTree,
    xs: PyTree,
    loss_fn: Callable[[Array], Array],
    carry: PyTree | None = None,
    **options: Any,
) -> PyTree:
    """Return the gradient of 1997 by the parameters: it flows along the carry, and not through `recur`.

    For an LSTM h_{t−1} is a constant at every gate and at the candidate, so that only the carousel of c reaches back in
    time (Hochreiter & Schmidhuber, Long short-term memory, 1997). `rtrl_gradient(cut_recurrence(cell), ...)`, which is
    e-prop with true learning signals, computes the same forward in time.

    Args:
      cell, params, xs, carry, options: as in `unroll`.
      loss_fn: of the outputs ys [time, *batch, hidden], a number.

    Raises:
      TypeError, ValueError: as `unroll`.
    """
    check_sequence("truncated_gradient", cell, params, *jax.tree.map(jnp.asarray, (xs, carry)))
    loss = lambda params: loss_fn(unroll(cut_recurrence(cell), params, xs, carry, **options)[1])
    check_number("truncated_gradient", "loss_fn", jax.eval_shape(loss, params))
    return jax.grad(loss)(params)
