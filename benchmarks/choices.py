"""Does each choice in `jaxlstm/tuning.py` earn its place?

Each choice is removed by itself. The plain scan and the fifteen lines everyone writes run alongside. All programs take
turns in one process, in a new order every round; several processes are started, because the same program can be a tenth
slower in one process than in another. The result holds, per shape, the time without a choice divided by the time with
all of them: medians and minima over all rounds.

    python -m benchmarks.choices
"""

import functools
import json
import logging
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import Array

from benchmarks.benchmark import SHAPES
from benchmarks.peers import Shape, measure, scan_lstm
from experiments.harness import devices, runs
from jaxlstm import LSTM, Bulk, LSTMParams, LSTMState
from jaxlstm.bulk import How, run, run_in_bulk
from jaxlstm.masks import Steps
from jaxlstm.tuning import make_plans

# How each plan differs from the library's own, on a CPU and on other platforms.
ON_A_CPU: dict[str, dict[str, Any]] = {
    "nothing": {},
    "blocks": {"block_size": None},
    "merged axes": {"merged_axes": 0},
    "kept gates": {"keep_gates": False},
    "pieces of z": {"pieces": 0},
    "closed form and kept gates": {"closed_form": False, "keep_gates": False},  # only a closed form reads kept gates
}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "several steps at a time": {"unroll": 1},
    "blocks": {"block_size": None},
    "gates computed again": {"keep_gates": True},
    "z before the loop": {"pieces": 0},
    "closed form": {"closed_form": False},
}
CPU = jax.default_backend() == "cpu"
WITHOUT = ON_A_CPU if CPU else ELSEWHERE
KINDS = ("forward", "gradient")

log = logging.getLogger("choices")

Run = Callable[[LSTMParams, Array], Array]


def by_plan(params: LSTMParams, xs: Array, *, without: str, rule: bool = True) -> Array:
    """Run the library's LSTM by its own plan without one choice."""
    carry: LSTMState = LSTM.initial_carry(params, xs.shape[1:2])
    plans = make_plans(LSTM, params, Steps(xs), carry, Bulk())
    plan = (plans.on_a_cpu if CPU else plans.elsewhere)._replace(**WITHOUT[without])
    return (run_in_bulk if rule else run)(How(LSTM, plan), params, Steps(xs), carry, None)[1]


RUNS: dict[str, Run] = {name: functools.partial(by_plan, without=name) for name in WITHOUT}
RUNS |= {"(plain scan)": functools.partial(by_plan, without="nothing", rule=False), "(fifteen lines)": scan_lstm}


def timed(shape: Shape, rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Return the seconds per call of every program at one shape, by kind and name."""
    num_steps, batch, input_size, hidden = shape
    keys = jax.random.split(jax.random.key(0), 3)
    params = LSTM.init(keys[0], input_size, hidden)
    xs = jax.random.normal(keys[1], (num_steps, batch, input_size), "float32")
    weight = jax.random.normal(keys[2], (num_steps, batch, hidden), "float32")

    def loss(run: Run, params: LSTMParams, xs: Array) -> Array:
        return (run(params, xs) * weight).sum()

    calls = {}
    for name, run_ in RUNS.items():
        calls["forward", name] = jax.jit(run_)
        calls["gradient", name] = jax.jit(jax.grad(functools.partial(loss, run_), (0, 1)))

    def call(kind: str, name: str) -> None:
        jax.block_until_ready(calls[kind, name](params, xs))

    for kind, name in calls:
        call(kind, name)  # compile
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in RUNS} for kind in KINDS}
    order = random.Random(0)
    for _ in range(rounds):
        for kind, name in order.sample(list(calls), len(calls)):
            times[kind][name].append(measure(functools.partial(call, kind, name), seconds))
    return times


def ratios(starts: list[dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return time without a choice over time with all of them: by kind and name, medians and minima."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        every = {name: [t for start in starts for t in start[kind][name]] for name in RUNS}
        out[kind] = {
            name: {
                "median": statistics.median(times) / statistics.median(every["nothing"]),
                "min": min(times) / min(every["nothing"]),
            }
            for name, times in every.items()
        }
    return out


def table(result: dict[str, Any]) -> str:
    """Return the geometric means over all shapes as text."""
    lines = [f"{'time without, over time with':28}  gradient     forward       (medians, minima)"]
    names = next(iter(result["shapes"].values()))["gradient"]
    for name in names:
        if name == "nothing":
            continue
        cells = []
        for kind in ("gradient", "forward"):
            means = [
                math.exp(statistics.fmean(math.log(shape[kind][name][of]) for shape in result["shapes"].values()))
                for of in ("median", "min")
            ]
            cells.append(f"{means[0]:.2f}, {means[1]:.2f}")
        lines.append(f"{name:28}  {'   '.join(cells)}")
    return "\n".join(lines)


def main(*, workdir: str | None = None, starts: int = 2, rounds: int = 5, seconds: float = 0.12) -> dict[str, Any]:
    """Measure all choices and print the table.

    Args:
      workdir: where the result goes; default a new folder in runs/.
      starts: processes, one after another.
      rounds: turns of every program in a process.
      seconds: of one turn.
    """
    folder = runs.open_folder("choices", workdir, {"starts": starts, "rounds": rounds, "seconds": seconds})
    found: dict[str, list[Any]] = {}
    for _ in range(starts):
        for shape in SHAPES:
            command = [sys.executable, "-m", "benchmarks.choices", json.dumps([shape, rounds, seconds])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(", ".join(map(str, shape)), []).append(json.loads(done.stdout))
            log.info("%s done", shape)
    result = {
        "config": {"starts": starts, "rounds": rounds, "seconds": seconds},
        "device": devices.found(),
        "versions": runs.versions(),
        "shapes": {shape: ratios(of_shape) for shape, of_shape in found.items()},
    }
    runs.write_json(Path(folder) / "result.json", result)
    log.info("%s\n%s", table(result), Path(folder) / "result.json")
    return result


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        print(json.dumps(timed(*json.loads(sys.argv[1]))))
    else:
        runs.cli("choices", main)
