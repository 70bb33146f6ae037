"""Draw docs/cell.svg, docs/unrolled.svg and docs/imports.svg: `python docs/diagrams.py`."""

import ast
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

plt.rcParams.update({"svg.hashsalt": "jaxlstm", "font.size": 13})
HERE = Path(__file__).parent
GATE, POINTWISE, STATE, BACK = "#cfe8ff", "#ffe3c2", "#1f5fa8", "#c0392b"


def arrow(
    axes: Any, *points: tuple[float, float], colour: str = "black", width: float = 1.6, head: bool = True
) -> None:
    """Draw a line through points, with a head at its end."""
    (*most, last) = points
    xs, ys = zip(*(most if head else points), strict=True)
    axes.plot(xs, ys, color=colour, linewidth=width, solid_joinstyle="round", zorder=1)
    if head:
        style = {
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": width,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 15,
        }
        axes.annotate("", last, most[-1], arrowprops=style, zorder=1)


def box(axes: Any, x: float, y: float, text: str, colour: str = GATE, width: float = 0.9, height: float = 0.7) -> None:
    """Draw a box with a text in it."""
    patch = plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor="black", zorder=2)
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", zorder=3)


def node(axes: Any, x: float, y: float, text: str) -> None:
    """Draw a circle with a sign in it: what is done element by element."""
    axes.add_patch(plt.Circle((x, y), 0.3, facecolor=POINTWISE, edgecolor="black", zorder=2))
    axes.text(x, y, text, ha="center", va="center", zorder=3)


def draw_rnn(axes: Any) -> None:
    """Draw one step of a simple RNN."""
    axes.set_title("RNN", fontsize=16)
    axes.add_patch(plt.Rectangle((0.6, 0.3), 3.8, 6.4, facecolor="0.97", edgecolor="0.7", zorder=0))
    arrow(axes, (0, 1), (2.5, 1), (2.5, 2.05))
    arrow(axes, (1.4, -0.4), (1.4, 1), head=False)
    box(axes, 2.5, 2.4, "tanh")
    arrow(axes, (2.5, 2.75), (2.5, 3.6), (3.6, 3.6), (3.6, 1), (5, 1))
    axes.text(-0.1, 1, "$h_{t-1}$", ha="right", va="center")
    axes.text(1.4, -0.5, "$x_t$", ha="center", va="top")
    axes.text(5.1, 1, "$h_t$", ha="left", va="center")
    axes.text(2.5, -1.6, r"$h_t = \tanh(x_t W_{ih} + h_{t-1} W_{hh} + b)$", ha="center", va="top")
    axes.set(xlim=(-1, 6), ylim=(-4.2, 7))


def draw_lstm(axes: Any) -> None:
    """Draw one step of an LSTM."""
    axes.set_title("LSTM", fontsize=16)
    axes.add_patch(plt.Rectangle((0.6, 0.3), 9.2, 6.4, facecolor="0.97", edgecolor="0.7", zorder=0))
    arrow(axes, (0, 6), (10.4, 6), colour=STATE, width=3)
    arrow(axes, (0, 1), (7.2, 1), head=False)
    arrow(axes, (1.4, -0.4), (1.4, 1), head=False)
    for x, name, function in (
        (2.6, "f", r"$\sigma$"),
        (4.2, "i", r"$\sigma$"),
        (5.6, "g", "tanh"),
        (7.2, "o", r"$\sigma$"),
    ):
        arrow(axes, (x, 1), (x, 2.05))
        box(axes, x, 2.4, function)
        axes.text(x + 0.12, 2.95, f"${name}$", ha="left", va="center")
    arrow(axes, (2.6, 2.75), (2.6, 5.7))
    arrow(axes, (4.2, 2.75), (4.2, 4.2), (4.6, 4.2))
    arrow(axes, (5.6, 2.75), (5.6, 4.2), (5.2, 4.2))
    arrow(axes, (4.9, 4.5), (4.9, 5.7))
    arrow(axes, (8.8, 6), (8.8, 5.15))
    box(axes, 8.8, 4.8, "tanh", POINTWISE)
    arrow(axes, (8.8, 4.45), (8.8, 3.9))
    arrow(axes, (7.2, 2.75), (7.2, 3.6), (8.5, 3.6))
    arrow(axes, (8.8, 3.3), (8.8, 1), (10.4, 1))
    for x, y, sign in ((2.6, 6, r"$\odot$"), (4.9, 4.2, r"$\odot$"), (4.9, 6, "+"), (8.8, 3.6, r"$\odot$")):
        node(axes, x, y, sign)
    axes.text(-0.1, 6, "$c_{t-1}$", ha="right", va="center", color=STATE)
    axes.text(-0.1, 1, "$h_{t-1}$", ha="right", va="center")
    axes.text(1.4, -0.5, "$x_t$", ha="center", va="top")
    axes.text(10.5, 6, "$c_t$", ha="left", va="center", color=STATE)
    axes.text(10.5, 1, "$h_t$", ha="left", va="center")
    lines = (
        r"$z = x_t W_{ih} + h_{t-1} W_{hh} + b$, in four blocks",
        r"$i = \sigma(z_i)\quad f = \sigma(z_f)\quad g = \tanh(z_g)\quad o = \sigma(z_o)$",
        r"$c_t = f \odot c_{t-1} + i \odot g \qquad h_t = o \odot \tanh(c_t)$",
    )
    for n, line in enumerate(lines):
        axes.text(5.2, -1.6 - 0.85 * n, line, ha="center", va="top")
    axes.set(xlim=(-1, 11.4), ylim=(-4.2, 7))


def draw_unrolled(axes: Any, name: str) -> None:
    """Draw four steps of a net side by side, and the way of the gradient back through them."""
    steps = ("$t-3$", "$t-2$", "$t-1$", "$t$")
    lstm = name == "LSTM"
    for n, step in enumerate(steps):
        x = 3.4 * n
        box(axes, x, 1.5, name, GATE, 1.5, 2.4)
        arrow(axes, (x, -0.7), (x, 0.3))
        axes.text(x, -0.8, f"$x$ at {step}", ha="center", va="top")
        arrow(axes, (x, 2.7), (x, 3.5))
        axes.text(x, 3.55, f"$h$ at {step}", ha="center", va="bottom")
        if n:
            left, right = x - 3.4 + 0.75, x - 0.75
            arrow(axes, (left, 0.9), (right, 0.9))
            axes.text((left + right) / 2, 0.98, "$h$", ha="center", va="bottom")
            arrow(axes, (right, 0.55), (left, 0.55), colour=BACK)
            axes.text(
                (left + right) / 2, 0.45, r"$\mathrm{d}z\,W_{hh}^\top$", ha="center", va="top", color=BACK, fontsize=11
            )
            if lstm:
                arrow(axes, (left, 2.0), (right, 2.0), colour=STATE, width=3)
                axes.text((left + right) / 2, 1.92, "$c$", ha="center", va="top", color=STATE)
                arrow(axes, (right, 2.35), (left, 2.35), colour=BACK)
                axes.text(
                    (left + right) / 2,
                    2.42,
                    r"$\mathrm{d}c \odot f$",
                    ha="center",
                    va="bottom",
                    color=BACK,
                    fontsize=11,
                )
    said = (
        r"back through every step: times $W_{hh}^\top$ and times $1 - h^2$"
        if not lstm
        else r"back along $c$: times $f$ alone, between 0 and 1 by unit; along $h$: through the gates, as in an RNN"
    )
    axes.text(5.1, -1.75, said, ha="center", va="top", color=BACK)
    axes.set(xlim=(-1.4, 11.6), ylim=(-2.4, 4.3))


PACKAGE = HERE.parent / "jaxlstm"
IMPORTED_BY_MOST = ("cell", "checks")  # nearly every module imports them


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in ("jaxlstm", "jaxlstm.diagnostics"):
            inside = node.module.removeprefix("jaxlstm").removeprefix(".")
            found |= {f"{inside}.{alias.name}".removeprefix(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxlstm."):
            found.add((node.module or "").removeprefix("jaxlstm."))
    return found


def import_graph() -> dict[str, set[str]]:
    """Return the direct imports of every module, without those it also gets through another import."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    names = {name: path for name, path in names.items() if "_" not in name and not name.startswith("adapters")}
    direct = {name: imports_of(path) & names.keys() - set(IMPORTED_BY_MOST) for name, path in names.items()}

    def reached(name: str) -> set[str]:
        return direct[name].union(*(reached(other) for other in direct[name]))

    return {name: own - set().union(*(reached(other) for other in own)) for name, own in direct.items()}


def draw_imports(axes: Any) -> None:
    """Draw every module above those that it imports."""
    graph = import_graph()
    alone = {name for name, own in graph.items() if not own and not any(name in others for others in graph.values())}

    def storey(name: str) -> int:
        return 1 + max(map(storey, graph[name]), default=0)

    storeys: dict[int, list[str]] = {}
    for name in sorted(graph.keys() - alone - set(IMPORTED_BY_MOST)):
        storeys.setdefault(storey(name), []).append(name)
    place: dict[str, tuple[float, float]] = {}
    for height, names in sorted(storeys.items()):
        # Order the modules of a row by the mean position of their imports.
        middle = {name: sum(place[other][0] for other in graph[name]) / max(1, len(graph[name])) for name in names}
        for n, name in enumerate(sorted(names, key=lambda name: (middle[name], name))):
            place[name] = (3.3 * (n - (len(names) - 1) / 2), 1.9 * height)
    for n, (name, (x, y)) in enumerate(reversed(place.items())):
        box(axes, x, y, name.replace("diagnostics.", "diagnostics.\n"), GATE, 2.9, 0.95)
        for other in sorted(graph[name]):  # lines of one module have one colour
            arrow(axes, (x, y - 0.48), (place[other][0], place[other][1] + 0.48), colour=f"C{n % 10}", width=1.4)
    box(axes, 0, 0, f"{' and '.join(IMPORTED_BY_MOST)}, which most modules import", POINTWISE, 12, 0.8)
    top = 1.9 * (max(storeys) + 0.7)
    axes.text(0, top, f"without imports: {', '.join(sorted(alone - set(IMPORTED_BY_MOST)))}", ha="center")
    width = 1.75 * max(map(len, storeys.values()))
    axes.set(xlim=(-width, width), ylim=(-0.8, top + 0.6))


def main() -> None:
    """Write the files."""
    figure, panels = plt.subplots(1, 2, figsize=(14, 8), width_ratios=(7, 12.4), layout="constrained")
    draw_rnn(panels[0])
    draw_lstm(panels[1])
    save(figure, panels, "cell")
    figure, panels = plt.subplots(2, 1, figsize=(12, 10.5), layout="constrained")
    draw_unrolled(panels[0], "RNN")
    draw_unrolled(panels[1], "LSTM")
    save(figure, panels, "unrolled")
    figure, axes = plt.subplots(figsize=(13, 8.6), layout="constrained")
    draw_imports(axes)
    save(figure, [axes], "imports", description=imports_as_text())


def imports_as_text() -> str:
    """Return the imports as text. The file holds it, so that a test sees whether the picture is up to date."""
    return "; ".join(f"{name}: {' '.join(sorted(own))}" for name, own in sorted(import_graph().items()))


def save(figure: Any, panels: Any, name: str, description: str | None = None) -> None:
    """Write an SVG that is the same each time."""
    for axes in panels:
        axes.set_aspect("equal")
        axes.axis("off")
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None, "Description": description})
    plt.close(figure)


if __name__ == "__main__":
    main()
