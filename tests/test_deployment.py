"""docs/deployment.md: what it saves runs in a process that has no jaxlstm, for any batch and any number of steps."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import oracles

PAGE = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
# Calls of other sizes than the page's, after the page's own program.
MORE = """
import sys
import numpy as np
for name, (T, B) in (("one", (1, 1)), ("many", (7, 4))):
    given = np.load(folder / f"{name}.npz")
    ys = jax.jit(saved_model.call)(given["xs"], given["lengths"])
    carries = [(jnp.zeros((B, units)), jnp.zeros((B, units))) for units in (64, 32)]
    for x in given["xs"]:
        carries, y = stream(carries, x)
    np.savez(folder / f"{name} results.npz", ys=ys, y=y, h=carries[1][0], c=carries[1][1])
assert not [module for module in sys.modules if module.startswith(("jaxlstm", "flax", "optax"))]
"""


@pytest.mark.ci
@pytest.mark.documented
def test_a_saved_model_and_a_saved_step_run_without_the_code_that_made_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    namespace = {"__name__": "deployment"}
    whole, step, serve = BLOCKS[:3]
    exec(compile(whole + step, "deployment.md", "exec"), namespace)
    assert "jaxlstm" in whole and "jaxlstm" not in serve
    rng, layers = np.random.default_rng(0), namespace["layers"]
    cases = {"one": (1, [1]), "many": (7, [7, 3, 1, 0])}
    for name, (num_steps, lengths) in cases.items():
        xs = rng.normal(size=(num_steps, len(lengths), 5)).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", xs=xs, lengths=np.array(lengths, np.int32))
    program = tmp_path / "serve.py"
    program.write_text(serve + MORE, "utf-8")
    # In its own folder: the repository must not be on its path.
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-I", str(program)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-6
    # An independent loop computes what the files should.
    for name, (num_steps, lengths) in cases.items():
        with np.load(tmp_path / f"{name}.npz") as given, np.load(tmp_path / f"{name} results.npz") as file:
            hs, results = given["xs"].astype(np.float64), dict(file)
        for layer in layers:
            params = [np.asarray(leaf, np.float64) for leaf in layer]
            zeros = np.zeros((len(lengths), layer.w_hh.shape[0]))
            state, hs = oracles.loop(oracles.lstm_step, params, hs, (zeros, zeros))
        ys = hs @ np.asarray(namespace["readout"], np.float64)
        real = np.arange(num_steps)[:, None] < np.array(lengths)
        assert np.abs(results["ys"] - ys * real[..., None]).max() < 1e-5
        assert np.abs(results["y"] - ys[-1]).max() < 1e-5
        assert max(np.abs(results[key] - value).max() for key, value in zip("hc", state, strict=True)) < 1e-5
