"""Check gradients on this machine: `python -m jaxlstm`, or with `--all` more of them.

Compares all methods of `compare_gradients` for the LSTM in float64, and its float32 gradient with its float64 one. With
`--all`, compares the methods for every cell, for the LSTM in float32 too, and checks `gradient="bulk"` and
`gradient="scan"` in float32 in the ways that users call them: with and without jit, for a plain sum and for random
weights, mapped over parameters, and example by example. `--json` prints everything as JSON.
"""

import functools
import json
import os
import platform
import re
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxlstm
from jaxlstm import GRU, LSTM, RNN, Cell, length_mask, unroll
from jaxlstm.diagnostics import Comparison, compare_gradients
from jaxlstm.gradients import Bulk
from jaxlstm.masks import Steps
from jaxlstm.tuning import make_plans

CELLS = (LSTM, GRU, RNN)
Mode = Literal["bulk", "scan"]
Gradients = Callable[..., Any]
MODES: tuple[Mode, ...] = ("bulk", "scan")
LOSSES = ("sum", "random")
NUM_STEPS, BATCH, INPUT_SIZE, HIDDEN_SIZE = 12, 3, 5, 7
LENGTHS = (12, 9, 4)
LARGE = (64, 128, 256)  # batch, features and units of a layer that devices run with their fast matmuls, if any
TOLERANCE = 1e-5  # of float32 against float64


def machine() -> dict[str, Any]:
    """Return the versions, the devices, and the plan by which `unroll` runs a layer of 256 units on them."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text("utf-8"), re.M) if cpuinfo.exists() else None
    params, xs, carry = problem(LSTM, "float32", *LARGE)
    plans = make_plans(LSTM, params, Steps(xs, None, None), carry, Bulk())
    plan = plans.on_a_cpu if jax.default_backend() == "cpu" else plans.elsewhere
    return {
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy")}
        | {"jaxlstm": jaxlstm.__version__, "Python": platform.python_version()},
        "system": platform.platform(),
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
        "plan": plan._asdict(),
    }


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
    xs = jnp.asarray(rng.normal(size=(NUM_STEPS, batch, input_size)), dtype)
    leaves, treedef = jax.tree.flatten(cell.initial_carry(params, (batch,)))
    carry = [jnp.asarray(rng.normal(size=leaf.shape), dtype) for leaf in leaves]
    return params, xs, jax.tree.unflatten(treedef, carry)


def compare(cell: Cell[Any, Any], dtype: str) -> Comparison:
    """Compare all methods for a loss that weights every output at random."""
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(NUM_STEPS, BATCH, HIDDEN_SIZE)), dtype)
    params, xs, carry = problem(cell, dtype)

    def step_loss(y: Array, t: Array) -> Array:
        return (y * weights[t]).sum()

    mask = length_mask(jnp.array(LENGTHS), NUM_STEPS)
    return compare_gradients(cell, params, xs, step_loss, carry=carry, mask=mask, dtype=dtype, by_step=False)


# The ways that users call a gradient. Each returns the gradient of one batch.


def _one_batch(gradients: Gradients, params: Any, *of_batch: Any) -> Any:
    return gradients(params, *of_batch)


def _over_params(gradients: Gradients, params: Any, *of_batch: Any) -> Any:
    several = jax.tree.map(lambda leaf: jnp.stack([0.7 * leaf, leaf]), params)
    each = jax.vmap(gradients, (0, *[None] * len(of_batch)))(several, *of_batch)
    return jax.tree.map(lambda leaf: leaf[1], each)


def _per_example(gradients: Gradients, params: Any, xs: Array, mask: Array, d_ys: Any, carry: Any) -> Any:
    each = jax.vmap(gradients, (None, 1, 1, 1, 0), (0, 1, 0))(params, xs, mask, d_ys, carry)
    return jax.tree.map(functools.partial(jnp.sum, axis=0), each[0]), *each[1:]


WAYS = {"one batch": _one_batch, "vmap over params": _over_params, "per example": _per_example}


def gradients_of(cell: Cell[Any, Any], way: str, mode: Mode, params: Any, xs: Array, carry: Any) -> dict[str, Any]:
    """Return the gradient of the sum of all outputs, and of their sum with random weights, by all variables."""

    def both(params: Any, xs: Array, mask: Array, d_ys: dict[str, Array], carry: Any) -> Any:
        def outputs(params: Any, xs: Array, carry: Any) -> Array:
            return unroll(cell, params, xs, carry, mask=mask, gradient=mode)[1]

        _, pull = jax.vjp(outputs, params, xs, carry)
        by_loss = [pull(d_ys[loss]) for loss in LOSSES]
        return tuple(dict(zip(LOSSES, of_one, strict=True)) for of_one in zip(*by_loss, strict=True))

    hidden_size = jax.tree.leaves(carry)[0].shape[-1]
    random = np.random.default_rng(2).normal(size=(*xs.shape[:-1], hidden_size))
    d_ys = {"sum": jnp.ones(random.shape, xs.dtype), "random": jnp.asarray(random, xs.dtype)}
    mask = length_mask(jnp.resize(jnp.array(LENGTHS), (xs.shape[1],)), NUM_STEPS)
    d_params, d_xs, d_carry = WAYS[way](both, params, xs, mask, d_ys, carry)
    return {loss: (d_params[loss], d_xs[loss], d_carry[loss]) for loss in LOSSES}


def reference_gradients(cell: Cell[Any, Any]) -> dict[str, Any]:
    """Return the gradients by autodiff of the scan in float64."""
    run = jax.jit(functools.partial(gradients_of, cell, "one batch", "scan"))
    return jax.device_get(run(*problem(cell, "float64")))


def worst_errors(cell: Cell[Any, Any], way: str, how: str, reference: dict[str, Any]) -> dict[str, float]:
    """Return the worst error in float32, by mode and loss."""

    def by_mode(*variables: Any) -> dict[str, Any]:
        return {mode: gradients_of(cell, way, mode, *variables) for mode in MODES}

    run = jax.jit(by_mode) if how == "jit" else by_mode
    found = jax.device_get(run(*problem(cell, "float32")))
    return {f"{mode} {loss}": _worst(found[mode][loss], reference[loss]) for mode in MODES for loss in LOSSES}


def _worst(gradient: Any, reference: Any) -> float:
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True)
    errors = [np.linalg.norm(np.ravel(g - r)) / np.linalg.norm(np.ravel(r)) for g, r in pairs]
    return float(np.max(errors))  # Python's max could lose a NaN


def default_precision() -> tuple[float, float]:
    """Return the worst error of an LSTM's float32 gradient: with the device's default matmuls, and with float32 ones.

    The layer is large enough for the device to use its fast but less accurate matmuls, if it has any.
    """

    @jax.jit
    def run(*variables: Any) -> Any:
        return gradients_of(LSTM, "one batch", "bulk", *variables)["random"]

    def gradient(dtype: str) -> Any:
        return jax.device_get(run(*problem(LSTM, dtype, *LARGE)))

    with jax.default_matmul_precision("default"):
        by_default = gradient("float32")
    reference = gradient("float64")
    return _worst(by_default, reference), _worst(gradient("float32"), reference)


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run jobs in threads, in full precision: most of the time goes into compiling, which runs well in parallel."""

    def run(job: Callable[[], Any]) -> Any:
        # The settings belong to a thread, so each must make its own.
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            return job()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, jobs))


def main(arguments: Sequence[str] = ()) -> int:
    """Print tables and the verdict; return 0 if all gradients agree, else 1."""
    parser = ArgumentParser("python -m jaxlstm", description="Check the gradients of jaxlstm on this machine.")
    parser.add_argument(
        "--all", action="store_true", help="check every cell, and every way of calling a gradient: half a minute"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    flags = parser.parse_args(arguments)
    start, here = time.perf_counter(), machine()
    if not flags.json:
        print(about(here))
    pairs: list[tuple[Cell[Any, Any], str]] = [(LSTM, "float64")]
    ways: list[tuple[Cell[Any, Any], str, str]] = []
    references: dict[Cell[Any, Any], Any] = {}
    if flags.all:
        pairs = [*((cell, "float64") for cell in CELLS), (LSTM, "float32")]
        ways = [(cell, way, how) for cell in CELLS for way in list(WAYS)[1:] for how in ("jit", "eager")]
        found = together([functools.partial(reference_gradients, cell) for cell in CELLS])
        references = dict(zip(CELLS, found, strict=True))
    jobs: list[Callable[[], Any]] = [
        *(functools.partial(compare, *pair) for pair in pairs),
        *(functools.partial(worst_errors, *way, references[way[0]]) for way in ways),
    ]
    found = together([*jobs, default_precision])
    comparisons = {(cell.name, dtype): own for (cell, dtype), own in zip(pairs, found, strict=False)}
    by_way = {
        (cell.name, f"{way}, {how}"): own for (cell, way, how), own in zip(ways, found[len(pairs) :], strict=False)
    }
    lines, seconds = disagreements(comparisons, by_way), time.perf_counter() - start
    if flags.json:
        errors = {" ".join(pair): own.errors for pair, own in comparisons.items()}
        errors |= {" ".join(way): own for way, own in by_way.items()}
        by_default, pinned = found[-1]
        of_float32 = {"default matmuls": by_default, "float32 matmuls": pinned}
        everything = {**here, "errors": errors, "float32": of_float32, "disagreements": lines, "seconds": seconds}
        print(json.dumps(jax.tree.map(_for_json, everything), indent=1, allow_nan=False))
    else:
        print(report(comparisons, by_way, *found[-1]))
        print(f"\n{seconds:.0f} s")
        print(*lines, "DISAGREE: do not trust gradients on this machine." if lines else "AGREE", sep="\n")
    return 1 if lines else 0


def _for_json(value: Any) -> Any:
    """Return a value as JSON has it; JSON has no NaN and no infinity, so they become text."""
    if isinstance(value, float | np.floating | np.ndarray | jax.Array):
        return float(value) if np.isfinite(value) else str(float(value))
    return value


def about(here: dict[str, Any]) -> str:
    """Return the head of the report."""
    versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("jaxlstm", "jax", "jaxlib", "numpy", "Python"))
    plan = ", ".join(f"{name} {value}" for name, value in here["plan"].items())
    return (
        f"{versions}\ndevices: {', '.join(here['devices'])}\n"
        f"{here['system']}, {here['processor']}, {here['cores']} cores\n"
        f"plan for {NUM_STEPS} steps, batch {LARGE[0]}, {LARGE[1]} features, {LARGE[2]} units: {plan}\n\n"
        "The gradient of an LSTM by all methods: relative error against autodiff of the scan, in float64.\n"
        f"{NUM_STEPS} steps, batch {BATCH} of lengths {LENGTHS}, {INPUT_SIZE} features, {HIDDEN_SIZE} units.\n"
    )


def report(
    comparisons: dict[tuple[str, str], Comparison],
    by_way: dict[tuple[str, str], dict[str, float]],
    by_default: float,
    pinned: float,
) -> str:
    """Return the tables as text."""
    lines = [str(comparisons["LSTM", "float64"]), "\nThe worst error over all weights and gates:\n"]
    for (cell, dtype), found in comparisons.items():
        worst = {method: np.max(list(errors.values())) for method, errors in found.errors.items() if method != "scan"}
        lines.append(f"{cell:10} {dtype}   " + "   ".join(f"{method} {error:.0e}" for method, error in worst.items()))
    if by_way:
        lines.append("\nThe ways that users call a gradient, in float32, against autodiff of the scan in float64:\n")
        lines.append(" " * 36 + "  ".join(f"{mode + ' ' + loss:>11}" for mode in MODES for loss in LOSSES))
    for (cell, way), errors in by_way.items():
        lines.append(f"{cell:10} {way:25}" + "  ".join(f"{error:11.0e}" for error in errors.values()))
    lines.append(
        f"\nAn LSTM's float32 gradient differs from float64 by {pinned:.0e} with matmuls pinned to float32, and by "
        f"{by_default:.0e} with this device's default matmuls."
    )
    if not by_default <= 10 * pinned:
        lines.append('The default is TF32 or bfloat16; jax.default_matmul_precision("highest") restores the digits.')
    return "\n".join(lines)


def disagreements(
    comparisons: dict[tuple[str, str], Comparison], by_way: dict[tuple[str, str], dict[str, float]]
) -> list[str]:
    """Return a line for every error above its tolerance; a NaN counts as one."""
    of_methods = [
        f"{cell} {dtype}: {method} departs in {departure.block}: {departure.error:.1e}"
        for (cell, dtype), found in comparisons.items()
        for method, departure in found.departures.items()
        if departure is not None
    ]
    of_ways = [
        f"{cell} {way}, {name}: {error:.1e}, allowed {TOLERANCE:.0e}"
        for (cell, way), errors in by_way.items()
        for name, error in errors.items()
        if not error <= TOLERANCE
    ]
    return of_methods + of_ways


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
