"""Run experiments as their users do: the main experiment made small, a corpus for it, and separate processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import checkpoints, runs

ROOT = Path(__file__).parents[1]
# Turns off the check for leaked tracers, which would make every process trace all functions anew.
UNCHECKED = {"JAX_CHECK_TRACER_LEAKS": "0"}
SMALL = [
    f"--{name}={value}"
    for name, value in {
        "learning-rate": 0.02, "hidden-size": 16, "batch-size": 8, "seq-len": 12, "steps": 110, "dropout": 0.2,
        "block": 50,
    }.items()
]  # fmt: skip


def write_corpus(path):
    # Python treats U+2028 as a line break, JSON does not.
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "naïve.", "\u2028"], 4000)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def arguments(module, *args):
    """Return the command line for a module: `benchmarks.peers`, or `char_lm` for `experiments.char_lm`."""
    return [sys.executable, "-m", module if "." in module else f"experiments.{module}", *map(str, args)]


def start(module, *args, **options):
    """Start a process that reacts to Ctrl-C, as in a terminal, even if the tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the new process inherits this
    try:
        return subprocess.Popen(arguments(module, *args), cwd=ROOT, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def command(module, *args, prefix=(), environment=(), **options):
    """Run a module to its end and capture its output."""
    return subprocess.run(
        [*prefix, *arguments(module, *args)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **dict(environment)}, check=False, **options,
    )  # fmt: skip


def said(done):
    """Return the one line in which a command reported an error."""
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stderr[-3000:]
    (line,) = done.stderr.splitlines()
    return line


def outcome(folder):
    """Return everything a run of char_lm wrote, except its folder and speed; the state as bits."""
    rows = runs.read_metrics(folder)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for row in [*rows, *result["evaluations"]]:
        row.pop("characters_per_second", None)
    result["config"] = {name: value for name, value in result["config"].items() if name not in runs.FREE}
    newest = next(checkpoints.intact(folder / "checkpoints"))
    return rows, result, newest.step, bits_of(newest)


def bits_of(checkpoint):
    """Return the bits of a checkpoint."""
    return bits(state_of(checkpoint))


def state_of(checkpoint):
    """Return the state in a checkpoint, whatever its structure."""
    like = {}
    for name, described in checkpoint.leaves.items():
        dtype, _, shape = described.partition("[")
        is_key = dtype.startswith("key")
        like[name] = jax.random.key(0) if is_key else jax.ShapeDtypeStruct(json.loads("[" + shape), dtype)
    return checkpoints.restore(checkpoint, like)


def bits(tree):
    """Return the dtype, shape and bytes of every leaf by its path; a typed key's bytes are those of its data."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found[jax.tree_util.keystr(path, simple=True, separator=".")] = (str(leaf.dtype), leaf.shape, data.tobytes())
    return found
