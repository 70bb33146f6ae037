"""Check gradients on this machine: `python -m jaxlstm`.

Every road of `compare_gradients`, for every cell, in float64, and of the LSTM in float32; and in float32 the library's
two modes the ways they are used: jitted or not, of a sum or of random weights, several parameters at once, example by
example.
"""

import functools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from platform import python_version
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxlstm
from jaxlstm import (
    GRU,
    LSTM,
    RNN,
    Cell,
    Comparison,
    compare_gradients,
    comparison_table,
    length_mask,
    unroll,
)

CELLS = (LSTM, GRU, RNN)
Mode = Literal["bulk", "scan"]
Gradients = Callable[..., Any]
MODES: tuple[Mode, ...] = ("bulk", "scan")
LOSSES = ("sum", "random")
NUM_STEPS, BATCH, INPUT_SIZE, HIDDEN_SIZE = 12, 3, 5, 7
LENGTHS = (12, 9, 4)
TOLERANCE = 1e-5  # of float32 against float64


def problem(
    cell: Cell[Any, Any],
    dtype: str,
    batch: int = BATCH,
    input_size: int = INPUT_SIZE,
    hidden_size: int = HIDDEN_SIZE,
) -> tuple[Any, Array, Any]:
    """Draw parameters, inputs and an initial carry."""
    rng = np.random.default_rng(0)
    params = cell.init(jax.random.key(0), input_size, hidden_size, dtype=dtype)
    draw = lambda like: jnp.asarray(rng.normal(size=like.shape), dtype)
    xs = draw(np.empty((NUM_STEPS, batch, input_size)))
    return params, xs, jax.tree.map(draw, cell.initial_carry(params, (batch,)))


def compare(cell: Cell[Any, Any], dtype: str) -> Comparison:
    """Compare all roads, of a loss that weights every output at random."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(NUM_STEPS, BATCH, HIDDEN_SIZE)), dtype)
    params, xs, carry = problem(cell, dtype)
    step_loss = lambda y, t: (y * weights[t]).sum()
    return compare_gradients(
        cell,
        params,
        xs,
        step_loss,
        carry=carry,
        mask=length_mask(jnp.array(LENGTHS), NUM_STEPS),
        dtype=dtype,
        by_step=False,
    )


# The ways a gradient is used: each returns that of one batch.


def _one_batch(gradients: Gradients, params: Any, *of_batch: Any) -> Any:
    return gradients(params, *of_batch)


def _over_params(gradients: Gradients, params: Any, *of_batch: Any) -> Any:
    several = jax.tree.map(lambda leaf: jnp.stack([0.7 * leaf, leaf]), params)
    each = jax.vmap(lambda params: gradients(params, *of_batch))(several)
    return jax.tree.map(lambda leaf: leaf[1], each)


def _per_example(gradients: Gradients, params: Any, xs: Array, mask: Array, d_ys: Any, carry: Any) -> Any:
    each = jax.vmap(gradients, (None, 1, 1, 1, 0), (0, 1, 0))(params, xs, mask, d_ys, carry)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), each[0]), *each[1:]


WAYS = {"one batch": _one_batch, "vmap over params": _over_params, "per example": _per_example}


def gradients_of(cell: Cell[Any, Any], way: str, mode: Mode, params: Any, xs: Array, carry: Any) -> dict[str, Any]:
    """Return the gradient of the sum of all outputs, and of a sum with random weights, by everything."""

    def both(params: Any, xs: Array, mask: Array, d_ys: dict[str, Array], carry: Any) -> Any:
        _, pull = jax.vjp(lambda *v: unroll(cell, v[0], v[1], v[2], mask=mask, gradient=mode)[1], params, xs, carry)
        by_loss = [pull(d_ys[loss]) for loss in LOSSES]
        return tuple(dict(zip(LOSSES, of_one, strict=True)) for of_one in zip(*by_loss, strict=True))

    hidden_size = jax.tree.leaves(carry)[0].shape[-1]
    random = np.random.default_rng(2).normal(size=(*xs.shape[:-1], hidden_size))
    d_ys = {"sum": jnp.ones(random.shape, xs.dtype), "random": jnp.asarray(random, xs.dtype)}
    mask = length_mask(jnp.resize(jnp.array(LENGTHS), (xs.shape[1],)), NUM_STEPS)
    d_params, d_xs, d_carry = WAYS[way](both, params, xs, mask, d_ys, carry)
    return {loss: (d_params[loss], d_xs[loss], d_carry[loss]) for loss in LOSSES}


def reference_gradients(cell: Cell[Any, Any]) -> dict[str, Any]:
    """Return what autodiff of the scan gives in float64."""
    run = jax.jit(lambda *variables: gradients_of(cell, "one batch", "scan", *variables))
    return jax.device_get(run(*problem(cell, "float64")))


def worst_errors(cell: Cell[Any, Any], way: str, how: str, reference: dict[str, Any]) -> dict[str, float]:
    """Return the worst error in float32, by mode and loss."""
    of_all = lambda *variables: {mode: gradients_of(cell, way, mode, *variables) for mode in MODES}
    found = jax.device_get((jax.jit(of_all) if how == "jit" else of_all)(*problem(cell, "float32")))
    return {f"{mode} {loss}": _worst(found[mode][loss], reference[loss]) for mode in MODES for loss in LOSSES}


def _worst(gradient: Any, reference: Any) -> float:
    error = lambda g, r: float(np.linalg.norm(np.ravel(g - r)) / np.linalg.norm(np.ravel(r)))
    return float(np.max(jax.tree.leaves(jax.tree.map(error, gradient, reference))))  # a NaN stays one


def default_precision() -> tuple[float, float]:
    """Return the worst error of an LSTM's float32 gradient with matmuls as this device has them, and pinned.

    Of a layer that is large enough to be given to whatever makes matmuls fast, and less right, here.
    """
    run = jax.jit(lambda *variables: gradients_of(LSTM, "one batch", "bulk", *variables)["random"])
    of = lambda dtype: jax.device_get(run(*problem(LSTM, dtype, batch=64, input_size=128, hidden_size=256)))
    with jax.default_matmul_precision("default"):
        by_default = of("float32")
    reference = of("float64")
    return _worst(by_default, reference), _worst(of("float32"), reference)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Do jobs in threads, in full precision: most of the time goes into compiling, which threads share well."""

    def one(job: Callable[[], Any]) -> Any:
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            return job()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, jobs))


def main() -> int:
    """Print tables and the verdict; return 0 if all gradients agree, else 1."""
    start = time.perf_counter()
    versions = "".join(f"{name} {version(name)}, " for name in ("jax", "jaxlib", "numpy"))
    print(f"jaxlstm {jaxlstm.__version__}, {versions}Python {python_version()}")
    print("devices: " + ", ".join(f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()))
    print(
        "\nThe gradient of an LSTM by all roads: relative error against autodiff of the scan, in float64.\n"
        f"{NUM_STEPS} steps, batch {BATCH} of lengths {LENGTHS}, {INPUT_SIZE} features, {HIDDEN_SIZE} units.\n"
    )
    pairs = [*((cell, "float64") for cell in CELLS), (LSTM, "float32")]
    ways = [(cell, way, how) for cell in CELLS for way in list(WAYS)[1:] for how in ("jit", "eager")]
    references = dict(
        zip(CELLS, together([functools.partial(reference_gradients, cell) for cell in CELLS]), strict=True)
    )
    jobs: list[Callable[[], Any]] = [
        *(functools.partial(compare, *pair) for pair in pairs),
        *(functools.partial(worst_errors, *way, references[way[0]]) for way in ways),
    ]
    found = together([*jobs, default_precision])
    comparisons = {(cell.name, dtype): own for (cell, dtype), own in zip(pairs, found, strict=False)}
    by_way = {
        (cell.name, f"{way}, {how}"): own for (cell, way, how), own in zip(ways, found[len(pairs) :], strict=False)
    }
    print(report(comparisons, by_way, *found[-1]))
    lines = disagreements(comparisons, by_way)
    print(f"\n{time.perf_counter() - start:.0f} s")
    print(*lines, "DISAGREE: do not trust gradients on this machine." if lines else "AGREE", sep="\n")
    return 1 if lines else 0


def report(
    comparisons: dict[tuple[str, str], Comparison],
    by_way: dict[tuple[str, str], dict[str, float]],
    by_default: float,
    pinned: float,
) -> str:
    """Return the tables as text."""
    lines = [comparison_table(comparisons["LSTM", "float64"]), "\nThe worst of all weights and gates:\n"]
    for (cell, dtype), found in comparisons.items():
        worst = {road: np.max(list(of_road.values())) for road, of_road in found.errors.items() if road != "scan"}
        lines.append(f"{cell:10} {dtype}   " + "   ".join(f"{road} {error:.0e}" for road, error in worst.items()))
    lines.append("\nThe ways a gradient is used, in float32, against autodiff of the scan in float64:\n")
    lines.append(" " * 36 + "  ".join(f"{mode + ' ' + loss:>11}" for mode in MODES for loss in LOSSES))
    for (cell, way), errors in by_way.items():
        lines.append(f"{cell:10} {way:25}" + "  ".join(f"{error:11.0e}" for error in errors.values()))
    lines.append(
        f"\nAn LSTM's gradient is {pinned:.0e} from float64 with matmuls pinned to float32, {by_default:.0e} with them "
        "as they are here by default."
    )
    if not by_default <= 10 * pinned:
        lines.append('TF32, or bfloat16: jax.default_matmul_precision("highest") brings the digits back.')
    return "\n".join(lines)


def disagreements(
    comparisons: dict[tuple[str, str], Comparison], by_way: dict[tuple[str, str], dict[str, float]]
) -> list[str]:
    """Return a line for every error above what is allowed; a NaN is one."""
    of_roads = [
        f"{cell} {dtype}: {road} departs in {departure.block}: {departure.error:.1e}"
        for (cell, dtype), found in comparisons.items()
        for road, departure in found.departures.items()
        if departure is not None
    ]
    of_ways = [
        f"{cell} {way}, {name}: {error:.1e}, allowed {TOLERANCE:.0e}"
        for (cell, way), errors in by_way.items()
        for name, error in errors.items()
        if not error <= TOLERANCE
    ]
    return of_roads + of_ways


if __name__ == "__main__":
    sys.exit(main())
