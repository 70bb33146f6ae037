"""How accurate is the gradient of an LSTM by each method, and what does each method cost?

The methods are autodiff of the scan, the library's rule, the hand-derived backward pass, real-time recurrent learning
(RTRL) and central differences. The experiment varies the sequence length, the width of the layer and the precision. The
reference is a backward pass in NumPy with more digits than all of them (80-bit floats). Expect the first four to be
equally accurate at every length, up to the rounding of their precision; differences lose a third to a half of the
digits. The memory of RTRL does not grow with the sequence, but it grows with the third power of the width, and its time
grows almost with the fourth.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from experiments import plots
from experiments.harness import devices, runs
from experiments.harness.rows import shown
from jaxlstm import LSTM, LSTMParams, low_precision, lstm_bptt, unroll
from jaxlstm.diagnostics import central_differences
from jaxlstm.rtrl import rtrl_gradient

BATCH, INPUT_SIZE = 4, 16
LENGTHS, WIDTHS = (10, 30, 100, 300, 1000), (8, 16, 32, 64, 128)
LENGTH, WIDTH = 100, 16  # the fixed one, while the other one varies
LONG = 2.0  # seconds: a run that takes longer is timed only once
STEP_SIZE = {"float64": 5e-4, "float32": 2e-2}
MOST = {"rtrl": 2e11, "differences": 8e10}  # operations; above this a method is left out

log = logging.getLogger("autodiff_vs_analytic")

Outputs = Callable[[LSTMParams, Array], Array]  # (params, xs) -> ys
Method = Callable[[LSTMParams, Array, Array], LSTMParams]  # (params, xs, weights) -> gradient of the loss Σ y · weights


def by_autodiff(outputs: Outputs) -> Method:
    """Return the method that differentiates the loss of these outputs with `jax.grad`."""

    def gradient(params: LSTMParams, xs: Array, weights: Array) -> LSTMParams:
        def loss(params: LSTMParams) -> Array:
            return (outputs(params, xs) * weights).sum()

        return jax.grad(loss)(params)

    return gradient


def unrolled(gradient: Literal["scan", "bulk"], dtype: str) -> Outputs:
    """Return the outputs of `unroll`, differentiated as `gradient` says; bfloat16 applies to the matmuls only."""
    cell = low_precision(LSTM, dtype) if dtype == "bfloat16" else LSTM

    def outputs(params: LSTMParams, xs: Array) -> Array:
        return unroll(cell, params, xs, gradient=gradient)[1]

    return outputs


def bptt_outputs(params: LSTMParams, xs: Array) -> Array:
    """Return the outputs of `lstm_bptt`, whose backward pass is derived by hand."""
    return lstm_bptt(params, xs, LSTM.initial_carry(params, xs.shape[1:-1]))[1]


def by_rtrl(params: LSTMParams, xs: Array, weights: Array) -> LSTMParams:
    """Compute the gradient forward in time."""

    def step_loss(y: Array, t: Array) -> Array:
        return (y * weights[t]).sum()

    return rtrl_gradient(LSTM, params, xs, step_loss)[1]


def by_differences(params: LSTMParams, xs: Array, weights: Array) -> LSTMParams:
    """Compute the gradient by central differences of the loss."""

    def loss(params: LSTMParams) -> Array:
        return (unroll(LSTM, params, xs)[1] * weights).sum()

    return central_differences(loss, params, STEP_SIZE[xs.dtype.name])


def methods(dtype: str) -> dict[str, Method]:
    """Return the methods available in this precision."""
    found = {
        "autodiff": by_autodiff(unrolled("scan", dtype)),
        "rule": by_autodiff(unrolled("bulk", dtype)),
    }
    if dtype == "bfloat16":
        return found
    return {**found, "by hand": by_autodiff(bptt_outputs), "rtrl": by_rtrl, "differences": by_differences}


def operations(method: str, num_steps: int, hidden: int) -> float:
    """Estimate the number of multiplications of a method."""
    num_params = 4 * hidden * (INPUT_SIZE + hidden + 1)
    once = num_steps * BATCH * num_params
    return once * {"rtrl": (2 * hidden) ** 2, "differences": 4 * num_params}.get(method, 3)


def with_more_digits(params: LSTMParams, xs: Any, weights: Any) -> list[np.ndarray]:
    """Compute the gradient by a backward pass in NumPy, in 80-bit floats where the processor supports them."""
    w_ih, w_hh, b = (np.asarray(leaf).astype(np.longdouble) for leaf in params)
    xs, weights = (np.asarray(v).astype(np.longdouble) for v in (xs, weights))
    h = c = np.zeros((xs.shape[1], len(w_hh)), np.longdouble)
    kept = []
    for x in xs:
        i, f, g, o = np.split(x @ w_ih + h @ w_hh + b, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        before, c = (h, c), f * c + i * g
        h = o * np.tanh(c)
        kept.append((x, *before, i, f, g, o, np.tanh(c)))
    d_w_ih, d_w_hh, d_b = (np.zeros_like(leaf) for leaf in (w_ih, w_hh, b))
    d_h = d_c = np.zeros_like(h)
    for (x, h, c, i, f, g, o, s), weight in zip(reversed(kept), reversed(weights), strict=True):
        d_h = d_h + weight
        d_c = d_c + d_h * o * (1 - s**2)
        by_gate = [d_c * g * i * (1 - i), d_c * c * f * (1 - f), d_c * i * (1 - g**2), d_h * s * o * (1 - o)]
        d_z = np.concatenate(by_gate, axis=-1)
        d_w_ih, d_w_hh, d_b = d_w_ih + x.T @ d_z, d_w_hh + h.T @ d_z, d_b + d_z.sum(axis=0)
        d_h, d_c = d_z @ w_hh.T, d_c * f
    return [d_w_ih, d_w_hh, d_b]


def sigmoid(v: Any) -> Any:
    """Return 1 / (1 + e^−v), in the precision of `v`."""
    return 1 / (1 + np.exp(-v))


def measure(num_steps: int, hidden: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Measure error, time and memory of every method at one size."""
    stored = "float32" if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(0)
    params = LSTM.init(jax.random.key(0), INPUT_SIZE, hidden, dtype=stored)
    xs, weights = (jnp.asarray(rng.normal(size=(num_steps, BATCH, n)), stored) for n in (INPUT_SIZE, hidden))
    want = with_more_digits(params, xs, weights)
    compiled = {
        name: jax.jit(method).lower(params, xs, weights).compile()
        for name, method in methods(dtype).items()
        if operations(name, num_steps, hidden) <= MOST.get(name, np.inf)
    }
    times: dict[str, list[float]] = {name: [] for name in compiled}
    rows = []
    for name, run in compiled.items():
        errors = [
            np.linalg.norm(g - r) / np.linalg.norm(r)
            for g, r in zip(jax.device_get(run(params, xs, weights)), want, strict=True)
        ]
        memory = run.memory_analysis()
        rows.append({
            "road": name,  # the method; committed results use this key
            "num_steps": num_steps, "hidden": hidden, "dtype": dtype, "error": float(max(errors)),
            "temporaries": memory and memory.temp_size_in_bytes,
        })  # fmt: skip
    for turn in range(rounds):  # interleaved, so that other load on the machine affects all methods alike
        for name, run in compiled.items():
            if turn and min(times[name]) > LONG:
                continue
            since = time.perf_counter()
            jax.block_until_ready(run(params, xs, weights))
            times[name].append(time.perf_counter() - since)
    return [row | {"seconds": min(times[str(row["road"])])} for row in rows]


def main(
    *,
    lengths: tuple[int, ...] = LENGTHS,
    widths: tuple[int, ...] = WIDTHS,
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16"),
    rounds: int = 5,
    workdir: str | None = None,
) -> dict[str, Any]:
    """Measure every method, write the result and a picture, and log the table.

    Args:
      lengths: numbers of steps, at 16 units.
      widths: numbers of units, at 100 steps.
      dtypes: in bfloat16, only matmul inputs are rounded, and only autodiff and the rule run.
      rounds: number of timed runs; the fastest one counts.
      workdir: folder of the results; by default a new one in runs/.
    """
    config = {k: v for k, v in locals().items() if k != "workdir"}
    folder = runs.open_folder("autodiff_vs_analytic", workdir, config)
    sizes = dict.fromkeys([(LENGTH, WIDTH), *((n, WIDTH) for n in lengths), *((LENGTH, n) for n in widths)])
    result: dict[str, Any] = {
        "config": config,
        "batch": BATCH,
        "input_size": INPUT_SIZE,
        "digits_of_the_reference": int(np.finfo(np.longdouble).precision),
        "versions": runs.versions(),
        "device": devices.found(),
        "rows": [],
    }
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        for num_steps, hidden in tqdm(sizes, unit="size"):
            for dtype in dtypes:
                result["rows"] += measure(num_steps, hidden, dtype, rounds)
            runs.write_json(folder / "result.json", result)  # after every size, so that Ctrl-C loses little
    picture = plots.gradient_methods(folder / "autodiff_vs_analytic.png", result["rows"], LENGTH, WIDTH)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: the largest error of each method over all sizes, and its cost at one size."""
    rows = result["rows"]
    lines = ["| method | float64 | float32 | bfloat16 matmuls | time | temporaries |", "|---|---|---|---|---|---|"]
    at = {
        row["road"]: row
        for row in rows
        if (row["num_steps"], row["hidden"], row["dtype"]) == (LENGTH, WIDTH, "float32")
    }
    for method in dict.fromkeys(row["road"] for row in rows):
        worst = {
            d: [r["error"] for r in rows if (r["road"], r["dtype"]) == (method, d)] for d in result["config"]["dtypes"]
        }
        cells = [f"{max(errors):.0e}" if errors else "" for errors in worst.values()]
        cost = [f"{shown(1e3 * at[method]['seconds'])} ms", f"{shown(at[method]['temporaries'] / 1e6, 2)} MB"]
        lines.append(f"| {method} | " + " | ".join(cells + cost) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli(
        "autodiff_vs_analytic", main, quick={"lengths": (100,), "widths": (16,), "dtypes": ("float32",), "rounds": 1}
    )
