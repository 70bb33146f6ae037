"""How fast is one LSTM layer of jaxlstm beside the libraries people use?

The benchmark times the forward pass, and the gradient with respect to parameters and inputs, against a plain
`lax.scan`, Flax, Equinox, Haiku, Keras, torch and ONNX Runtime. Every library runs in its own process on the same
weights, and all results are compared before anything is timed. The libraries take turns in every round, in a new random
order. All processes are restarted a few times, since the same program can be a tenth slower in one process than in
another. The table shows ratios of medians. Expect the gradient to be about 1.2 times as fast as the fastest other JAX
library in the geometric mean, and 1.5 times for long sequences in small layers.
"""

import contextlib
import json
import logging
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks import plots
from benchmarks.peers import OF_JAX, PEERS, Shape
from experiments.harness import devices, runs
from experiments.harness.rows import shown

SHAPES: tuple[Shape, ...] = (
    (100, 32, 64, 64),
    (100, 64, 128, 256),
    (100, 64, 512, 512),
    (1000, 16, 32, 128),
    (100, 1, 64, 64),
    (64, 128, 64, 1024),
)
KINDS = ("forward", "gradient")
# The sizes at which costs are measured.
MEMORY_OF: dict[str, Any] = {"batch": 16, "input_size": 256, "hidden": 256, "lengths": [2000, 4000]}
COMPILED: dict[str, Any] = {"batch": 16, "input_size": 64, "hidden": 64, "lengths": [10, 10_000]}
STEP_COMPILED: Shape = (100, 32, 64, 64)
DOUBLED: Shape = (10_000, 1, 8, 8)
TRAINED: Shape = (100, 64, 128, 256)
STREAMED: dict[str, Any] = {"input_size": 64, "hidden": 64, "streams": [1, 64, 1024, 8192]}
ENSEMBLES: tuple[Shape, ...] = ((50, 8, 16, 32), (100, 8, 64, 64), (100, 32, 64, 64))
MEMBERS = 8
SPREAD: tuple[Shape, ...] = ((100, 32, 64, 64), (100, 64, 128, 256))
# Relative, in float32, over a thousand time steps. On a GPU, matmuls round their operands to TF32, as is the default of
# JAX and of torch's LSTM.
TOLERANCE = {"cpu": 1e-4, "gpu": 1e-2}

log = logging.getLogger("benchmark")


class Peer:
    """A process that times one library or measures a cost of jaxlstm."""

    def __init__(self, name: str, module: str = "benchmarks.peers"):
        command = [sys.executable, "-m", module, name]
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - an unread pipe would fill up and block
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )  # fmt: skip
        self.about = self._answer()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send a question and wait for its answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # some libraries print messages of their own
                return dict(json.loads(line))
        self.errors.seek(0)
        last = self.errors.read().strip().rpartition("\n")[2]
        raise OSError(f"the process of {self.name} ended: {last}")


@contextlib.contextmanager
def processes(names: tuple[str, ...]) -> Iterator[dict[str, Peer]]:
    """Start a process for each installed library; log a line for each that is not installed."""
    peers: dict[str, Peer] = {}
    try:
        for name in tqdm(names, desc="starting", file=sys.stderr, leave=False):
            peers[name] = Peer(name)
        for name in [name for name, peer in peers.items() if "absent" in peer.about]:
            log.info("%s is skipped: %s", name, peers[name].about["absent"])
            peers.pop(name).process.kill()
        yield peers
    finally:
        for peer in peers.values():
            peer.process.kill()


def side_by_side(
    peers: dict[str, Peer], shape: Shape, rounds: int, seconds: float, order: random.Random
) -> dict[str, Any]:
    """Time all libraries at one shape, one turn each per round.

    Every round has a random order: threads of some libraries keep spinning into the turn of the next library, and a
    fixed order would always slow down the same one.

    Args:
      peers: the libraries' processes.
      shape: T, B, I, H.
      rounds: the number of turns.
      seconds: the length of a turn.
      order: draws the order of each round.

    Returns:
      Each library's times for each kind, and the size of its gradient's temporaries.

    Raises:
      ValueError: a library's results differ from those of the first library.
    """
    temporaries = {}
    times: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for name, peer in peers.items():
        about = peer.ask(shape=shape)
        temporaries[name] = about["temporaries"]
        for kind in KINDS if about["gradient"] else KINDS[:1]:
            times[kind][name] = []
    compare(peers, shape)
    turns = [(name, kind) for kind, of_kind in times.items() for name in of_kind]
    for _ in tqdm(range(rounds), desc=str(shape), file=sys.stderr, leave=False):
        for name, kind in order.sample(turns, len(turns)):
            times[kind][name].append(peers[name].ask(kind=kind, seconds=seconds)["seconds"])
    return {"temporaries": temporaries, **times}


def summary(shape: Shape, starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the smallest, median and largest time of each library at one shape, over all starts."""
    out = {"shape": shape, "temporaries": starts[0]["temporaries"]}
    for kind in KINDS:
        all_times = {name: [time for start in starts for time in start[kind][name]] for name in starts[0][kind]}
        out[kind] = {
            name: {"min": min(times), "median": statistics.median(times), "max": max(times)}
            for name, times in all_times.items()
        }
    return out


def compare(peers: dict[str, Peer], shape: Shape) -> None:
    """Check that all libraries compute the same results as the first one."""
    tolerance = TOLERANCE.get(jax.default_backend(), max(TOLERANCE.values()))
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, dict[str, np.ndarray]] = {}
        for name, peer in peers.items():
            path = Path(folder) / "results.npz"
            peer.ask(results=str(path))
            results[name] = dict(np.load(path))
        first = next(iter(results))
        for name, own in results.items():
            for what, value in own.items():
                want = results[first][what]
                error = np.linalg.norm(value - want) / np.linalg.norm(want)
                if not error < tolerance:
                    raise ValueError(f"benchmark: {what} of {name} differs from {first}'s by {error:.1e} at {shape}.")


def machine() -> str:
    """Describe the machine: the model of its CPU and the number of its cores, or JAX's name for its accelerator."""
    if jax.default_backend() != "cpu":
        return devices.found()
    with contextlib.suppress(OSError):
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
        if model:
            return f"{model[1]}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def own_costs(rounds: int, seconds: float) -> dict[str, Any]:
    """Measure what jaxlstm costs besides time: see `benchmarks.costs`."""
    with Peer("1", "benchmarks.costs") as one, Peer("2", "benchmarks.costs") as two:
        # All costs on one device share a process: memory and compile time do not depend on the programs before.
        costs: dict[str, Any] = {
            "temporaries": one.ask(measure="temporaries", **MEMORY_OF),
            "compiling": one.ask(measure="compiling", **COMPILED, repeats=rounds),
            "compiling a step": one.ask(measure="compiling_a_step", shape=STEP_COMPILED, repeats=rounds),
            "doubling": one.ask(measure="doubling", shape=DOUBLED, rounds=rounds, seconds=seconds),
            "masked": {
                ", ".join(map(str, shape)): one.ask(measure="masked", shape=shape, rounds=rounds, seconds=seconds)
                for shape in SHAPES
            },
            "ensembles": {
                ", ".join(map(str, shape)): one.ask(
                    measure="ensemble", shape=shape, members=MEMBERS, rounds=rounds, seconds=seconds
                )
                for shape in ENSEMBLES
            },
            "training": one.ask(measure="training", shape=TRAINED, rounds=rounds, seconds=seconds),
            "streaming": one.ask(measure="streaming", **STREAMED, seconds=4 * seconds),
            "matmul": one.ask(measure="matmul", seconds=5 * seconds),
            "devices": {},
        }
        turns = ((one, "jaxlstm"), (two, "jaxlstm"), (two, "Flax linen"))
        for shape in SPREAD:
            question = {"measure": "sharded", "shape": shape, "seconds": seconds}
            times = [
                [process.ask(library=library, **question)["seconds"] for process, library in turns]
                for _ in range(rounds)
            ]
            costs["devices"][", ".join(map(str, shape))] = list(map(statistics.median, zip(*times, strict=True)))
    return costs


# The tables.


def geometric_mean(ratios: list[float]) -> float:
    """Return the geometric mean of some ratios."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def span(values: list[float]) -> str:
    """Return one number, or the range of several machines' numbers: `1.25`, or `1.19 to 1.25`."""
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def ratios(row: dict[str, Any], kind: str) -> dict[str, float]:
    """Return median times divided by jaxlstm's: of the fastest JAX library, the plain scans, torch and ONNX Runtime."""
    medians = {name: own["median"] for name, own in row[kind].items()}
    out = {}
    if of_jax := [medians[name] for name in OF_JAX if name in medians]:
        out["fastest JAX library"] = min(of_jax) / medians["jaxlstm"]
    for name in ("fifteen lines", "torch", "cuDNN by JAX", "ONNX Runtime", "jaxlstm, scan"):
        if name in medians:
            out[name] = medians[name] / medians["jaxlstm"]
    return out


def name_of(result: dict[str, Any]) -> str:
    """Return the machine's name as pages show it: of a GPU, its model alone."""
    return re.sub(r"^1 x gpu \((.*)\)$", r"\1", result["device"])


def by_library(results: list[dict[str, Any]]) -> str:
    """Return a table with the geometric mean over all shapes for every library: its median time over jaxlstm's."""
    names = dict.fromkeys(name for result in results for row in result["shapes"] for name in row["forward"])
    heads = [f"{name_of(result).partition(',')[0]}: {kind}" for result in results for kind in KINDS]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = []
        for result in results:
            for kind in KINDS:
                times = [row[kind][name]["median"] / row[kind]["jaxlstm"]["median"]
                         for row in result["shapes"] if name in row[kind]]  # fmt: skip
                cells.append(f"{geometric_mean(times):.2f}" if len(times) == len(result["shapes"]) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


COLUMNS = [
    ("gradient", "fastest JAX library"),
    ("gradient", "fifteen lines"),
    ("gradient", "torch"),
    ("gradient", "cuDNN by JAX"),
    ("forward", "fastest JAX library"),
    ("forward", "fifteen lines"),
    ("forward", "torch"),
    ("forward", "cuDNN by JAX"),
    ("forward", "ONNX Runtime"),
]


def table(result: dict[str, Any]) -> str:
    """Return the documentation's table of a result: times relative to jaxlstm's, with a column per measured peer."""
    shapes = result["shapes"]
    found = {(kind, name): [ratios(row, kind).get(name) for row in shapes] for kind, name in COLUMNS}
    found = {column: values for column, values in found.items() if any(value is not None for value in values)}
    lines = [
        "| T, B, I, H | " + " | ".join(f"{kind}: {name}" for kind, name in found) + " | jaxlstm's gradient |",
        "|---" * (len(found) + 2) + "|",
    ]
    for n, row in enumerate(shapes):
        cells = ["" if values[n] is None else f"{values[n]:.2f}" for values in found.values()]
        time = f"{shown(1e3 * row['gradient']['jaxlstm']['median'])} ms"
        lines.append(f"| {', '.join(map(str, row['shape']))} | " + " | ".join([*cells, time]) + " |")
    means = [geometric_mean([value for value in values if value is not None]) for values in found.values()]
    lines.append("| geometric mean | " + " | ".join([*(f"**{mean:.2f}**" for mean in means), ""]) + " |")
    return "\n".join(lines)


def floors(result: dict[str, Any], kind: str) -> list[float]:
    """Return, for each shape, jaxlstm's time relative to its matmuls alone at the rate of one large matmul."""
    out = []
    for row in result["shapes"]:
        num_steps, batch, input_size, hidden = row["shape"]
        operations = 2 * num_steps * batch * 4 * hidden * (input_size + hidden) * (1 if kind == "forward" else 3)
        out.append(row[kind]["jaxlstm"]["median"] * result["costs"]["matmul"]["rate"] / operations)
    return out


def costs_table(result: dict[str, Any]) -> str:
    """Return the documentation's table of costs."""
    costs = result["costs"]
    rows = {}
    rate = f"{costs['matmul']['rate'] / 1e9:.0f} GFLOP/s"
    for kind in KINDS:
        rows[f"{kind}: time relative to its matmuls alone at {rate}, for each shape"] = _list(
            floors(result, kind), "{:.1f}"
        )

    few, many = MEMORY_OF["lengths"]
    sizes = {name: costs["temporaries"][name] for name in ("scan", "bulk", "chunked")}
    at = "B={batch}, I={input_size}, H={hidden}"
    rows[f"temporaries of the gradient at T={few}, {at.format(**MEMORY_OF)}, MB"] = _named(
        {name: size[0] / 1e6 for name, size in sizes.items()}, "{:.0f}"
    )
    rows["the same per additional time step, KiB"] = _named(
        {name: (size[1] - size[0]) / (many - few) / 1024 for name, size in sizes.items()}, "{:.1f}"
    )

    short, long = COMPILED["lengths"]
    rows[f"from Python to a compiled gradient, {at.format(**COMPILED)}, at T={short} and T={long}, s"] = _named(
        costs["compiling"], "{0[0]:.2f} and {0[1]:.2f}"
    )
    if "compiling a step" in costs:  # older results lack it
        of_step = "from Python to a compiled Adam step of two masked layers at T={}, B={}, I={}, H={}, s"
        rows[of_step.format(*STEP_COMPILED)] = _named(costs["compiling a step"], "{:.2f}")
    rows["time at 2T divided by time at T: T={}, B={}, I={}, H={}".format(*DOUBLED)] = _named(
        costs["doubling"], "{:.2f}"
    )
    rows["gradient with a mask: time relative to the one without, for each shape"] = _list(
        [times["with"] / times["without"] for times in costs["masked"].values()], "{:.2f}"
    )
    for shape, of_shape in costs["ensembles"].items():
        for what, form, scale in (("seconds", "{:.1f}", 1e3), ("megabytes", "{:.0f}", 1)):
            unit = {"seconds": "ms", "megabytes": "MB of temporaries"}[what]
            rows[f"gradients of {MEMBERS} nets at {shape}, {unit}"] = _named(
                {name: scale * value for name, value in of_shape[what].items()}, form
            )
    rows["an Adam step at T={}, B={}, I={}, H={}, ms".format(*TRAINED)] = _named(
        {name: 1e3 * time for name, time in costs["training"].items()}, "{:.0f}"
    )
    for shape, times in costs["devices"].items():
        rows[f"gradient at {shape}: batch on one device, on two, Flax linen on two, ms"] = _list(
            [1e3 * time for time in times], "{:.1f}"
        )
    for streams, times in costs["streaming"].items():
        number = int(streams)
        name = (
            f"one time step of {number:,} stream{'s' * (number != 1)} per call, I={STREAMED['input_size']}, "
            f"H={STREAMED['hidden']}: median and p99, µs; time steps per second"
        )
        rows[name] = f"{1e6 * times['median']:.0f}, {1e6 * times['p99']:.0f}; {number / times['median']:,.0f}"
    return "\n".join(["|  |  |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _list(values: list[float], form: str) -> str:
    return ", ".join(map(form.format, values))


def _named(values: dict[str, Any], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())


def main(
    *,
    workdir: str | None = None,
    starts: int = 3,
    rounds: int = 2,
    seconds: float = 0.25,
    shapes: tuple[Shape, ...] = SHAPES,
    peers: tuple[str, ...] = tuple(PEERS),
    costs: bool = True,
) -> dict[str, Any]:
    """Time all installed libraries, draw the result and print its tables.

    Args:
      workdir: the folder for the result; default a new folder in runs/.
      starts: how often every process is restarted; where its memory happens to lie changes a program's speed.
      rounds: turns of every library at every shape per start; use five or more in all for stable medians.
      seconds: length of a turn.
      shapes: T, B, I, H of each shape.
      peers: names of the libraries.
      costs: also measure memory, compile times, growth with T, training steps, streaming and two devices.
    """
    if unknown := [name for name in peers if name not in PEERS]:
        raise SystemExit(f"benchmark: --peers must be among {', '.join(PEERS)}; got {', '.join(unknown)}.")
    config = {"starts": starts, "rounds": rounds, "seconds": seconds, "shapes": shapes, "peers": peers, "costs": costs}
    folder = runs.open_folder("benchmark", workdir, config)
    result: dict[str, Any] = {
        "config": config,
        "device": machine(),
        "versions": runs.versions(),
        "shapes": [],
    }
    found: dict[Shape, list[dict[str, Any]]] = {shape: [] for shape in shapes}
    order = random.Random(0)
    for _ in range(starts):
        with processes(peers) as started:
            peers = tuple(started)
            result["versions"] |= {name: peer.about["version"] for name, peer in started.items()}
            for shape in shapes:
                found[shape].append(side_by_side(started, shape, rounds, seconds, order))
                result["shapes"] = [summary(shape, own) for shape, own in found.items() if own]
                runs.write_json(folder / "result.json", result)  # an interrupted benchmark keeps what it has measured
    for row in result["shapes"]:
        log.info("%s: gradient %s", row["shape"], {k: round(v, 2) for k, v in ratios(row, "gradient").items()})
    tables = [table(result)]
    if costs:
        log.info("measuring memory, compile times, growth and streaming: a minute or two")
        result["costs"] = own_costs(starts * rounds, seconds)
        runs.write_json(folder / "result.json", result)
        tables.append(costs_table(result))
    picture = plots.benchmark(folder / "benchmark.png", result)
    log.info("%s\n\n%s\n%s", "\n\n".join(tables), folder / "result.json", picture)
    return result


if __name__ == "__main__":
    runs.cli("benchmark", main)
