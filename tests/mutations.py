"""Mutations: small mechanical changes of the package, put into a copy of the project one at a time.

Nobody picked them, so the share that the tests catch estimates how many future faults they would catch.

    python tests/mutations.py --count 60              draw 60 from the whole package
    python tests/mutations.py --count 9 masks tuning  from these modules
    python tests/mutations.py --list masks            only list them
    python tests/mutations.py --again FILE            run the survivors of an earlier outcome once more

Each runs the test files that aim at its module; with `--whole`, a survivor also runs the whole suite.
"""

import argparse
import ast
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from faults import ROOT, copy_of_the_project, first_failure

PACKAGE = ROOT / "jaxlstm"
# The test files that aim at a module; they run in this order until one fails.
AIMED = {
    "cell": "cell recurrence lstm precision", "lstm": "lstm recurrence bptt", "baselines": "recurrence cell",
    "initializers": "lstm fuzz", "variants": "variants", "masks": "recurrence layers fuzz habits", "tangents": "derivative recurrence rtrl",
    "gradients": "recurrence derivative layers", "bulk": "derivative recurrence",
    "tuning": "derivative recurrence habits", "recurrence": "recurrence derivative habits meshes",
    "precision": "precision", "checks": "recurrence layers train fuzz habits meshes comparison",
    "layers": "layers regularize", "bidirectional": "layers regularize", "regularize": "regularize",
    "bptt": "bptt", "rtrl": "rtrl structure", "structure": "structure rtrl", "train": "train", "epochs": "epochs",
    "ensembles": "train", "plots": "plots", "__main__": "main",
    "diagnostics/comparison": "comparison", "diagnostics/differences": "differences bptt comparison main",
    "diagnostics/sources": "sources", "diagnostics/flow": "diagnostics", "diagnostics/dynamics": "diagnostics",
    "diagnostics/statespace": "statespace", "adapters/weights": "weights", "adapters/onnx": "onnx",
    "adapters/conventions": "adapters", "adapters/linen": "adapters", "adapters/nnx": "adapters",
}  # fmt: skip

GENERAL = "keywords escapes fuzz"  # test files that call everything

COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
               ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}  # fmt: skip
COMMUTATIVE = {"max", "min", "maximum", "minimum"}  # functions whose arguments may be swapped
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
             ast.BitAnd: "|", ast.BitOr: "&"}  # fmt: skip


LONGEST = 900  # seconds


class Mutation(NamedTuple):
    """A module, a line of it and its text, what changes there, and the source of the whole changed module."""

    module: str
    line: int
    text: str
    what: str
    source: str

    @property
    def name(self) -> str:
        """Name the mutation without its line, which other changes move."""
        return f"{self.module}: {self.what}  in  {self.text}"


def mutations(module: str) -> Iterator[Mutation]:
    """Yield every mutation of a module."""
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    raw = source.encode()

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        begin, end = span(node)
        return raw[begin:end].decode()

    def mutation(node: ast.AST, what: str, changed: bytes) -> Mutation:
        return Mutation(module, node.lineno, lines[node.lineno - 1].strip(), what[:120], changed.decode())

    def change(node: ast.AST, new: str) -> Mutation:
        begin, end = span(node)
        what = f"{' '.join(text(node).split())[:60]}  ->  {' '.join(new.split())[:60]}"
        return mutation(node, what, raw[:begin] + new.encode() + raw[end:])

    for node in _code(ast.parse(source)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            new = COMPARISONS[type(node.ops[0])]
            yield change(node, f"{text(node.left)} {new} {text(node.comparators[0])}")
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield change(node, f"({text(node.left)}) {OPERATORS[type(node.op)]} ({text(node.right)})")
        elif isinstance(node, ast.BoolOp):
            other = " or " if isinstance(node.op, ast.And) else " and "
            yield change(node, other.join(f"({text(value)})" for value in node.values))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            yield change(node, f"({text(node.operand)})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = not node.value if isinstance(node.value, bool) else node.value + 1
            yield change(node, repr(value))
        elif isinstance(node, ast.IfExp | ast.If):
            yield change(node.test, f"not ({text(node.test)})")
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg and keyword.arg != "strict":  # drop it, with the comma before or after it
                    begin, end = span(keyword)
                    before, after = raw[:begin].rstrip(), raw[end:].lstrip()
                    cut = before.removesuffix(b",") if before.endswith(b",") else before
                    after = after if cut != before else after.removeprefix(b",")
                    yield mutation(keyword, f"without {' '.join(text(keyword).split())}", cut + after)
            symmetric = text(node.func).rpartition(".")[2] in COMMUTATIVE
            if len(node.args) >= 2 and not symmetric and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
                one, two = node.args[:2]
                if text(one) != text(two):
                    (begin, middle), (start, end) = span(one), span(two)
                    swapped = raw[:begin] + text(two).encode() + raw[middle:start] + text(one).encode() + raw[end:]
                    yield mutation(node, f"swapped in {' '.join(text(node).split())}", swapped)


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that compute: no annotations, no decorators, no messages of errors, no checks by `strict`."""
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases") or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _code(child)


# What no test can notice, because the mutated code does the same, and why. Not drawn.
EQUIVALENT = {
    "diagnostics/dynamics: -1  ->  (1)  in  w = LSTMGates(*jnp.split(params.w_hh, 4, axis=-1))": "a matrix has two axes",
    "lstm: swapped in activations(params, state, z, a)  in  i, f, g, o = activations(params, state, z, a)": "an LSTM's gates read only z and a",
    "adapters/nnx: -1  ->  (1)  in  w_ih=jnp.concatenate([gate.kernel[...] for gate in inputs], axis=-1),": "a matrix has two axes",
    "masks: 0  ->  1  in  known = np.zeros(0, int) if traced else np.asarray(lengths)": "the array has the dtype of known lengths; its size is not read",
    "tuning: 0  ->  1  in  num_steps = jax.tree.leaves(steps)[0].shape[0]": "all leaves have the same leading axes",
    "__main__: 0.7  ->  1.7  in  several = jax.tree.map(lambda leaf: jnp.stack([0.7 * leaf, leaf]), params)":
        "any other parameters will do",
    "diagnostics/comparison: error <= tolerance  ->  error < tolerance  in  "
    "wrong = {name for name, error in errors.items() if not error <= tolerance}": "no error is exactly the tolerance",
    "diagnostics/dynamics: 1  ->  2  in  "
    "jacobians = where(jnp.asarray(mask), jacobians, jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype))":
        "a Jacobian is square",
}  # fmt: skip


class Hunter:
    """Runs the aimed tests on mutations, first those that caught an earlier mutation of the module."""

    def __init__(self, *, whole: bool):
        self.whole = whole
        self.caught_before: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def first_failure(self, mutation: Mutation) -> str:
        """Return the first test that fails with a mutation, or "" if it survives."""
        known = self.caught_before[mutation.module]
        with tempfile.TemporaryDirectory() as folder:
            copy = copy_of_the_project(Path(folder))
            (copy / "jaxlstm" / f"{mutation.module}.py").write_text(mutation.source, encoding="utf-8")
            aimed = [f"tests/test_{name}.py" for name in AIMED[mutation.module].split()]
            quick, rest = "not slow and not ci", "ci and not slow"
            turns = [([test for test, _ in known.most_common(8)], "not slow")] if known else []
            turns += [([file], quick) for file in aimed]
            turns += [([f"tests/test_{name}.py" for name in GENERAL.split()], quick), (aimed, rest)]
            turns += [([], quick), ([], rest)] if self.whole else []
            for tests, marks in turns:
                try:
                    found = first_failure(copy, *tests, marks=marks, timeout=LONGEST)
                except subprocess.TimeoutExpired:
                    return f"more than {LONGEST} s"
                if found:
                    if "::" in found:
                        known[found] += 1
                    return found
        return ""


def report(outcome: dict[str, Any]) -> str:
    """Return a table of the share caught per module, and the total before and after tests were written for survivors."""
    survived, at_first = (
        collections.Counter(name.partition(":")[0] for name in outcome[which])
        for which in ("survivors", "survived at first")
    )
    drawn = outcome["drawn"]
    rows = [f"{module:24} {n - survived[module]:4} of {n}" for module, n in sorted(drawn.items())]
    total = sum(drawn.values())
    now, before = (total - sum(counted.values()) for counted in (survived, at_first))
    return "\n".join([*rows, f"{now} of {total} caught, {before} of them at first; {outcome['of']} mutations in all"])


def main() -> int:
    """Draw mutations, run them two at a time, and print what caught each and the share caught per module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(AIMED))
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--again", type=Path, help="run the survivors in this JSON file again and update it")
    parser.add_argument("--results", type=Path, help="write the outcome to this JSON file")
    flags = parser.parse_args()
    every = [mutation for module in flags.modules for mutation in mutations(module)]
    if flags.list:
        print(*(f"{m.module}:{m.line}  {m.what}" for m in every), sep="\n")
        return 0
    every = [mutation for mutation in every if mutation.name not in EQUIVALENT]
    if flags.again:
        outcome = json.loads(flags.again.read_text(encoding="utf-8"))
        for name in EQUIVALENT.keys() & set(outcome["survived at first"]):
            outcome["drawn"][name.partition(":")[0]] -= 1
        for which in ("survivors", "survived at first"):
            outcome[which] = [name for name in outcome[which] if name not in EQUIVALENT]
        tried = [mutation for mutation in every if mutation.name in outcome["survivors"]]
    else:
        tried = random.Random(flags.seed).sample(every, min(flags.count, len(every)))
        drawn = collections.Counter(mutation.module for mutation in tried)
        outcome = {"seed": flags.seed, "of": len(every), "drawn": drawn}

    hunter, survivors = Hunter(whole=flags.whole), []
    with tempfile.TemporaryDirectory() as compiled, ThreadPoolExecutor(2) as pool:
        os.environ["JAXLSTM_TESTS_COMPILED"] = compiled  # one compilation cache for all
        for mutation, found in zip(tried, pool.map(hunter.first_failure, tried), strict=True):
            print(f"{mutation.module}:{mutation.line}  {mutation.what}: {found or 'SURVIVES'}", flush=True)
            survivors += [] if found else [mutation.name]
    if flags.again:  # a mutation whose line has changed is not tried, and stays
        caught = {mutation.name for mutation in tried} - set(survivors)
        outcome["survivors"] = [name for name in outcome["survivors"] if name not in caught]
    else:
        outcome |= {"survivors": survivors, "survived at first": survivors}
    print(report(outcome))
    if path := flags.again or flags.results:
        path.write_text(json.dumps(outcome, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
