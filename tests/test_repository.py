"""What the repository promises about itself: docstrings, exports, links, versions, sizes."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import trimserve

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for path in (ROOT / "trimserve").rglob("*.py") if path.parent.name != "v1")
IGNORED = {"build", "out", "runs"}
DOCUMENTS = [
    path
    for path in ROOT.rglob("*.md")
    if not any(part in IGNORED or part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def module_name(path: Path) -> str:
    """`trimserve/ops/__init__.py` -> `trimserve.ops`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_public_definitions_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if path.stat().st_size:
        assert ast.get_docstring(tree), path
    outer: list[ast.Module | ast.ClassDef] = [
        tree,
        *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"),
    ]
    for parent in outer:
        for node in parent.body:
            if isinstance(node, definitions) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_all_names_exist_and_public_definitions_are_in_all(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    exported = getattr(module, "__all__", [])
    for name in exported:
        assert hasattr(module, name), name
    defined = [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    ]
    assert set(defined) <= set(exported)


def test_the_newest_changelog_entry_is_this_version() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == trimserve.__version__


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_at_most_120_columns_wide(path: Path) -> None:
    written = re.sub(r"^(<!-- generated.*?<!-- end -->|```.*?^```|\|.*?)$", "", path.read_text(), flags=re.M | re.S)
    assert not [line for line in written.splitlines() if len(line) > 120]


def test_what_silences_a_checker_says_why_on_its_line() -> None:
    silenced = re.compile(r"(# noqa(: [A-Z0-9, ]+)?|# type: ignore(\[[a-z, -]+\])?|NOLINT\S*|clang-format off)$", re.M)
    for folder in ("benchmarks", "csrc", "examples", "scripts", "tests", "training", "trimserve"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu"} and path.parent.name != "v1":
                assert not silenced.search(path.read_text()), path


def test_lines_of_kernels_are_at_most_120_columns_wide() -> None:
    for path in [*ROOT.glob("csrc/**/*"), *ROOT.glob("tests/csrc/fibers/*")]:
        if path.suffix in {".cpp", ".h", ".cu"}:
            assert not [line for line in path.read_text().splitlines() if len(line) > 120], path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_every_adr_that_code_cites_exists() -> None:
    numbers = {path.name[:4] for path in (ROOT / "docs/adr").glob("*.md")}
    for source in [*ROOT.glob("trimserve/**/*.py"), *ROOT.glob("csrc/**/*"), *ROOT.glob("docs/*.md")]:
        if source.is_file():
            cited = set(re.findall(r"ADR-(\d{4})", source.read_text()))
            assert cited <= numbers, source


def test_adrs_are_short() -> None:
    for path in (ROOT / "docs/adr").glob("[0-9]*.md"):
        assert len(path.read_text().splitlines()) <= 40, path


def test_source_files_stay_small() -> None:
    for pattern in (
        "trimserve/**/*.py",
        "csrc/**/*",
        "training/*.py",
        "scripts/**/*.*",
        "benchmarks/*.py",
        "tests/**/*.py",
    ):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.parent.name != "v1" and path.suffix in {".py", ".sh", ".cpp", ".h", ".cu"}:
                assert len(path.read_text().splitlines()) <= 400, path
