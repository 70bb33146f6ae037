"""Print the lowest versions that pyproject.toml allows, as constraints for pip: `make test-lowest` tests with them.

They are the versions of what users install: the dependencies, and the extras that add features. Tools that only the
tests need are not among them.
"""

import re
import tomllib
from pathlib import Path

EXTRAS = ("plots", "experiments", "export", "onnx", "safetensors")


def constraints(text: str) -> list[str]:
    """Return a line `name==version` for every requirement, given pyproject.toml."""
    project = tomllib.loads(text)["project"]
    optional = project["optional-dependencies"]
    requirements = project["dependencies"] + [own for name in EXTRAS for own in optional[name]]
    found = {own: re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", own) for own in requirements if "jaxlstm[" not in own}
    if without := [own for own, match in found.items() if match is None]:
        raise ValueError(f"pyproject.toml: every requirement needs a lower bound, name>=version, got {without}")
    return sorted({f"{match[1]}=={match[2]}" for match in found.values() if match})


if __name__ == "__main__":
    print(*constraints((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")), sep="\n")
