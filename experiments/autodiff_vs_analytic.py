"""How right is the gradient of an LSTM by every road, and what does it cost?

Autodiff of the scan, the library's rule, the derivation by hand, real-time recurrent learning and central differences,
over the length of a sequence, the width of the layer and the precision, against a backward pass in NumPy with more
digits than any of them (80-bit floats). To expect: the first four are equally right, to the last digits of their
precision, at any length; differences lose a third to a half of the digits; RTRL's memory does not grow with the
sequence, but with the third power of the width, and its time nearly with the fourth.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from experiments import devices, plots, runs
from jaxlstm import LSTM, LSTMParams, central_differences, lstm_bptt, rtrl_gradient, unroll

BATCH, INPUT_SIZE = 4, 16
LENGTHS, WIDTHS = (10, 30, 100, 300, 1000), (8, 16, 32, 64, 128)
LENGTH, WIDTH = 100, 16  # where the other one is varied
LONG = 2.0  # seconds: what takes longer is timed once
STEP_SIZE = {"float64": 5e-4, "float32": 2e-2}
MOST = {"rtrl": 2e11, "differences": 8e10}  # operations; beyond it a road is left out

log = logging.getLogger("autodiff_vs_analytic")

Road = Callable[[LSTMParams, Array, Array], LSTMParams]  # of (params, xs, weights), for the loss Σ y · weights


def roads(dtype: str) -> dict[str, Road]:
    """Return every road that there is in this precision."""
    by_autodiff = lambda layer: lambda params, xs, weights: jax.grad(lambda p: (layer(p, xs) * weights).sum())(params)
    if dtype == "bfloat16":
        return {
            name: by_autodiff(lambda p, xs, how=how: unroll(LSTM, p, xs, gradient=how, compute_dtype=dtype)[1])
            for name, how in (("autodiff", "scan"), ("rule", "bulk"))
        }
    return {
        "autodiff": by_autodiff(lambda p, xs: unroll(LSTM, p, xs, gradient="scan")[1]),
        "rule": by_autodiff(lambda p, xs: unroll(LSTM, p, xs)[1]),
        "by hand": by_autodiff(lambda p, xs: lstm_bptt(p, xs, LSTM.initial_carry(p, xs.shape[1:-1]))[1]),
        "rtrl": lambda p, xs, weights: rtrl_gradient(LSTM, p, xs, lambda y, t: (y * weights[t]).sum())[1],
        "differences": lambda params, xs, weights: central_differences(
            lambda p: (unroll(LSTM, p, xs)[1] * weights).sum(), params, STEP_SIZE[dtype]
        ),
    }


def operations(road: str, num_steps: int, hidden: int) -> float:
    """Return about how many multiplications a road takes."""
    num_params = 4 * hidden * (INPUT_SIZE + hidden + 1)
    once = num_steps * BATCH * num_params
    return once * {"rtrl": (2 * hidden) ** 2, "differences": 4 * num_params}.get(road, 3)


def with_more_digits(params: LSTMParams, xs: Any, weights: Any) -> list[np.ndarray]:
    """Return the gradient by a backward pass in NumPy, in 80-bit floats where the processor has them."""
    w_ih, w_hh, b = (np.asarray(leaf).astype(np.longdouble) for leaf in params)
    xs, weights = (np.asarray(v).astype(np.longdouble) for v in (xs, weights))
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
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


def measure(num_steps: int, hidden: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Return error, time and memory of every road at one size."""
    held = "float32" if dtype == "bfloat16" else dtype
    rng = np.random.default_rng(0)
    params = LSTM.init(jax.random.key(0), INPUT_SIZE, hidden, dtype=held)
    xs, weights = (jnp.asarray(rng.normal(size=(num_steps, BATCH, n)), held) for n in (INPUT_SIZE, hidden))
    want = with_more_digits(params, xs, weights)
    compiled = {
        name: jax.jit(road).lower(params, xs, weights).compile()
        for name, road in roads(dtype).items()
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
            "road": name, "num_steps": num_steps, "hidden": hidden, "dtype": dtype, "error": float(max(errors)),
            "temporaries": memory and memory.temp_size_in_bytes,
        })  # fmt: skip
    for turn in range(rounds):  # one road after another, so that what else the machine does meets them all
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
    """Measure, draw, and print the table.

    Args:
      lengths: steps of a sequence, at 16 units.
      widths: units, at 100 steps.
      dtypes: bfloat16 rounds for the matmuls alone, and only the scan and the rule have it.
      rounds: of the times the least counts.
      workdir: where the result goes; default a new folder in runs/.
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
            runs.write_json(folder / "result.json", result)  # what is measured stays, also if the rest is stopped
    picture = plots.roads(folder / "autodiff_vs_analytic.png", result["rows"], LENGTH, WIDTH)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return the README's table: the worst error of each road over all sizes, and its cost at one."""
    rows = result["rows"]
    lines = ["| road | float64 | float32 | bfloat16 matmuls | time | temporaries |", "|---|---|---|---|---|---|"]
    at = {
        row["road"]: row
        for row in rows
        if (row["num_steps"], row["hidden"], row["dtype"]) == (LENGTH, WIDTH, "float32")
    }
    for road in dict.fromkeys(row["road"] for row in rows):
        worst = {
            d: [r["error"] for r in rows if (r["road"], r["dtype"]) == (road, d)] for d in result["config"]["dtypes"]
        }
        cells = [f"{max(errors):.0e}" if errors else "" for errors in worst.values()]
        cost = [f"{1e3 * at[road]['seconds']:.3g} ms", f"{at[road]['temporaries'] / 1e6:.2g} MB"]
        lines.append(f"| {road} | " + " | ".join(cells + cost) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("autodiff_vs_analytic", main)
