"""Every example runs, learns what it claims to learn, is short, and needs only JAX, Optax and this library."""

import ast
import dataclasses
import functools
import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}

# For each example: the learned number, its baseline, and the difference it must exceed. A negative one means lower.
BARS = {
    "agent": ("after", "chance", 0.4),
    "classifier": ("accuracy", "majority", 0.5),
    "language_model": ("bits", "unigram", -3.0),
    "own_cell": ("accuracy", "chance", 0.6),
    "stream": ("last", "memoryless", -0.25),
}
SLOW = {"agent", "classifier", "language_model"}
EACH = pytest.mark.parametrize("name", PATHS)
EACH_IN_ITS_TIME = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.ci] if name in SLOW else []) for name in PATHS]
)


def load(name):
    """Import an example anew, so that a test can change its constants."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", PATHS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def run(name):
    return load(name).main()


def beats_the_baseline(name, numbers):
    learned, baseline, margin = BARS[name]
    gain = numbers[learned] - numbers[baseline]
    return gain > margin if margin > 0 else gain < margin


@pytest.mark.documented
@EACH_IN_ITS_TIME
def test_an_example_learns(name, capsys):
    numbers = run(name)
    assert beats_the_baseline(name, numbers), numbers
    assert numbers.get("agree", True)


@pytest.mark.documented
@EACH_IN_ITS_TIME
def test_an_example_gives_the_numbers_of_its_docstring(name):
    """Another machine or another JAX may change the last digit."""
    (expected,) = re.findall(r"^Expect .*", ast.get_docstring(ast.parse(PATHS[name].read_text("utf-8"))), re.M | re.S)
    promised = [float(number) for number in re.findall(r"\d+\.\d+", expected)]
    numbers = run(name)
    for key in BARS[name][:2]:
        assert min(abs(numbers[key] - number) for number in promised) < 0.04, (key, numbers[key], promised)


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


def test_there_are_five_examples_each_with_a_bar():
    assert PATHS.keys() == BARS.keys() and len(PATHS) == 5


@EACH
def test_an_example_has_40_to_100_lines_and_a_command_to_run_it(name):
    text = PATHS[name].read_text(encoding="utf-8")
    assert 40 <= len(text.splitlines()) <= 100
    assert f"\n    python examples/{name}.py\n" in ast.get_docstring(ast.parse(text))
    assert text.endswith('\n\n\nif __name__ == "__main__":\n    main()\n')


@EACH
def test_an_example_needs_only_jax_optax_and_this_library(name):
    tree = ast.parse(PATHS[name].read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= {"jax", "jaxlstm", "optax"} | sys.stdlib_module_names
    assert not any(module.startswith("jaxlstm.") for module in modules), "public names come from the top"
