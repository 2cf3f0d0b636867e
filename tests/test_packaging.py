"""What is built from the sources: the wheel has what a user needs, the source distribution what its own tests need."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
RELATIVE_LINK = re.compile(r"\]\((?!https?://)")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths of the wheel and the source distribution, built without network."""
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            raise PackageNotFoundError
    except PackageNotFoundError:
        pytest.skip("needs setuptools 77 or newer")
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    command = [sys.executable, "setup.py", "-q", "sdist", "bdist_wheel"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[0]) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return wheel.read(name).decode()


def test_source_distribution_has_every_file_that_tests_scripts_and_documents_need(built):
    with tarfile.open(built[1]) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("benchmarks", "examples", "generation", "model_cards", "modeling_diffusiongemma", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [*ROOT.glob("*.md"), *ROOT.glob("requirements*.txt"), ROOT / "Makefile", ROOT / "LICENSE", ROOT / "pyproject.toml"]
    assert {path.relative_to(ROOT).as_posix() for path in files} - there == set()
    assert not [name for name in there if "__pycache__" in name or name.endswith(".pyc")]


def test_wheel_has_the_packages_the_checkpoints_and_their_cards(wheel):
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"generation", "modeling_diffusiongemma"}
    sources = [path for package in ("generation", "modeling_diffusiongemma") for path in (ROOT / package).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in sources} - names == set()
    for checkpoint in (ROOT / "modeling_diffusiongemma" / "checkpoints").iterdir():
        folder = checkpoint.relative_to(ROOT).as_posix()
        assert {f"{folder}/{file.name}" for file in checkpoint.iterdir()} | {f"{folder}/README.md"} <= names
        card = wheel.read(f"{folder}/README.md").decode()
        assert card.lower().startswith(f"# the {checkpoint.name} checkpoint") and not RELATIVE_LINK.search(card)


def test_package_page_has_no_link_to_a_file_that_is_not_there(metadata):
    page = metadata.split("\n\n", 1)[1]
    assert "# DiffusionGemma for Transformers" in page and "](https://" in page
    assert not RELATIVE_LINK.search(page)


def test_supported_versions_are_the_same_everywhere(metadata):
    """The README, the metadata and the oldest environment that is tested say one thing."""
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    bounds = {one.name: one.specifier for one in required if one.marker is None}
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("torch", "transformers"):
        lowest, newest = re.search(rf"{name} (\d+\.\d+) to (\d+\.\d+)", said).groups()
        major, minor = newest.split(".")
        assert bounds[name].contains(lowest) and bounds[name].contains(f"{newest}.9")
        assert not bounds[name].contains(f"{major}.{int(minor) + 1}")
    pythons = re.findall(r"^Classifier: Programming Language :: Python :: (3\.\d+)$", metadata, re.MULTILINE)
    assert re.search(r"Python (3\.\d+) to (3\.\d+)", said).groups() == (pythons[0], pythons[-1])
    assert f"Requires-Python: >={pythons[0]}\n" in metadata
