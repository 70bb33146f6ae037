"""What do the compilers for accelerators make of a gradient, seen from a machine without one?

XLA compiles for TPUs and NVIDIA GPUs without the hardware. No time is measured: the result is what the compiler says of
its program, the memory for temporaries and, on a GPU, how many kernels it starts.

    pip install libtpu 'jax[cuda12]'     # one of them is enough
    python -m benchmarks.ahead
"""

import functools
import logging
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from benchmarks.benchmark import SHAPES
from benchmarks.peers import Shape, scan_lstm
from experiments.harness import runs
from jaxlstm import LSTM, LSTMParams, Scan, unroll

# NVIDIA's data sheet, as XLA asks for it.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  l2_cache_size: 52428800  memory_bandwidth: 3352320000000  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# By device: the package of its compiler, and how JAX describes it.
DEVICES: dict[str, tuple[str, dict[str, Any]]] = {
    "TPU v5e": ("libtpu", {"platform": "tpu", "topology_name": "v5e:2x2"}),
    "NVIDIA H100": (
        "jax-cuda12-pjrt",
        {"platform": "cuda", "topology_name": "h100", "target_config": H100, "topology": "1x1x1"},
    ),
}
LARGE: Shape = (1024, 64, 1024, 1024)
# Instructions of a compiled program that start no kernel.
FREE = set("parameter constant tuple get-tuple-element bitcast while call conditional after-all".split())

log = logging.getLogger("ahead")

Run = Callable[[LSTMParams, Array], Array]
RUNS: dict[str, Run] = {
    "jaxlstm": lambda params, xs: unroll(LSTM, params, xs)[1],
    "jaxlstm, scan": lambda params, xs: unroll(LSTM, params, xs, gradient=Scan())[1],
    "fifteen lines": scan_lstm,
}


def compiled(run: Run, shape: Shape, dtype: str, device: Any) -> Any:
    """Compile the gradient with respect to parameters and inputs for a device that need not be here."""
    num_steps, batch, input_size, hidden = shape
    typed = functools.partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=SingleDeviceSharding(device))
    params = jax.eval_shape(lambda: LSTM.init(jax.random.key(0), input_size, hidden))
    arguments = [jax.tree.map(lambda leaf: typed(leaf.shape), params), typed((num_steps, batch, input_size))]

    def loss(params: LSTMParams, xs: Array, weight: Array) -> Array:
        return (run(params, xs) * weight).sum()

    # Without a GPU, no kernels can be timed to choose among them.
    options: Any = {"xla_gpu_autotune_level": "0"} if device.platform in ("gpu", "cuda") else {}
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments, typed((num_steps, batch, hidden)))
    return program.compile(compiler_options=options)


def kernels(program: str) -> int:
    """Count the kernels that a compiled GPU program starts, those in loops once per turn."""
    computations = {}
    for text in re.split(r"\n(?=%|ENTRY)", program):
        if name := re.match(r"(?:ENTRY )?%?([\w.-]+) ", text):
            computations["ENTRY" if text.startswith("ENTRY") else name[1]] = text

    @functools.cache
    def count(name: str) -> int:
        total = 0
        for line in computations[name].splitlines()[1:]:
            instruction = re.search(r" = .*?[\s)}\]]([a-z][\w-]*)\(", line)
            if instruction is None:
                continue
            if instruction[1] == "while":
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                body = re.search(r"body=%?([\w.-]+)", line)
                assert turns and body
                total += int(turns[1]) * count(body[1])
            elif instruction[1] == "call":
                called = re.search(r"to_apply=%?([\w.-]+)", line)
                assert called
                total += count(called[1])
            else:
                total += instruction[1] not in FREE
        return total

    return count("ENTRY")


def measured(shape: Shape, dtype: str, device: Any) -> dict[str, dict[str, float]]:
    """Return, for each way of computing the gradient, bytes per unit and step, and kernels per step on a GPU."""
    num_steps, batch, _, hidden = shape
    found: dict[str, dict[str, float]] = {}
    for name, run in RUNS.items():
        program = compiled(run, shape, dtype, device)
        found[name] = {"bytes": program.memory_analysis().temp_size_in_bytes / (num_steps * batch * hidden)}
        if device.platform in ("gpu", "cuda"):
            found[name]["kernels"] = kernels(program.as_text()) / num_steps
    return found


def table(result: dict[str, Any]) -> str:
    """Return the documentation's table."""
    lines = [
        "| compiled for | T, B, I, H | dtype | bytes per unit and step | kernels per step |",
        "|---|---|---|---|---|",
    ]
    for device, rows in result["devices"].items():
        for row in rows:
            pairs = {
                of: [row["found"][name].get(of) for name in ("jaxlstm", "fifteen lines")] for of in ("bytes", "kernels")
            }
            cells = ["" if None in pair else "{:.1f}, {:.1f}".format(*pair) for pair in pairs.values()]
            lines.append(f"| {device} | {', '.join(map(str, row['shape']))} | {row['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(*, workdir: str | None = None, shapes: tuple[Shape, ...] = (LARGE, *SHAPES)) -> dict[str, Any]:
    """Compile for every accelerator whose compiler is installed, and print the table.

    Args:
      workdir: the folder for the result; default a new folder in runs/.
      shapes: T, B, I, H of each shape.
    """
    folder = runs.open_folder("ahead", workdir, {"shapes": shapes})
    result: dict[str, Any] = {"versions": runs.versions(), "devices": {}}
    for name, (package, about) in DEVICES.items():
        try:
            result["versions"][package] = version(package)
        except PackageNotFoundError:
            log.info("%s is skipped: %s is not installed", name, package)
            continue
        device = topologies.get_topology_desc(**about).devices[0]
        cases = [(shape, dtype) for shape in shapes for dtype in ("float32", "bfloat16")]
        result["devices"][name] = [
            {"shape": shape, "dtype": dtype, "found": measured(shape, dtype, device)}
            for shape, dtype in tqdm(cases, desc=name, leave=False)
        ]
    if not result["devices"]:
        raise SystemExit("ahead: no compiler for an accelerator is installed; pip install libtpu or 'jax[cuda12]'.")
    runs.write_json(Path(folder) / "result.json", result)
    log.info("%s\n%s", table(result), Path(folder) / "result.json")
    return result


if __name__ == "__main__":
    jnp.zeros(0)  # starts the backend of this machine, before a compiler for another one is loaded
    runs.cli("ahead", main)
