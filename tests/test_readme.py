"""Every code block in the README and the docs runs, and every figure there equals the committed results."""

import ast
import inspect
import itertools
import json
import os
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import benchmark
from jaxlstm import LSTM, unroll
from jaxlstm.moved import MOVED

from cells import draw, worst_error

pytestmark = pytest.mark.usefixtures("ranks_may_be_promoted")

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]


def read_json(*path):
    return json.loads(ROOT.joinpath(*path).read_text(encoding="utf-8"))


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", TEXT[page], re.S)


# Each block of the README stands alone; the blocks of another page run one after the other.
BLOCKS = {f"README.md {n}": code for n, code in enumerate(python_blocks("README.md"), 1)}
BLOCKS |= {page: "\n".join(python_blocks(page)) for page in PAGES[1:] if python_blocks(page)}
del BLOCKS["docs/gallery.md"]  # `test_plots.py` runs it, and looks at what it draws


@pytest.mark.documented
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras's variables, when NumPy reads them
@pytest.mark.parametrize(
    "name", [name if name.startswith("README") else pytest.param(name, marks=pytest.mark.ci) for name in BLOCKS]
)
def test_code_blocks_run(name, capsys):
    if framework := re.search(r"coming-from-(\w+)", name):
        os.environ["KERAS_BACKEND"] = "jax"
        pytest.importorskip(framework[1])
    namespace = {"__name__": "readme"}
    exec(compile(BLOCKS[name], name, "exec"), namespace)
    if name == "README.md 1":
        first_block_compares_two_gradients(namespace, capsys.readouterr().out)
    if framework or "deployment" in name:
        assert namespace["difference"] < 1e-5
    if "Classifier" in namespace:
        example, _, _ = BLOCKS[name].partition("import functools")  # without the sweep over keys
        assert len([line for line in example.splitlines() if line]) <= 26
        assert namespace["metrics"]["accuracy"][-10:].mean() > 0.95


def first_block_compares_two_gradients(namespace, printed):
    assert len(BLOCKS["README.md 1"].strip().splitlines()) <= 12
    error, xs, carry = (namespace[name] for name in ("gradient_error", "xs", "carry"))
    assert max(error(namespace["by_hand"], namespace["gradient"])) < 1e-5
    assert printed.startswith("LSTMParams(w_ih=")

    def loss(params):
        return (unroll(LSTM, params, xs, carry, gradient="scan")[1] ** 2).mean()

    assert max(error(namespace["by_hand"], jax.grad(loss)(namespace["params"]))) < 1e-5


def test_the_readme_is_short_and_its_first_block_is_simple():
    assert len(README.split()) <= 1000
    for outer in ast.walk(ast.parse(BLOCKS["README.md 1"])):
        if isinstance(outer, ast.Lambda):
            assert not any(isinstance(inner, ast.Lambda) for inner in ast.walk(outer.body))


def test_every_page_that_teaches_a_call_has_code():
    without = {
        f"docs/{name}.md"
        for name in ("benchmark", "claims", "experiments", "organisation", "published", "runs", "where-next")
    }  # tables, commands
    assert {page for page in PAGES if not python_blocks(page)} == without


def test_the_readme_links_to_every_page():
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md|CONTRIBUTING\.md)\)", README))
    assert linked == set(PAGES[1:])


def test_the_changelog_says_where_every_name_went():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    old_names = [row.split("|")[1] for row in changelog.splitlines() if row.startswith("| `jaxlstm.")]
    for name in MOVED:
        assert re.search(rf"\b{name}\b", " ".join(old_names)), name


def test_the_tests_named_on_the_pages_exist():
    named = [name for text in TEXT.values() for name in re.findall(r"tests/(\w+\.py)::(\w+)", text)]
    named += [("test_claims.py", name) for name in re.findall(r"`(test_\w+)`", TEXT["docs/claims.md"])]
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text("utf-8"), (file, test)


def fifteen_lines():
    """Return the function in docs/comparison-with-scan.md."""
    (code,) = [code for code in python_blocks("docs/comparison-with-scan.md") if "def lstm(" in code]
    assert len(code[code.index("def lstm(") :].strip().splitlines()) <= 15
    namespace = {}
    exec(code, namespace)
    return namespace["lstm"]


def test_the_fifteen_lines_equal_gradient_scan():
    lstm = fifteen_lines()
    params, xs, carry = draw(LSTM)

    def gradient(run):
        loss = lambda v: sum((leaf**2).sum() for leaf in jax.tree.leaves(run(*v)))
        return jax.value_and_grad(loss)((params, xs, carry))

    plain = gradient(lambda params, xs, carry: lstm(params, xs, tuple(carry)))
    assert worst_error(gradient(lambda *v: unroll(LSTM, *v, gradient="scan")), plain) < 1e-14


@pytest.mark.slow
@jax.debug_nans(False)
def test_the_comparison_table_is_right_about_flax_and_the_fifteen_lines():
    xs, lengths = jax.random.normal(jax.random.key(0), (3, 5, 2), "float32"), jnp.array([5, 0, 2])
    layer = nn.RNN(nn.OptimizedLSTMCell(4), return_carry=True)
    variables = layer.init(jax.random.key(1), xs)
    (_, h), ys = layer.apply(variables, xs, seq_lengths=lengths)
    np.testing.assert_array_equal(h[1], ys[1, -1])  # length 0, but the carry of the last padding step
    assert np.any(h[1])
    dirty = xs.at[2, 2:].set(jnp.nan)
    # The loss reads real steps only, but its gradient is NaN.
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


def test_the_character_models_figures_equal_the_committed_result():
    page = TEXT["docs/runs.md"]
    result = read_json("experiments", "results", "char_lm", "result.json")
    assert result["learned"]
    assert f"({result['corpus']['characters']:,} characters" in page
    rows = {"LSTM, 2 layers of 128": result["held_out_bits"], **result["baselines"]}
    for name, bits in rows.items():
        assert re.search(rf"\| [^|]*{re.escape(name)}[^|]* \| {bits:.2f} \|", page), name
    assert (result["config"]["num_layers"], result["config"]["hidden_size"]) == (2, 128)
    assert all(row["agrees"] for check in result["gradient_check"].values() for row in check.values())


def benchmarks_of(pattern):
    return [json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "benchmarks" / "results").glob(pattern))]


RESULTS, (ON_A_GPU,) = benchmarks_of("cpu-*.json"), benchmarks_of("gpu-*.json")


def test_there_is_one_benchmark_per_machine_and_each_has_the_fifteen_lines():
    assert RESULTS and len({result["device"] for result in RESULTS}) == len(RESULTS)
    assert all(result["config"]["starts"] * result["config"]["rounds"] >= 5 for result in RESULTS)
    for result in [*RESULTS, ON_A_GPU]:
        assert f"### {benchmark.name_of(result)}\n\n{benchmark.table(result)}" in TEXT["docs/benchmark.md"]
        assert [tuple(row["shape"]) for row in result["shapes"]] == list(benchmark.SHAPES)
        for row in result["shapes"]:
            assert all("fifteen lines" in benchmark.ratios(row, kind) for kind in benchmark.KINDS)


def test_the_benchmarks_page_has_the_mean_of_every_library():
    table = benchmark.by_library([*RESULTS, ON_A_GPU])
    assert table in TEXT["docs/benchmark.md"]
    (cell,) = re.findall(r"^\| Flax linen \| \S+ \| (\S+) \|", table, re.M)
    rows = [row["gradient"] for row in RESULTS[0]["shapes"]]
    ratios = [row["Flax linen"]["median"] / row["jaxlstm"]["median"] for row in rows]
    assert cell == f"{np.prod(ratios) ** (1 / len(ratios)):.2f}"


def test_the_benchmarks_page_equals_the_committed_result():
    page = TEXT["docs/benchmark.md"]
    result = RESULTS[0]
    assert result["device"].startswith("AMD EPYC")
    assert benchmark.costs_table(result) in page
    assert result["config"]["starts"] * result["config"]["rounds"] >= 5
    gradients = [benchmark.ratios(row, "gradient") for row in result["shapes"]]
    # The page says that five percent is noise.
    *ahead, level = [found["fastest JAX library"] for found in gradients]
    assert min(ahead) > 1.05 and abs(level - 1) < 0.05
    torch = [found["torch"] for found in gradients]
    assert f"{min(torch):.2f} to {max(torch):.2f} times as long" in " ".join(page.split())
    assert [factor > 1 for factor in torch] == [False] * 4 + [True, False], "faster except with a single stream"
    forward = [benchmark.ratios(row, "forward")["fastest JAX library"] for row in result["shapes"]]
    noise = [benchmark.ratios(row, "forward")["jaxlstm, scan"] for row in result["shapes"]]
    assert f"the scan's factors, {benchmark.span(noise)}, show the noise" in " ".join(page.split())
    assert min(forward) > min(noise) and benchmark.geometric_mean(forward) > 1, "level"
    assert f"level with the other JAX libraries, {benchmark.span(forward)}," in page
    assert all((r["versions"]["jax"], r["versions"]["torch"][:4]) == ("0.10.2", "2.13") for r in RESULTS)
    assert min(forward[0], forward[4]) > max(noise), "faster in the smallest layers"
    assert all(found["fifteen lines"] > 1 for found in gradients), "never faster"


def test_the_benchmarks_page_gives_the_time_to_compile_a_training_step():
    seconds = RESULTS[1]["costs"]["compiling a step"]
    said = "takes {jaxlstm:.2f} s with jaxlstm, {Flax linen:.2f} s with Flax linen and {fifteen lines:.2f} s"
    assert said.format(**seconds) in " ".join(TEXT["docs/benchmark.md"].split())
    assert benchmark.STEP_COMPILED == (100, 32, 64, 64) and RESULTS[1]["device"].startswith("Intel")


def test_the_guides_figures_about_memory_and_sweeps_equal_the_committed_results():
    for result in RESULTS:
        costs = result["costs"]
        of_step = {name: (b - a) / 2000 / 1024 for name, (a, b) in costs["temporaries"].items()}
        shown = {name: float(f"{size:.1f}") for name, size in of_step.items()}
        assert shown == {"scan": 224.0, "bulk": 64.0, "chunked": 32.5}
        times = costs["ensembles"]["100, 32, 64, 64"]["seconds"]
        assert 0.4 < times["sweep"] / times["vmap"] < 0.6
    page = " ".join(TEXT["docs/gradients.md"].split())
    assert "each further time step takes 224 KiB with `Scan()`, 64 with `Bulk()` and 32.5 with `Chunked()`" in page
    assert "With 8 nets of 64 units and a batch of 32, it takes about half the time of `vmap`" in " ".join(
        TEXT["docs/training.md"].split()
    )


def test_a_second_model_of_cpu_shows_the_same():
    for result in RESULTS[1:]:
        *ahead, level = [benchmark.ratios(row, "gradient")["fastest JAX library"] for row in result["shapes"]]
        assert min(ahead) > 1.05 and abs(level - 1) < 0.05
        forward = [benchmark.ratios(row, "forward") for row in result["shapes"]]
        peer, noise = (
            benchmark.geometric_mean([found[name] for found in forward])
            for name in ("fastest JAX library", "jaxlstm, scan")
        )
        assert 1.05 > peer > noise, "level: the plain scan compiles to the same forward program as jaxlstm"
    for result, kind in itertools.product(RESULTS, benchmark.KINDS):
        ahead_of_torch = [benchmark.ratios(row, kind)["torch"] > 1 for row in result["shapes"]]
        assert ahead_of_torch == [False] * 4 + [True, False], "torch is faster except with a single stream"


def test_the_benchmarks_page_describes_the_result_of_a_gpu():
    *others, _ = [benchmark.ratios(row, "gradient") for row in ON_A_GPU["shapes"]]
    for peer in ("fastest JAX library", "fifteen lines"):
        assert all(found[peer] > 2 for found in others), "less than half the time"
    ahead_of_torch = [benchmark.ratios(row, "gradient")["torch"] > 1 for row in ON_A_GPU["shapes"]]
    assert ahead_of_torch == [True, True, True, False, True, False]
    assert (ON_A_GPU["config"]["starts"], ON_A_GPU["config"]["rounds"]) == (1, 4)
    forward = [benchmark.ratios(row, "forward")["torch"] > 1 for row in ON_A_GPU["shapes"]]
    assert forward == [False, True, True, False, False, False]
    memory = [row["temporaries"]["jaxlstm"] / row["temporaries"]["fifteen lines"] for row in ON_A_GPU["shapes"]]
    assert max(ON_A_GPU["shapes"][4]["temporaries"][name] for name in ("jaxlstm", "fifteen lines")) < 1e6
    assert f"takes {benchmark.span(memory[:4] + memory[5:])} times the memory" in " ".join(
        TEXT["docs/benchmark.md"].split()
    )


def test_the_readmes_speeds_equal_the_committed_results():
    def mean(kind, name, results=RESULTS):
        of = lambda result: [benchmark.ratios(row, kind).get(name) for row in result["shapes"]]
        # Not every machine has every library.
        return benchmark.span([benchmark.geometric_mean(of(result)) for result in results if all(of(result))])

    assert benchmark.span([1.254, 1.191]) == "1.19 to 1.25" and benchmark.span([1.251, 1.249]) == "1.25"

    names = {
        "fastest of Flax, Equinox, Haiku and Keras": "fastest JAX library",
        "fifteen lines of `lax.scan`": "fifteen lines",
        "torch": "torch",
    }
    for shown, name in names.items():
        cells = [mean(kind, name, results) for results in (RESULTS, [ON_A_GPU]) for kind in ("gradient", "forward")]
        assert f"| {shown} | {' | '.join(cells)} |" in README
    sizes = ON_A_GPU["shapes"][-1]["temporaries"]
    assert sizes["jaxlstm"] < 0.5 * sizes["fifteen lines"], "less than half"


def test_the_full_suites_figures_equal_its_reports(request):
    if request.config.getoption("results"):
        pytest.skip("this run is about to measure them")
    rows = dict(re.findall(r"^\| ([^|]+) \| (\d+/\d+) \|$", TEXT["CONTRIBUTING.md"], re.M))
    (kills,), (damages,), (gradients,), (faults,) = (
        [figure for said, figure in rows.items() if words in said]
        for words in ("killed by SIGKILL", "damaged checkpoints", "equals its plain scan", "faults, put one at a time")
    )
    runs = " ".join(TEXT["docs/runs.md"].split())
    assert f"killed {kills} runs at random moments, 15 of them inside a save" in runs
    assert f"noticed {damages} damaged checkpoints" in runs
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "tests" / "results").glob("jax-*.json")]
    assert reports
    for report in reports:
        assert report["failed"] == report["uncommitted"] == [] and report["tests"]["error"] == 0
        assert report["command"] == "pytest -n 2 --results tests/results"
        assert report["sweeps"] == {
            "runs killed at a random moment that ended in the same bits": kills,
            "of these, killed inside a save": "15/15",
            "damaged checkpoints noticed": damages,
            "bulk gradients equal to those of the scan": gradients,
            "faults caught": faults,
        }


def test_the_figures_of_the_mutations_equal_the_committed_outcome():
    rows = dict(re.findall(r"^\| ([^|]+) \| (\d+/\d+) \|$", TEXT["CONTRIBUTING.md"], re.M))
    outcome = read_json("tests", "results", "mutations.json")
    drawn = sum(outcome["drawn"].values())
    at_first, after = (drawn - len(outcome[which]) for which in ("survived at first", "survivors"))
    assert rows["mechanical changes, drawn at random, that a test caught at first"] == f"{at_first}/{drawn}"
    assert rows["the same, after tests were written for those that survived"] == f"{after}/{drawn}"
    assert set(outcome["survivors"]) <= set(outcome["survived at first"]) and drawn >= 200


def anchors(path):
    """Return the anchors GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = re.sub(r"```.*?```", "", TEXT[page], flags=re.S)
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), anchor
    for path in re.findall(r"^\| `([\w./]+)` \|", text, re.M):
        assert (ROOT / path).exists(), path
