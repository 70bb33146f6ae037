"""Check the LSTM's gradient on this machine: `python -m jaxlstm`.

The same gradient four ways: by autodiff of the scan, by the library's own rule, by hand, and by central differences of
the loss.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from platform import python_version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

import jaxlstm
from jaxlstm import (
    LSTM,
    LSTMState,
    central_differences,
    gradient_error,
    length_mask,
    lstm_bptt,
    split_gates,
    unroll,
)

NUM_STEPS, BATCH, INPUT_SIZE, HIDDEN_SIZE = 12, 3, 5, 7
LENGTHS = (12, 9, 4)

# Relative error allowed against autodiff, of the rule and by hand. Differences are allowed their noise floor where that
# is higher: in float32 it always is, so there they convict, and never acquit.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
TOLERANCE_DIFFERENCES = {"float64": 1e-9, "float32": 0.0}
STEP_SIZE = {"float64": 5e-4, "float32": 2e-2}


class Row(NamedTuple):
    """Relative errors against autodiff of one block of the gradient."""

    rule: float
    by_hand: float
    differences: float
    floor: float  # what rounding alone does to the differences


def compare(dtype: str) -> dict[str, Row]:
    """Return the errors of every parameter and gate, of the inputs and of the initial state."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = LSTM.init(jax.random.key(0), INPUT_SIZE, HIDDEN_SIZE, dtype=dtype)
    xs, d_ys = normal(NUM_STEPS, BATCH, INPUT_SIZE), normal(NUM_STEPS, BATCH, HIDDEN_SIZE)
    carry, d_carry = (LSTMState(*normal(2, BATCH, HIDDEN_SIZE)) for _ in range(2))
    mask = length_mask(jnp.array(LENGTHS), NUM_STEPS)

    def terms(layer: Callable[..., Any], variables: Any) -> Float[Array, "terms"]:
        carry, ys = layer(*variables, mask=mask)
        return ravel_pytree((ys * d_ys, carry.h * d_carry.h, carry.c * d_carry.c))[0]

    @jax.jit
    def errors(variables: Any) -> Any:
        scan = lambda *variables, mask: unroll(LSTM, *variables, mask=mask, gradient="scan")
        autodiff = blocks(jax.grad(lambda v: terms(scan, v).sum())(variables))
        in_bulk = lambda *variables, mask: unroll(LSTM, *variables, mask=mask, gradient="bulk")
        rule = blocks(jax.grad(lambda v: terms(in_bulk, v).sum())(variables))
        by_hand = blocks(jax.grad(lambda v: terms(lstm_bptt, v).sum())(variables))
        step_size = STEP_SIZE[dtype]
        differences = blocks(central_differences(lambda v: terms(scan, v).sum(), variables, step_size))
        # Rounding moves every term of the loss by a few units in its last place, at random; 1/ε magnifies it.
        noise = 4 * jnp.finfo(dtype).eps * jnp.linalg.norm(terms(scan, variables)) / step_size
        floors = jax.tree.map(lambda r: noise * r.size**0.5 / jnp.linalg.norm(r.ravel()), autodiff)
        return *(gradient_error(other, autodiff) for other in (rule, by_hand, differences)), floors

    trees = jax.device_get(errors((params, xs, carry)))
    return {name: Row(*(float(tree[name]) for tree in trees)) for name in blocks((params, xs, carry))}


def blocks(gradients: Any) -> dict[str, Array]:
    """Cut a gradient into what is compared: each parameter gate by gate, the inputs, the initial state."""
    d_params, d_xs, d_carry = gradients
    by_gate = split_gates(d_params)
    cut = {f"{name}  {gate}": getattr(getattr(by_gate, gate), name) for name in d_params._fields for gate in "ifgo"}
    return {**cut, "xs": d_xs, "h_0": d_carry.h, "c_0": d_carry.c}


def main() -> int:
    """Print the table and the verdict; return 0 if the gradients agree, else 1."""
    versions = "".join(f"{name} {version(name)}, " for name in ("jax", "jaxlib", "numpy"))
    print(f"jaxlstm {jaxlstm.__version__}, {versions}Python {python_version()}")
    print("devices: " + ", ".join(f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()))
    print(
        f"""
The gradient of an LSTM: relative error of the library's rule, of the gradient by hand and of central differences of the
loss, against autodiff of the scan.
{NUM_STEPS} steps, batch {BATCH} of lengths {LENGTHS}, {INPUT_SIZE} features, {HIDDEN_SIZE} units.
In brackets: no verdict, since the differences agree as far as their noise floor lets them see.
"""
    )
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        tables = {dtype: compare(dtype) for dtype in ("float64", "float32")}
    print(" " * 7 + "".join(f"{dtype:>14}{'':29}" for dtype in tables).rstrip())
    print(" " * 7 + "   rule   by hand  differences  floor      " * len(tables))
    for name in tables["float64"]:
        print(f"{name:7}" + "".join(_format(table[name], dtype) for dtype, table in tables.items()))
    print()
    lines = [line for dtype, table in tables.items() for line in disagreements(dtype, table)]
    if lines:
        print(*lines, "DISAGREE: do not trust gradients on this machine.", sep="\n")
        return 1
    worst = {dtype: max(max(row.rule, row.by_hand) for row in table.values()) for dtype, table in tables.items()}
    print(
        f"AGREE: the rule and by hand to {worst['float64']:.0e} in float64 and {worst['float32']:.0e} in float32; "
        f"central differences to {max(row.differences for row in tables['float64'].values()):.0e} in float64."
    )
    return 0


def _format(row: Row, dtype: str) -> str:
    no_verdict = TOLERANCE_DIFFERENCES[dtype] < row.floor and row.differences < row.floor
    differences = f"({row.differences:.0e})" if no_verdict else f"{row.differences:.0e} "
    return f"{row.rule:7.0e}{row.by_hand:10.0e}{differences:>13}{row.floor:7.0e}      "


def disagreements(dtype: str, table: dict[str, Row]) -> list[str]:
    """Return a line for every error above what is allowed; a NaN is one."""
    lines = []
    for name, row in table.items():
        for way, error in (("the rule", row.rule), ("by hand", row.by_hand)):
            if not error <= TOLERANCE[dtype]:
                lines.append(f"{dtype} {name}: {way} {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")
        allowed = max(TOLERANCE_DIFFERENCES[dtype], row.floor)
        if not row.differences <= allowed:
            lines.append(f"{dtype} {name}: differences {row.differences:.1e}, allowed {allowed:.0e}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
