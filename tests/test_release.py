"""The package that a release uploads: its files, its metadata, and that it works outside the repository."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import jaxlstm

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.ci


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the wheel and the sdist with hatchling."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_package_and_nothing_else(built):
    files = zipfile.ZipFile(built[0]).namelist()
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jaxlstm").rglob("*.py")} | {"jaxlstm/py.typed"}
    assert {name for name in files if ".dist-info/" not in name} == own


def test_the_source_archive_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not any(name.split("/")[1] in ("tests", "experiments", "docs") for name in names if "/" in name)
    run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=source)
    (again,) = (tmp_path / "again").glob("*.whl")
    first, second = zipfile.ZipFile(built[0]), zipfile.ZipFile(again)
    assert first.namelist() == second.namelist()
    assert all(first.read(name) == second.read(name) for name in first.namelist() if not name.endswith("RECORD"))


def test_the_metadata_are_complete(built):
    run("-m", "twine", "check", "--strict", *built)
    archive = zipfile.ZipFile(built[0])
    (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_string(archive.read(path).decode())
    assert metadata["Version"] == jaxlstm.__version__
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL")} == {"Source", "Issues", "Changelog"}
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in metadata.get_all("Classifier")
    readme = metadata.get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(targets) > 30 and all(target.startswith(("https://", "#")) for target in targets)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
    assert pictures and all("/raw/main/" in picture for picture in pictures)
    own = [re.split("/(?:raw|blob)/main/", target)[1] for target in targets if "/main/" in target]
    assert len(own) > 30 and all((ROOT / path.partition("#")[0]).exists() for path in own)


def test_the_lowest_versions_are_those_of_the_metadata():
    sys.path.insert(0, str(ROOT / "tools"))
    import lowest

    found = lowest.constraints((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"jax==0.10.2", "numpy==2.4", "onnxruntime==1.20", "matplotlib==3.10.8"} <= set(found)
    example = """[project]
dependencies = ["a[x]>=1.2"]
[project.optional-dependencies]
plots = ["c-d>=3"]
experiments = ["jaxlstm[plots]"]
export = []
onnx = []
safetensors = []
test = ["e>=4"]
"""
    assert lowest.constraints(example) == ["a==1.2", "c-d==3"]
    with pytest.raises(ValueError, match=r"needs a lower bound, name>=version, got \['c-d~=3'\]"):
        lowest.constraints(example.replace("c-d>=3", "c-d~=3"))


def test_the_version_and_its_date_are_the_same_everywhere():
    newest = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None and newest[1] == jaxlstm.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {newest[1]}\ndate-released: {newest[2]}\n" in citation


def test_the_wheel_works_outside_the_repository(built, tmp_path):
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "lib", built[0])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "PYTHONSAFEPATH": "1"}
    where = run("-c", "import jaxlstm; print(jaxlstm.__file__)", cwd=tmp_path, env=environment)
    assert Path(where.strip()).is_relative_to(tmp_path)
    checked = run("-m", "jaxlstm", cwd=tmp_path, env=environment)
    assert checked.rstrip().endswith("AGREE") and f"jaxlstm {jaxlstm.__version__}" in checked
