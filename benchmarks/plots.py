"""The benchmark's picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt


def benchmark(path: Path, result: dict[str, Any]) -> Path:
    """Draw how much longer each library takes than jaxlstm: a row per shape, a marker per library."""
    markers = dict(zip(result["shapes"][0]["forward"], "|xosv^DPX*<>", strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained", sharey=True)
    slowest = 1.0
    for axes, kind in zip(panels, ("gradient", "forward"), strict=True):
        for place, name in enumerate(name for name in markers if name != "jaxlstm"):
            points = [(n, row) for n, row in enumerate(result["shapes"]) if name in row[kind]]
            ratio = [row[kind][name]["median"] / row[kind]["jaxlstm"]["median"] for _, row in points]
            height = [n + 0.06 * (place - len(markers) / 2) for n, _ in points]  # side by side, not on one another
            colour = "0.6" if name == "jaxlstm, scan" else f"C{place}"
            slowest = max([slowest, *ratio])
            axes.plot(ratio, height, markers[name], color=colour, label=name, markersize=8, markeredgewidth=1.5)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        ticks = [tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 4, 6) if tick < 1.3 * slowest]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(axis="x", color="0.9")
        axes.set(title=kind, xlabel="median time relative to jaxlstm (right of the line: slower)")
    names = ["T {}, B {}, I {}, H {}".format(*row["shape"]) for row in result["shapes"]]
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
