"""Print the table of all cells in docs/variants.md: python docs/cells.py."""

import math

import jax
import jax.numpy as jnp

from jaxlstm import GRU, LSTM, RNN, Cell, num_params, variants

INPUT, HIDDEN = 80, 12
CELLS = [
    RNN,
    GRU,
    LSTM,
    variants.PeepholeLSTM,
    variants.NoInputGateLSTM,
    variants.NoForgetGateLSTM,
    variants.NoOutputGateLSTM,
    variants.NoInputActivationLSTM,
    variants.NoOutputActivationLSTM,
    variants.FullGateRecurrenceLSTM,
    variants.CoupledLSTM,
    variants.LayerNormLSTM,
    variants.ProjectedLSTM,
    variants.make_lstm_1997(2),
    variants.SLSTM,
]


def matmul_flops(cell: Cell) -> int:
    """Count 2·m·n·k for every matmul of one step."""
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), INPUT, HIDDEN))
    carry = jax.eval_shape(cell.initial_carry, params)
    program = jax.make_jaxpr(cell.step)(params, carry, jax.ShapeDtypeStruct((INPUT,), jnp.float32))
    flops = 0
    for operation in program.eqns:
        if operation.primitive.name == "dot_general":
            (contracted, _), _ = operation.params["dimension_numbers"]
            lengths = [operation.invars[0].aval.shape[axis] for axis in contracted]
            flops += 2 * math.prod(lengths) * math.prod(operation.outvars[0].aval.shape)
    return flops


def table() -> str:
    """Return the table: the carry is also what the backward pass keeps of every step."""
    rows = [
        "| cell | parameters | matmul FLOP per step | numbers in the carry, per unit | derivative of the gates |",
        "|---|---|---|---|---|",
    ]
    for cell in CELLS:
        params = cell.init(jax.random.key(0), INPUT, HIDDEN)
        per_unit = num_params(cell.initial_carry(params)) / HIDDEN
        closed = "JAX's" if cell.gates_jvp is None else "closed form"
        rows.append(f"| {cell.name} | {num_params(params):,} | {matmul_flops(cell):,} | {per_unit:g} | {closed} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
