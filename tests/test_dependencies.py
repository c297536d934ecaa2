"""What is installed is what was locked, and what is used is what is asked for."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from scripts.generate.lock import FILES, ROOT, pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("trimserve", "training", "tests", "benchmarks", "scripts")
DISTRIBUTIONS = packages_distributions()


def canonical(requirement: str) -> str:
    """`PyYAML==6.0.3` -> `pyyaml`."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def imported(path: Path) -> Iterator[str]:
    """Top-level modules that a file imports, of other people's distributions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            module = name.partition(".")[0]
            if module not in sys.stdlib_module_names and module not in FOLDERS:
                yield module


def used(folder: str) -> dict[str, Path]:
    """Distributions that the files of a folder import, each with a file that does.

    A script that names its own dependencies (PEP 723) runs in an environment of its own.
    """
    return {
        canonical(distribution): path
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "# /// script\n" not in path.read_text()
        for module in imported(path)
        for distribution in DISTRIBUTIONS.get(module, [module])
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_whatever_is_imported_is_locked(folder: str) -> None:
    files = ("dev.txt", "fuzz.txt", "meta.txt", "playground.txt", "ray.txt")
    locked = {"torch"}.union(*(pins(file) for file in files))
    missing = {name: path for name, path in used(folder).items() if name not in locked}
    assert not missing, "add it to pyproject.toml and run `make lock`"


def test_whatever_the_package_imports_is_asked_for() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = {canonical(each) for each in [*PROJECT["project"]["dependencies"], *(e for extra in extras for e in extra)]}
    # Namespaces that several distributions share: one of them is enough.
    shared = {canonical(each) for module in ("google", "opentelemetry") for each in DISTRIBUTIONS[module]}
    assert not used("trimserve").keys() - asked - shared


@pytest.mark.parametrize("name", FILES)
def test_every_locked_release_has_hashes(name: str) -> None:
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements" / name).read_text())
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)


@pytest.mark.parametrize("name", FILES)
def test_no_lock_brings_torch_or_cuda(name: str) -> None:
    allowed = {"nvidia-cuda-nvdisasm"}  # a program that reads what the compiler made, and brings nothing else
    cuda = {each for each in pins(name) if each in {"torch", "triton"} or each.startswith("nvidia-")}
    assert cuda <= allowed


@pytest.mark.parametrize("name", ["serve.txt", "build.txt"])
def test_images_get_the_releases_that_are_tested(name: str) -> None:
    tested = pins("dev.txt")
    assert all(tested[each] == versions for each, versions in pins(name).items())


def test_the_build_needs_the_locked_tools() -> None:
    assert PROJECT["build-system"]["requires"] == PROJECT["dependency-groups"]["build"]
