"""The documentation site: built with every warning an error, complete, and looked at in a browser if there is one."""

import ast
import functools
import html as html_module
import http.server
import importlib
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs the extra docs")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import site_pages  # noqa: E402
import test_architecture  # noqa: E402

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = built.stdout + built.stderr
    assert built.returncode == 0 and not re.search(r"^(WARNING|ERROR)", output, re.M), output
    return folder


def addresses(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html") if path.name != "404.html")


@pytest.mark.parametrize("module", site_pages.MODULES)
def test_every_public_name_has_an_entry_in_the_reference(module, site):
    page = (site / "reference" / f"{module}.html").read_text(encoding="utf-8")
    known = importlib.import_module(module)
    own = getattr(known, "__all__", None) or [
        name for name, value in vars(known).items() if getattr(value, "__module__", "") == module and name[0] != "_"
    ]
    for name in own:
        if f"{module}.{name}" not in site_pages.MODULES:
            assert f'id="{module}.{name}"' in page, name


@pytest.mark.parametrize("module", site_pages.MODULES)
def test_every_public_name_has_an_example(module):
    """In its docstring or on a page; a class of results or parameters also where another name uses it."""
    for name in site_pages.public_names(module):
        path = f"{module}.{name}"
        about = site_pages.definition(path).docstring
        found = (about and ">>> " in about.value) or site_pages.used_in(path) or site_pages.see_also(path)
        assert found or name in ("COLORS", "MARKERS"), name


def test_all_public_modules_and_names_are_in_the_reference(site):
    rooms = {f"jaxlstm.{room}" for room in test_architecture.ROOMS}
    assert site_pages.MODULES.keys() == {"jaxlstm", "jaxlstm.bptt"} | rooms | test_architecture.ADAPTERS
    page = (site / "reference" / "other.html").read_text(encoding="utf-8")
    for module, names in site_pages.OTHER.items():
        assert all(f'id="{module}.{name}"' in page for name in names)


def test_every_entry_of_the_reference_links_to_the_lines_that_define_it(site):
    for path in sorted((site / "reference").glob("*.html")):
        html = path.read_text(encoding="utf-8")
        links = re.findall(r'href="https://github.com/jaxlstm/jaxlstm/blob/main/([^"#]+)#L(\d+)">Source', html)
        names = re.findall(r'<h2 id="(jaxlstm\.[\w.]+)"', html)
        assert len(names) == len(links) > 0
        for name, (file, line) in zip(names, links, strict=True):
            text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
            assert re.search(rf"\b{name.rpartition('.')[2]}\b|^@", text), (name, text)


def test_the_examples_are_whole(site):
    html = (site / "examples.html").read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").glob("*.py")):
        question = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n")[0]
        assert question in html_module.unescape(html) and f"examples/{path.name}" in html
    assert html.count("__main__") == len(list((ROOT / "examples").glob("*.py")))


def test_fields_and_calls_are_described_as_their_source_does(site):
    page = (site / "reference" / "jaxlstm.diagnostics.html").read_text(encoding="utf-8")
    assert "<p>[*points, n]: −1 / ln|λ| steps; negative where a direction is unstable</p>" in page
    page = (site / "reference" / "jaxlstm.adapters.nnx.html").read_text(encoding="utf-8")
    assert 'id="jaxlstm.adapters.nnx.Recurrent.__call__"' in page and "__post_init__" not in page
    assert "[*batch, time, features], or [time, *batch, features] if" in page
    assert "units of each layer, and of each direction" in page, "of __init__"


def test_only_names_of_the_package_count_as_used():
    code = """import equinox as eqx, flax
from jaxlstm import LSTM, initializers as init
from jaxlstm.adapters import nnx
eqx.nn.LSTMCell; init.torch; flax.nnx.GRUCell; nnx.Recurrent(5); jaxlstm.variants.SLSTM; LSTM.init
"""
    found = site_pages.names_in(code)
    wanted = {"LSTM", "initializers.torch", "adapters.nnx.Recurrent", "variants.SLSTM"}
    assert {f"jaxlstm.{name}" for name in wanted} <= found
    assert not any(name.endswith(("LSTMCell", "GRUCell", "initializers.flax")) for name in found)


@pytest.mark.parametrize("page", ["flax.md", "benchmark.md", "coming-from-keras.md", "weights.md"])
def test_names_of_other_libraries_do_not_link_to_the_reference(page, site):
    html = (site / page.replace(".md", ".html")).read_text(encoding="utf-8")
    for name in ("Bidirectional", "OptimizedLSTMCell", "RNN"):
        foreign = re.findall(rf"(\S+ +(?:<[^>]*>)*)<a [^>]*><code>{name}</code></a>", html)
        assert not any(word.startswith(("Flax", "linen", "Keras")) for word in foreign), foreign


def test_every_formula_is_drawn(site):
    pages = {address: (site / address).read_text(encoding="utf-8") for address in addresses(site)}
    assert not any(re.search(r"formula\d+(block|inline)", html) for html in pages.values())
    source = re.sub("```.*?```", "", (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8"), flags=re.S)
    assert pages["derivation.html"].count("<math") == len(re.findall(r"\$+", source)) / 2 > 50


def test_links_out_of_the_docs_lead_to_files_of_the_repository(site):
    source = "https://github.com/jaxlstm/jaxlstm/"
    found = set()
    for address in addresses(site):
        found |= set(re.findall(rf'href="{source}(?:blob|tree)/main/([^"#]+)', (site / address).read_text("utf-8")))
    assert len(found) > 20
    assert all((ROOT / path).exists() for path in found), sorted(found)


# In a browser.


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    """Start headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("the browser test needs Chromium; on Debian: apt-get install chromium")
    with api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def base(site):
    """Serve the site on this machine."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


WIDTH_AND_PICTURES = """() => ({
    wider: document.documentElement.scrollWidth - window.innerWidth,
    missing: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    background: getComputedStyle(document.body).backgroundColor,
    formulas: [...document.querySelectorAll("math")].map(math => math.getBoundingClientRect().height),
})"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_in_a_browser(width, scheme, browser, base, site):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    # The search may still load when we leave a page, which aborts it.
    page.on("requestfailed", lambda request: request.failure != "net::ERR_ABORTED" and complaints.append(request.url))
    page.on("request", lambda request: request.url.startswith(base) or complaints.append(request.url))
    page.on("response", lambda response: response.status >= 400 and complaints.append(response.url))
    wanted = addresses(site)
    assert len(wanted) > 40
    for address in wanted:
        page.goto(base + address)
        found = page.evaluate(WIDTH_AND_PICTURES)
        assert not complaints, (address, complaints)
        assert found["wider"] <= 0 and not found["missing"], (address, found)
        light = sum(map(int, re.findall(r"\d+", found["background"])[:3])) > 3 * 128
        assert light == (scheme == "light"), (address, found["background"])
        assert min(found["formulas"], default=9) > 5, address
        if address == "derivation.html":
            assert len(found["formulas"]) > 50
            text = page.inner_text("article")
            assert not re.search(r"\$|formula\d+(block|inline)", text.partition("import jax")[0])
    context.close()


def test_the_search_finds_unroll(browser, base):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(base + "index.html", wait_until="networkidle")
    page.click("input.md-search__input")
    page.keyboard.type("unroll")
    page.wait_for_selector(".md-search-result__link", timeout=20_000)
    links = page.eval_on_selector_all(".md-search-result__link", "links => links.map(link => link.href)")
    assert any("reference/jaxlstm.html" in link for link in links[:5]), links[:5]
    page.close()
