"""Pictures of the experiments, from what their result files hold. Each one can be read without its experiment."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from experiments.harness import intervals
from jaxlstm import LSTMGates
from jaxlstm.diagnostics import Linearization, PrincipalComponents, Trace
from jaxlstm.plots import COLORS, MARKERS, flow_by_lag, gate_map, phase_portrait


def _save(figure: Any, path: Path, dpi: int) -> Path:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)  # pyplot keeps figures, and warns after twenty
    return path


def _one_legend(figure: Any, panels: Any, **place: Any) -> None:
    """Replace the legends of all panels by the first one's, beside them."""
    handles = panels[0].get_legend_handles_labels()
    for axes in panels:
        axes.get_legend().remove()
    figure.legend(*handles, **place)


# Language models.


def learning_curve(path: Path, metrics: list[dict[str, Any]], baselines: dict[str, float]) -> Path:
    """Draw bits per character over the training steps, with the baselines as dashed lines."""
    evaluations = [row for row in metrics if "held_out_bits" in row]
    rows = [(row["step"], row["loss"] / math.log(2)) for row in metrics if "loss" in row]
    steps, bits = np.reshape(rows, (-1, 2)).T  # the reshape allows for no rows at all
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.plot(steps, bits, color="0.8", linewidth=0.6, label="LSTM, training batches")
    axes.plot(
        [row["step"] for row in evaluations],
        [row["held_out_bits"] for row in evaluations],
        "o-",
        color="C0",
        label="LSTM, held-out text",
    )
    for name, value in baselines.items():
        axes.axhline(value, color="C3", linewidth=1, linestyle="--")
        axes.annotate(f"{name} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), xytext=(6, 0),
                      textcoords="offset points", color="C3", va="bottom" if name != "xz" else "top")  # fmt: skip
    for last in (row["held_out_bits"] for row in evaluations[-1:]):
        axes.annotate(f"LSTM {last:.2f}", (1, last), xycoords=("axes fraction", "data"), xytext=(6, -2),
                      textcoords="offset points", color="C0", va="top", weight="bold")  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="bits per character", xlim=(0, max(steps, default=1)),
             ylim=(min([1.0, *bits]), baselines["unigram"] + 0.8),
             title="A character LSTM compared with n-grams and xz (dashed) on held-out text")  # fmt: skip
    axes.legend(loc="upper right")
    return _save(figure, path, dpi=130)


UNITS = 20  # more rows than this are noise


def read_aloud(sentence: str, recorded: Trace) -> dict[str, Any]:
    """Return what `gate_maps` draws, for a result file: gates and cell state of some units at every character.

    The units are spread evenly over the order by mean forget gate, those that remember longest first.
    """
    values = {name: np.asarray(value) for name, value in recorded.gates._asdict().items()}
    values["c"] = np.asarray(recorded.carry.c)
    order = np.argsort(values["f"].mean(axis=0))[::-1]
    units = order[np.linspace(0, len(order) - 1, min(UNITS, len(order))).round().astype(int)]
    rows = {name: np.round(value[:, units].astype(float), 3).tolist() for name, value in values.items()}
    return {"sentence": sentence, "units": units.tolist(), "of": len(order), **rows}


def gate_maps(path: Path, read: dict[str, Any]) -> Path:
    """Draw what `read_aloud` returns: one row per unit, one column per character."""
    titles = {
        "i": "input gate i: how much the cell writes",
        "f": "forget gate f: how much it keeps",
        "g": "candidate g: what it writes",
        "o": "output gate o: how much it shows",
        "c": "cell state c: what it remembers",
    }
    symbols = ["·" if symbol == " " else symbol if symbol.isprintable() else "↵" for symbol in read["sentence"]]
    values = {name: jnp.array(read[name]) for name in titles}
    gates = LSTMGates(*(values[name] for name in LSTMGates._fields))
    recorded = Trace(None, None, None, gates, {"c": values["c"]}, None)
    figure, rows = plt.subplots(5, 1, figsize=(10, 11), layout="constrained", sharex=True)
    for axes, (name, title) in zip(rows, titles.items(), strict=True):
        gate_map(recorded, name, labels=symbols, ax=axes)
        axes.set(title=title, xlabel=None, ylabel=None, yticks=[])
    figure.supylabel(f"{len(read['units'])} of {read['of']} units, sorted by mean f: the longest memory on top")
    rows[-1].set_xlabel("character read (· is a space, ↵ a newline)")
    rows[-1].tick_params(axis="x", labelfontfamily="monospace", length=0)
    return _save(figure, path, dpi=100)


# The gradient by lag.

NETS = {
    ("RNN", None): ("RNN", COLORS[1]),
    ("GRU", None): ("GRU", COLORS[2]),
    ("LSTM", 0.0): ("LSTM, b_f = 0", COLORS[5]),
    ("LSTM", 1.0): ("LSTM, b_f = 1", COLORS[0]),
    ("LSTM", 3.0): ("LSTM, b_f = 3", COLORS[3]),
    ("LSTM", "chrono"): ("LSTM, chrono", COLORS[6]),
}


def gradient_flow(path: Path, measured: dict[str, Any], recurrent: str) -> Path:
    """Draw how much of the gradient is left at every lag, before and after training, for small and large inputs.

    Six bands would hide one another, so bars show the range of the seeds at a few lags, side by side.
    """
    first, *_, last = measured
    figure, panels = plt.subplots(2, 2, figsize=(10, 8), layout="constrained", sharex=True, sharey=True)
    for row, (step, when) in zip(panels, ((first, "before training"), (last, f"after {last} steps")), strict=True):
        for axes, scale in zip(row, (0.1, 1.0), strict=True):
            own = [found for found in measured[step] if (found["recurrent"], found["scale"]) == (recurrent, scale)]
            for place, found in enumerate(own):
                label, color = NETS[found["cell"], found["forget"]]
                _line_and_bars(axes, found, label, color, 2 * place - len(own) + 1)
            _by_lag(axes, f"{when}, inputs of scale {scale:g}")
    for axes in panels[:, 0]:
        axes.set_ylabel("norm of the gradient, relative to lag 0")
    for axes in panels[1]:
        axes.set_xlabel("lag: steps back from the loss")
    figure.suptitle(f"How far back the gradient reaches, with {recurrent} recurrent weights\n"
                    "(lines: median of the seeds; bars: their range)")  # fmt: skip
    _one_legend(figure, panels.flat, loc="outside lower center", ncols=3, fontsize=12)
    return _save(figure, path, dpi=100)


def _line_and_bars(axes: Any, found: dict[str, Any], label: str, color: str, shift: int) -> None:
    """Draw the median of the seeds as a line, and their range as bars at three lags."""
    norms = np.array(found["flow"])  # [seed, lag]
    flow = norms.T[::-1, :, None]  # as `diagnostics.gradient_flow` returns gradients: [time, batch, units]
    flow_by_lag(flow, band=None, label=label, color=color, ax=axes)
    lags = np.array([25, 50, 75]) + shift
    axes.vlines(lags, norms[:, lags].min(axis=0), norms[:, lags].max(axis=0), color=color, linewidth=3, alpha=0.5)


def _by_lag(axes: Any, title: str) -> None:
    axes.set(title=title, ylim=(1e-9, 1e2), xlim=(0, 100), xlabel=None, ylabel=None)
    axes.grid(color="0.92")


def _orthogonal(rows: list[dict[str, Any]], cell: str, forget: float | str | None) -> dict[str, Any]:
    """Return the row of a net with orthogonal recurrent weights and inputs of scale 1."""
    wanted = (cell, forget, "orthogonal", 1.0)
    (found,) = [row for row in rows if (row["cell"], row["forget"], row["recurrent"], row["scale"]) == wanted]
    return found


def flow_in_training(path: Path, measured: dict[str, Any]) -> Path:
    """Draw the gradient by lag at several stages of training, one panel per net."""
    figure, panels = plt.subplots(2, 3, figsize=(12, 7), layout="constrained", sharex=True, sharey=True)
    for axes, (key, (label, _)) in zip(panels.flat, NETS.items(), strict=True):
        for n, (step, rows) in enumerate(measured.items()):
            _line_and_bars(axes, _orthogonal(rows, *key), f"{step} steps", COLORS[n], 2 * n - len(measured) + 1)
        _by_lag(axes, label)
    for axes in panels[:, 0]:
        axes.set_ylabel("gradient, relative to lag 0")
    for axes in panels[1]:
        axes.set_xlabel("lag")
    figure.suptitle("How training changes the gradient (orthogonal recurrent weights, inputs of scale 1)\n"
                    "(lines: median of the seeds; bars: their range)")  # fmt: skip
    _one_legend(figure, panels.flat, loc="outside lower center", ncols=4, fontsize=12)
    return _save(figure, path, dpi=100)


def four_terms(path: Path, measured: dict[str, Any]) -> Path:
    """Draw the shares of the carousel and of the three gates in the derivative of c_t with respect to c_{t−1}."""
    names = {"carousel": "the carousel, diag(f)", "forget_gate": "through the forget gate",
             "input_gate": "through the input gate", "candidate": "through the candidate"}  # fmt: skip
    figure, panels = plt.subplots(1, 4, figsize=(12, 4.5), layout="constrained", sharey=True)
    for axes, (_, forget) in zip(panels, list(NETS)[2:], strict=True):
        below = np.zeros(len(measured))
        for name, label in names.items():
            shares = [np.mean(_orthogonal(rows, "LSTM", forget)["shares"][name]) for rows in measured.values()]
            axes.bar(range(len(measured)), shares, bottom=below, label=label, width=0.8)
            below += shares
        axes.set_xticks(range(len(measured)), list(measured))
        axes.set(title=NETS["LSTM", forget][0], xlabel="steps of training")
    panels[0].set_ylabel("share of the norm of dc_t / dc_(t-1)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=12)
    return _save(figure, path, dpi=100)


def gate_histograms(path: Path, measured: dict[str, Any]) -> Path:
    """Draw histograms of the gates of an LSTM, before and after training."""
    titles = {"i": "input gate i", "f": "forget gate f", "o": "output gate o"}
    first, *_, last = measured
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained", sharey=True)
    edges = np.linspace(0, 1, 21)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for step, colour, when in ((first, "C1", "before training"), (last, "C0", f"after {last} steps")):
            row = _orthogonal(measured[step], "LSTM", 1.0)
            axes.stairs(np.mean(row["histogram"][name], axis=0), edges, color=colour, fill=True, alpha=0.5, label=when)
        axes.set(title=title, xlabel="0 is closed, 1 is open", xlim=(0, 1))
    panels[0].set_ylabel("share, over all units, steps and texts")
    figure.suptitle(
        "How open the gates of an LSTM are (forget bias 1, orthogonal recurrent weights, inputs of scale 1)"
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=12)
    return _save(figure, path, dpi=100)


def gradient_methods(path: Path, rows: list[dict[str, Any]], length: int, width: int) -> Path:
    """Draw error, time and memory of every method, over the sequence length and over the width of the layer."""
    colours = {"autodiff": "0.35", "rule": "C0", "by hand": "C2", "rtrl": "C1", "differences": "C3"}
    markers = dict(zip(colours, "osv^D", strict=True))
    figure, panels = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    kinds = {
        "error": "relative error of the gradient",
        "seconds": "time in seconds, float32",
        "temporaries": "temporary memory in bytes, float32",
    }
    for line, (over, other, at, label) in zip(
        panels, (("num_steps", "hidden", width, "steps"), ("hidden", "num_steps", length, "units")), strict=True
    ):
        for axes, (kind, title) in zip(line, kinds.items(), strict=True):
            for dtype, style in (("float64", "-"), ("float32", "--"), ("bfloat16", ":")):
                for method, colour in colours.items():
                    own = [r for r in rows if (r["road"], r["dtype"], r[other]) == (method, dtype, at)]
                    own.sort(key=lambda row: row[over])
                    if own and (kind == "error" or dtype == "float32"):
                        look = {"marker": markers[method], "linestyle": style, "color": colour, "markersize": 5}
                        axes.plot([r[over] for r in own], [r[kind] for r in own], label=method, **look)
            axes.set(
                xscale="log",
                yscale="log",
                xlabel=f"{label}, at {at} {'units' if other == 'hidden' else 'steps'}",
                ylabel=title,
            )
            ticks = sorted({r[over] for r in rows if r[other] == at})
            axes.set_xticks(ticks, map(str, ticks))
            axes.minorticks_off()
            axes.grid(color="0.92")
    for axes in panels[:, 0]:
        for dtype, level in (("float64", 2e-15), ("float32", 8e-7), ("bfloat16", 2e-2)):
            axes.annotate(
                dtype, (0.02, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=12, weight="bold"
            )
        axes.set_ylim(1e-17, 1)
    handles, labels = panels[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=12)
    return _save(figure, path, dpi=100)


# Agreement.


def agreement(path: Path, result: dict[str, Any], trained: int, attractors_at: int) -> Path:
    """Draw the accuracy on number and gender, over distance and attractors, and with units held fixed."""
    colours = {"RNN": COLORS[1], "GRU": COLORS[2], "LSTM": COLORS[0]}
    figure, panels = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    curves = (
        (panels[0, 0], result["number"], "was or were?", "words between subject and verb"),
        (panels[0, 1], result["gender"], "he or she?", "words between subject and verb"),
        (
            panels[1, 0],
            result["attractors"],
            f"was or were, at {attractors_at} words?",
            "attractors (nouns of the other number), out of four nouns",
        ),
    )
    for axes, found, title, label in curves:
        for name, colour in colours.items():
            right = np.array([found[key][name] for key in found])
            at = [int(key) for key in found]
            axes.plot(at, right.mean(axis=1), "o-", color=colour, label=name, linewidth=2, markersize=4)
            axes.fill_between(at, right.min(axis=1), right.max(axis=1), color=colour, alpha=0.2, linewidth=0)
        axes.axhline(0.5, color="black", linewidth=1, linestyle="--")
        axes.set(title=title, xlabel=label, ylim=(0.3, 1.03))
        axes.grid(color="0.92")
    for axes in panels[0]:
        axes.axvspan(0, trained, color="0.93", zorder=0)
        axes.annotate("seen in training", (trained / 2, 0.33), ha="center", fontsize=10, rotation=90)
        axes.set_xlim(0)
    panels[1, 0].set_xticks([int(key) for key in result["attractors"]])
    axes = panels[1, 1]
    for place, (name, colour) in enumerate(colours.items()):
        rows = result["clamping"][name]
        columns = [
            [row["free"] for row in rows], [right for row in rows for right in row["random"]],
            [row["without one"] for row in rows], [row["without two"] for row in rows],
        ]  # fmt: skip
        for x, column in enumerate(columns):
            middle = x + 0.25 * (place - 1)
            axes.bar(middle, np.mean(column), width=0.22, color=colour, alpha=0.35)
            axes.plot(middle + np.linspace(-0.09, 0.09, len(column)), column, "o", color=colour, markersize=4)
    axes.axhline(0.5, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(4), ["no unit", "a random\nunit", "the unit\nfound", "both units\nfound"])
    axes.set(title=f"was or were, at {trained} words, with units held fixed", ylim=(0.3, 1.03))
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy (dashed: chance)")
    figure.suptitle("Number and gender of the subject across a relative clause (mean and range of the seeds)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=12)
    return _save(figure, path, dpi=100)


def unit(path: Path, clause: dict[str, Any], title: str) -> Path:
    """Draw the gates and the cell state of one unit over a clause, once in singular and once in plural."""
    names = {"i": "input gate i", "f": "forget gate f", "g": "candidate g", "o": "output gate o", "c": "cell state c"}
    figure, rows = plt.subplots(5, 1, figsize=(11, 10), layout="constrained", sharex=True)
    for axes, (name, label) in zip(rows, names.items(), strict=True):
        for number, style in (("one", "o-"), ("many", "s--")):
            axes.plot(clause[number][name], style, color="C0" if number == "one" else "C1",
                      label=f"the {clause[number]['words'][1]} ...", linewidth=2, markersize=5)  # fmt: skip
        axes.set_ylabel(label)
        axes.grid(color="0.92")
        if name in "ifo":
            axes.set_ylim(-0.05, 1.05)
    both = zip(clause["one"]["words"], clause["many"]["words"], strict=True)
    rows[-1].set_xticks(range(len(clause["one"]["words"])), [a if a == b else f"{a}/\n{b}" for a, b in both])
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=12)
    figure.suptitle(title)
    return _save(figure, path, dpi=100)


def attention(path: Path, attended: dict[str, dict[str, Any]], exact_match: float) -> Path:
    """Draw the attention weights: one panel per text, one row per symbol written, one column per character read."""
    figure, rows = plt.subplots(len(attended), 1, figsize=(8, 3.1 * len(attended)), layout="constrained")
    for axes, (text, found) in zip(rows, attended.items(), strict=True):
        image = axes.imshow(found["weights"], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(text)), list(text), family="monospace", fontsize=12)
        axes.set_yticks(range(len(found["written"])), list(found["written"]), family="monospace", fontsize=10)
        axes.set_title(f"{text}   →   {found['written']}", family="monospace", fontsize=12)
        axes.set_ylabel("symbol written")
    figure.colorbar(image, ax=rows, label="attention weight", shrink=0.5)
    figure.suptitle(
        f"Where the model attends while it writes ({100 * exact_match:.2f} % of held-out strings exactly right)"
    )
    return _save(figure, path, dpi=100)


# Dynamics.

CUBE = (8, 12, 6, 1)  # corners, edges, faces, center: how many bits are undecided


def flip_flop(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Draw the fixed points of the first net of each cell in principal components, and their kinds for all nets."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    portraits: list[Any] = []
    figure = plt.figure(figsize=(11, 7), layout=ConstrainedLayoutEngine(rect=(0, 0, 0.985, 1)))
    grid = figure.add_gridspec(2, len(cells), height_ratios=[3, 1.3])
    for place, cell in enumerate(cells):
        own = [row for row in rows if row["cell"] == cell]
        first = own[0]
        axes: Any = figure.add_subplot(grid[0, place], projection="3d")
        components, points, around = _as_found(first)
        phase_portrait(components, np.array(first["trajectories"]).swapaxes(0, 1), points, around, ax=axes)
        portraits.append(axes)
        axes.set(title=f"{cell}, first net: {first['points']} points", xlabel="PC 1", ylabel="PC 2", zlabel="PC 3")
        axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.labelpad = -12  # no tick labels need the room
        below = figure.add_subplot(grid[1, place])
        for row in own:
            below.plot(range(4), row["by_unstable"], "-", color="0.6", linewidth=0.8, zorder=1)
        for k in range(4):
            below.scatter([k] * len(own), [row["by_unstable"][k] for row in own], color=COLORS[k], marker=MARKERS[k])
        below.plot(range(4), CUBE, "_", color="black", markersize=20, label="a cube: 8, 12, 6, 1")
        most = max(max(row["by_unstable"]) for row in own)
        below.set(xlim=(-0.4, 3.4), ylim=(-0.06 * most, 1.12 * most), xticks=range(4), xlabel="unstable directions",
                  title=f"all {len(own)} nets", ylabel="points" if place == 0 else None)  # fmt: skip
        below.locator_params(axis="y", integer=True)
    _one_legend(figure, portraits, loc="outside upper center", ncols=4, title="fixed points without input")
    below.legend(fontsize="small")
    return _save(figure, path, dpi=110)


def _as_found(row: dict[str, Any]) -> tuple[PrincipalComponents, np.ndarray, Linearization]:
    """Return a row's coordinates as points of a space with three axes, in which they are their own components."""
    points, number = np.reshape(row["coordinates"], (-1, 3)), np.array(row["num_unstable"])
    right = np.zeros((len(points), 3, 3))
    for own, directions in zip(right, row["unstable_directions"], strict=True):
        own[:, : len(directions)] = np.reshape(directions, (-1, 3)).T
    unknown: Any = [None] * len(Linearization._fields)
    around = Linearization(*unknown)._replace(eigenvalues=np.zeros((len(points), 3)), right=right, num_unstable=number)
    return PrincipalComponents(jnp.zeros(3), jnp.eye(3), jnp.array(row["explained"])), points, around


# Agents with memory.


def ppo(path: Path, rows: list[dict[str, Any]], num_steps: int) -> Path:
    """Draw the success in the T-maze over the length of its corridor, and the return of RepeatPrevious in training."""
    looks = {"LSTM": (COLORS[0], "o"), "GRU": (COLORS[2], "s"), "RNN": (COLORS[1], "^"), "no memory": ("0.35", "D"),
             "LSTM, reset=done": (COLORS[3], "v")}  # fmt: skip
    figure, (maze, repeat) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for n, (net, (colour, marker)) in enumerate(looks.items()):
        own = [row for row in rows if (row["task"], row["net"]) == ("T-maze", net)]
        last = np.array([np.array(row["success"])[:, -1] for row in own])  # [length, seed]
        lengths = np.array([row["number"] for row in own]) * 1.08 ** (n - 2)  # side by side
        maze.plot(lengths, last.mean(axis=1), color=colour, linewidth=2, label=net)
        maze.plot(lengths, last, marker, color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
        (curves,) = (np.array(row["return"]) for row in rows if (row["task"], row["net"]) == ("RepeatPrevious", net))
        at = num_steps * (np.arange(curves.shape[1]) + 1) / curves.shape[1] / 1000
        mean, low, high = np.transpose([intervals.of_mean(values) for values in curves.T])
        repeat.plot(at, mean, color=colour, linewidth=2)
        repeat.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    for axes, guess in ((maze, 0.5), (repeat, -0.5)):
        axes.axhline(guess, color="black", linewidth=1, linestyle="--", label="guessing")
        axes.grid(color="0.92")
    ticks = sorted({row["number"] for row in rows if row["task"] == "T-maze"})
    maze.set(title="T-maze: right arm chosen (dots: seeds; lines: means)", xlabel="steps from the sign to the junction",
             xscale="log", ylabel="share of episodes", ylim=(0, 1.04))  # fmt: skip
    maze.set_xticks(ticks, map(str, ticks))
    maze.minorticks_off()
    repeat.set(title="RepeatPrevious (means and their 95 % intervals)", xlabel="thousand steps of experience",
               ylabel="return", ylim=(-1, 1.08))  # fmt: skip
    figure.suptitle("Recurrent PPO")
    figure.legend(*maze.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return _save(figure, path, dpi=100)


def lorenz(path: Path, result: dict[str, Any], published: Sequence[float]) -> Path:
    """Draw the attractor of the true system and of the first net of each cell, and the exponents of all nets."""
    colours = {"true": "black", "LSTM": COLORS[0], "GRU": COLORS[2], "RNN": COLORS[1]}
    shown = {"true": result["true"]["run"]} | {row["net"]: row["run"] for row in result["rows"] if "run" in row}
    exponents = {"true": result["true"]["exponents"]}
    exponents |= {net: [row["exponents"] for row in result["rows"] if row["net"] == net] for net in list(shown)[1:]}
    figure = plt.figure(figsize=(10, 6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    above, below = parts
    panels = above.subplots(1, len(shown), sharex=True, sharey=True)
    for axes, (name, run) in zip(panels, shown.items(), strict=True):
        x, _, z = np.array(run).T
        axes.plot(x, z, color=colours[name], linewidth=0.5)
        axes.set(title="the true system" if name == "true" else f"{name} on its own", xlabel="x")
    panels[0].set_ylabel("z")
    panels = below.subplots(1, 3)
    for n, (axes, value) in enumerate(zip(panels, published, strict=True)):
        for place, (name, values) in enumerate(exponents.items()):
            of_seeds = np.array(values)[:, n]
            at = place + np.linspace(-0.15, 0.15, len(of_seeds))
            axes.plot(at, of_seeds, "o", color=colours[name], markersize=5)
        axes.axhline(value, color="black", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(exponents)), list(exponents))
        axes.set(title=f"exponent {n + 1} (dashed: {value:g})", xlim=(-0.6, len(exponents) - 0.4))
        axes.grid(axis="y", color="0.92")
    panels[0].set_ylabel("per unit of time")
    return _save(figure, path, dpi=100)


# Polyphonic music.


def _seeds(axes: Any, place: float, values: Sequence[float], color: str, label: str | None = None) -> None:
    """Draw one dot per seed at a height, and their mean with its 95 % interval."""
    mean, low, high = intervals.of_mean(values)
    axes.plot(values, [place] * len(values), "o", color=color, alpha=0.3, markersize=4)
    axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], color=color, capsize=3, marker="|", markersize=14,
                  label=label)  # fmt: skip


def chorales(path: Path, rows: list[dict[str, Any]], data: str) -> Path:
    """Draw the test loss of every seed beside the published number."""
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(rows) + 1.4), layout="constrained")
    for place, row in enumerate(rows):
        _seeds(axes, place, row["test"], COLORS[0], None if place else "this library: seeds, mean, 95 % interval")
        axes.plot(row["published"], place, "D", color=COLORS[1], markersize=7,
                  label="published" if not place else None)  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['cell']}, {row['units']} units" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="test: nats per chord (lower is better)", title=f"{data}: predicting the next chord")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=2)
    return _save(figure, path, dpi=120)


# Long lags.


def long_lag(
    path: Path, limit: int, rows: list[dict[str, Any]], published: dict[str, dict[int, int]], by_lag: str
) -> Path:
    """Draw the share of solved trials by lag for every cell, and sequences to success beside the published ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(1, 1.15))
    cells = [row for row in rows if row["task"] == by_lag and row["recipe"] != "1997"]
    for n, net in enumerate(dict.fromkeys(row["recipe"] for row in cells)):
        own = [row for row in cells if row["recipe"] == net]
        shares = [intervals.of_share(sum(map(bool, row["solved_at"])), len(row["solved_at"])) for row in own]
        share, low, high = np.array(shares).T
        lags = np.array([row["lag"] for row in own]) * 1.04 ** (n - 2)  # beside each other
        left.errorbar(lags, share, (share - low, high - share), color=COLORS[n], marker=MARKERS[n], capsize=2,
                      elinewidth=0.8, label=net)  # fmt: skip
    left.set(xscale="log", xlabel="lag, in steps", ylabel="share of trials that solved it", ylim=(-0.05, 1.05),
             title=f"The {by_lag}, within {limit:,} sequences")  # fmt: skip
    ticks = sorted({row["lag"] for row in cells})
    left.set_xticks(ticks, map(str, ticks))
    left.minorticks_off()
    left.legend(fontsize="small")
    kinds = {"1997": ("recipe of 1997", COLORS[0]), "LSTM, chrono": ("recipe of today", COLORS[2])}
    solved_by = [row for row in rows if row["recipe"] in kinds and any(row["solved_at"])]
    right.set_visible(bool(solved_by))
    places = sorted({(row["task"], row["lag"]) for row in solved_by})
    places = [place for place in places if place[0] != by_lag or place[1] in published[by_lag]]
    for height, (task, lag) in enumerate(places):
        for row in solved_by:
            if (row["task"], row["lag"]) == (task, lag):
                _, color = kinds[row["recipe"]]
                solved = [number for number in row["solved_at"] if number]
                offset = 0.14 if row["recipe"] == "1997" else -0.14
                right.plot(solved, [height + offset] * len(solved), "o", color=color, alpha=0.6, markersize=4)
        if paper := published.get(task, {}).get(lag):
            right.plot(paper, height, "D", color=COLORS[1], markersize=7)
    for label, color in kinds.values():
        right.plot([], [], "o", color=color, label=label)
    right.plot([], [], "D", color=COLORS[1], label="published 1997 (mean)")
    right.set_yticks(range(len(places)), [f"{task}, {lag}" for task, lag in places])
    right.invert_yaxis()
    right.set(xscale="log", xlabel="sequences to success, one dot per solved trial", title="Task and lag")
    right.grid(axis="x", alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), fontsize="small", loc="outside lower right", ncols=3)
    return _save(figure, path, dpi=110)


# Counting.


def counting(path: Path, result: dict[str, Any]) -> Path:
    """Draw how far every seed counts, the cell state that counts, and the share of right words of brackets."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    (reached, counter), bracketed = panels
    config, rows = result["config"], result["rows"]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    counts = [row for row in rows if "reach" in row]
    languages = list(dict.fromkeys(row["language"] for row in counts))
    for axes in (reached, counter):
        axes.set_visible(bool(counts))
    spread = np.random.default_rng(0)
    for row in counts:
        n, place = cells.index(row["cell"]), languages.index(row["language"]) * (len(cells) + 1)
        jitter = spread.uniform(-0.25, 0.25, len(row["reach"]))
        reached.plot(place + n + jitter, np.maximum(row["reach"], 0.8), MARKERS[n], color=COLORS[n], alpha=0.7,
                     label=row["cell"] if not place else None)  # fmt: skip
    reached.axhline(config["trained_to"], color="0.5", linewidth=1, linestyle="--")
    reached.annotate("largest n in training", (0, config["trained_to"]), xycoords=("axes fraction", "data"),
                     xytext=(4, -3), textcoords="offset points", va="top", color="0.4", fontsize="small")  # fmt: skip
    middles = [k * (len(cells) + 1) + (len(cells) - 1) / 2 for k in range(len(languages))]
    reached.set_xticks(middles, languages)
    reached.set(yscale="log", ylabel="right for all words up to n", title="Each dot is one net")
    reached.legend(fontsize="small", loc="lower right")
    for shown in (row["counter"] for row in counts if row["cell"] == "LSTM" and "counter" in row):
        for unit in shown:
            counter.plot(unit, color=COLORS[cells.index("LSTM")], alpha=0.6, linewidth=1.2)
        half = len(shown[0]) // 2
        counter.axvline(half, color="0.5", linewidth=1, linestyle="--")
        counter.set(xlabel="step", ylabel="cell state c, one line per unit",
                    title=f"One LSTM reads n = {half}: {half} a's, then {half} b's")  # fmt: skip
    for axes, language in zip(bracketed, ("Dyck-1", "Dyck-2"), strict=True):
        own = [row for row in rows if row["language"] == language]
        axes.set_visible(bool(own))
        if not own:
            continue
        for row in own:
            n, share = cells.index(row["cell"]), np.array(row["right"])
            axes.plot(row["lengths"], share.mean(1), color=COLORS[n], marker=MARKERS[n], label=row["cell"])
            axes.fill_between(row["lengths"], share.min(1), share.max(1), color=COLORS[n], alpha=0.15, linewidth=0)
            units = row["units"]
        axes.set(xscale="log", ylim=(-0.05, 1.05), xlabel="length of the word (trained on the shortest here and less)",
                 ylabel="share of words that are right",
                 title=f"{language}, {units} unit{'s' * (units > 1)}: mean and range of the nets")  # fmt: skip
        axes.set_xticks(row["lengths"], map(str, row["lengths"]))
        axes.minorticks_off()
        axes.legend(fontsize="small")
    return _save(figure, path, dpi=100)


# Variants and sizes on polyphonic music.


def odyssey(path: Path, rows: list[dict[str, Any]], changes: dict[str, str]) -> Path:
    """Draw the test loss of every variant: one dot per seed, and the 95 % interval of the mean."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    base, *_ = rows
    _, low, high = intervals.of_mean(base["test"])
    axes.axvspan(low, high, color=COLORS[0], alpha=0.15, linewidth=0)
    right = max(np.median(row["test"]) for row in rows) + 0.25  # a seed that failed must not hide the others
    for place, row in enumerate(rows):
        _seeds(axes, place, row["test"], COLORS[0] if row is base else COLORS[1])
        if failed := [f"{loss:.2f}" for loss in row["test"] if loss > right]:
            note = f"{len(failed)} of {len(row['test'])} seeds: {', '.join(failed)} →"
            axes.annotate(note, (right, place), (-4, 10), textcoords="offset points", ha="right", fontsize="small")
    axes.set_yticks(range(len(rows)), [f"{row['variant']}: {changes[row['variant']]}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="test: nats per chord (lower is better)", title="Variants of the LSTM on JSB Chorales")
    axes.set_xlim(right=right)
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, path, dpi=120)


def rnn_vs_lstm(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Draw the loss on training and test data for every net, and the time of a training step."""
    figure, (losses, times) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(1.6, 1))
    labels = [f"{row['cell']}, {row['units']} units\n{row['parameters']:,} parameters" for row in rows]
    for place, row in enumerate(rows):
        for part, label, color in (("train", "training data", COLORS[2]), ("test", "test data", COLORS[1])):
            _seeds(losses, place, row[part], color, None if place else label)
        times.barh(place, 1e3 * row["step seconds"], color=COLORS[0])
    losses.set(xlabel="nats per chord", title="Best validation: the gap between the dots is overfitting")
    losses.set_yticks(range(len(rows)), labels)
    losses.legend(fontsize="small")
    times.set(xlabel="milliseconds per training step", title="Time", yticks=[])
    for axes in (losses, times):
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the same in both, the first row on top
        axes.grid(axis="x", alpha=0.3)
    return _save(figure, path, dpi=110)


# GradBench.


def gradbench(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Draw how much longer the gradient takes than its objective, for both programs at every size."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    for n, (name, color) in enumerate((("jaxlstm", COLORS[0]), ("lax.scan", COLORS[1]))):
        ratios = [row[name]["gradient"] / row[name]["objective"] for row in rows]
        bars = axes.barh(np.arange(len(rows)) + 0.4 * n - 0.2, ratios, 0.36, color=color, label=name)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    axes.set_yticks(range(len(rows)), [f"{row['layers']} layers, {row['num_steps']:,} characters" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="time of the gradient / time of the objective (lower is better)", title="GradBench's LSTM")
    figure.legend(loc="outside lower center", ncols=2)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.12)
    return _save(figure, path, dpi=110)


# Tagging.


CLASS_COLORS = ("#f4b942", "#cfe2f3", "#b6d7a8", "#e6a5b8", "#d9d2e9", "#d0d0d0", "#ffffff")


def tagging(
    folder: Path, rows: list[dict[str, Any]], classes: Sequence[str], snippet: str, truth: list[int]
) -> list[Path]:
    """Draw the scores, what the gates do at borders, the tags over a program, and what each tag depends on."""
    figure, (scores, borders) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1.3, 1))
    names = [row["name"] for row in rows]
    for n, row in enumerate(rows):
        of_seeds = np.array(row["f1"])
        columns = [of_seeds.mean(1), *of_seeds.T]
        mean, low, high = np.array([intervals.of_mean(column) for column in columns]).T
        places = np.arange(len(columns)) + 0.22 * (n - 1)
        scores.errorbar(places, mean, (mean - low, high - mean), fmt=MARKERS[n], color=COLORS[n], capsize=2,
                        label=row["name"])  # fmt: skip
    scores.set_xticks(range(1 + len(classes)), ["mean", *classes], rotation=20)
    scores.set(ylabel="F1 on held-out files", title="Mean of the seeds and 95 % interval")
    scores.grid(axis="y", alpha=0.3)
    scores.legend(fontsize="small")
    (lstm,) = (row for row in rows if "around borders" in row)
    offsets = np.arange(len(lstm["around borders"][0]["f"])) - len(lstm["around borders"][0]["f"]) // 2
    right = borders.twinx()
    for n, (name, axes) in enumerate((("f", borders), ("i", borders), ("change of c", right))):
        of_seeds = np.array([found[name] for found in lstm["around borders"]])
        mean, low, high = np.array([intervals.of_mean(column) for column in of_seeds.T]).T
        shown = {"f": "forget gate f", "i": "input gate i"}.get(name, "‖Δc‖ (right axis)")
        axes.plot(offsets, mean, color=COLORS[n], marker=MARKERS[n], markersize=4, label=shown)
        axes.fill_between(offsets, low, high, color=COLORS[n], alpha=0.2, linewidth=0)
    borders.axvline(-0.5, color="0.5", linestyle="--", linewidth=1)
    borders.set_xticks(range(-10, 11, 5))
    borders.set(xlabel="characters from the first one of a new class", ylabel="mean of all units",
                title=f"The LSTM at {lstm['borders']:,} borders")  # fmt: skip
    right.set(ylabel="‖Δc‖", ylim=(0, None))
    handles = [*borders.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    borders.legend(handles=handles, fontsize="small", loc="center left")
    drawn = [_save(figure, folder / "tagging.png", dpi=110)]

    shown_rows = [("truth", truth), *((row["name"], row["snippet"]) for row in rows if row["name"] != names[0])]
    figure, panels = plt.subplots(len(shown_rows), 1, figsize=(8.4, 5.2), layout="constrained")
    lines = snippet.splitlines()
    width = max(map(len, lines))
    for axes, (name, labels) in zip(panels, shown_rows, strict=True):
        at = 0
        for row_number, line in enumerate(lines):
            for column, symbol in enumerate(line):
                color = CLASS_COLORS[labels[at]]
                axes.add_patch(Rectangle((column, row_number), 1, 1, color=color, linewidth=0))
                if labels[at] != truth[at]:
                    axes.add_patch(Rectangle((column, row_number + 0.86), 1, 0.14, color="#c00000", linewidth=0))
                axes.text(
                    column + 0.5, row_number + 0.55, symbol, family="monospace", fontsize=9, ha="center", va="center"
                )
                at += 1
            at += 1  # the line's end
        wrong = sum(a != b for a, b in zip(labels, truth, strict=True))
        axes.set(xlim=(0, width), ylim=(len(lines), 0), xticks=[], yticks=[])
        axes.set_title(name if name == "truth" else f"{name}: {wrong} of {len(truth)} characters wrong (underlined)",
                       loc="left", fontsize=10)  # fmt: skip
    patches = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="0.7") for color in CLASS_COLORS]
    figure.legend(patches, classes, loc="outside lower center", ncols=len(classes), fontsize="small")
    drawn.append(_save(figure, folder / "code.png", dpi=110))

    pair = [row for row in rows if row["name"] != names[0]]
    figure, panels = plt.subplots(1, len(pair), figsize=(9, 4.4), layout="constrained")
    for axes, row in zip(panels, pair, strict=True):
        matrix = np.log10(np.maximum(row["sensitivity"], 1e-4))
        image = axes.imshow(matrix, vmin=-4, vmax=1, cmap="viridis")
        axes.set(title=row["name"], xlabel="character read, s", ylabel="tag, t")
    figure.colorbar(image, ax=panels, label="log₁₀ ‖∂y_t/∂x_s‖", shrink=0.8)
    drawn.append(_save(figure, folder / "sensitivity.png", dpi=100))
    return drawn


# Tiny Shakespeare.


def shakespeare(path: Path, rows: list[dict[str, Any]], published: float) -> Path:
    """Draw held-out and training loss over the epochs, and the published loss."""
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for n, recipe in enumerate(dict.fromkeys(row["recipe"] for row in rows)):
        own = [row["curve"] for row in rows if row["recipe"] == recipe]
        epochs = np.arange(1, 1 + len(own[0]["held out"]))
        for k, curve in enumerate(own):
            axes.plot(epochs, curve["held out"], color=COLORS[n], label=None if k else f"{recipe}: held out")
            axes.plot(epochs, curve["training"], color=COLORS[n], linewidth=0.8, linestyle=":",
                      label=None if k else f"{recipe}: training")  # fmt: skip
    axes.axhline(published, color="0.3", linestyle="--", linewidth=1)
    axes.annotate(f"published {published:.4f}", (0, published), xycoords=("axes fraction", "data"), xytext=(4, -13),
                  textcoords="offset points", color="0.3")  # fmt: skip
    axes.set(xlabel="epoch", ylabel="nats per character", ylim=(1.1, 2.0), title="Tiny Shakespeare: one line per seed")
    axes.legend(fontsize="small", ncols=2)
    return _save(figure, path, dpi=110)
