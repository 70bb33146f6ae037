"""`python -m jaxlstm`: gradients agree here, the exit code says so, and a wrong gradient is named."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlstm
from jaxlstm import LSTM, RNN, lstm_bptt, tuning, unroll
from jaxlstm import __main__ as check
from jaxlstm.diagnostics import central_differences, comparison

BLOCKS = [f"{name} {gate}" for name in ("w_ih", "w_hh", "b") for gate in "ifgo"] + ["xs", "h_0", "c_0"]


@pytest.mark.ci  # half a minute on two cores
def test_the_gradients_agree_on_this_machine():
    done = subprocess.run([sys.executable, "-m", "jaxlstm", "--all"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"jaxlstm \S+, jax \S+, jaxlib \S+, numpy \S+, Python \S+\ndevices: ", done.stdout)
    rows = [re.match(r"((?:w_ih|w_hh|b) [ifgo]|xs|h_0|c_0) +\S+e", line) for line in done.stdout.splitlines()]
    assert [row[1] for row in rows if row] == BLOCKS
    ways = re.findall(
        r"^(LSTM|GRU|RNN\(tanh\)) +(vmap over params|per example), (jit|eager)((?: +\S+e-\d+){4})$", done.stdout, re.M
    )
    assert len({way[:3] for way in ways}) == len(ways) == 3 * 2 * 2
    worst = re.findall(r"^(\S+) +(float\d\d)   bulk \S+(   by hand \S+)?   rtrl \S+   differences", done.stdout, re.M)
    assert [row[:2] for row in worst] == [
        ("LSTM", "float64"), ("GRU", "float64"), ("RNN(tanh)", "float64"), ("LSTM", "float32")
    ]  # fmt: skip
    assert re.search(r"from float64 by \S+ with matmuls pinned to float32, .*\n\n\d+ s\nAGREE\n$", done.stdout, re.S)


@pytest.mark.ci
def test_by_default_only_the_lstm_is_checked_and_help_checks_nothing(monkeypatch, capsys):
    agreeing = check.compare(RNN, "float64")
    compared = []
    monkeypatch.setattr(check, "compare", lambda cell, dtype: compared.append((cell, dtype)) or agreeing)
    monkeypatch.setattr(check, "worst_errors", None)
    monkeypatch.setattr(check, "default_precision", lambda: (1e-7, 1e-7))
    assert check.main() == 0 and compared == [(LSTM, "float64")]
    assert capsys.readouterr().out.endswith("AGREE\n")
    with pytest.raises(SystemExit) as stopped:
        check.main(["--help"])
    assert stopped.value.code == 0 and "usage: python -m jaxlstm" in capsys.readouterr().out and len(compared) == 1


def test_the_plan_is_of_the_platform(monkeypatch):
    on_a_cpu = check.machine()["plan"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = check.machine()["plan"]
    assert on_a_cpu["unroll"] == 1 < elsewhere["unroll"] and on_a_cpu["pieces"] == 4 != elsewhere["pieces"]


def test_the_report_as_json_has_no_nan(monkeypatch, capsys):
    agreeing = check.compare(RNN, "float64")
    monkeypatch.setattr(check, "compare", lambda *args: agreeing)
    monkeypatch.setattr(check, "reference_gradients", lambda cell: None)
    monkeypatch.setattr(check, "worst_errors", lambda *args: {"bulk sum": np.nan, "scan sum": np.float32(np.inf)})
    monkeypatch.setattr(check, "default_precision", lambda: (np.nan, 1e-7))
    assert check.main(["--all", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["errors"]["LSTM per example, eager"] == {"bulk sum": "nan", "scan sum": "inf"}
    assert found["float32"] == {"default matmuls": "nan", "float32 matmuls": 1e-7}
    assert "LSTM per example, eager, bulk sum: nan, allowed 1e-05" in found["disagreements"]


def test_the_report_as_json(monkeypatch, capsys):
    """Attached to a bug report, it says what was measured, and on what."""
    agreeing = check.compare(RNN, "float64")
    monkeypatch.setattr(check, "compare", lambda *args: agreeing)
    monkeypatch.setattr(check, "default_precision", lambda: (1e-3, 1e-7))
    assert check.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__ and found["versions"]["jaxlstm"] == jaxlstm.__version__
    assert found["devices"] == [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
    assert found["cores"] == os.cpu_count() and found["processor"] and found["system"]
    assert found["plan"].keys() == tuning.Plan()._asdict().keys()
    assert found["errors"] == {"LSTM float64": json.loads(json.dumps(agreeing.errors, default=float))}
    assert found["float32"] == {"default matmuls": 1e-3, "float32 matmuls": 1e-7}
    assert found["disagreements"] == [] and 0 < found["seconds"] < 600


@pytest.fixture
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.ci
def test_a_wrong_method_is_named(monkeypatch, full_precision):
    stopped = lambda params: params._replace(w_hh=jax.lax.stop_gradient(params.w_hh))
    monkeypatch.setattr(
        comparison, "lstm_bptt", lambda params, xs, carry, mask: lstm_bptt(stopped(params), xs, carry, mask=mask)
    )
    found = check.compare(LSTM, "float64")
    (line,) = check.disagreements({("LSTM", "float64"): found}, {})
    assert re.fullmatch(r"LSTM float64: by hand departs in w_hh [ifgo]: 1\.0e\+00", line)


@pytest.mark.parametrize("how", ["jit", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_wrong_mode_is_named(how, monkeypatch, full_precision):
    def wrong(cell, params, *args, gradient, mask):
        scale = 1 + 1e-3 * (gradient == "bulk")
        return unroll(cell, params._replace(w_ih=scale * params.w_ih), *args, gradient=gradient, mask=mask)

    reference = check.reference_gradients(RNN)
    right = check.worst_errors(RNN, "per example", how, reference)
    assert check.disagreements({}, {("RNN", "per example"): right}) == []
    thirds = jax.tree.map(lambda v: v / 3, reference)
    np.testing.assert_allclose(list(check.worst_errors(RNN, "per example", how, thirds).values()), 2, rtol=1e-4)
    monkeypatch.setattr(check, "unroll", wrong)
    lines = check.disagreements({}, {("RNN", "per example"): check.worst_errors(RNN, "per example", how, reference)})
    assert [line.partition(":")[0] for line in lines] == ["RNN per example, bulk sum", "RNN per example, bulk random"]


@pytest.mark.ci
def test_a_disagreement_sets_the_exit_code_and_a_nan_is_a_disagreement(monkeypatch, capsys, full_precision):
    agreeing = check.compare(RNN, "float64")
    monkeypatch.setattr(check, "compare", lambda *args: agreeing)
    monkeypatch.setattr(check, "worst_errors", lambda *args: {"bulk sum": np.nan})
    monkeypatch.setattr(check, "default_precision", lambda: (1e-3, 1e-7))
    assert check.main(["--all"]) == 1
    out = capsys.readouterr().out
    assert "LSTM per example, eager, bulk sum: nan, allowed 1e-05\n" in out
    assert 'jax.default_matmul_precision("highest") restores the digits' in out
    assert out.endswith("DISAGREE: do not trust gradients on this machine.\n")


def test_central_differences_are_of_fourth_order():
    x = {"a": jnp.array([0.3, -0.2]), "b": jnp.array(1.1)}
    f = lambda x: jnp.sin(x["a"]).sum() * jnp.exp(x["b"])
    right, errors = jax.grad(f)(x), []
    for step_size in (1e-1, 5e-2):
        wrong = central_differences(f, x, step_size)
        errors.append(max(abs(wrong[name] - right[name]).max() for name in x))
    assert 15 < errors[0] / errors[1] < 17
