"""How fast is it, side by side with what people use?

Forward, and gradient by parameters and inputs, of one LSTM layer against Flax, Equinox, Haiku, Keras, torch and ONNX
Runtime, on the same weights, each in a process of its own; their results are compared before anything is timed. All
take turns in every round, in a new order. All are started anew a few times, since the same program is up to a tenth
slower in one process than in another. What counts is the ratio of medians. Expect a gradient some 1.3 times as fast as
the fastest other JAX library in the geometric mean, and twice as fast on long sequences of small layers.
"""

import contextlib
import json
import logging
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import devices, plots, runs
from experiments.peers import OF_JAX, PEERS, Shape

SHAPES: tuple[Shape, ...] = (
    (100, 32, 64, 64),
    (100, 64, 128, 256),
    (100, 64, 512, 512),
    (1000, 16, 32, 128),
    (100, 1, 64, 64),
    (64, 128, 64, 1024),
)
KINDS = ("forward", "gradient")
# What costs are measured at.
MEMORY_OF: dict[str, Any] = {"batch": 16, "input_size": 256, "hidden": 256, "lengths": [1000, 2000]}
COMPILED: dict[str, Any] = {"batch": 16, "input_size": 64, "hidden": 64, "lengths": [10, 10_000]}
DOUBLED: Shape = (10_000, 1, 8, 8)
TRAINED: Shape = (100, 64, 128, 256)
STREAMED: dict[str, Any] = {"input_size": 64, "hidden": 64, "streams": [1, 64, 1024, 8192]}
SPREAD: tuple[Shape, ...] = ((100, 32, 64, 64), (100, 64, 128, 256))
TOLERANCE = 1e-4  # relative, float32, over a thousand steps

log = logging.getLogger("benchmark")


class Peer:
    """A process that times one library, or that says what jaxlstm costs."""

    def __init__(self, name: str, module: str = "experiments.peers"):
        command = [sys.executable, "-m", module, name]
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )  # fmt: skip
        self.about = self._answer()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # some libraries print on their own
                return dict(json.loads(line))
        self.errors.seek(0)
        last = self.errors.read().strip().rpartition("\n")[2]
        raise OSError(f"the process of {self.name} has ended: {last}")


@contextlib.contextmanager
def processes(names: tuple[str, ...]) -> Iterator[dict[str, Peer]]:
    """Start the libraries that are installed; the others are skipped with a line."""
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
    """Time one shape: every library takes its turn in every round. Return all times, and each library's temporaries.

    Each round has an order of its own: the threads of some libraries go on spinning into the turn of the next.

    Raises:
      ValueError: a library's results are not those of the first.
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
    """Summarise the times of one shape over all starts of the processes."""
    of_kind = lambda kind: {name: [t for start in starts for t in start[kind][name]] for name in starts[0][kind]}
    spread = lambda times: {"min": min(times), "median": statistics.median(times), "max": max(times)}
    summaries = {kind: {name: spread(times) for name, times in of_kind(kind).items()} for kind in KINDS}
    return {"shape": shape, "temporaries": starts[0]["temporaries"], **summaries}


def compare(peers: dict[str, Peer], shape: Shape) -> None:
    """Check that all compute the same."""
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
                if not error < TOLERANCE:
                    raise ValueError(f"benchmark: {what} of {name} differs from {first}'s by {error:.1e} at {shape}.")


def own_costs(rounds: int, seconds: float) -> dict[str, Any]:
    """Ask what jaxlstm costs beside the times: see `experiments.costs`."""
    with Peer("1", "experiments.costs") as one, Peer("2", "experiments.costs") as two:
        # No process of its own for each: the memory and compile times of one program do not hang on another's.
        costs: dict[str, Any] = {
            "temporaries": one.ask(measure="temporaries", **MEMORY_OF),
            "compiling": one.ask(measure="compiling", **COMPILED, repeats=rounds),
            "doubling": one.ask(measure="doubling", shape=DOUBLED, rounds=rounds, seconds=seconds),
            "training": one.ask(measure="training", shape=TRAINED, rounds=rounds, seconds=seconds),
            "streaming": one.ask(measure="streaming", **STREAMED, seconds=4 * seconds),
            "matmul": one.ask(measure="matmul", seconds=5 * seconds),
            "devices": {},
        }
        over = ((one, "jaxlstm"), (two, "jaxlstm"), (two, "Flax linen"))
        for shape in SPREAD:
            asked = {"measure": "sharded", "shape": shape, "seconds": seconds}
            times = [
                [process.ask(library=library, **asked)["seconds"] for process, library in over] for _ in range(rounds)
            ]
            costs["devices"][", ".join(map(str, shape))] = list(map(statistics.median, zip(*times, strict=True)))
    return costs


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def ratios(row: dict[str, Any], kind: str) -> dict[str, float]:
    """Return the times of others over jaxlstm's, medians: the fastest JAX library's, and torch's and ONNX Runtime's."""
    medians = {name: own["median"] for name, own in row[kind].items()}
    out = {}
    if of_jax := [medians[name] for name in OF_JAX if name in medians]:
        out["fastest JAX library"] = min(of_jax) / medians["jaxlstm"]
    for name in ("torch", "ONNX Runtime", "jaxlstm, scan"):
        if name in medians:
            out[name] = medians[name] / medians["jaxlstm"]
    return out


def table(result: dict[str, Any]) -> str:
    """Return the README's table of a result: how many times as long the others take."""
    columns = [("gradient", "fastest JAX library"), ("gradient", "torch"), ("forward", "fastest JAX library"),
               ("forward", "torch"), ("forward", "ONNX Runtime")]  # fmt: skip
    lines = [
        "| T, B, I, H | " + " | ".join(f"{kind}: {name}" for kind, name in columns) + " | jaxlstm's gradient |",
        "|---" * (len(columns) + 2) + "|",
    ]
    found: dict[Any, list[float]] = {column: [] for column in columns}
    for row in result["shapes"]:
        cells = []
        for kind, name in columns:
            ratio = ratios(row, kind).get(name)
            found[kind, name] += [] if ratio is None else [ratio]
            cells.append("" if ratio is None else f"{ratio:.2f}")
        time = f"{1e3 * row['gradient']['jaxlstm']['median']:.3g} ms"
        lines.append(f"| {', '.join(map(str, row['shape']))} | " + " | ".join([*cells, time]) + " |")
    means = [f"**{geometric_mean(own):.2f}**" if own else "" for own in found.values()]
    lines.append("| geometric mean | " + " | ".join([*means, ""]) + " |")
    return "\n".join(lines)


def floors(result: dict[str, Any], kind: str) -> list[float]:
    """Return, shape by shape, the time over that of the layer's matmuls at the rate of a large one."""
    out = []
    for row in result["shapes"]:
        num_steps, batch, input_size, hidden = row["shape"]
        operations = 2 * num_steps * batch * 4 * hidden * (input_size + hidden) * (1 if kind == "forward" else 3)
        out.append(row[kind]["jaxlstm"]["median"] * result["costs"]["matmul"]["rate"] / operations)
    return out


def costs_table(result: dict[str, Any]) -> str:
    """Return the README's table of costs."""
    costs = result["costs"]
    named = lambda values, form: ", ".join(f"{name} {form(value)}" for name, value in values.items())
    few, many = MEMORY_OF["lengths"]
    slope = lambda sizes: f"{(sizes[1] - sizes[0]) / (many - few) / 1024:.1f}"
    sizes = {name: costs["temporaries"][name] for name in ("scan", "bulk", "chunked")}
    of = "B={batch}, I={input_size}, H={hidden}"
    rate = f"{costs['matmul']['rate'] / 1e9:.0f} GFLOP/s"
    lines = [
        ("", ""),
        ("---", "---"),
        *(
            (f"{kind}: time over that of its matmuls at {rate}, shape by shape", ", ".join(f"{v:.1f}" for v in found))
            for kind, found in ((kind, floors(result, kind)) for kind in KINDS)
        ),
        (
            f"temporaries of the gradient at T={many}, {of.format(**MEMORY_OF)}, MB",
            named(sizes, lambda v: f"{v[1] / 1e6:.0f}"),
        ),
        ("and for every further step, KiB", named(sizes, slope)),
        (
            f"from Python to a compiled gradient, {of.format(**COMPILED)}, at T={COMPILED['lengths'][0]} "
            f"and T={COMPILED['lengths'][1]}, s",
            named(costs["compiling"], lambda v: f"{v[0]:.2f} and {v[1]:.2f}"),
        ),
        (
            "time at 2T over time at T: T={}, B={}, I={}, H={}".format(*DOUBLED),
            named(costs["doubling"], lambda v: f"{v:.2f}"),
        ),
        (
            "an Adam step at T={}, B={}, I={}, H={}, ms".format(*TRAINED),
            named(costs["training"], lambda v: f"{1e3 * v:.0f}"),
        ),
        *(
            (
                f"gradient at {shape}: batch over one device, over two, Flax linen's over two, ms",
                ", ".join(f"{1e3 * seconds:.1f}" for seconds in times),
            )
            for shape, times in costs["devices"].items()
        ),
        *(
            (
                f"one step of {int(streams):,} stream{'s' * (streams != '1')}, I={STREAMED['input_size']}, "
                f"H={STREAMED['hidden']}, a call each: median and p99, µs; steps a second",
                f"{1e6 * times['median']:.0f}, {1e6 * times['p99']:.0f}; {int(streams) / times['median']:,.0f}",
            )
            for streams, times in costs["streaming"].items()
        ),
    ]
    return "\n".join(f"| {what} | {value} |" if what != "---" else "|---|---|" for what, value in lines)


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
    """Measure, draw, and print the table.

    Args:
      workdir: where the result goes; default a new folder in runs/.
      starts: of every library's process; one has its luck with where its memory lies.
      rounds: turns of every library at every shape after a start; for the medians to mean something, five in all.
      seconds: of one turn.
      shapes: T, B, I, H.
      peers: the libraries, by name.
      costs: also memory, compile times, growth with T, a call's share, more devices.
    """
    if unknown := [name for name in peers if name not in PEERS]:
        raise SystemExit(f"benchmark: peers must be of {', '.join(PEERS)}; got {', '.join(unknown)}.")
    config = {"starts": starts, "rounds": rounds, "seconds": seconds, "shapes": shapes, "peers": peers, "costs": costs}
    folder = runs.open_folder("benchmark", workdir, config)
    result: dict[str, Any] = {
        "config": config,
        "device": devices.found(),
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
                runs.write_json(folder / "result.json", result)  # what is measured stays, also if the rest is stopped
    for row in result["shapes"]:
        log.info("%s: gradient %s", row["shape"], {k: round(v, 2) for k, v in ratios(row, "gradient").items()})
    tables = [table(result)]
    if costs:
        log.info("what it costs beside: memory, compiling, growth; a minute or two")
        result["costs"] = own_costs(starts * rounds, seconds)
        runs.write_json(folder / "result.json", result)
        tables.append(costs_table(result))
    picture = plots.benchmark(folder / "benchmark.png", result)
    log.info("%s\n\n%s\n%s", "\n\n".join(tables), folder / "result.json", picture)
    return result


if __name__ == "__main__":
    runs.cli("benchmark", main)
