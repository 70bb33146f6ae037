"""The experiments beside published numbers: their data, their measures, how they choose, and short runs of each."""

import io
import itertools
import json
import keyword
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.io import savemat

from experiments import (
    catalog,
    chorales,
    counting,
    gradbench,
    long_lag,
    odyssey,
    plots,
    rnn_vs_lstm,
    shakespeare,
    tagging,
    text,
)
from experiments.harness import intervals, rows, runs
from jaxlstm import GRU, LSTM, Cell, num_params, variants
from jaxlstm.diagnostics import check_gradients
from jaxlstm.variants import make_lstm_1997

from cells import normal

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def default_settings():
    """JAX as a user of an experiment has it: float32, and dtypes and ranks are promoted."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


def random_net(units):
    """Return a net for music whose readout is not zero."""
    net = chorales.init_net(jax.random.key(0), LSTM, units)
    return net._replace(w=jnp.asarray(normal(0, units, 88)), b=jnp.asarray(normal(1, 88)))


# What all of them share.


def test_rows_are_saved_one_by_one_and_a_resumed_run_measures_only_the_rest(tmp_path):
    plans = [{"cell": cell, "units": units} for cell in ("GRU", "LSTM") for units in (3, 5)]
    seen = []

    def measure(cell, units):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append((cell, units))
        return {"twice": 2 * units}

    options = {"workdir": str(tmp_path / "run"), "resume": False}
    with pytest.raises(KeyboardInterrupt):
        rows.collect("toy", {"width": 3}, plans, measure, **options)
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(row["cell"], row["units"], row["twice"]) for row in saved["rows"]] == [("GRU", 3, 6), ("GRU", 5, 10)]
    seen.clear()
    options["resume"] = True
    folder, result = rows.collect(
        "toy", {"width": 3}, plans, lambda **plan: seen.append(plan) or {"twice": 0}, **options
    )
    assert seen == plans[2:] and [row["twice"] for row in result["rows"]] == [6, 10, 0, 0]
    assert result == json.loads((folder / "result.json").read_text())
    assert all(row["seconds"] >= 0 for row in result["rows"])
    assert result["config"] == {"width": 3} and {"versions", "device"} <= result.keys()
    assert all("commit" in row for row in result["rows"])


def test_a_result_names_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs.commit() is None
    (tmp_path / "file").write_text("1")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "first")
    clean = runs.commit()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert len(clean) == 12 and head.startswith(clean)
    (tmp_path / "file").write_text("2")
    assert runs.commit() == clean + "+"


def test_quick_sets_flags_that_others_on_the_command_line_replace(monkeypatch, capsys):
    seen = []

    def main(*, steps: int = 100, sizes: tuple[int, ...] = (1, 2), workdir: str | None = None, resume: bool = False):
        """Train.

        Args:
          steps: how many.
        """
        seen.append((steps, sizes))

    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    for flags in ([], ["--quick"], ["--quick", "--steps", "7"], ["--steps", "7", "--quick"]):
        monkeypatch.setattr("sys.argv", ["toy", *flags])
        runs.cli("toy", main, quick={"steps": 2, "sizes": (5,)})
    assert seen == [(100, (1, 2)), (2, (5,)), (7, (5,)), (7, (5,))]
    monkeypatch.setattr("sys.argv", ["toy", "--help"])
    with pytest.raises(SystemExit):
        runs.cli("toy", main, quick={"steps": 2, "sizes": (5,)})
    assert "--quick stands for --steps 2 --sizes 5" in " ".join(capsys.readouterr().out.replace("│", "").split())
    monkeypatch.setattr("sys.argv", ["toy", "--quick"])
    with pytest.raises(SystemExit):
        runs.cli("toy", main)


def test_intervals_are_those_of_scipy():
    values = [0.3, 0.9, 1.4, 0.2]
    mean, low, high = intervals.of_mean(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    np.testing.assert_allclose((mean, low, high), (0.7, *expected))
    assert intervals.of_mean([2.5]) == (2.5, 2.5, 2.5) and intervals.shown([2.5]) == "2.50"
    z, n, k = stats.norm.ppf(0.975), 10, 7
    center, half = k + z**2 / 2, z * np.sqrt(k * (n - k) / n + z**2 / 4)
    np.testing.assert_allclose(
        intervals.of_share(k, n), (0.7, (center - half) / (n + z**2), (center + half) / (n + z**2))
    )


# Music.


def pieces(*lengths):
    return [(normal(n, length, chorales.NOTES) > 1).astype(np.uint8) for n, length in enumerate(lengths)]


def test_streams_hold_every_chord_once_and_ask_for_all_but_the_first_of_a_piece():
    own = pieces(9, 4, 12, 5, 2)
    packed = chorales.streams(own, 12)
    chords, reset, asked = map(np.asarray, packed)
    assert chords.shape == (3, 12, 88)  # 12, 9 + 2, 5 + 4
    found = []
    for stream, starts, predicts in zip(chords, reset, asked, strict=True):
        begins = [*np.flatnonzero(starts), 12]
        for start, stop in itertools.pairwise(begins):
            length = predicts[start:stop].sum() + 1
            assert predicts[start : start + length - 1].all()
            found.append(stream[start : start + length])
    assert sorted(map(len, found)) == [2, 4, 5, 9, 12]
    for piece in own:
        assert any(np.array_equal(piece, other) for other in found)
    assert asked.sum() == sum(len(piece) - 1 for piece in own)


def test_training_pieces_are_cut_and_test_pieces_are_not(tmp_path):
    path = write_music(tmp_path, 11, 3, 7)
    parts = chorales.load(path, 4)
    assert parts["train"].chords.shape[1] == 4 and parts["valid"].chords.shape[1] == 11
    assert int(parts["train"].reset.sum()) == 2 * (3 + 1 + 2) and int(parts["test"].reset.sum()) == 6
    with pytest.raises(FileNotFoundError, match=r"nothing.mat is not a file"):
        chorales.read("nothing.mat")


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (long_lag.main, {"tasks": ("adding", "add")}, r"--tasks must be one of 'adding', .*, got 'add'"),
        (counting.main, {"languages": ("ab",)}, r"--languages must be one of .*'Dyck-1'.*, got 'ab'"),
        (shakespeare.main, {"recipes": ("yesterday",)}, r"--recipes must be one of 'char-rnn', .*, got 'yesterday'"),
        (odyssey.main, {"names": ("NP", "N")}, r"--names must be one of 'V', .*, got 'N'"),
        (chorales.main, {"data": "Bach.mat"}, r"--data must be a file named JSB_Chorales.mat or Nottingham.mat"),
        (chorales.main, {"sizes": ("7",)}, r"--sizes must contain a size of JSB Chorales, 20,000 or 300,000, got 7"),
    ],
)
def test_a_wrong_name_is_reported_before_any_work(main, flags, message):
    with pytest.raises(runs.FlagError, match=message):
        main(**flags)


@pytest.mark.ci
def test_a_wrong_name_ends_in_one_line():
    command = [sys.executable, "-m", "experiments.long_lag", "--tasks", "add"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("long_lag: --tasks must be one of 'adding', ") and done.stderr.count("\n") == 1


def write_music(folder, *lengths):
    """Write a file in the format of the data sets, with two pieces of each length in every part."""
    parts = {}
    for n, part in enumerate(("train", "valid", "test")):
        own = pieces(*(length for length in lengths for _ in range(2)))
        cells = np.empty((1, len(own)), object)
        for k, piece in enumerate(own):
            cells[0, k] = np.roll(piece, n, axis=1)
        parts[f"{part}data"] = cells
    savemat(folder / "JSB_Chorales.mat", parts)
    return folder / "JSB_Chorales.mat"


def test_the_loss_of_music_equals_a_numpy_loop_over_each_piece_alone():
    own = pieces(6, 3, 4)
    packed = chorales.streams(own, 7)
    net = random_net(5)
    nats, asked = chorales.losses(LSTM, net, packed)
    total = 0.0
    for piece in own:
        h = c = np.zeros(5)
        for now, after in itertools.pairwise(piece.astype(float)):
            z = now @ np.asarray(net.cell.w_ih) + h @ np.asarray(net.cell.w_hh) + np.asarray(net.cell.b)
            i, f, g, o = np.split(z, 4)
            i, f, o = (1 / (1 + np.exp(-v)) for v in (i, f, o))
            c = f * c + i * np.tanh(g)
            h = o * np.tanh(c)
            logits = h @ np.asarray(net.w) + np.asarray(net.b)
            p = 1 / (1 + np.exp(-logits))
            total -= (after * np.log(p) + (1 - after) * np.log(1 - p)).sum()
    np.testing.assert_allclose(nats.sum(where=asked), total, rtol=1e-5)
    np.testing.assert_allclose(chorales.mean_loss(LSTM, net, packed), total / asked.sum(), rtol=1e-5)


def test_masks_drop_inputs_units_and_outputs():
    packed = chorales.streams(pieces(6, 5), 6)
    net = random_net(5)
    ones = chorales.Masks(jnp.ones((2, 88)), jnp.ones((2, 5)), jnp.ones((2, 5)))
    plain, _ = chorales.losses(LSTM, net, packed)
    np.testing.assert_allclose(chorales.losses(LSTM, net, packed, ones)[0], plain, rtol=1e-6)
    for name in ones._fields:
        changed = chorales.losses(LSTM, net, packed, ones._replace(**{name: 0 * getattr(ones, name)}))[0]
        assert np.abs(changed - plain).max() > 1e-3, name
    silent, _ = chorales.losses(LSTM, net._replace(b=0 * net.b), packed, ones._replace(y=0 * ones.y))
    np.testing.assert_allclose(silent, 88 * np.log(2), rtol=1e-6)


def test_the_validation_part_chooses_and_the_test_part_is_read_once(monkeypatch):
    data = {name: name for name in ("train", "valid", "test")}
    read = []

    def trained(cell, recipe, data, keys, rates):
        # A net is its learning rate; the best validation loss is at 0.02, the best test loss at 0.1.
        distance = jnp.abs(rates - 0.02) + 10 * (recipe.dropout != 0.3)
        epochs = {name: jnp.stack([distance + 1, distance, distance + 2], axis=1) for name in ("validation", "loss")}
        return rates, {**epochs, "ran": jnp.array([[True, True, False]] * len(rates))}

    def mean_loss(cell, net, part):
        read.append(part.shape)
        return net

    monkeypatch.setattr(chorales, "train_all", trained)
    monkeypatch.setattr(chorales, "mean_loss", mean_loss)
    data = {"train": jnp.zeros(3), "valid": jnp.zeros(4), "test": jnp.zeros(5)}
    recipes = [chorales.Recipe(5, dropout) for dropout in (0.0, 0.3)]
    found = chorales.train_and_choose(LSTM, recipes, data, (0.1, 0.02, 0.005), 2)
    assert found["chosen"] == 4 and found["tried"][4]["dropout"] == 0.3
    assert found["tried"][4]["learning_rate"] == 0.02 and found["tried"][4]["epochs"] == [2, 2]
    assert found["test"] == found["train"] == [0.02, 0.02]
    assert read == [(3,), (5,)]  # one call for the training part, one for the test part


@pytest.mark.ci
def test_a_net_learns_music_and_dropout_changes_its_training(tmp_path):
    motif = np.zeros((12, 88), np.uint8)
    motif[np.arange(12), 20 + 3 * (np.arange(12) % 4)] = 1
    part = chorales.streams([motif, motif[:9], motif[2:], motif[1:11]], 12)
    data = {"train": part, "valid": part, "test": part}
    plain = chorales.train_and_choose(GRU, [chorales.Recipe(7, epochs=40)], data, (3e-2,), 2)
    assert max(plain["test"]) < 4  # at the start it is 88 log 2 = 61
    noisy = chorales.train_and_choose(GRU, [chorales.Recipe(7, 0.5, epochs=40)], data, (3e-2,), 2)
    assert noisy["train"] != plain["train"] and plain["parameters"] == 3 * 7 * (88 + 7 + 1) + 7 + 8 * 88


@pytest.mark.ci
def test_the_validation_part_stops_the_training_and_the_test_part_takes_no_part():
    own = pieces(7, 6)
    # The validation set inverts the training set, so training stops soon.
    parts = {"train": own, "valid": [1 - piece for piece in own], "test": pieces(8, 5)}
    parts = {name: chorales.streams(part, 8) for name, part in parts.items()}
    recipe = chorales.Recipe(3, epochs=60, patience=3, batch=2)
    run = jax.jit(lambda data: chorales.train(LSTM, recipe, data, jax.random.key(0), 0.2))

    def changed(name, by):
        return {**parts, name: parts[name]._replace(chords=by * parts[name].chords)}

    net, epochs = run(parts)
    same, _ = run(changed("test", 9))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(net), jax.tree.leaves(same), strict=True))
    other, _ = run(changed("train", 0))
    assert not np.array_equal(net.w, other.w)
    _, other = run(changed("valid", 0))
    assert other["validation"][0] != epochs["validation"][0] and other["loss"][0] == epochs["loss"][0]
    best = int(epochs["validation"].argmin())
    assert int(epochs["ran"].sum()) == best + 1 + 3 < 60  # patience
    np.testing.assert_allclose(chorales.mean_loss(LSTM, net, parts["valid"]), epochs["validation"][best], rtol=1e-5)
    slower = jax.jit(lambda rate: chorales.train(LSTM, recipe, parts, jax.random.key(0), rate))(0.05)[1]
    assert slower["loss"][0] == epochs["loss"][0] and slower["loss"][1] != epochs["loss"][1]


@pytest.mark.parametrize("size", ["20,000", "300,000"])
def test_the_nets_have_the_sizes_that_they_name(size):
    cells = {**chorales.CELLS, "LSTM with dropout": LSTM}
    for net in chorales.NETS["JSB Chorales"]:
        if net.size == size:
            count = num_params(
                jax.eval_shape(lambda net=net: chorales.init_net(jax.random.key(0), cells[net.cell], net.units))
            )
            assert 0.97 < count / int(size.replace(",", "")) < 1.4, net  # the paper's RNN of 100 units has 27,788


# Long lags.


@pytest.mark.parametrize(("task", "low"), [("adding", -1), ("multiplication", 0)])
def test_the_answer_is_made_of_the_two_marked_numbers(task, low):
    xs, asked, targets = map(np.asarray, long_lag.TASKS[task].draw(jax.random.key(0), 40, 300))
    assert xs.shape == (44, 300, 2) and asked.shape == (1, 300) and targets.shape == (1, 300, 1)
    assert {*asked[0]} == {39, 40, 41, 42, 43}
    values, marker = xs[..., 0], xs[..., 1]
    assert low <= values.min() < low + 0.1 and values.max() > 0.9
    for n in range(300):
        places = np.flatnonzero(marker[:, n] == 1)
        assert len(places) == 2 and places.min() < 10 and places.max() < 20
        first, second = values[places, n]
        np.testing.assert_allclose(targets[0, n, 0], 0.5 + (first + second) / 4 if low else first * second, rtol=1e-6)
        ends = [step for step in (0, asked[0, n]) if step not in places]
        assert (marker[ends, n] == -1).all() and (marker[:, n] == -1).sum() == len(ends)
    first_is_marked = marker[0] == 1
    neutral = 0 if low else 1
    assert first_is_marked.any() and (values[0, first_is_marked] == neutral).all()


@pytest.mark.parametrize(
    ("task", "windows"), [("order of two", ((10, 20), (50, 60))), ("order of three", ((10, 20), (33, 43), (66, 76)))]
)
def test_the_answer_is_the_order_of_the_two_signs(task, windows):
    symbols, asked, targets = map(np.asarray, long_lag.TASKS[task].draw(jax.random.key(1), 100, 200))
    assert symbols.shape == (110, 200) and targets.shape == (1, 200, 2 ** len(windows))
    for n in range(200):
        assert symbols[0, n] == 6 and symbols[asked[0, n], n] == 7 and 99 <= asked[0, n] < 110
        places = np.flatnonzero((symbols[:, n] == 4) | (symbols[:, n] == 5))
        assert len(places) == len(windows)
        assert all(low <= place <= high for place, (low, high) in zip(places, windows, strict=True))
        answer = sum((symbols[place, n] - 4) * 2**k for k, place in enumerate(places))
        assert targets[0, n].argmax() == answer and targets[0, n].sum() == 1
    assert {*symbols[1:9].ravel()} == {0, 1, 2, 3}


def test_2c_asks_for_the_second_symbol_and_copy_for_the_first_ten():
    symbols, asked, targets = map(np.asarray, long_lag.noise(jax.random.key(2), 30, 200))
    assert (symbols[0] == 0).all() and {*symbols[1]} == {2, 3}
    assert (targets[0].argmax(-1) == symbols[1] - 2).all()
    assert (symbols[asked[0], np.arange(200)] == 1).all() and asked.min() >= 32 and asked.max() < len(symbols)
    assert symbols[2:32].min() == 4 and symbols[2:32].max() == 33
    assert 5 < (asked[0] - 32).mean() < 13  # geometric, mean 9

    symbols, asked, targets = map(np.asarray, long_lag.copy(jax.random.key(3), 12, 50))
    assert symbols.shape == (32, 50) and (symbols[10:21] == 8).all() and (symbols[21] == 9).all()
    assert (asked == np.arange(22, 32)[:, None]).all() and (targets.argmax(-1) == symbols[:10]).all()
    assert {*symbols[:10].ravel()} == set(range(8))


def test_a_symbol_picks_a_row_of_the_weights():
    params = LSTM.init(jax.random.key(0), 6, 3)._replace(b=jnp.asarray(normal(0, 12)))
    symbols = np.array([[0, 5], [3, 3]])
    np.testing.assert_allclose(
        long_lag.lookup(params, symbols), LSTM.project(params, jax.nn.one_hot(symbols, 6)), rtol=1e-6
    )


@pytest.mark.ci
def test_the_outputs_are_read_where_they_are_asked_for():
    recipe = long_lag.recipe_of_today(long_lag.TASKS["copy"], 5, long_lag.nets(5)["GRU"], 1e-2)
    batch = long_lag.copy(jax.random.key(0), 5, 3)
    params = recipe.init(jax.random.key(1))._replace(w=jnp.asarray(normal(1, long_lag.UNITS, 8)))
    got = long_lag.read(recipe.cell, params, batch)
    state = GRU.initial_carry(params.cell, (3,))
    outputs = []
    for x in jax.nn.one_hot(batch.xs, 10):
        state, h = GRU.step(params.cell, state, x)
        outputs.append(h @ params.w + params.b)
    np.testing.assert_allclose(got, np.stack(outputs[-10:]), rtol=1e-5, atol=1e-6)


@pytest.mark.ci
def test_the_recipe_of_1997_has_the_papers_weights():
    biases = {"adding": (-3, -6), "order of two": (-2, -4), "order of three": (-2, -4, -6), "multiplication": ()}
    weights = {"adding": 93, "order of two": 156, "order of three": 308, "multiplication": 93}
    for task, expected in biases.items():
        recipe = long_lag.recipe_of_1997(long_lag.TASKS[task], 100)
        params = recipe.init(jax.random.key(0))
        assert num_params(params) == weights[task] and recipe.batch == 1
        cells = params.w.shape[0]
        w_ih, w_hh, b = params.cell
        np.testing.assert_array_equal(b[cells : cells + len(expected)], expected)
        free = np.delete(np.asarray(b), np.arange(cells, cells + len(expected)))
        sizes = np.abs(np.concatenate([leaf.ravel() for leaf in (w_ih, w_hh, free, params.w, params.b)]))
        assert sizes.max() < 0.1 and 0.04 < sizes.mean() < 0.06
    with pytest.raises(ValueError, match="does not contain this task"):
        long_lag.recipe_of_1997(long_lag.TASKS["copy"], 50)


def test_the_net_of_2c_has_no_biases_and_gets_none():
    task = long_lag.TASKS["2c"]
    recipe = long_lag.recipe_of_1997(task, 50)
    params = recipe.init(jax.random.key(0))
    assert long_lag.num_weights(task, params) == 364 and num_params(params) == 372
    ones = jax.tree.map(jnp.ones_like, params)
    update, _ = recipe.optimizer.update(ones, recipe.optimizer.init(params), params)
    assert not any(np.any(b) for b in (params.cell.b, params.b, update.cell.b, update.b))
    np.testing.assert_allclose(update.cell.w_hh, -0.01)
    assert 0.19 < np.abs(params.cell.w_ih).max() < 0.2


@pytest.mark.ci
def test_the_recipe_of_1997_cuts_the_gradient_at_the_units_outputs():
    task = long_lag.TASKS["adding"]
    recipe = long_lag.recipe_of_1997(task, 10)
    params = jax.tree.map(lambda leaf: 5 * leaf, recipe.init(jax.random.key(0)))
    batch = task.draw(jax.random.key(1), 10, 3)

    def gradient(truncate):
        cell = make_lstm_1997(2, truncate=truncate)
        return jax.grad(lambda params: long_lag.read(cell, params, batch).sum())(params).cell.w_hh

    got = jax.grad(lambda params: long_lag.read(recipe.cell, params, batch).sum())(params).cell.w_hh
    np.testing.assert_allclose(got, gradient(True), rtol=1e-5, atol=1e-7)
    assert np.abs(got - gradient(False)).max() > 1e-2 * np.abs(got).max()


def test_the_nets_of_today_start_from_the_biases_that_they_name():
    found = {name: net.init(jax.random.key(0), 3, 16) for name, net in long_lag.nets(50).items()}
    for name, bias in (("LSTM, b_f = 0", 0), ("LSTM, b_f = 1", 1)):
        assert (found[name].b[16:32] == bias).all() and not found[name].b[:16].any()
    chrono = found["LSTM, chrono"].b
    np.testing.assert_array_equal(chrono[:16], -chrono[16:32])
    assert chrono[16:32].min() >= 0 and 3 < chrono[16:32].max() < np.log(49)
    assert num_params(found["GRU"]) > num_params(found["RNN"]) == 16 * (3 + 16 + 1)


def test_the_tasks_are_those_of_the_paper():
    found = {name: task.paper and task.paper.sequences for name, task in long_lag.TASKS.items()}
    assert found == {
        "adding": {100: 74_000, 500: 209_000, 1000: 853_000}, "multiplication": {100: 482_000},
        "order of two": {100: 31_390}, "order of three": {100: 571_100}, "2c": {50: 30_000, 1000: 49_000}, "copy": None,
    }  # fmt: skip
    rules = {name: task[2:4] + task[5:] for name, task in long_lag.TASKS.items()}
    assert rules == {
        "adding": (0.04, 0.01, 2000, 0), "multiplication": (0.04, 0.01, 2000, 139), "order of two": (0.3, 0.1, 2000, 0),
        "order of three": (0.3, 0.1, 2000, 0), "2c": (0.2, 0.2, 10_000, 0), "copy": (0.3, 0.1, 2000, 0),
    }  # fmt: skip
    rates = {name: task.paper.learning_rate for name, task in long_lag.TASKS.items() if task.paper}
    assert rates == {"adding": 0.5, "multiplication": 0.1, "order of two": 0.5, "order of three": 0.1, "2c": 0.01}


def test_the_recipe_of_1997_is_plain_descent_on_half_the_squared_error():
    recipe = long_lag.recipe_of_1997(long_lag.TASKS["adding"], 10)
    z, target = jnp.array([[[0.3]]]), jnp.array([[[0.8]]])
    y = 1 / (1 + np.exp(-0.3))
    np.testing.assert_allclose(jax.grad(recipe.loss)(z, target), [[[(y - 0.8) * y * (1 - y)]]], rtol=1e-6)
    update, _ = recipe.optimizer.update({"w": jnp.ones(2)}, recipe.optimizer.init({"w": jnp.ones(2)}))
    np.testing.assert_allclose(update["w"], -0.5)


@pytest.mark.parametrize(("misses", "mean_error"), [(0, 0.4), (2, 0.4), (2, 0.17)])
def test_a_task_is_solved_at_the_first_time_when_the_last_sequences_were_right(misses, mean_error):
    task = long_lag.TASKS["adding"]._replace(tolerance=0.5, mean_error=mean_error, in_a_row=12, misses=misses)
    rng = np.random.default_rng(misses)
    errors = rng.uniform(0, 0.45, (20, 2, 4, 3))  # [step, answer, batch, output]
    errors[rng.random(20) < 0.3, 1, 2, 0] = 0.9  # one output of one answer is wrong
    errors[8:12] /= 1.6
    progress = long_lag.no_progress(task, 4)
    watch = jax.jit(lambda progress, now: long_lag.watch(task, progress, now))
    for now in errors:
        progress = watch(progress, jnp.asarray(now, jnp.float32))
    expected = 0
    for step in range(3, 21):
        last = errors[step - 3 : step]
        wrong = (last.max((1, 3)) >= 0.5).sum()
        if not expected and wrong <= misses and last.mean() < mean_error:
            expected = 4 * step
    assert int(progress.solved_at) == expected > 0 and int(progress.seen) == 80


@pytest.mark.ci
def test_training_goes_on_until_every_trial_has_solved_the_task(monkeypatch):
    monkeypatch.setattr(long_lag, "BLOCK", 80)

    def easy(key, lag, batch):  # the answer is the last input
        symbols = jax.random.randint(key, (3, batch), 0, 2)
        return long_lag.Batch(symbols, jnp.full((1, batch), 2), jax.nn.one_hot(symbols[2], 2)[None])

    task = long_lag.Task(easy, lambda lag: 2, 0.3, 0.1, None, in_a_row=40)
    recipe = long_lag.recipe_of_today(task, 3, long_lag.nets(3)["LSTM, b_f = 1"], 3e-2)
    keys = lambda: jax.random.split(jax.random.key(0), 3)
    solved = long_lag.sequences_to_success(task, recipe, 3, keys(), 4000)
    assert all(40 < number < 4000 for number in solved) and len({*solved}) > 1
    assert long_lag.sequences_to_success(task, recipe, 3, keys(), 80) == [None] * 3


def test_long_lag_plans_every_row_once_and_the_longest_last():
    rows_ = long_lag.plans(("adding", "order of two", "2c", "copy"), (50, 100, 500), (50,), (50, 200))
    found = [(row["recipe"], row["task"], row["lag"]) for row in rows_]
    by_cell = [(net, "order of two", lag) for net in long_lag.nets(9) if net != "LSTM, chrono" for lag in (50, 200)]
    chrono = [("adding", 100), ("adding", 500), ("2c", 50), ("copy", 50), ("copy", 100)]
    chrono += [("order of two", lag) for lag in (50, 100, 200, 500)]
    assert len(found) == len(set(found))
    assert set(found) == {("1997", "2c", 50), *by_cell, *(("LSTM, chrono", *place) for place in chrono)}
    assert [row["lag"] for row in rows_] == sorted(row["lag"] for row in rows_)
    assert not any(row["task"] == "order of two" for row in long_lag.plans(("copy",), (50,), (), (50,)))


def test_long_lag_tables_show_medians_ranges_and_failures():
    row = {"solved_at": [5000, 3000, None, 4000]}
    assert long_lag.sequences(row) == "3/4: 4,500 (3,000 to the limit)"
    assert long_lag.sequences({"solved_at": [7000, 9000]}) == "2/2: 8,000 (7,000 to 9,000)"
    assert long_lag.sequences({"solved_at": [None, None, 7]}) == "1/3" and long_lag.sequences(None) == ""
    assert (
        long_lag.solved_share({"solved_at": [5] * 10}) == "10/10 (0.72 to 1.00)" and long_lag.solved_share(None) == ""
    )


# Counting.


@pytest.mark.parametrize(("letters", "alphabet"), [(2, "ab"), (3, "abc")])
def test_after_every_symbol_exactly_the_right_ones_are_allowed(letters, alphabet):
    ns = range(1, 7)
    symbols, allowed, real = map(np.asarray, counting.counted(letters, ns))
    language = {"".join(letter * n for letter in alphabet) for n in range(1, 9)}
    for word, n in enumerate(ns):
        text = "".join(letter * n for letter in alphabet)
        assert real[:, word].sum() == 1 + len(text)
        assert ["?", *text] == ["?" if s == 0 else alphabet[s - 1] for s in symbols[real[:, word], word]]
        for step in range(1 + len(text)):
            following = {other[step : step + 1] for other in language if other.startswith(text[:step])}
            assert {"" if k == 0 else alphabet[k - 1] for k in np.flatnonzero(allowed[step, word])} == following


@pytest.mark.parametrize("kinds", [1, 2])
def test_brackets_are_balanced_and_their_continuations_right(kinds):
    lengths = [2, 10, 6, 4] * 50
    symbols, allowed, real = map(np.asarray, counting.brackets(kinds, np.random.default_rng(0), lengths))
    for word, length in enumerate(lengths):
        assert real[:, word].sum() == 1 + length
        stack = []
        for step in range(1 + length):
            symbol = symbols[step, word]
            if step and symbol <= kinds:
                stack.append(symbol)
            elif step:
                assert stack.pop() == symbol - kinds
            expected = {*range(1, 1 + kinds), stack[-1] + kinds if stack else 0}
            assert {*np.flatnonzero(allowed[step, word])} == expected
        assert not stack
    if kinds == 1:  # the five shapes of six brackets are equally likely
        words = counting.brackets(1, np.random.default_rng(1), [6] * 1000).symbols
        _, counts = np.unique(np.asarray(words), axis=1, return_counts=True)
        assert len(counts) == 5 and stats.chisquare(counts).pvalue > 1e-3


def counter_net():
    """A net that counts: c goes up at a and down at b, and the readout compares it with 0 and with what was read."""

    class State(dict):
        pass

    def gates(params, state, z, a):
        c = state["c"] + z[..., :1]
        last = z[..., 1:]
        h = jnp.concatenate([c, last], axis=-1)
        return {"c": c, "h": h}, h

    def project(params, xs):  # one-hot of (start, a, b) -> change of c, and which symbol it was
        return jnp.concatenate([xs[..., 1:2] - xs[..., 2:3], xs], axis=-1)

    def initial(params, batch_shape=()):
        return {"c": jnp.zeros((*batch_shape, 1)), "h": jnp.zeros((*batch_shape, 4))}

    cell = Cell(lambda *_: None, initial, gates, project, lambda params, state: None)
    # end: after b with c = 0; a: after the start or a; b: after a, or after b with c > 0
    w = jnp.array([[-1.0, 0.0, 1.0], [-9.0, 1.0, -9.0], [-9.0, 1.0, 9.0], [0.5, -1.0, -0.5]])
    return cell, counting.Params(jnp.zeros(()), w, jnp.zeros(3))


def test_a_net_that_counts_is_right_and_one_that_cannot_is_wrong():
    cell, net = counter_net()
    words = counting.counted(2, range(1, 30))
    assert np.asarray(counting.right(cell, net, words)).all()
    broken = net._replace(w=net.w.at[3, 0].set(-0.5))
    assert not np.asarray(counting.right(cell, broken, words)).any()


def test_reach_is_the_last_word_before_the_first_mistake():
    assert counting.reach(np.array([True, True, False, True])) == 2
    assert counting.reach(np.array([False, True])) == 0 and counting.reach(np.ones(5, bool)) == 5


@pytest.mark.ci
def test_every_setting_of_counting_changes_the_result(monkeypatch):
    settings = {"trained_to": 4, "tested_to": 6, "seeds": 2, "steps": 3, "learning_rate": 1e-2}
    base = counting.measure("aⁿbⁿ", "GRU", **settings)
    assert len(base["loss"]) == 2 and len(base["counter"]) == 10 and len(base["counter"][0]) == 1 + 2 * 16
    for name, value in (("trained_to", 5), ("steps", 4), ("learning_rate", 2e-2), ("seeds", 1)):
        assert counting.measure("aⁿbⁿ", "GRU", **{**settings, name: value})["loss"] != base["loss"], name
    tested = []
    monkeypatch.setattr(counting, "right", lambda cell, net, words: tested.append(words.real.shape[1]) or words.real[0])
    assert counting.measure("aⁿbⁿ", "GRU", **settings)["reach"] == [6, 6] and tested == [6]
    brackets = counting.measure("Dyck-2", "LSTM", **settings)
    assert brackets["lengths"] == [4, 8] and np.shape(brackets["right"]) == (2, 2) and brackets["units"] == 16


# Tagging.


def test_labels_equal_those_of_the_tokenizer_character_by_character():
    source = 'def f(x):\n    """Doc."""\n    return x + 1.5  # note\n'
    labels = [tagging.CLASSES[k] for k in tagging.label(source)]
    expected = {"def": "keyword", "f": "name", '"""Doc."""': "string", "return": "keyword", "1.5": "number",
                "# note": "comment", "+": "operator"}  # fmt: skip
    for words, kind in expected.items():
        at = source.index(words, 4 if words == "f" else 0)
        assert labels[at : at + len(words)] == [kind] * len(words), words
    assert all(labels[at] == "space" for at, symbol in enumerate(source) if symbol == "\n")
    covered = sum(len(t.string) for t in tokenize.generate_tokens(io.StringIO(source).readline) if tagging.class_of(t))
    assert covered == sum(kind != "space" for kind in labels)
    assert not keyword.iskeyword("format") and tagging.label('f"a{b}"')[0] == tagging.CLASSES.index("string")


@pytest.mark.ci
def test_training_and_test_windows_come_from_different_files():
    seen, held_out = tagging.load(1000, 2000)
    fewer, _ = tagging.load(25, 2000)
    assert 0 < len(fewer.symbols) < len(seen.symbols)
    assert seen.symbols.shape[1] == 128 and held_out.symbols.shape[1] == 512
    assert 3 < seen.symbols.size / held_out.symbols.size < 8 and int(seen.symbols.max()) < 128
    assert {*np.unique(held_out.labels)} == set(range(7))
    windows = {np.asarray(row[:128]).tobytes() for row in held_out.symbols}
    assert len(windows & {np.asarray(row).tobytes() for row in seen.symbols}) < 0.02 * len(windows)


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    rng = np.random.default_rng(0)
    predicted, labels = rng.integers(0, 7, 500), rng.integers(0, 7, 500)
    for k, score in enumerate(tagging.f1(predicted, labels)):
        hits = ((predicted == k) & (labels == k)).sum()
        precision, recall = hits / (predicted == k).sum(), hits / (labels == k).sum()
        np.testing.assert_allclose(score, stats.hmean([precision, recall]))


def test_lone_borders_are_those_without_another_one_near():
    labels = np.zeros((2, 60), int)
    labels[0, 20:] = 1
    labels[1, 15:30], labels[1, 38:] = 2, 3
    windows, steps = tagging.lone_borders(labels)
    assert [*zip(windows, steps, strict=True)] == [(0, 20), (1, 15)]


@pytest.mark.ci
def test_gates_are_averaged_over_units_and_borders():
    net = tagging.Net(LSTM, 3)
    params = tagging.init_net(jax.random.key(0), net)
    symbols = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 50)))
    labels = jnp.asarray(np.repeat([[0, 1], [2, 3]], 25, axis=1))
    found = tagging.around_borders(net, params, tagging.Text(symbols, labels))
    state, f, change = LSTM.initial_carry(params.layer, (2,)), [], []
    for x in params.embedding[symbols.T]:
        z, a = LSTM.project(params.layer, x), LSTM.recur(params.layer, state)
        f.append(LSTM.activations(params.layer, state, z, a).f.mean(-1))
        before, (state, _) = state, LSTM.step(params.layer, state, x)
        change.append(jnp.sqrt(((state.c - before.c) ** 2).sum(-1)))
    np.testing.assert_allclose(found["f"], np.stack(f)[15:36].mean(1), atol=1e-4)
    np.testing.assert_allclose(found["change of c"], np.stack(change)[15:36].mean(1), atol=1e-4)


def test_sensitivity_is_triangular_for_one_direction_and_full_for_both():
    for both in (False, True):
        net = tagging.Net(LSTM, 3, both)
        params = tagging.init_net(jax.random.key(0), net)
        params = params._replace(w=jnp.asarray(normal(0, *params.w.shape)))
        matrix = np.array(tagging.sensitivity(net, params, "if x:\n"))
        assert matrix.shape == (6, 6) and (np.tril(matrix) > 0).sum() == 21
        assert (np.triu(matrix, 1) > 0).any() == both


def test_the_three_taggers_have_equally_many_parameters():
    counts = [
        num_params(jax.eval_shape(lambda net=net: tagging.init_net(jax.random.key(0), net)))
        for net in tagging.NETS.values()
    ]
    assert max(counts) / min(counts) < 1.03


# Tiny Shakespeare.


def test_the_split_is_that_of_char_rnn():
    tokens = np.random.default_rng(0).integers(0, 65, 50 * 50 * 41 + 77)
    seen, held_out = shakespeare.split(tokens)
    assert seen.inputs.shape == (38 * 50, 50) and held_out.inputs.shape == (3 * 50, 50)  # floor(0.95 * 41) blocks
    rows = tokens[: 50 * 50 * 41].reshape(50, 41 * 50)
    np.testing.assert_array_equal(np.concatenate([seen.inputs, held_out.inputs]).T, rows)
    following = np.append(rows.ravel()[1:], rows[0, 0]).reshape(rows.shape)
    np.testing.assert_array_equal(np.concatenate([seen.targets, held_out.targets]).T, following)


@pytest.mark.ci
def test_char_rnn_has_its_size_its_initial_parameters_and_its_schedule():
    how = shakespeare.RECIPES["char-rnn"]
    net = shakespeare.init_net(jax.random.key(0), how, 65)
    # Lua's net adds a second bias to every layer: 240,321 parameters.
    assert (
        num_params(net)
        == 240_321 - 2 * 4 * 128
        == num_params(shakespeare.init_net(jax.random.key(0), shakespeare.RECIPES["today"], 65))
    )
    assert all((layer.b[128:256] == 1).all() for layer in net.layers)
    free = np.concatenate([np.delete(layer.b, np.arange(128, 256)) for layer in net.layers])
    sizes = np.abs(
        np.concatenate([*(leaf.ravel() for leaf in (*net.layers[0][:2], *net.layers[1][:2], net.w, net.b)), free])
    )
    assert 0.079 < sizes.max() < 0.08 and 0.039 < sizes.mean() < 0.041
    optimizer = shakespeare.make_optimizer(how, 3)
    state = optimizer.init(jnp.zeros(2))
    mean_square, update = np.zeros(2), jax.jit(optimizer.update)
    for step in range(40):
        gradient = np.array([0.01 * (1 + step % 3), 7.0])
        got, state = update(jnp.asarray(gradient, jnp.float32), state)
        clipped = np.clip(gradient, -5, 5)
        mean_square = 0.95 * mean_square + 0.05 * clipped**2
        rate = 2e-3 * 0.97 ** max(0, step // 3 - 9)
        np.testing.assert_allclose(got, -rate * clipped / (np.sqrt(mean_square) + 1e-8), rtol=1e-5)


@pytest.mark.ci
def test_char_rnns_loss_is_summed_over_time_and_every_recipe_passes_its_carry_on():
    seen, held_out = shakespeare.split(np.arange(50 * 50 * 3) % 7)
    for name in ("char-rnn", "today"):
        how = shakespeare.RECIPES[name]._replace(units=5, dropout=0.0, seq_len=10)
        net = shakespeare.init_net(jax.random.key(0), how, 7)._replace(w=20 * jnp.asarray(normal(0, 5, 7)))
        batch = jax.tree.map(lambda leaf: leaf[:10], seen)
        loss, (carries, metrics) = shakespeare.loss_fn(
            net, batch, shakespeare.zero_carries(net), jax.random.key(1), recipe=how
        )
        carry, logits = shakespeare.predict(net, shakespeare.zero_carries(net), batch.inputs)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1).mean()
        np.testing.assert_allclose(metrics["nats"], nats, rtol=1e-5)
        np.testing.assert_allclose(loss, nats * (10 if name == "char-rnn" else 1), rtol=1e-5)
        np.testing.assert_array_equal(carries[1].c, carry[1].c)
        _, logits = shakespeare.predict(net, shakespeare.zero_carries(net), held_out.inputs)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, held_out.targets).mean()
        np.testing.assert_allclose(shakespeare.held_out_nats(net, held_out), expected, rtol=1e-5)
        noisy = shakespeare.loss_fn(
            net, batch, shakespeare.zero_carries(net), jax.random.key(1), recipe=how._replace(dropout=0.5)
        )[0]
        assert abs(float(noisy / loss) - 1) > 1e-3


# RNN against LSTM, and the variants.


def test_the_nets_of_rnn_vs_lstm_match_in_parameters_and_their_gaps_are_differences(monkeypatch):
    counts = {
        net: num_params(
            jax.eval_shape(lambda net=net: chorales.init_net(jax.random.key(0), rnn_vs_lstm.CELLS[net[0]], net[1]))
        )
        for net in rnn_vs_lstm.NETS
    }
    for rnn, lstm in ((("RNN", 82), ("LSTM", 36)), (("RNN", 178), ("LSTM", 82))):
        assert abs(counts[rnn] / counts[lstm] - 1) < 0.01
    asked = []

    def found(cell, recipes, parts, rates, seeds):
        asked.append((cell, recipes[0].patience, tuple(rates)))
        best = {"validation": [7.0, 8.5], "training": [5.0, 6.0]}
        last = {"last validation": [9.0, 8.0], "last training": [2.0, 3.0]}
        tried = [{"learning_rate": rate, **best, **last} for rate in rates]
        return {"tried": tried, "chosen": 1 % len(tried), "train": [1.0, 1.0], "test": [2.0, 3.0]}

    monkeypatch.setattr(chorales, "train_and_choose", found)
    row = rnn_vs_lstm.measure("LSTM", 3, parts={}, learning_rates=(0.1, 0.2), seeds=2, epochs=50)
    assert row["gap"] == [2.0, 2.5] and row["last gap"] == [7.0, 5.0]
    assert asked == [(LSTM, 15, (0.1, 0.2)), (LSTM, 50, (0.2,))]


def test_the_variants_are_the_cells_that_they_name():
    names = {"V": "Peephole", "NIG": "NoInputGate", "NFG": "NoForgetGate", "NOG": "NoOutputGate", "NP": ""}
    names |= {"NIAF": "NoInputActivation", "NOAF": "NoOutputActivation"}
    names |= {"CIFG": "Coupled", "FGR": "FullGateRecurrence"}
    for name, cell in names.items():
        expected = getattr(variants, f"{cell}LSTM") if cell else LSTM
        assert odyssey.VARIANTS[name].cell is expected
    not_zero_mean = odyssey.VARIANTS["NP, g = σ"].cell
    params = LSTM.init(jax.random.key(0), 2, 3)
    z = jnp.asarray(normal(0, 12))
    gates = not_zero_mean.activations(params, LSTM.initial_carry(params), z, 0 * z)
    np.testing.assert_allclose(gates.g, jax.nn.sigmoid(z[6:9]), rtol=1e-6)
    with_peepholes = {name for name, variant in odyssey.VARIANTS.items() if variant.base == "V"}
    assert with_peepholes == {"V", "NIG", "NFG", "NOG", "NIAF", "NOAF", "NP", "FGR"}


# GradBench's problem.


@pytest.fixture
def x64(default_settings):
    with jax.enable_x64(True):
        yield


def numpy_objective(params, carries, sequence):
    """The objective as the benchmark defines it, in plain loops."""
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    states = [(np.array(h), np.array(c)) for h, c in carries]
    total = 0.0
    for now, after in itertools.pairwise(np.asarray(sequence)):
        x = now * params.scale
        for k, (w, b) in enumerate(params.layers):
            h, c = states[k]
            forget, output = sigmoid(x * w[1] + b[1]), sigmoid(x * w[3] + b[3])
            c = c * forget + sigmoid(h * w[0] + b[0]) * np.tanh(h * w[2] + b[2])
            x = output * np.tanh(c)
            states[k] = (x, c)
        prediction = x * params.w + params.b
        total += (after * (prediction - np.log(np.exp(prediction).sum() + 2))).sum()
    return -total / ((len(sequence) - 1) * sequence.shape[1])


@pytest.mark.ci
@pytest.mark.usefixtures("x64")
def test_the_diagonal_lstm_has_the_objective_and_the_gradient_of_the_benchmark():
    params, carries, sequence = gradbench.problem(2, 9)
    assert {*np.unique(sequence)} == {0, 1} and sequence.shape == (9, 14)
    expected = numpy_objective(*jax.tree.map(np.asarray, (params, carries, sequence)))
    by_layer, by_step = (
        jax.jit(
            jax.value_and_grad(lambda params, predict=predict: gradbench.objective(predict, params, carries, sequence))
        )
        for predict in (gradbench.by_layer, gradbench.by_step)
    )
    check_gradients(lambda params: by_layer(params)[0], params, key=jax.random.key(0))
    (value, gradient), (value_by_step, gradient_by_step) = by_layer(params), by_step(params)
    np.testing.assert_allclose([value, value_by_step], [expected, expected], rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_by_step), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_the_text_of_gradbench_is_written_in_bits():
    _, _, sequence = gradbench.problem(1, 50)
    codes = np.asarray(sequence) @ 2.0 ** np.arange(gradbench.BITS)[::-1]
    assert "".join(map(chr, codes.astype(int))) == text.load_corpus("python-docs").train[:50]


# The list, the pages, and short runs.


def test_the_list_contains_every_experiment_and_no_other_program():
    helpers = {"sample", "gradient_check", "char_lm_report"}
    programs = {
        path.stem
        for path in (ROOT / "experiments").glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text("utf-8") and path.stem != "__main__"
    }
    assert {entry.name for entry in catalog.EXPERIMENTS} == programs - helpers
    assert all(entry.question.endswith(("?", ".")) for entry in catalog.EXPERIMENTS)
    shown = subprocess.run([sys.executable, "-m", "experiments"], cwd=ROOT, capture_output=True, text=True, check=True)
    for entry in catalog.EXPERIMENTS:
        assert all(said in shown.stdout for said in (entry.question, entry.command, entry.published, entry.answer))
    assert catalog.markdown() in (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert all((ROOT / entry.picture).is_file() for entry in catalog.EXPERIMENTS)


def test_the_picture_of_gradbench_has_a_bar_for_every_ratio_of_the_table(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, dpi: figures.append(figure))
    rows = json.loads((ROOT / "experiments" / "results" / "gradbench" / "result.json").read_text("utf-8"))["rows"]
    plots.gradbench(tmp_path / "picture.png", rows)
    (axes,) = figures[0].axes
    expected = [row[name]["gradient"] / row[name]["objective"] for name in gradbench.PREDICTIONS for row in rows]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], expected)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list(gradbench.PREDICTIONS)


def test_variants_differ_by_welchs_interval_for_all_comparisons_together():
    base, row = {"test": [1.0, 2.0, 3.0]}, {"test": [2.0, 3.5, 4.5, 6.0]}
    mean, low, high = odyssey.difference(row, base, 5)
    se = np.sqrt(np.var(base["test"], ddof=1) / 3 + np.var(row["test"], ddof=1) / 4)
    df = se**4 / ((np.var(base["test"], ddof=1) / 3) ** 2 / 2 + (np.var(row["test"], ddof=1) / 4) ** 2 / 3)
    half = stats.t.ppf(1 - 0.05 / 5 / 2, df) * se
    np.testing.assert_allclose((mean, low, high), (2.0, 2 - half, 2 + half))


MODULES = (chorales, counting, gradbench, long_lag, odyssey, rnn_vs_lstm, shakespeare, tagging)
RESULTS = ROOT / "experiments" / "results"
COMMITTED = [module for module in MODULES if (RESULTS / module.__name__.split(".")[1] / "result.json").exists()]


def committed(name):
    return json.loads((RESULTS / name / "result.json").read_text(encoding="utf-8"))


PAGE = " ".join((ROOT / "docs" / "published.md").read_text(encoding="utf-8").split())
CLAIMS = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", COMMITTED, ids=lambda module: module.__name__.split(".")[1])
def test_the_page_holds_the_table_of_the_committed_result(module):
    name = module.__name__.split(".")[1]
    result = committed(name)
    assert module.table(result) in (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    assert {"config", "versions", "device"} <= result.keys()
    # A result is of a commit, without changes, and names no path of the machine that made it.
    assert all(len(row["commit"]) == 12 for row in result["rows"])
    assert not any("/" in str(value) for value in result["config"].values())
    pictures = [*(RESULTS / name).glob("*.png")]
    assert all(picture.stat().st_size < 200_000 and f"{name}/{picture.name}" in PAGE for picture in pictures)


def test_the_figures_about_counting_are_in_the_result():
    rows = {(row["language"], row["cell"]): row for row in committed("counting")["rows"]}
    reached = {key: np.array(row["reach"]) for key, row in rows.items() if "reach" in row}
    median = {key: np.median(values) for key, values in reached.items()}
    said = f"right up to n = {median['aⁿbⁿ', 'LSTM']:.0f} on aⁿbⁿ and n = {median['aⁿbⁿcⁿ', 'LSTM']:.0f} on aⁿbⁿcⁿ"
    assert said in PAGE and "six and four of ten go beyond 100" in PAGE
    assert [int((reached[language, "LSTM"] > 100).sum()) for language in ("aⁿbⁿ", "aⁿbⁿcⁿ")] == [6, 4]
    grus = [reached[language, "GRU"] for language in ("aⁿbⁿ", "aⁿbⁿcⁿ")]
    assert max(map(max, grus)) == 67 and min(map(min, grus)) > 50 and "No GRU gets past 67" in PAGE
    assert (reached["aⁿbⁿ", "RNN"] >= 50).sum() == 4 and reached["aⁿbⁿcⁿ", "RNN"].max() == 5
    dyck = rows["Dyck-1", "LSTM"]
    assert min(dyck["right"][0]) == 1 and f"{np.mean(dyck['right'][1]):.2f}" == "0.84"
    assert f"{np.mean(rows['Dyck-2', 'LSTM']['right'][1]):.2f}" == "0.35"
    assert f"{np.mean(dyck['right'][3]):.2f}" == "0.04"
    assert "At length 100 0.84 of the words are right, at length 400 0.04." in PAGE
    assert "at length 100 it is right in 0.35" in PAGE
    assert f"{np.mean(rows['Dyck-2', 'LSTM']['right'][0]):.2f}" == "0.85"


def test_the_figures_about_music_are_in_the_result():
    rows = {row["cell"]: row for row in committed("chorales")["rows"] if row["size"] == "20,000"}
    assert f"**The LSTM of 36 units** has {intervals.shown(rows['LSTM']['test'])}, published 8.67" in PAGE
    mean, low, high = intervals.of_mean(rows["LSTM"]["test"])
    assert mean < 8.67 and low < 8.67 < high
    spans = [intervals.of_mean(rows[cell]["test"]) for cell in ("LSTM", "RNN", "GRU")]
    assert max(low for _, low, _ in spans) < min(high for _, _, high in spans), "the intervals overlap"
    assert np.ptp([mean for mean, _, _ in spans]) < 0.05
    sizes = [row["parameters"] for row in rows.values()]
    assert f"{max(sizes) / min(sizes) - 1:.0%}" == "31%"
    for row in rows.values():
        rates = [tried["learning_rate"] for tried in row["tried"]]
        assert min(rates) < rates[row["chosen"]] < max(rates)
    capped = {cell for cell, row in rows.items() if min(row["tried"][0]["epochs"]) == 400}
    assert capped == {"GRU", "LSTM"} and rows["GRU"]["tried"][0]["learning_rate"] == 3e-4


def test_the_figures_about_long_lags_are_in_the_result():
    rows = {(row["recipe"], row["task"], row["lag"]): row["solved_at"] for row in committed("long_lag")["rows"]}
    median = {key: np.median([number or np.inf for number in solved]) for key, solved in rows.items()}
    solved = {key: sum(map(bool, numbers)) for key, numbers in rows.items()}
    own = [key for key in rows if key[0] == "LSTM, chrono"]
    assert {key[1] for key in own if solved[key] < 10} == {"copy"} == {key[1] for key in own if solved[key] == 0}
    assert f"an LSTM of {long_lag.UNITS} units" in PAGE
    found = [median["LSTM, chrono", "adding", lag] for lag in (100, 500, 1000)]
    at_100, at_500, at_1000 = (f"{number:,.0f}" for number in found)
    said = f"Adding takes {at_100} sequences in the median at lag 100, {at_500} at lag 500 and {at_1000} at lag 1000"
    assert said in PAGE
    assert all(number < limit for number, limit in zip(found, (20_000, 209_000, 853_000), strict=True))
    of_two = median["1997", "order of two", 100]
    assert f"needs {of_two:,.0f} sequences in the median for the order of two; the published mean is 31,390" in PAGE
    assert round(median["1997", "adding", 100] / 74_000) == 10 and round(median["1997", "2c", 50] / 30_000) == 5
    assert [10 - solved["1997", task, 100] for task in ("multiplication", "order of three")] == [9, 6]
    by_lag = {name: [solved[name, "order of two", lag] for lag in (50, 100, 200)] for name in long_lag.nets(50)}
    assert by_lag == {
        "RNN": [0] * 3, "GRU": [10] * 3, "LSTM, b_f = 0": [0] * 3, "LSTM, b_f = 1": [3, 0, 0], "LSTM, chrono": [10] * 3
    }  # fmt: skip
    assert [solved["LSTM, chrono", "order of two", lag] for lag in (500, 1000)] == [10, 10]
    assert not any(("GRU", "order of two", lag) in rows for lag in (500, 1000))
    assert 50_000 / long_lag.BATCH == 6250


def test_the_figures_about_shakespeare_are_in_the_result():
    rows = committed("shakespeare")["rows"]
    best = {name: [row["best"] for row in rows if row["recipe"] == name] for name in shakespeare.RECIPES}
    last = [row["curve"]["held out"][-1] for row in rows if row["recipe"] == "char-rnn"]
    said = f"has {np.mean(best['char-rnn']):.3f} nats at its best epoch, below the published 1.3950"
    assert said in PAGE and f"{np.mean(last):.3f} at the last epoch" in PAGE
    assert max(best["char-rnn"] + best["today"]) < shakespeare.PUBLISHED
    assert f"**Today's recipe** has {np.mean(best['today']):.3f} at the same number of parameters" in PAGE
    assert intervals.of_mean(best["today"])[2] < intervals.of_mean(best["char-rnn"])[1], "apart"
    assert "The two intervals are apart." in PAGE
    sizes = {row["recipe"]: row["parameters"] for row in rows}
    assert sizes["today"] == sizes["char-rnn"]
    share = sizes["today, 96 units"] / sizes["today"]
    assert f"{share:.0%} of the parameters, today's recipe has {np.mean(best['today, 96 units']):.3f}" in PAGE
    below = sum(loss < shakespeare.PUBLISHED for loss in best["today, 96 units"])
    assert below == 1 and "one of three seeds lies below the published loss" in PAGE
    ends = [row["curve"]["held out"][-1] - row["best"] for row in rows if row["recipe"] == "today"]
    assert max(ends) < 0.001 and "does not overfit" in PAGE


def test_the_figures_about_overfitting_are_in_the_result():
    row = {(row["cell"], row["units"]): row for row in committed("rnn_vs_lstm")["rows"]}
    assert all(len(found[name]) >= 10 for found in row.values() for name in ("gap", "last gap", "test"))

    def difference(a, b, what="gap"):
        low, high = stats.ttest_ind(row[a][what], row[b][what], equal_var=False).confidence_interval(0.95)
        assert low > 0
        return f"{np.mean(row[a][what]) - np.mean(row[b][what]):.2f} ({low:.2f} to {high:.2f})"

    small, large, rnns = ("LSTM", 36), ("LSTM", 82), [("RNN", 36), ("RNN", 82), ("RNN", 178)]
    equal_width = difference(small, rnns[0]), difference(large, rnns[1])
    equal_parameters = difference(small, rnns[1]), difference(large, rnns[2])
    assert f"its gap is larger by {' and '.join(equal_width)} at equal width" in PAGE
    assert f"and by {' and '.join(equal_parameters)} at equal parameters" in PAGE
    better = difference(rnns[2], large, "test"), difference(rnns[1], small, "test")
    assert f"its test loss is lower by {better[0]}." in PAGE and f"the two nets are close: {better[1]}." in PAGE
    rates = {name: found["tried"][found["chosen"]]["learning_rate"] for name, found in row.items()}
    assert rates[large] == max(tried["learning_rate"] for tried in row[large]["tried"]) == 0.03
    assert rates[rnns[2]] == 0.001 and "the RNN of equal size chose 0.001" in PAGE
    assert f"the gap of the larger LSTM is {np.mean(row[large]['last gap']):.2f} nats" in PAGE
    seconds = {name: found["step seconds"] for name, found in row.items()}
    ratios = [seconds[small] / seconds[rnns[0]], seconds[large] / seconds[rnns[1]]]
    ratios += [seconds[small] / seconds[rnns[1]], seconds[large] / seconds[rnns[2]]]
    taken = "takes {:.1f} and {:.1f} times as long at equal width**, not four times, and {:.1f} and {:.1f} times"
    assert taken.format(*ratios) in PAGE
    gap, last = ({name: np.mean(found[what]) for name, found in row.items()} for what in ("gap", "last gap"))
    of_rnns = [sorted(means[name] for name in rnns) for means in (gap, last)]
    said = f"{gap[small]:.2f} and {gap[large]:.2f} nats per chord for LSTMs, {of_rnns[0][0]:.2f} to {of_rnns[0][2]:.2f}"
    assert said in CLAIMS
    said = f"{last[small]:.2f} and {last[large]:.2f}, against {of_rnns[1][0]:.2f} to {of_rnns[1][2]:.2f}"
    assert said in CLAIMS and "takes {:.1f} and {:.1f} times as long at equal width".format(*ratios) in CLAIMS


def test_the_figures_about_variants_are_in_the_result():
    row = {row["variant"]: row for row in committed("odyssey")["rows"]}
    assert row.keys() == odyssey.VARIANTS.keys() and all(len(found["test"]) >= 10 for found in row.values())
    compared = [name for name, variant in odyssey.VARIANTS.items() if variant.base != name]
    base = {name: row[odyssey.VARIANTS[name].base] for name in compared}
    found = {name: odyssey.difference(row[name], base[name], len(compared)) for name in compared}

    def shown(name):
        assert found[name][1] > 0 or found[name][2] < 0, name
        mean, *ends = (f"{abs(value):.2f}" for value in found[name])
        return f"{mean} ({min(ends)} to {max(ends)})"

    for name, verb in (("NFG", "higher"), ("NIAF", "higher"), ("NOAF", "*lower*"), ("NP", "lower")):
        assert f"({name}) the loss is {verb} by {shown(name)}" in PAGE, name
        assert (found[name][0] > 0) == (verb == "higher")
    assert all(found[name][1] < 0 < found[name][2] for name in ("NIG", "NOG", "FGR")), "not significant"
    assert f"lowers the loss by {shown('NP, g = σ')}" in PAGE and found["NP, g = σ"][0] < 0
    assert f"are worse than NP by {shown('CIFG')}" in PAGE and found["CIFG"][0] > 0
    epochs = {name: [np.mean(tried["epochs"]) for tried in own["tried"]] for name, own in row.items()}
    said = "V trains for {:.0f} epochs in the mean and NP for {:.0f}. NOAF, which has peepholes too, trains for {:.0f}."
    assert said.format(*(epochs[name][1] for name in ("V", "NP", "NOAF"))) in PAGE
    assert [tried["learning_rate"] for tried in row["V"]["tried"]] == [0.001, 0.003, 0.01, 0.03]
    longer = [f"{a / b:.1f}" for a, b in zip(epochs["NP, g = σ"][1:], epochs["NP"][1:], strict=True)]
    assert f"trains for {min(longer)} to {max(longer)} times as many epochs" in PAGE
    limit = sum(ran == 500 for ran in row["NP, g = σ"]["tried"][0]["epochs"])
    assert row["NP, g = σ"]["chosen"] == 0 and f"at which {limit} of ten runs reach 500 epochs" in PAGE
    *nine, failed = sorted(row["FGR"]["test"])
    said = f"nine of ten seeds have {nine[0]:.2f} to {nine[-1]:.2f}, all above V's mean, and one stays at {failed:.2f}"
    assert said in PAGE and nine[0] > np.mean(row["V"]["test"])
    sigma = shown("NP, g = σ").replace("(", "nats per chord (", 1)
    assert f"lower than with tanh, by {sigma}" in CLAIMS
    assert f"it trains for {min(longer)} to {max(longer)} times as many epochs" in CLAIMS
    assert f"Without any input activation the loss is higher by {found['NIAF'][0]:.2f}." in CLAIMS
    assert "the loss changes by {:.2f} ({:.2f} to {:.2f});".format(*found["NIG"]).replace("-", "−") in CLAIMS
    assert f"without the forget gate it is higher by {found['NFG'][0]:.2f}" in CLAIMS
    assert "| **open** |" not in CLAIMS


def test_the_figures_about_gradbench_are_in_the_result():
    rows = committed("gradbench")["rows"]
    ratios = {
        name: [row[name]["gradient"] / row[name]["objective"] for row in rows] for name in ("jaxlstm", "lax.scan")
    }
    (low, high), (scan_low, scan_high) = ((f"{min(own):.1f}", f"{max(own):.1f}") for own in ratios.values())
    assert f"With jaxlstm, the gradient takes {low} to {high} times as long as its objective" in PAGE
    assert f"with `lax.scan`, {scan_low} to {scan_high} times" in PAGE
    slower = [100 * (row["jaxlstm"]["objective"] / row["lax.scan"]["objective"] - 1) for row in rows]
    assert f"objective itself is {min(slower):.0f} to {max(slower):.0f} % slower than the scan's" in PAGE
    assert max(row["difference"] for row in rows) < 1e-14


QUICK = [entry.name for entry in catalog.EXPERIMENTS]


@pytest.mark.ci
@pytest.mark.parametrize("name", QUICK)
def test_every_experiment_has_a_quick_form(name, tmp_path):
    write_music(tmp_path, 30, 40)
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be: that is the question.\n" * 300)
    out = tmp_path / "run"
    command = [sys.executable, "-m", f"experiments.{name}", "--quick", "--workdir", str(out)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["config"] and result["versions"]["jaxlstm"]
    assert str(out) in done.stdout and tmp_path.name not in json.dumps(result)
