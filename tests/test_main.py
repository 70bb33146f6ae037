"""`python -m jaxlstm`: it agrees here, says so in its exit code, and convicts a wrong gradient by name."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxlstm import __main__ as check
from jaxlstm import lstm_bptt

BLOCKS = [f"{name}  {gate}" for name in ("w_ih", "w_hh", "b") for gate in "ifgo"] + ["xs", "h_0", "c_0"]


def test_the_gradients_agree_on_this_machine():
    done = subprocess.run([sys.executable, "-m", "jaxlstm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"jaxlstm \S+, jax \S+, jaxlib \S+, numpy \S+, Python \S+\ndevices: ", done.stdout)
    rows = [re.match(r"((?:w_ih|w_hh|b)  [ifgo]|xs|h_0|c_0) +\S+e", line) for line in done.stdout.splitlines()]
    assert [row[1] for row in rows if row] == BLOCKS
    assert re.search(r"\nAGREE: .*float64 .*float32.*\n$", done.stdout)
    # In float64 the differences have a verdict of their own; in float32 all are below their noise floor, in brackets.
    assert done.stdout.count("(") - done.stdout.split("\n\n")[1].count("(") == len(BLOCKS)


@pytest.fixture
def x64_restored():
    before = jax.config.jax_enable_x64
    yield
    assert jax.config.jax_enable_x64 == before


@pytest.mark.parametrize(
    "fault, block",
    [
        pytest.param(lambda params: params._replace(b=params.b.at[8].multiply(1 + 1e-3)), None, marks=pytest.mark.slow),
        (lambda params: params._replace(w_hh=jax.lax.stop_gradient(params.w_hh)), "w_hh  g"),
    ],
    ids=["another function", "stop_gradient"],
)
def test_a_wrong_gradient_is_convicted(fault, block, monkeypatch, capsys, x64_restored):
    monkeypatch.setattr(
        check, "lstm_bptt", lambda params, xs, carry, mask: lstm_bptt(fault(params), xs, carry, mask=mask)
    )
    assert check.main() == 1
    out = capsys.readouterr().out
    assert out.endswith("DISAGREE: do not trust gradients on this machine.\n")
    assert "float64 w_hh  i: by hand" in out and "float64 w_hh  i: the rule" not in out
    if block:
        assert f"float64 {block}: by hand 1.0e+00, allowed 1e-12" in out
        assert "xs: by hand" not in out


def test_a_wrong_rule_is_convicted(monkeypatch, capsys):
    def unroll(cell, params, *args, gradient, mask):
        scale = 1 + 1e-3 * (gradient == "bulk")
        return check.jaxlstm.unroll(
            cell, params._replace(w_ih=scale * params.w_ih), *args, gradient=gradient, mask=mask
        )

    monkeypatch.setattr(check, "unroll", unroll)
    assert check.main() == 1
    out = capsys.readouterr().out
    assert "float64 w_ih  f: the rule" in out and "float32 w_ih  f: the rule" in out and ": by hand" not in out


@pytest.mark.slow
def test_wrong_differences_are_convicted_in_both_dtypes(monkeypatch, capsys):
    right = check.central_differences
    monkeypatch.setattr(check, "central_differences", lambda *args: jax.tree.map(lambda v: 1.01 * v, right(*args)))
    assert check.main() == 1
    out = capsys.readouterr().out
    assert "float64 xs: differences 1.0e-02" in out and "float32 xs: differences 1.0e-02" in out


def test_a_nan_is_a_disagreement():
    row = check.Row(rule=float("nan"), by_hand=float("nan"), differences=float("nan"), floor=1.0)
    assert len(check.disagreements("float64", {"w_ih  i": row})) == 3


def test_central_differences_are_of_fourth_order():
    x = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(1.1)}
    f = lambda x: jnp.sin(x["a"]).sum() * jnp.exp(x["b"])
    right, errors = jax.grad(f)(x), []
    for step_size in (1e-1, 5e-2):
        wrong = check.central_differences(f, x, step_size)
        errors.append(max(abs(wrong[name] - right[name]).max() for name in x))
    assert 15 < errors[0] / errors[1] < 17
