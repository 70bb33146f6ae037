"""The table of all cells that the contract tests go through, with the NumPy step of each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlstm import GRU, LSTM, RNN, Cell, make_rnn, variants

import oracles


class LeakyState(NamedTuple):
    s: jax.Array


def _init(key, input_size, hidden_size, *, dtype=jnp.float32):
    keys = jax.random.split(key, 3)
    shapes = {"a_into": (input_size, hidden_size), "b_back": (hidden_size, hidden_size), "c_rate": (hidden_size,)}
    return {
        name: jax.random.normal(k, s, jnp.float32).astype(dtype)
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


def _gates(params, carry, z, a):
    keep = jnp.broadcast_to(jax.nn.sigmoid(params["c_rate"]), carry.s.shape)
    s = keep * carry.s + (1 - keep) * jnp.tanh(z + a)
    return LeakyState(s), s**2


# A user's cell: a dict of parameters, none of the library's names, weights in the gates, an output that is not the
# carry.
LEAKY = Cell(
    name="leaky",
    init=_init,
    initial_carry=lambda params, batch_shape=(): LeakyState(
        jnp.zeros((*batch_shape, len(params["c_rate"])), params["c_rate"].dtype)
    ),
    gates=_gates,
    project=lambda params, xs: xs @ params["a_into"],
    recur=lambda params, carry: carry.s @ params["b_back"],
)

CELLS = {
    "LSTM": (LSTM, oracles.lstm_step),
    "GRU": (GRU, oracles.gru_step),
    "RNN": (RNN, oracles.rnn_step(np.tanh)),
    "RNN(relu)": (make_rnn("relu"), oracles.rnn_step(oracles.relu)),
    "RNN(sigmoid)": (make_rnn("sigmoid"), oracles.rnn_step(oracles.sigmoid)),
    "leaky": (LEAKY, oracles.leaky_step),
}
# The LSTM family (jaxlstm/variants.py). A new cell is one line here; tests/test_variants.py has the contract.
FAMILY = {
    "peephole": (variants.PeepholeLSTM, oracles.lstm_variant_step("V")),
    "no input gate": (variants.NoInputGateLSTM, oracles.lstm_variant_step("NIG")),
    "no forget gate": (variants.NoForgetGateLSTM, oracles.lstm_variant_step("NFG")),
    "no output gate": (variants.NoOutputGateLSTM, oracles.lstm_variant_step("NOG")),
    "no input activation": (variants.NoInputActivationLSTM, oracles.lstm_variant_step("NIAF")),
    "no output activation": (variants.NoOutputActivationLSTM, oracles.lstm_variant_step("NOAF")),
    "full gate recurrence": (variants.FullGateRecurrenceLSTM, oracles.lstm_variant_step("FGR")),
    "coupled": (variants.CoupledLSTM, oracles.coupled_step),
    "layer norm": (variants.LayerNormLSTM, oracles.layer_norm_step),
    "projected": (variants.ProjectedLSTM, oracles.projected_step),
    "projected, 3": (variants.make_projected_lstm(3), oracles.projected_step),
    "1997": (variants.make_lstm_1997(2), oracles.lstm_1997_step(2)),
    "1997, alone": (variants.make_lstm_1997(1), oracles.lstm_1997_step(1)),
    "sLSTM": (variants.SLSTM, oracles.slstm_step),
}
T, B, I, H = 7, 3, 5, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# A mask with holes; resets, one of them at a masked step.
HOLES = normal(5, T, B) > -0.3
RESET = np.zeros((T, B), bool)
RESET[0, 0] = RESET[2, 0] = RESET[3] = RESET[6, 2] = True


def draw(cell, seed=0, dtype=np.float64):
    """Draw params with no zeros among them, xs [T, B, I] and a carry [B, H]."""
    like = jax.eval_shape(lambda: cell.init(jax.random.key(0), I, H))
    params = jax.tree.map(lambda v: jnp.asarray(normal(seed, *v.shape) / 2, dtype), like)
    states = jax.eval_shape(lambda p: cell.initial_carry(p, (B,)), params)
    leaves, treedef = jax.tree.flatten(states)
    carry = treedef.unflatten([jnp.asarray(normal(seed + 1 + k, *v.shape), dtype) for k, v in enumerate(leaves)])
    return params, jnp.asarray(normal(seed + 9, T, B, I), dtype), carry


def worst_error(got, want):
    """Return the largest ‖got − want‖ / ‖want‖ over the leaves of two trees of the same shapes, by NumPy alone."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    assert pairs
    for g, w in pairs:
        assert g.shape == w.shape
    return max(
        float(np.linalg.norm(np.asarray(g) - np.asarray(w)) / (np.linalg.norm(np.asarray(w)) or 1)) for g, w in pairs
    )
