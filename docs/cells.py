"""Print the table of all cells in docs/variants.md: python docs/cells.py."""

import math

import jax
import jax.numpy as jnp

from jaxlstm import GRU, LSTM, RNN, Cell, num_params, unroll, variants

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


def numbers_kept(cell: Cell) -> float:
    """Count what the forward pass keeps for the backward pass, per unit and step, besides the inputs."""

    def size(num_steps: int) -> int:
        params = cell.init(jax.random.key(0), 1, HIDDEN)
        xs = jax.ShapeDtypeStruct((num_steps, 2, 1), jnp.float32)
        pullback = jax.eval_shape(lambda xs: jax.vjp(lambda p, xs: unroll(cell, p, xs)[1], params, xs)[1], xs)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback)) - math.prod(xs.shape)

    return (size(100) - size(50)) / (50 * 2 * HIDDEN)


def table() -> str:
    """Return the table in docs/variants.md."""
    rows = [
        "| cell | parameters | matmul FLOP per step | numbers in the carry, per unit | numbers kept, per unit and step "
        "| derivative of the gates |",
        "|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        params = cell.init(jax.random.key(0), INPUT, HIDDEN)
        per_unit = num_params(cell.initial_carry(params)) / HIDDEN
        closed = "JAX's" if cell.gates_jvp is None else "closed form"
        numbers = (f"{num_params(params):,}", f"{matmul_flops(cell):,}", f"{per_unit:g}", f"{numbers_kept(cell):g}")
        rows.append(f"| {cell.name} | {' | '.join(numbers)} | {closed} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
