"""Which inputs each number of a result depends on, found by tracing: from operations and shapes, never from values.

A derivative may be 0 at one point and not at another: a ReLU is flat where its input is negative. So `dependence`
builds a linear map with the structure of the derivative, in which every coefficient is positive. Where the map is 0,
the derivative is 0 at every point. An operation that it does not know makes every result depend on every input.

Inside a `custom_jvp` or `custom_vjp`, whose derivative may be anything, flags and integers carry a dependence too: the
surrogate gradient of a step function depends on what the step compares.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal
from jaxtyping import Array

# Each number of the result depends on the number in the same place of every operand.
ELEMENTWISE = set(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy cos cosh digamma "
    "div erf erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min mul neg nextafter pow "
    "reduce_precision rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh "
    "and eq ge gt is_finite le lt ne not or xor".split()
)
# Linear in all operands: the operation moves numbers or adds them up.
LINEAR = set(
    "broadcast_in_dim concatenate cumsum expand_dims pad pvary reduce_sum reshape rev sharding_constraint slice split "
    "squeeze transpose".split()
)
# Maximum, minimum and product over axes: the map sums over the same axes.
REDUCTIONS = {"reduce_max", "reduce_min", "reduce_prod"}
SCANS = {"cummax", "cummin", "cumprod", "cumlogsumexp"}
CONSTANT = {"stop_gradient"}


def dependence(function: Callable[[Array], Array], x: Array) -> Callable[[Array], Array]:
    """Return a linear map from x to the result: entry [i, j] is positive if result i may depend on x_j, else 0.

    Args:
      function: from one floating array to another.
      x: where to trace it; only its shape and dtype matter.
    """
    closed = jax.make_jaxpr(function)(x)

    def structure(d_x: Array) -> Array:
        (d_y,) = _through(closed, [d_x])
        return jnp.zeros(closed.out_avals[0].shape, d_x.dtype) if d_y is None else d_y

    return structure


def _through(closed: Any, d_inputs: list[Any], *, custom: bool = False) -> list[Any]:
    """Pass tangents, None for zero, through a jaxpr; `custom`: it is inside of a custom derivative."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known = dict(zip(jaxpr.invars, d_inputs, strict=True))

    def read(v: Any) -> Any:
        return None if isinstance(v, Literal) else known.get(v)

    for equation in jaxpr.eqns:
        d_values = [read(v) for v in equation.invars]
        shapes = [v.aval.shape for v in equation.outvars]
        real = [custom or jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars]
        stopped = equation.primitive.name in CONSTANT and not custom
        if all(d is None for d in d_values) or not any(real) or stopped:
            continue
        d_outs = _through_one(equation, d_values, shapes, custom)
        known.update((v, d) for v, d, is_real in zip(equation.outvars, d_outs, real, strict=True) if is_real)
    return [read(v) for v in jaxpr.outvars]


def _through_one(equation: Any, d_values: list[Any], shapes: list[tuple[int, ...]], custom: bool) -> list[Any]:
    name, settings = equation.primitive.name, equation.params
    custom = custom or name.startswith("custom_")
    if name in ELEMENTWISE or name in CONSTANT:
        return [_total([jnp.broadcast_to(d, shapes[0]) for d in d_values if d is not None])]
    if name in LINEAR:
        (dtype,) = {d.dtype for d in d_values if d is not None}
        full = [
            jnp.zeros(v.aval.shape, dtype) if d is None else d for v, d in zip(equation.invars, d_values, strict=True)
        ]
        outs = equation.primitive.bind(*full, **settings)
        return list(outs) if equation.primitive.multiple_results else [outs]
    if name in REDUCTIONS:
        return [d_values[0].sum(settings["axes"])]
    if name in SCANS:
        return [lax.cumsum(d_values[0], settings["axis"], settings["reverse"])]
    if name == "dot_general":
        d_x, d_y = d_values
        x, y = (jnp.ones(v.aval.shape, (d_y if d_x is None else d_x).dtype) for v in equation.invars)
        products = [(d_x, y)] * (d_x is not None) + [(x, d_y)] * (d_y is not None)
        return [_total([lax.dot_general(a, b, settings["dimension_numbers"]) for a, b in products])]
    for inner in (settings.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr")):
        if name != "scan" and inner is not None:
            return _through(inner, d_values, custom=custom)
    if name == "cond":
        by_branch = [_through(branch, d_values[1:], custom=custom) for branch in settings["branches"]]
        return [_total([d for d in of_one if d is not None]) for of_one in zip(*by_branch, strict=True)]
    everything = _total([d.sum() for d in d_values if d is not None])
    return [jnp.broadcast_to(everything, shape) for shape in shapes]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield every operation of a jaxpr, also those inside another operation."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def is_jaxpr(value: Any) -> bool:
    """Return whether a setting of an operation is a program that runs inside it."""
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _total(tangents: list[Any]) -> Any:
    return sum(tangents[1:], tangents[0]) if tangents else None
