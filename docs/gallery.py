"""Run the code of gallery.md and write its pictures: `python docs/gallery.py`."""

import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

DOCS = Path(__file__).parent


def main(folder: Path = DOCS) -> tuple[dict[str, Any], list[Path]]:
    """Write the picture of every block whose link follows it; return the page's variables and the paths."""
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "gallery"}
    written: list[Path] = []
    for code, link in re.findall(r"```python\n(.*?)```(?:\s*!\[.*?\]\((.*?)\))?", page, re.S):
        exec(compile(code, "gallery.md", "exec"), namespace)
        if link:
            (number,) = plt.get_fignums()
            figure = plt.figure(number)
            figure.set_size_inches(8, 4.5)
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / link, dpi=100, bbox_inches="tight")  # 800 pixels, about the width of a page
            plt.close(figure)
            written.append(folder / link)
    return namespace, written


if __name__ == "__main__":
    print(*main()[1], sep="\n")
