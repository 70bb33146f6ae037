"""Other people's habits: cells with custom derivatives in them, legacy keys, exports, empty batches, eager calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxlstm import LSTM, Bulk, Chunked, LSTMState, Scan, unroll

from cells import H, T, draw, worst_error

OPEN = {"gates_jvp": None, "activations": None}
MODES = [Bulk(), Bulk(block_size=3), Chunked(3), Chunked(3, within=Scan())]


# Cells with other derivatives in them.


@jax.custom_vjp
def fire(v):
    return (v > 0).astype(v.dtype)


fire.defvjp(lambda v: (fire(v), v), lambda v, d: (d / (1 + jnp.abs(v)) ** 2,))


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (v, None), lambda _, d: (jnp.clip(d, -0.05, 0.05),))


@jax.custom_vjp
def rounded(w):
    return jnp.round(w * 8) / 8


rounded.defvjp(lambda w: (rounded(w), None), lambda _, d: (d,))


@jax.custom_jvp
def doubled(v):
    return v


doubled.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


@jax.custom_vjp
def called_back(v):
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(v.shape, v.dtype), v)


called_back.defvjp(lambda v: (called_back(v), v), lambda v, d: (d * (1 - jnp.tanh(v) ** 2),))


def spiking(params, s, z, a):
    c = 0.9 * s.c + (z + a)[..., :H]
    y = fire(c - 0.1)
    return LSTMState(y, c * (1 - y)), y


def after_step(change):
    """Make gates whose new carry goes through a function."""

    def gates(params, s, z, a):
        new, y = LSTM.gates(params, s, z, a)
        return LSTMState(change(new.h), change(new.c)), y

    return gates


def by_switch(v):
    return lax.switch(jnp.clip((v.sum() > 0).astype(int) + 1, 0, 2), [jnp.sin, jnp.tanh, jnp.cos], v)


def by_while(v):
    """Halve until small, which only forward mode differentiates; the gradient stops."""
    return v + lax.stop_gradient(lax.while_loop(lambda u: jnp.abs(u).max() > 0.1, lambda u: u / 2, v))


CELLS = {
    "a surrogate gradient": {"gates": spiking},
    "a clipped gradient": {"gates": after_step(clipped)},
    "a clipped gradient in recur": {"recur": lambda p, s: clipped(s.h) @ p.w_hh},
    "a clipped gradient inside jit": {"gates": after_step(jax.jit(lambda v: 2 * clipped(v)))},
    "straight through in project": {"project": lambda p, x: x @ rounded(p.w_ih) + p.b},
    "straight through in recur": {"recur": lambda p, s: s.h @ rounded(p.w_hh)},
    "custom_jvp": {"gates": after_step(doubled)},
    "a checkpoint": {"gates": jax.checkpoint(LSTM.gates)},
    "a callback with a derivative": {"gates": after_step(called_back)},
    "cond": {"gates": after_step(lambda v: lax.cond(v.sum() > 0, jnp.sin, jnp.tanh, v))},
    "switch": {"gates": after_step(by_switch)},
    "scan": {"gates": after_step(lambda v: lax.scan(lambda u, _: (jnp.sin(u), None), v, length=3)[0])},
    "fori_loop": {"gates": after_step(lambda v: lax.fori_loop(0, 3, lambda _, u: jnp.sin(u), v))},
    "while_loop": {"gates": after_step(by_while)},
    "debug.print": {"gates": after_step(lambda v: jax.debug.callback(lambda u: None, v) or v)},
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_with_other_derivatives_in_it_has_the_gradient_of_the_scan(name):
    cell = dataclasses.replace(LSTM, **OPEN, **CELLS[name])
    params, xs, carry = draw(LSTM)

    def loss(variables, gradient):
        params, xs, carry = variables
        carry, ys = unroll(
            cell, params, xs, carry, mask=jnp.arange(T)[:, None] < jnp.array([7, 4, 5]), gradient=gradient
        )
        return (ys**2).sum() + (carry.c**2).sum()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want = value_and_grad((params, xs, carry), "scan")
    for gradient in MODES:
        assert worst_error(value_and_grad((params, xs, carry), gradient), want) < 1e-13, gradient


def learned_temperature(t, part):
    """A cell made inside the loss, one of whose functions closes over what is differentiated."""
    if part == "gates":
        gates = lambda p, s, z, a: LSTM.gates(p, s, t * z, a)
        return dataclasses.replace(LSTM, gates=gates, **OPEN)
    if part == "recur":
        return dataclasses.replace(LSTM, recur=lambda p, s: t * (s.h @ p.w_hh))
    return dataclasses.replace(LSTM, project=jax.jit(lambda p, xs: t * (xs @ p.w_ih) + p.b))


@pytest.mark.parametrize("part", ["gates", "recur", "project"])
def test_a_cell_that_closes_over_what_is_differentiated_has_the_gradient_of_the_scan(part):
    params, xs, carry = draw(LSTM)

    def loss(t, gradient):
        return (unroll(learned_temperature(t, part), params, xs, carry, gradient=gradient)[1] ** 2).sum()

    want = jax.grad(loss)(0.9, "scan")
    difference = (loss(0.9 + 1e-6, "scan") - loss(0.9 - 1e-6, "scan")) / 2e-6
    assert abs(want - difference) < 1e-7 * abs(want)
    for gradient in (Bulk(), Chunked(3)):
        of_t = lambda t, gradient=gradient: loss(t, gradient)
        for derivative in (jax.grad(of_t), jax.jit(jax.grad(of_t)), jax.grad(jax.jit(of_t)), jax.jacfwd(of_t)):
            assert abs(derivative(0.9) - want) < 1e-13
