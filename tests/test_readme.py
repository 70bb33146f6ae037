"""Every code block of the README and the docs runs; every claim and every figure in it holds."""

import inspect
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import benchmark
from jaxlstm import LSTM, unroll

from cells import draw, worst_error

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "experiments" / "results" / "char_lm"


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


# The README's blocks stand each by itself; a page of the docs is read from the top.
BLOCKS = {f"README.md {n}": code for n, code in enumerate(python_blocks("README.md"), 1)}
BLOCKS |= {page: "\n".join(python_blocks(page)) for page in PAGES[1:] if python_blocks(page)}


@pytest.mark.documented
@pytest.mark.parametrize("name", BLOCKS)
def test_code_blocks_run(name, capsys):
    namespace = {"__name__": "readme"}
    exec(compile(BLOCKS[name], name, "exec"), namespace)
    if name == "README.md 1":  # the first screen ends in a gradient compared
        assert len(BLOCKS[name].strip().splitlines()) <= 12
        assert max(namespace["gradient_error"](namespace["by_hand"], namespace["autodiff"])) < 1e-5
        assert capsys.readouterr().out.startswith("LSTMParams(w_ih=")
    if "Classifier" in namespace:
        assert len([line for line in BLOCKS[name].splitlines() if line]) <= 26
        assert namespace["metrics"]["accuracy"][-10:].mean() > 0.95


def test_there_are_blocks_in_every_page_that_teaches_a_call():
    without = {"docs/claims.md", "docs/experiments.md"}  # tables and pictures
    assert {page for page in PAGES if not python_blocks(page)} == without


def test_the_tests_that_pages_name_are_there():
    named = [name for page in PAGES for name in re.findall(r"tests/(\w+\.py)::(\w+)", (ROOT / page).read_text("utf-8"))]
    claims = (ROOT / "docs" / "claims.md").read_text("utf-8")
    named += [("test_claims.py", name) for name in re.findall(r"`(test_\w+)`", claims)]
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), (file, test)


def fifteen_lines():
    """Return the README's own function."""
    (code,) = [code for code in python_blocks("README.md") if "def lstm(" in code]
    assert len(code[code.index("def lstm(") :].strip().splitlines()) <= 15
    namespace = {}
    exec(code, namespace)
    return namespace["lstm"]


def test_the_fifteen_lines_are_gradient_scan():
    lstm = fifteen_lines()
    params, xs, carry = draw(LSTM)

    def gradient(run):
        loss = lambda v: sum((leaf**2).sum() for leaf in jax.tree.leaves(run(*v)))
        return jax.value_and_grad(loss)((params, xs, carry))

    plain = gradient(lambda params, xs, carry: lstm(params, xs, tuple(carry)))
    assert worst_error(gradient(lambda *v: unroll(LSTM, *v, gradient="scan")), plain) < 1e-14


@pytest.mark.slow
@jax.debug_nans(False)
def test_what_the_table_says_of_flax_and_of_the_fifteen_lines():
    xs, lengths = jax.random.normal(jax.random.key(0), (3, 5, 2), "float32"), jnp.array([5, 0, 2])
    layer = nn.RNN(nn.OptimizedLSTMCell(4), return_carry=True)
    variables = layer.init(jax.random.key(1), xs)
    (_, h), ys = layer.apply(variables, xs, seq_lengths=lengths)
    np.testing.assert_array_equal(h[1], ys[1, -1])  # of length 0, yet the last padding step's
    assert np.any(h[1])
    dirty = xs.at[2, 2:].set(jnp.nan)
    # The loss sees only what lies inside the lengths; its gradient is NaN all the same.
    final = lambda v: layer.apply(v, dirty, seq_lengths=lengths)[0][1][2].sum()
    assert np.isfinite(final(variables))
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(jax.grad(final)(variables)))
    for call in (nn.RNN.__call__, nnx.RNN.__call__):
        assert "seq_lengths" in inspect.signature(call).parameters
        assert not {"reset", "resets", "mask"} & inspect.signature(call).parameters.keys()

    lstm = fifteen_lines()
    params, xs, carry = draw(LSTM)
    inside = lambda p: lstm(p, xs.at[5:, 2].set(jnp.nan), tuple(carry))[1][:5].sum()
    assert np.isfinite(inside(params))
    assert np.isnan(jax.grad(inside)(params).w_hh).any()


def test_the_figures_are_those_of_the_committed_result():
    result = json.loads((RESULTS / "result.json").read_text(encoding="utf-8"))
    assert result["learned"]
    assert f"({result['corpus']['characters']:,} characters" in README
    rows = {"LSTM, 2 layers of 128": result["held_out_bits"], **result["baselines"]}
    for name, bits in rows.items():
        assert re.search(rf"\| [^|]*{re.escape(name)}[^|]* \| {bits:.2f} \|", README), name
    assert (result["config"]["num_layers"], result["config"]["hidden_size"]) == (2, 128)
    assert all(row["agrees"] for check in result["gradient_check"].values() for row in check.values())
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists()


def test_the_benchmarks_table_is_that_of_its_committed_result():
    result = json.loads((ROOT / "experiments" / "results" / "benchmark" / "result.json").read_text(encoding="utf-8"))
    assert benchmark.table(result) in README
    assert benchmark.costs_table(result) in README
    assert (
        len(result["shapes"]) == len(benchmark.SHAPES) and result["config"]["starts"] * result["config"]["rounds"] >= 5
    )
    gradients = [benchmark.ratios(row, "gradient") for row in result["shapes"]]
    # As the README says below the table, where a twentieth is noise.
    *ahead, level = [found["fastest JAX library"] for found in gradients]
    assert min(ahead) > 1.05 and abs(level - 1) < 0.05
    torch = [found["torch"] for found in gradients]
    assert f"{min(torch):.2f} to {max(torch):.2f} times as long" in README and torch.index(max(torch)) == 4
    forward = [benchmark.ratios(row, "forward")["fastest JAX library"] for row in result["shapes"]]
    assert min(forward) > 0.93 and benchmark.geometric_mean(forward) > 1


def test_the_figures_of_the_full_suite_are_those_it_left(request):
    if request.config.getoption("results"):
        pytest.skip("they are being found out")
    rows = dict(re.findall(r"^\| ([^|]+) \| (\d+/\d+) \|$", README, re.M))
    (kills,), (damages,), (gradients,), (faults,) = (
        [figure for said, figure in rows.items() if words in said]
        for words in ("killed by SIGKILL", "damaged checkpoints", "what its plain scan gives", "faults put into a copy")
    )
    left = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "tests" / "results").glob("jax-*.json")]
    assert left
    for result in left:
        assert result["failed"] == result["uncommitted"] == [] and result["tests"]["error"] == 0
        assert result["command"] == "pytest -n 2 --results tests/results"
        assert result["sweeps"] == {
            "runs killed at a random moment that ended in the same bits": kills,
            "of these, killed inside a save": "15/15",
            "damaged checkpoints noticed": damages,
            "bulk gradients equal to those of the scan": gradients,
            "faults caught": faults,
        }


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
    for path in re.findall(r"^\| `([\w./]+)` \|", README, re.M):
        assert (ROOT / path).exists(), path
