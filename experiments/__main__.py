"""List the experiments: `python -m experiments`."""

import ast
from pathlib import Path

NOT_EXPERIMENTS = {"__init__", "__main__"}


def main() -> None:
    """Print every module that can be run, with the first line of its docstring."""
    print("Each is a command with flags of its own; --help lists them.\n")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.stem not in NOT_EXPERIMENTS and '__name__ == "__main__"' in source:
            summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            print(f"python -m experiments.{path.stem:22} {summary}")


if __name__ == "__main__":
    main()
