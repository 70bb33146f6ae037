"""What the documentation site shows beside the pages in docs/: a hook of MkDocs, named in mkdocs.yml.

README.md becomes the first page, and one page shows the programs in examples/. The reference has one page per public
module, written from the docstrings. Pictures that pages show from other folders come with them, links to source files
lead to the repository, and formulas become MathML, which browsers draw without a script.
"""

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Paragraphs of a docstring that begin with >>>.
DOCTEST, AS_CODE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.M), r"\1```pycon\n\g<0>\n\1```"
MODULES = {  # the titles of the reference's pages
    "jaxlstm": "Cells, sequences, training",
    "jaxlstm.bptt": "The gradient by hand",
    "jaxlstm.diagnostics": "Diagnostics",
    "jaxlstm.epochs": "Epochs and batches",
    "jaxlstm.initializers": "Initializers",
    "jaxlstm.plots": "Plots",
    "jaxlstm.regularize": "Regularized cells",
    "jaxlstm.rtrl": "Learning online",
    "jaxlstm.variants": "Variants of the LSTM",
    "jaxlstm.adapters.weights": "Weights of other frameworks",
    "jaxlstm.adapters.nnx": "Flax NNX",
    "jaxlstm.adapters.linen": "Flax Linen",
    "jaxlstm.adapters.onnx": "ONNX",
}
OTHER = {  # names in annotations and errors, of modules that have no page
    "jaxlstm.baselines": ["GRUGates"],
    "jaxlstm.train": ["TrainStep"],
    "jaxlstm.checks": ["ArgumentTypeError", "ArgumentValueError"],
}


# The reference.


def source_of(module: str) -> ast.Module:
    """Return the syntax tree of a module."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """Return the names in `__all__`, or else the functions and classes without an underscore."""
    tree = source_of(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            return [name for name in names if f"{module}.{name}" not in MODULES]
    definitions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [node.name for node in definitions if not node.name.startswith("_")]


@functools.cache
def reference() -> dict[str, str]:
    """Return where the reference describes a name, for all names that only one module has."""
    places = [(name, f"{module}.{name}") for module in MODULES for name in public_names(module)]
    names = [name for name, _ in places]
    return {name: place for name, place in places if names.count(name) == 1}


def reference_page(module: str) -> str:
    """Return the Markdown that mkdocstrings fills: the module's docstring, and every public name."""
    about = DOCTEST.sub(AS_CODE, ast.get_docstring(source_of(module)) or "")
    return "\n\n".join([f"# `{module}`", about, *(entry(f"{module}.{name}") for name in public_names(module))])


def other_names_page() -> str:
    """Return the page of the public names that no other page has."""
    about = "These names appear in annotations and errors. You need them to write types, or to catch an error."
    paths = [f"{module}.{name}" for module, names in OTHER.items() for name in names]
    return "\n\n".join(["# Other names", about, *map(entry, paths)])


def entry(path: str) -> str:
    """Return the entry of a name: what mkdocstrings writes, where else to look, and the lines that define it."""
    found = definition(path)
    place = f"{Path(str(found.filepath)).relative_to(ROOT).as_posix()}#L{found.lineno}"
    return f"::: {path}\n\n{used_in(path)}{see_also(path)}[Source](../../{place})"


def used_in(path: str) -> str:
    """Return links to the pages whose code, which the tests run, uses a name of the package."""
    links = [f"[{title}](../{page})" for page, (title, names) in names_in_pages().items() if path in names]
    return f"Used in: {', '.join(links[:4])}. " if links else ""


def see_also(path: str) -> str:
    """Return links to the names of the same module whose signature, fields or docstring mention this class."""
    module, _, name = path.rpartition(".")
    if module not in MODULES or not definition(path).is_class:
        return ""
    others = [own for own in public_names(module) if own != name]
    found = [own for own in others if re.search(rf"\b{name}\b", as_text(f"{module}.{own}"))]
    return f"See also: {', '.join(f'[`{own}`][{module}.{own}]' for own in found[:4])}. " if found else ""


@functools.cache
def package() -> griffe.Object:
    """Return the package as griffe reads it, without importing it."""
    loaded = griffe.load("jaxlstm", search_paths=[str(ROOT)], resolve_aliases=True)
    assert isinstance(loaded, griffe.Object)
    return loaded


def definition(path: str) -> griffe.Object:
    """Return what a public name stands for, also if its module imports it from another one."""
    found = package()[path.partition(".")[2]]
    return found.final_target if found.is_alias else found


def as_text(path: str) -> str:
    """Return the docstring of a name with the annotations of its arguments, result or fields."""
    found = definition(path)
    parts = [found.docstring.value if found.docstring else ""]
    if isinstance(found, griffe.Function):
        parts += [str(found.returns), *(str(parameter.annotation) for parameter in found.parameters)]
    if isinstance(found, griffe.Class):
        parts += [str(field.annotation) for field in found.attributes.values()]
    return "\n".join(parts)


def examples_page() -> str:
    """Return the programs in examples/, each with its docstring as text and its code."""
    parts = ["# Examples", "Each program is one file to copy. The tests run all of them."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        question, _, about = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
        code = text.split('"""', 2)[2].strip()
        link = f"[{path.name}](../examples/{path.name}):"
        parts += [f"## {question}", about.strip(), link, f"```python\n{code}\n```"]
    return "\n\n".join(parts)


@functools.cache
def names_in_pages() -> dict[str, tuple[str, set[str]]]:
    """Return the title of every page with code, and the names of the package that its code uses, in full."""
    paths = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))} | {"index.md": ROOT / "README.md"}
    found = {}
    for page, path in paths.items():
        text = path.read_text(encoding="utf-8")
        code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M))
        found[page] = (title_of(text), names_in(code))
    return found


def title_of(text: str) -> str:
    """Return the heading that a page begins with."""
    return text.strip().partition("\n")[0].removeprefix("# ")


def names_in(code: str) -> set[str]:
    """Return every jaxlstm name that the code imports, or reaches as an attribute of an import."""
    nodes = list(ast.walk(ast.parse(code)))
    meaning = {"jaxlstm": "jaxlstm"}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "jaxlstm":
            meaning |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    dotted = (ast.unparse(node).partition(".") for node in nodes if isinstance(node, ast.Attribute))
    return {*meaning.values(), *(f"{meaning[name]}.{rest}" for name, _, rest in dotted if name in meaning)}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give the reference its pages, and forget what an earlier build found."""
    for cached in (names_in_pages, reference, package):
        cached.cache_clear()
    FORMULAS.clear()
    for section in config.nav or []:
        if "Reference" in section:
            section["Reference"] = [{title: f"reference/{module}.md"} for module, title in MODULES.items()]
            section["Reference"].append({"Other names": "reference/other.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, the examples and the reference."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    pages = {f"reference/{module}.md": reference_page(module) for module in MODULES}
    pages |= {"reference/other.md": other_names_page(), "examples.md": examples_page()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        for name, content in notebook_page(notebook).items():
            files.append(File.generated(config, name, content=content))
    return files


def notebook_page(path: Path) -> dict[str, str | bytes]:
    """Return a notebook as a page, and its pictures."""
    resources = {"output_files_dir": f"pictures/{path.stem}"}
    text, found = MarkdownExporter().from_filename(str(path), resources)
    return {f"{path.stem}.md": text.replace("![png]", f"![Output: {title_of(text)}]"), **found["outputs"]}


class AsWritten(griffe.Extension):
    """Keep shapes such as "time *batch" as written; show doctests as code; give each parameter its own line.

    A comment at the end of a field's line becomes its docstring.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring."""
        if obj.docstring:
            text = DOCTEST.sub(AS_CODE, SEVERAL.sub(one_per_line, obj.docstring.value))
            escape = functools.partial(STAR.sub, r"\\*")
            obj.docstring.value = without_code(CODE_BLOCK, functools.partial(without_code, INLINE_CODE, escape), text)

    def on_function_instance(self, *, node: Any, func: griffe.Function, **_: Any) -> None:
        """Change the annotations of a function."""
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]
            for argument in filter(None, arguments):
                func.parameters[argument.arg].annotation = annotation(
                    argument.annotation, func.parameters[argument.arg].annotation
                )
            func.returns = annotation(node.returns, func.returns)

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Change the annotation of an attribute, and describe it."""
        if isinstance(node, ast.AnnAssign):
            attr.annotation = annotation(node.annotation, attr.annotation)
            if attr.docstring is None and (comment := re.search(r"  # (.*)$", attr.source)):
                attr.docstring = griffe.Docstring(comment[1], parent=attr)


def annotation(node: ast.expr | None, parsed: Any) -> Any:
    """Return an annotation as text if it contains a shape, which griffe would read as an expression."""
    shapes = (isinstance(n, ast.Constant) and isinstance(n.value, str) for n in ast.walk(node or ast.Pass()))
    return ast.unparse(node) if node and any(shapes) else parsed


STAR = re.compile(r"(?<=[\[( ])\*(?=\w+[,\])])")  # of a shape: Markdown would take two of them for emphasis
SEVERAL = re.compile(r"^( +)([a-z]\w*(?:, [a-z]\w*)+): (.*(?:\n\1 +.*)*)$", re.M)  # "cell, params: as for `unroll`"


def one_per_line(line: re.Match[str]) -> str:
    """Return a line of a docstring for each parameter."""
    indent, names, about = line.groups()
    return "\n".join(f"{indent}{name}: {about}" for name in names.split(", "))


# Links and formulas.

CODE_BLOCK = re.compile(r"(^ *```.*?^ *```$)", re.S | re.M)
INLINE_CODE = re.compile(r"(`[^`\n]+`)")
LINK, NAME = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)"), re.compile(r"(?<!\[)`(\w+)`(?!\])")
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$`])\$([^$\n]+(?:\n[^$\n]+)?)\$", re.S)
FORMULAS: list[str] = []  # Markdown would break a paragraph at MathML: marks stand for it until the page is HTML


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, names and formulas for the site."""
    here = page.file.src_uri
    at = next((source for source, own in PAGES.items() if own == here), f"docs/{here}")
    linked: set[str] = set()

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or ":" in target:
            return match[0]
        where = site_place(normpath(str(PurePosixPath(at).parent / target)), files, config)
        if ":" not in where:
            where = relpath(where, str(PurePosixPath(here).parent))
        return f"{match[1]}({where}{'#' + anchor if anchor else ''})"

    def name(match: re.Match[str]) -> str:
        """Link a public name to the reference where a page uses it first."""
        if match[1] not in reference() or match[1] in linked or here.startswith("reference/"):
            return match[0]
        linked.add(match[1])
        return f"[{match[0]}][{reference()[match[1]]}]"

    def prose(text: str) -> str:
        text = without_code(INLINE_CODE, functools.partial(FORMULA.sub, formula), text)
        return LINK.sub(link, NAME.sub(name, text))

    return without_code(CODE_BLOCK, prose, markdown)


def without_code(code: re.Pattern[str], change: Callable[[str], str], text: str) -> str:
    """Change a text between its pieces of code."""
    return "".join(part if n % 2 else change(part) for n, part in enumerate(code.split(text)))


def formula(match: re.Match[str]) -> str:
    """Keep a formula as MathML and return its mark; a tag such as (1) stands at its right."""
    text, _, tag = (match[1] or match[2]).partition(r"\tag{")
    display = "block" if match[1] else "inline"
    shown = convert(text.strip(), display=display)
    if display == "block":
        number = f'<span class="tag">({tag.strip("} ")})</span>' if tag else ""
        shown = f'<div class="formula">{shown}{number}</div>'
    FORMULAS.append(shown)
    mark = f"formula{len(FORMULAS) - 1}{display}"
    return f"\n\n{mark}\n\n" if display == "block" else mark


def on_page_content(html: str, **_: Any) -> str:
    """Put the formulas in place of their marks."""
    html = re.sub(r"<p>(formula\d+block)</p>", r"\1", html)
    return re.sub(r"formula(\d+)(?:block|inline)", lambda mark: FORMULAS[int(mark[1])], html)


def site_place(path: str, files: Files, config: MkDocsConfig) -> str:
    """Return where the site shows a file of the repository: a page, a picture, or the repository itself."""
    if path in PAGES:
        return PAGES[path]
    if path.endswith(".ipynb"):
        path = path.replace(".ipynb", ".md")
    if path.startswith("docs/") and files.get_file_from_path(path.removeprefix("docs/")):
        return path.removeprefix("docs/")
    if path.endswith((".png", ".svg")):
        place = f"pictures/{path}"
        if not files.get_file_from_path(place):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        return place
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{config.extra['source']}/{kind}/main/{path}"
