"""docs/your-own-data.md: what one process saves, another one loads, bit for bit; and what the page says of itself."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")
RAGGED, WINDOWS, SPLIT, MODEL, TRAIN, LOOP, SWEEP, SAVE, LOAD = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def definitions(code):
    """Return the imports, functions and classes of some code, without what it computes."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    return "\n".join(ast.unparse(node) for node in ast.parse(code).body if isinstance(node, kinds))


COMMON = "\n".join(
    [RAGGED, SPLIT, *map(definitions, (MODEL, TRAIN, LOOP, SWEEP, SAVE, LOAD))]
    + ["import hashlib, json, sys", "folder = Path(sys.argv[1])"]
)
TRAINED = """
step = jax.jit(make_train_step(loss_fn, optax.adam(0.03)))
batch = {name: leaf[:32] for name, leaf in train.items()}
state, _ = step(new_state(jax.random.key(3)), batch)
"""
# The next step shows that the optimizer's state and the key are back too.
REPORT = """
def bits(tree):
    tree = tree._replace(key=jax.random.key_data(tree.key)) if hasattr(tree, "key") else tree
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    described = [(str(leaf.dtype), leaf.shape) for leaf in leaves]
    return [str(described), hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()]

step = jax.jit(make_train_step(loss_fn, optax.adam(0.03)))
batch = {name: leaf[32:64] for name, leaf in train.items()}
following, metrics = step(state, batch)
xs, length = test["xs"], test["length"].astype(np.int32)
print(json.dumps({
    "state": bits(state), "following": bits(following), "params": bits(params), "logits": bits(logits),
    "norm": float(optax.tree.norm(params)), "error": float(abs(logits - logits_of(params, xs, length)).max()),
}))
"""


def run(code, folder):
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ci
def test_what_one_process_saves_another_loads_bit_for_bit(tmp_path):
    pytest.importorskip("safetensors")
    save = SAVE.replace("folder = Path(tempfile.mkdtemp())\n", "")
    assert save != SAVE
    of_saved = "\nparams = state.params\nlogits = jax.jit(exported.call)(test['xs'], test['length'].astype(np.int32))\n"
    saved = run(COMMON + TRAINED + save + of_saved + REPORT, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "tagger.safetensors", "tagger.jax"}
    loaded = run(COMMON + "\n" + LOAD + "\nstate = restored\n" + REPORT, tmp_path)
    assert saved == loaded
    assert saved["norm"] > 1 and saved["error"] < 1e-5 and saved["state"] != saved["following"]


@pytest.mark.documented
def test_windows_are_views_of_the_series_in_order_of_time():
    namespace = {}
    exec("\n".join([RAGGED, WINDOWS]), namespace)
    scaled, windows, forecast = (namespace[name] for name in ("scaled", "windows", "forecast"))
    assert windows.shape == (750, 51, 2) and np.shares_memory(windows, scaled)
    for n in (0, 1, 749):
        np.testing.assert_array_equal(forecast["xs"][n], scaled[n : n + 50])
        np.testing.assert_array_equal(forecast["targets"][n], scaled[n + 1 : n + 51])
    for row, recording in zip(namespace["data"]["xs"], namespace["recordings"], strict=True):
        np.testing.assert_array_equal(row[: len(recording)], recording)
        assert not row[len(recording) :].any()


def test_the_page_counts_its_lines():
    (said,) = re.findall(r"model, evaluation and training with early stopping take (\d+) lines", " ".join(PAGE.split()))
    code = [line for block in (MODEL, TRAIN) for line in block.splitlines() if line.strip()]
    assert int(said) == len(code) <= 42


@pytest.mark.ci
@pytest.mark.documented
@pytest.mark.filterwarnings("ignore")
def test_the_page_learns_and_its_loop_stops_as_it_says():
    namespace = {"__name__": "page"}
    exec("\n".join([RAGGED, SPLIT, MODEL, TRAIN]), namespace)
    accuracy = namespace["evaluate"](namespace["measure"], namespace["state"].params, namespace["test"], 32)["accuracy"]
    assert accuracy > 0.95 > 0.6 > np.mean(namespace["test"]["tags"])
    exec(LOOP, namespace)
    assert namespace["lowest"] < 0.1 and namespace["waited"] == 5
