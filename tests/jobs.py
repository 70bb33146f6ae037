"""Jobs as their users run them: the main job made small, a corpus for it, and a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import checkpoints, runs

ROOT = Path(__file__).parents[1]
# The environment of a job that is not watched for leaked tracers, which would have it trace everything anew.
UNCHECKED = {"JAX_CHECK_TRACER_LEAKS": "0"}
SMALL = [
    f"--{name}={value}"
    for name, value in {
        "learning-rate": 0.02, "hidden-size": 16, "batch-size": 8, "seq-len": 12, "steps": 110, "dropout": 0.2,
        "block": 50,
    }.items()
]  # fmt: skip


def write_corpus(path):
    # U+2028 is a line break to Python, and none to JSON.
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "naïve.", "\u2028"], 4000)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def arguments(module, *args):
    return [sys.executable, "-m", f"experiments.{module}", *map(str, args)]


def start(module, *args, **options):
    """Start a job that hears Ctrl-C, as in a terminal: one in the background of a script was told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # inherited
    try:
        return subprocess.Popen(arguments(module, *args), cwd=ROOT, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def command(module, *args, prefix=(), environment=(), **options):
    return subprocess.run(
        [*prefix, *arguments(module, *args)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **dict(environment)}, check=False, **options,
    )  # fmt: skip


def said(done):
    """Return the one line with which a command refused."""
    assert done.returncode == 1 and "Traceback" not in done.stdout, done.stderr[-3000:]
    (line,) = done.stderr.splitlines()
    return line


def outcome(folder):
    """Return all that a run of char_lm has to say, but for where it was and how fast: the state to the last bit."""
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
    """Return what a checkpoint holds, whatever state that is."""
    like = {}
    for name, described in checkpoint.leaves.items():
        dtype, _, shape = described.partition("[")
        is_key = dtype.startswith("key")
        like[name] = jax.random.key(0) if is_key else jax.ShapeDtypeStruct(json.loads("[" + shape), dtype)
    return checkpoints.restore(checkpoint, like)


def bits(tree):
    """Return every leaf's dtype, shape and bytes, by its path; a typed key's are those of its data."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    data = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    leaves = jax.tree.leaves_with_path(tree)
    return {name(path): (str(leaf.dtype), leaf.shape, np.asarray(data(leaf)).tobytes()) for path, leaf in leaves}
