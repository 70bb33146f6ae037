"""What must hold of any layer, whatever it computes: metamorphic properties, each tried on many drawn cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlstm import (
    GRU,
    LSTM,
    Bidirectional,
    GRUParams,
    LSTMParams,
    init_stack,
    length_mask,
    segment_resets,
    unroll_stack,
)

from cells import B, I, T, normal, worst_error

SIZES = [4, 3]
FORMS = {
    (cell.name, bidirectional): (
        init_stack(jax.random.key(n), cell, I, SIZES, bidirectional=bidirectional, dtype=jnp.float64),
        jax.jit(functools.partial(unroll_stack, cell)),
    )
    for n, (cell, bidirectional) in enumerate([(LSTM, False), (LSTM, True), (GRU, False)])
}
CAUSAL = [form for form in FORMS if not form[1]]
seeds = st.integers(0, 10**6)
forms, causal = st.sampled_from(sorted(FORMS)), st.sampled_from(CAUSAL)
lengths = st.lists(st.integers(0, T), min_size=B, max_size=B)


def carries_of(params, seed):
    """Draw a carry for every layer and direction: each leaf [B, width of the layer]."""
    cell = LSTM if isinstance(jax.tree.leaves(params, is_leaf=_is_cell)[0], LSTMParams) else GRU
    like = jax.tree.map(lambda p: cell.initial_carry(p, (B,)), params, is_leaf=_is_cell)
    return jax.tree.map(lambda v: jnp.asarray(normal(seed, *v.shape)), like)


def _is_cell(node):
    return isinstance(node, LSTMParams | GRUParams)


def drawn(form, seed):
    params, run = FORMS[form]
    rng = np.random.default_rng(seed)
    mask, reset = rng.random((T, B)) < 0.7, rng.random((T, B)) < 0.25
    return params, run, jnp.asarray(normal(seed, T, B, I)), carries_of(params, seed + 1), mask, reset


@pytest.mark.ci
@given(forms, seeds, lengths, seeds)
def test_appended_padding_changes_nothing(form, seed, lengths, garbage):
    params, run, xs, carries, _, reset = drawn(form, seed)
    last, ys = run(params, xs, carries, mask=length_mask(np.array(lengths), T), reset=reset)
    more = jnp.concatenate([xs, jnp.asarray(1e3 * normal(garbage, 4, B, I))])
    padded = {"mask": length_mask(np.array(lengths), T + 4), "reset": np.concatenate([reset, np.zeros((4, B), bool)])}
    last_padded, ys_padded = run(params, more, carries, **padded)
    assert worst_error((last_padded, ys_padded[:T]), (last, ys)) <= 1e-14
    assert (ys_padded[T:] == 0).all()


@pytest.mark.ci
@given(forms, seeds, st.permutations(range(B)))
def test_permuting_the_batch_permutes_the_results(form, seed, order):
    params, run, xs, carries, mask, reset = drawn(form, seed)
    order = np.array(order)
    last, ys = run(params, xs, carries, mask=mask, reset=reset)
    permuted = jax.tree.map(lambda v: v[order], carries)
    got = run(params, xs[:, order], permuted, mask=mask[:, order], reset=reset[:, order])
    assert worst_error(got, (jax.tree.map(lambda v: v[order], last), ys[:, order])) <= 1e-14


@pytest.mark.ci
@given(causal, seeds)
def test_pieces_that_pass_the_carry_on_equal_one_run(form, seed):
    params, run, xs, carries, mask, reset = drawn(form, seed)
    last, ys = run(params, xs, carries, mask=mask, reset=reset)
    pieces = []
    for part in (slice(0, 3), slice(3, 4), slice(4, T)):
        carries, piece = run(params, xs[part], carries, mask=mask[part], reset=reset[part])
        pieces.append(piece)
    assert worst_error((carries, jnp.concatenate(pieces)), (last, ys)) <= 1e-14


@given(forms, seeds, st.integers(1, T - 1), st.integers(0, 2))
def test_packed_sequences_are_run_apart(form, seed, first_length, gap):
    """Two sequences in one row, padding between them: each is as if it were alone, also within a longer one."""
    params, run, xs, _, _, _ = drawn(form, seed)
    ids = np.where(np.arange(T) < first_length, 7, 8)[:, None].repeat(B, axis=1)
    second = min(first_length + gap, T)
    mask = ((np.arange(T) < first_length) | (np.arange(T) >= second))[:, None].repeat(B, axis=1)
    _, packed = run(params, xs, mask=mask, reset=segment_resets(ids))
    pad = lambda part: jnp.concatenate([part, jnp.zeros((T - len(part), B, I))])  # one shape for all of them
    length = lambda n: length_mask(np.full(B, n), T)
    _, one = run(params, pad(xs[:first_length]), mask=length(first_length))
    _, two = run(params, pad(xs[second:]), mask=length(T - second))
    want = jnp.concatenate([one[:first_length], jnp.zeros_like(packed[first_length:second]), two[: T - second]])
    assert worst_error(packed, want) <= 1e-14


@pytest.mark.ci
@given(forms, seeds)
def test_vmap_is_a_batch(form, seed):
    params, run, xs, carries, mask, reset = drawn(form, seed)
    last, ys = run(params, xs, carries, mask=mask, reset=reset)
    alone = lambda x, c, m, r: run(params, x, c, mask=m, reset=r)
    mapped = jax.vmap(alone, in_axes=(1, 0, 1, 1), out_axes=(0, 1))(xs, carries, mask, reset)
    assert worst_error(mapped, (last, ys)) <= 1e-14


@pytest.mark.ci
@given(forms, seeds, st.permutations(range(SIZES[0])))
def test_hidden_units_permuted_consistently_change_nothing(form, seed, order):
    """Permute the units of the first layer, forward, and the rows of w_ih that read them: the output is the same."""
    params, run, xs, _, mask, reset = drawn(form, seed)
    order, hidden = np.array(order), SIZES[0]

    def columns(leaf):  # gate by gate
        return leaf.reshape(*leaf.shape[:-1], -1, hidden)[..., order].reshape(leaf.shape)

    def rows(p):
        return p._replace(w_ih=jnp.concatenate([p.w_ih[:hidden][order], p.w_ih[hidden:]]))

    first, second = params
    one = first.forward if isinstance(first, Bidirectional) else first
    one = jax.tree.map(columns, one)
    one = one._replace(w_hh=one.w_hh[order])
    if isinstance(first, Bidirectional):
        permuted = [first._replace(forward=one), Bidirectional(*map(rows, second))]
    else:
        permuted = [one, rows(second)]
    _, ys = run(params, xs, mask=mask, reset=reset)
    _, got = run(permuted, xs, mask=mask, reset=reset)
    assert worst_error(got, ys) <= 1e-14


@given(causal, seeds, st.integers(0, T - 1))
def test_a_reset_is_starting_there(form, seed, start):
    params, run, xs, carries, mask, _ = drawn(form, seed)
    reset = np.zeros((T, B), bool)
    reset[start] = True
    last, ys = run(params, xs, carries, mask=mask, reset=reset)
    rolled = jnp.roll(xs, -start, axis=0)  # one shape, whatever the start
    real = np.roll(mask, -start, axis=0) & (np.arange(T) < T - start)[:, None]
    fresh, want = run(params, rolled, None, mask=real)
    assert worst_error((last, ys[start:]), (fresh, want[: T - start])) <= 1e-14
