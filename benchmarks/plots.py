"""The benchmark's picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from jaxlstm.plots import COLORS

NOT_JAX = ("torch", "ONNX")  # how their names begin


def benchmark(path: Path, result: dict[str, Any]) -> Path:
    """Draw how much longer each library takes than jaxlstm: a row per library, a dot per shape, a bar for the mean."""
    names = [name for name in result["shapes"][0]["forward"] if name != "jaxlstm"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", sharex=True, sharey=True)
    for axes, kind in zip(panels, ("gradient", "forward"), strict=True):
        for place, name in enumerate(names):
            rows = [row[kind] for row in result["shapes"] if name in row[kind]]
            if not rows:
                axes.annotate(f"no {kind}", (1.02, place), va="center", color="0.4")
                continue
            ratios = np.array([row[name]["median"] / row["jaxlstm"]["median"] for row in rows])
            color = COLORS[1] if name.startswith(NOT_JAX) else COLORS[0]
            axes.plot(ratios, np.full(len(ratios), place), "o", color=color, alpha=0.45, markersize=7)
            mean = np.exp(np.log(ratios).mean())
            axes.plot([mean], [place], "|", color=color, markersize=22, markeredgewidth=3.5)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xscale="log", title=kind)
        axes.grid(axis="y", color="0.92")
    low, high = panels[0].get_xlim()
    ticks = [tick for tick in (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if low <= tick <= high]
    panels[0].set_xticks(ticks, map(str, ticks))
    for axes in panels:
        axes.minorticks_off()
    panels[0].set_yticks(range(len(names)), names, fontsize=12)
    panels[0].invert_yaxis()
    for look, label in (
        ({"marker": "o", "alpha": 0.45, "markersize": 7}, "one shape"),
        ({"marker": "|", "markersize": 16, "markeredgewidth": 3.5}, "geometric mean"),
        ({"marker": "s", "color": COLORS[0], "markersize": 9}, "JAX"),
        ({"marker": "s", "color": COLORS[1], "markersize": 9}, "not JAX"),
    ):
        panels[0].plot([], [], linestyle="", label=label, **{"color": "0.3"} | look)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=11)
    figure.supxlabel("median time, relative to jaxlstm (right of the line: slower)")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
