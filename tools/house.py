"""Count how readable the package is: `python tools/house.py [ROOT ...]`, a column for each copy of the project.

Lines of code count neither blank lines nor docstrings nor comments. A comment line holds nothing but a comment. Files
that `xs` passes through are the files of the package in the tracebacks of the equations of `unroll(LSTM, ...)`.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

FOLLOW = """
import json, jax, jax.numpy as jnp, jaxlstm
params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
closed = jax.make_jaxpr(lambda xs: jaxlstm.unroll(jaxlstm.LSTM, params, xs))(jnp.ones((11, 3, 5)))
files = set()
def visit(jaxpr):
    for equation in jaxpr.eqns:
        traceback = equation.source_info.traceback
        files.update(frame.file_name for frame in (traceback.frames if traceback else ()))
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)
visit(closed.jaxpr)
print(json.dumps(sorted(f.rpartition("/jaxlstm/")[2] for f in files if "/jaxlstm/" in f and "/tools/" not in f)))
"""


def code_lines(source: str) -> int:
    """Count the lines that hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = source.splitlines()
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in docstrings
        for number, line in enumerate(lines, 1)
    )


def comment_lines(source: str) -> int:
    """Count the lines that hold only a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT and token.line.strip().startswith("#") for token in tokens)


def comments(source: str) -> int:
    """Count all comments, those at the end of a line of code too."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(source).readline))


def functions(source: str, path: Path) -> list[tuple[int, bool, str]]:
    """Return of every function its number of parameters, whether it is private, and where it is."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef)
            if is_function:
                arguments = child.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                number = len([name for name in names if name not in ("self", "cls")])
                public = not inside and not child.name.startswith("_")
                decorated = any("border" in ast.dump(decorator) for decorator in child.decorator_list)
                of_method = isinstance(node, ast.ClassDef)
                found.append((number, not (public and (decorated or of_method)) and child.name != "__init__"
                              and child.name != "__call__", f"{path.name}:{child.name}"))  # fmt: skip
            visit(child, inside or is_function)

    visit(ast.parse(source), False)
    return found


def count(root: Path) -> dict[str, object]:
    """Return all counts of one copy of the project."""
    paths = sorted((root / "jaxlstm").rglob("*.py"))
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    total = sum(lines.values())
    lambdas = sum(isinstance(node, ast.Lambda) for s in sources.values() for node in ast.walk(ast.parse(s)))
    raises = sum(isinstance(node, ast.Raise) for s in sources.values() for node in ast.walk(ast.parse(s)))
    private = [found for path, s in sources.items() for found in functions(s, path) if found[1]]
    init = ast.parse(sources[root / "jaxlstm" / "__init__.py"])
    (exported,) = [n for n in init.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    rule = next(p for p in (root / "jaxlstm" / "bulk.py", root / "jaxlstm" / "derivative.py") if p.exists())
    followed = subprocess.run(
        [sys.executable, "-c", FOLLOW], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    longest = max(private)
    code = sum(map(code_lines, sources.values()))
    # The LSTM family, the doors to other frameworks, fixed points, epochs and pictures came after the engine. Its size
    # has a bound of its own.
    added = ("variants.py", "weights.py", "onnx.py", "statespace.py", "epochs.py", "plots.py")
    code_added = sum(code_lines(source) for path, source in sources.items() if path.name in added)
    readme = (root / "README.md").read_text(encoding="utf-8")
    return {
        "lines of the package": total,
        "of these, code": code,
        "of these, code, without what was added to the engine": code - code_added,
        "lines of the file with the rule": lines[rule],
        "of these, code ": code_lines(sources[rule]),
        "public names at the top": len(ast.literal_eval(exported.value)),
        "longest parameter list of a private function": f"{longest[0]} ({longest[2]})",
        "lambdas per 100 lines": round(100 * lambdas / total, 2),
        "raises per 100 lines": round(100 * raises / total, 2),
        "comment lines per 100 lines of code": round(100 * sum(map(comment_lines, sources.values())) / code, 2),
        "comments per 100 lines of code": round(100 * sum(map(comments, sources.values())) / code, 2),
        "words of README.md": len(re.findall(r"\S+", readme)),
        "files that xs passes through": ", ".join(json.loads(followed)),
    }


def main() -> None:
    """Print the counts of each copy side by side."""
    roots = [Path(word).resolve() for word in sys.argv[1:]] or [Path(__file__).resolve().parents[1]]
    counts = [count(root) for root in roots]
    for name in counts[0]:
        print(
            f"{name:46}" + "  ".join(f"{found[name]!s:>44}" if len(roots) > 1 else str(found[name]) for found in counts)
        )


if __name__ == "__main__":
    main()
