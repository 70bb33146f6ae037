"""Every example runs, learns what it claims to learn, is short, and needs only JAX, Optax and this library."""

import ast
import dataclasses
import functools
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}

# For each example: the learned number, its baseline, and the difference it must exceed. A negative one means lower.
BARS = {
    "agent": ("after", "chance", 0.4),
    "classifier": ("accuracy", "majority", 0.5),
    "language_model": ("bits", "unigram", -3.0),
    "own_cell": ("accuracy", "chance", 0.6),
    "own_data": ("accuracy", "majority", 0.5),
    "stream": ("last", "memoryless", -0.25),
}
MAX_LINES = {name: 140 if name == "own_data" else 100 for name in PATHS}
NEEDS = {"own_data": {"numpy", "matplotlib"}}  # beyond JAX, Optax and this library
EACH = pytest.mark.parametrize("name", PATHS)


def load(name):
    """Import an example anew, so that a test can change its constants."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", PATHS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def run(name):
    module = load(name)
    if name != "own_data":
        return module.main()
    with tempfile.TemporaryDirectory() as folder:
        module.FOLDER = Path(folder)
        numbers = module.main()
        assert sorted(path.name for path in module.FOLDER.iterdir()) == ["learning_curves.png", "tagger.safetensors"]
        return numbers


def beats_the_baseline(name, numbers):
    learned, baseline, margin = BARS[name]
    gain = numbers[learned] - numbers[baseline]
    return gain > margin if margin > 0 else gain < margin


@pytest.mark.documented
@pytest.mark.ci
@EACH
def test_an_example_learns(name, capsys):
    numbers = run(name)
    assert beats_the_baseline(name, numbers), numbers
    assert numbers.get("agree", True)


@pytest.mark.documented
@pytest.mark.ci
@EACH
def test_an_example_gives_the_numbers_of_its_docstring(name):
    """Another machine or another JAX may change the last digit."""
    (expected,) = re.findall(r"^Expect .*", ast.get_docstring(ast.parse(PATHS[name].read_text("utf-8"))), re.M | re.S)
    promised = [float(number) for number in re.findall(r"\d+\.\d+", expected)]
    numbers = run(name)
    for key in BARS[name][:2]:
        assert min(abs(numbers[key] - number) for number in promised) < 0.04, (key, numbers[key], promised)


def linear_accuracy(train, test, num_samples):
    """Return the test accuracy of least squares on the last samples of a recording."""

    def rows(data):
        before = np.pad(data.signal[..., 0], ((0, 0), (num_samples - 1, 0)))
        real = np.arange(data.tag.shape[1]) < data.length[:, None]
        windows = np.lib.stride_tricks.sliding_window_view(before, num_samples, axis=1)[real]
        return np.c_[windows, np.ones(len(windows))], data.tag[real]

    (xs, tags), (test_xs, test_tags) = rows(train), rows(test)
    weights = np.linalg.lstsq(xs, np.eye(3)[tags])[0]
    return np.mean((test_xs @ weights).argmax(axis=1) == test_tags)


@pytest.mark.documented
@pytest.mark.parametrize("num_samples", [1, 8, 32])
def test_a_linear_tagger_of_the_last_samples_does_not_pass(num_samples):
    train, _, test = load("own_data").make_data()
    assert 0.2 < linear_accuracy(train, test, num_samples) < 0.45


@pytest.mark.ci
@pytest.mark.documented
def test_one_short_run_of_the_tagger_beats_every_linear_one():
    """The whole sweep runs in CI."""
    module = load("own_data")
    module.NUM_EPOCHS = 12
    train, validation, test = module.make_data()
    states, _ = jax.jit(functools.partial(module.train, train, validation))(jax.random.key(0), 0.03)
    values = module.evaluate(module.measure, states.params, test, 60)
    assert 0.75 < values["accuracy"] < 1


@pytest.mark.documented
def test_an_untrained_classifier_does_not_pass(monkeypatch, capsys):
    module = load("classifier")
    monkeypatch.setattr(module, "NUM_EPOCHS", 0)
    assert not beats_the_baseline("classifier", module.main())


def centred_project(params, xs):
    """Break the contract of `project`: the first axis is time in a sequence, and features in a single input."""
    return (xs - xs.mean(axis=0)) @ params.w_ih + params.b


@jax.custom_jvp
def tanh(x):
    return jnp.tanh(x)


@tanh.defjvp
def wrong_derivative(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.tanh(x), (1 - x**2) * dx  # 1 − tanh(x)² would be right


def gates_with_a_wrong_derivative(params, state, z, a):
    alpha = jax.nn.sigmoid(params.r)
    h = (1 - alpha) * state.h + alpha * tanh(z + a)
    return type(state)(h), h


FAULTS = [{"project": centred_project}, {"gates": gates_with_a_wrong_derivative}]


@pytest.mark.ci
@pytest.mark.documented
@pytest.mark.parametrize("fault", FAULTS, ids=["project", "gates"])
def test_the_comparison_of_gradients_catches_a_faulty_cell(fault, capsys):
    module = load("own_cell")
    assert not module.gradients_agree(dataclasses.replace(module.Leaky, **fault))
    assert "DISAGREE" in capsys.readouterr().out


def test_there_are_six_examples_each_with_a_bar():
    assert PATHS.keys() == BARS.keys() and len(PATHS) == 6


@EACH
def test_an_example_is_short_and_has_a_command_to_run_it(name):
    text = PATHS[name].read_text(encoding="utf-8")
    assert 40 <= len(text.splitlines()) <= MAX_LINES[name]
    assert f"\n    python examples/{name}.py\n" in ast.get_docstring(ast.parse(text))
    assert text.endswith('\n\n\nif __name__ == "__main__":\n    main()\n')


@EACH
def test_an_example_needs_only_jax_optax_and_this_library(name):
    tree = ast.parse(PATHS[name].read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    needed = {"jax", "jaxlstm", "optax"} | NEEDS.get(name, set())
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= needed | sys.stdlib_module_names
    inner = {module for module in modules if module.startswith("jaxlstm.")}
    assert inner <= {"jaxlstm.adapters.weights", "jaxlstm.epochs"}, "public names come from the top or from a room"
