"""The benchmark: all libraries agree, its tables are computed correctly, and missing libraries are handled."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import benchmark, choices, costs, peers
from jaxlstm import LSTM, tuning

from jobs import UNCHECKED, command
from sweeps import some

pytestmark = pytest.mark.usefixtures("ranks_may_be_promoted")

SHAPE = (11, 3, 5, 7)
TIMES = {"min": 1.0, "max": 9.0}


def row(shape, **medians):
    of_kind = {name.replace("_", " "): {**TIMES, "median": median} for name, median in medians.items()}
    return {"shape": shape, "forward": of_kind, "gradient": of_kind}


def results_of(name):
    layer = peers.PEERS[name][0](peers.problem(SHAPE))
    return layer.gradient, layer.read(layer.forward(), layer.gradient and layer.gradient())


@pytest.fixture(scope="module")
def want():
    with jax.enable_x64(False):
        return results_of("jaxlstm")[1]


@jax.enable_x64(False)
@pytest.mark.parametrize("name", some(list(peers.PEERS)[1:], "fifteen lines"))
def test_every_library_computes_the_same_results_from_the_same_weights(name, want):
    try:
        gradient, results = results_of(name)
    except ImportError as error:
        pytest.skip(str(error))
    assert set(results) == ({"ys"} if gradient is None else set(want))
    for what, value in results.items():
        assert value.shape == want[what].shape
        assert np.linalg.norm(value - want[what]) < 1e-6 * np.linalg.norm(want[what]), what


def test_a_ratio_is_relative_to_the_fastest_jax_library():
    found = benchmark.ratios(row(SHAPE, jaxlstm=2.0, Flax_linen=5.0, Haiku=3.0, torch=1.0), "gradient")
    assert found == {"fastest JAX library": 1.5, "torch": 0.5}
    found = benchmark.ratios(row(SHAPE, jaxlstm=2.0, fifteen_lines=1.0, Haiku=3.0), "gradient")
    assert found == {"fastest JAX library": 1.5, "fifteen lines": 0.5}  # which are not a library
    assert benchmark.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_the_table_has_a_line_for_every_shape_and_a_geometric_mean():
    shapes = [row((1, 2, 3, 4), jaxlstm=1.0, Keras=2.0), row((5, 6, 7, 8), jaxlstm=1.0, Keras=8.0, torch=1.5)]
    lines = benchmark.table({"shapes": shapes}).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 1, 2, 3, 4 | 2.00 |  | 2.00 |")
    assert lines[-1].startswith("| geometric mean | **4.00** | **1.50** |")


def test_the_table_has_a_column_for_the_fifteen_lines_if_they_were_measured():
    without, measured = row(SHAPE, jaxlstm=2.0, Keras=3.0), row(SHAPE, jaxlstm=2.0, Keras=3.0, fifteen_lines=5.0)
    assert "fifteen lines" not in benchmark.table({"shapes": [without]})
    head, _, line, _ = benchmark.table({"shapes": [measured]}).splitlines()
    assert head.count("fifteen lines") == 2 and line.startswith("| 11, 3, 5, 7 | 1.50 | 2.50 | 1.50 | 2.50 |")
    assert list(peers.PEERS)[:3] == ["jaxlstm", "jaxlstm, scan", "fifteen lines"]


def test_a_library_with_different_results_stops_the_benchmark():
    class Wrong:
        def __init__(self, value):
            self.value = value

        def ask(self, results):
            np.savez(results, ys=np.full(3, self.value))

    with pytest.raises(
        ValueError, match=r"benchmark: ys of other differs from jaxlstm's by 1.0e-02 at \(11, 3, 5, 7\)"
    ):
        benchmark.compare({"jaxlstm": Wrong(1.0), "other": Wrong(1.01)}, SHAPE)


@pytest.mark.ci
def test_the_command_measures_draws_and_prints(tmp_path):
    names = ["--peers", "jaxlstm", "Flax linen", "--shapes", *map(str, SHAPE)]
    small = ["--workdir", tmp_path / "b", "--starts", 2, "--rounds", 1, "--seconds", 0.01, "--no-costs"]
    done = command("benchmarks.benchmark", *small, *names, environment=UNCHECKED)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    (measured,) = result["shapes"]
    assert measured["gradient"].keys() == measured["forward"].keys() == {"jaxlstm", "Flax linen"}
    for times in measured["gradient"].values():
        assert 0 < times["min"] <= times["median"] <= times["max"] < math.inf
    assert benchmark.table(result) in done.stdout
    assert (tmp_path / "b" / "benchmark.png").stat().st_size > 10_000


COSTS = {
    "temporaries": {name: [20_000_000, 40_480_000] for name in ("scan", "bulk", "chunked")},
    "compiling": {"bulk": [0.25, 0.5]},
    "compiling a step": {"jaxlstm": 1.5, "Flax linen": 1.25},
    "doubling": {"forward": 2.0, "gradient": 1.9},
    "masked": {"1": {"without": 0.5, "with": 0.625}, "2": {"without": 0.25, "with": 0.25}},
    "ensembles": {
        "50, 8, 16, 32": {"seconds": {"sweep": 0.001, "vmap": 0.002}, "megabytes": {"sweep": 1.25, "vmap": 10.0}}
    },
    "training": {"a call each": 0.125, "fit": 0.1},
    "streaming": {
        "1": {"median": 2e-5, "p99": 4e-5},
        "1024": {"median": 1e-3, "p99": 2e-3},
    },
    "matmul": {"rate": 100e9},
    "devices": {"100, 32, 64, 64": [0.007, 0.005, 0.025]},
}


def test_the_floor_is_the_time_of_the_matmuls():
    result = {"shapes": [row((10, 20, 30, 40), jaxlstm=3.84e-3)], "costs": {"matmul": {"rate": 1e10}}}
    # The forward pass has 2 · 10·20·(30 + 40)·160 operations, 0.448 ms at that rate; the gradient has 3 times as many.
    assert benchmark.floors(result, "forward") == pytest.approx([3.84 / 0.448])
    assert benchmark.floors(result, "gradient") == pytest.approx([3.84 / 1.344])


def test_the_table_of_costs_shows_every_cost_in_its_unit():
    text = benchmark.costs_table({"shapes": [row((100, 32, 64, 64), jaxlstm=0.01)], "costs": COSTS})
    values = [line.split("|")[2].strip() for line in text.splitlines()]
    assert values[2:] == [
        "4.8", "1.6", "scan 20, bulk 20, chunked 20", "scan 10.0, bulk 10.0, chunked 10.0", "bulk 0.25 and 0.50",
        "jaxlstm 1.50, Flax linen 1.25",
        "forward 2.00, gradient 1.90", "1.25, 1.00", "sweep 1.0, vmap 2.0", "sweep 1, vmap 10",
        "a call each 125, fit 100", "7.0, 5.0, 25.0",
        "20, 40; 50,000", "1000, 2000; 1,024,000",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.documented
def test_costs_are_measured():
    sizes = costs.temporaries(2, 3, 4, [40, 80])
    assert sizes.keys() == costs.METHODS.keys() and all(0 < few < many for few, many in sizes.values())
    assert all(0 < few < 60 > many > 0 for few, many in costs.compiling(2, 3, 4, [5, 50], repeats=1).values())
    assert all(0 < seconds < 60 for seconds in costs.compiling_a_step((5, 2, 3, 4), repeats=1).values())
    assert 0.5 < costs.doubling((500, 1, 3, 4), rounds=3, seconds=0.02)["gradient"] < 8
    times = costs.masked((20, 2, 3, 4), 1, 0.01)
    assert 0.1 < times["with"] / times["without"] < 10
    found = costs.ensemble((5, 2, 3, 4), 3, 1, 0.01)
    assert found["seconds"].keys() == found["megabytes"].keys() >= {"sweep", "vmap", "lax.map"}
    assert found["megabytes"]["lax.map"] < found["megabytes"]["vmap"]
    for times in (
        found["seconds"],
        costs.training((5, 2, 3, 4), 1, 0.01, steps=2),
        *costs.streaming(3, 4, 0.05, [1, 7]).values(),
    ):
        assert all(0 < value < 10 for value in times.values())
    for library in ("jaxlstm", "Flax linen"):
        assert 0 < costs.sharded((5, 2, 3, 4), library, 0.01)["seconds"] < 10
    assert 1e7 < costs.matmul(0.05)["rate"] < 1e15


@pytest.mark.ci
@pytest.mark.documented
def test_the_steps_whose_compile_times_are_compared_compute_the_same():
    of_linen, *others = (float(loss(params)) for loss, params in reversed(costs.masked_layers((7, 5, 3, 4)).values()))
    assert others == pytest.approx([of_linen] * 2, rel=1e-5)
    lengths, mask = costs._lengths(5, 7)
    assert mask.sum() == lengths.sum() < mask.size


@jax.debug_nans(False)  # the check keeps donated buffers, to repeat the operation that made a NaN
def test_a_streaming_step_donates_its_carry_resets_each_stream_alone_and_compiles_once():
    step, layers, carries, x = costs.stream(3, 4, 5)
    given, x = carries, x.astype(layers[0].b.dtype)
    for begun in (jnp.zeros(5, bool), jnp.arange(5) == 2):
        before = jax.tree.map(jnp.copy, carries)
        carries, _ = step(layers, carries, x, reset=begun)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given)), "donated"
    assert step._cache_size() == 1
    fresh, _ = LSTM.step(layers[0], LSTM.initial_carry(layers[0], (5,)), x)
    on, _ = LSTM.step(layers[0], before[0], x)
    for got, reset, went_on in zip(carries[0], fresh, on, strict=True):
        np.testing.assert_allclose(got[2], reset[2], rtol=1e-6)
        np.testing.assert_allclose(got[:2], went_on[:2], rtol=1e-6)
        assert not np.allclose(got[2], went_on[2])


def test_an_unknown_library_is_reported_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as refused:
        benchmark.main(workdir=str(tmp_path / "b"), peers=("jaxlstm", "Theano"))
    (line,) = str(refused.value).splitlines()
    assert line.startswith("benchmark: --peers must be among jaxlstm, ") and line.endswith("; got Theano.")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name, without, shapes", [("choices", choices.ON_A_CPU, 6), ("choices-gpu", choices.ELSEWHERE, 2)]
)
def test_the_tables_of_choices_are_the_committed_results(name, without, shapes):
    """Each choice in tuning.py was measured; its docstring quotes the results."""
    result = json.loads((Path(benchmark.__file__).parent / "results" / f"{name}.json").read_text("utf-8"))
    every = [", ".join(map(str, shape)) for shape in benchmark.SHAPES]
    assert set(result["shapes"]) <= set(every) and len(result["shapes"]) == shapes
    rows = [line for line in choices.table(result).splitlines() if not line.startswith("(")]
    assert len(rows) == 1 + len(without) - 1
    assert all(f"    {row}\n" in tuning.__doc__ for row in rows)


@pytest.mark.ci
def test_choices_are_timed_and_none_changes_the_result():
    shape = (12, 3, 5, 7)
    times = choices.timed(shape, rounds=2, seconds=0.001)
    assert all(len(own) == 2 and min(own) > 0 for of_kind in times.values() for own in of_kind.values())
    params = LSTM.init(jax.random.key(0), 5, 7)
    xs = jax.random.normal(jax.random.key(1), (12, 3, 5), "float32")
    want = peers.scan_lstm(params, xs)
    for name, run in choices.RUNS.items():
        assert float(abs(run(params, xs) - want).max()) < 1e-5, name
