"""What README and docs show runs: Python blocks, doctests, commands and flags."""

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import typer

from tests.test_repository import MODULES, ROOT, module_name
from trimserve.cli import app
from trimserve.errors import CannotListen, CheckpointError, CredentialsError
from trimserve.serve import in_process_server
from trimserve.server.grpc.services import RPCS
from trimserve.server.grpc.statuses import STATUS
from trimserve.server.metrics import Metrics
from trimserve.server.running import InProcessServer
from trimserve.trimming.policies.table import POLICIES

README = (ROOT / "README.md").read_text()
CORRECTNESS = (ROOT / "docs/correctness.md").read_text()
ALGORITHMS = (ROOT / "docs/algorithms.md").read_text()
COMMANDS = [
    command
    for document in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    for command in re.findall(r"^\$ (.+?)(?:\s+#.*)?$", document.read_text(), re.MULTILINE)
]

OTHER_PROGRAMS = ("buf", "cd", "curl", "docker", "grype", "guidellm", "kubectl", "node", "printf", "python", "token=")
"""Of commands that scripts/verify/ runs, or people."""


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    """Of the embedded model, with HTTP."""
    with in_process_server(with_http=True) as server:
        yield server


@pytest.mark.parametrize("document", ["README.md", "docs/api.md", "docs/http.md"])
def test_python_examples_run(document: str, server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(ROOT)
    for block in blocks:
        program = block.replace("127.0.0.1:50051", server.address).replace("127.0.0.1:8000", str(server.http_address))
        program = program.replace("photo.jpg", "trimserve/assets/samples/scene.png")
        exec(compile(program, document, "exec"), {})


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_doctests_pass(path: Path) -> None:
    assert doctest.testmod(importlib.import_module(module_name(path))).failed == 0


def help_of_benchmark(module: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `python -m MODULE --help` prints."""
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with redirect_stdout(StringIO()) as said, pytest.raises(SystemExit):
        importlib.import_module(module).main()
    return said.getvalue()


def test_commands_name_real_targets_programs_subcommands_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    group = typer.main.get_command(app)
    checked = set()
    for command in COMMANDS:
        program, *words = re.sub(r"^[A-Z_]+=\S+ ", "", command).split()  # without a variable that is set for it
        match program.rpartition("/")[2], *words:
            case "make", target:
                assert target in targets, command
            case "python", "-m", str(module), *flags if module.startswith("benchmarks."):
                known = set(re.findall(r"--[a-z-]+", help_of_benchmark(module, monkeypatch)))
                assert {flag for flag in flags if flag.startswith("--")} <= known, command
            case "trimserve", subcommand, *words:
                known = {name for parameter in group.commands[subcommand].params for name in parameter.opts}  # type: ignore[attr-defined]  # a group
                assert {word for word in words if word.startswith("--")} <= known, command
            case _:
                assert program.startswith(OTHER_PROGRAMS), command
                continue
        checked.add(command)
    assert len(checked) >= 12


def test_flags_in_readmes_prose_exist() -> None:
    group = typer.main.get_command(app)
    commands = [group, *group.commands.values()]  # type: ignore[attr-defined]  # a group
    known = {name for command in commands for parameter in command.params for name in parameter.opts}
    for flag in re.findall(r"`(?:trimserve )?(--[a-z-]+)", README):
        assert flag in known, flag


def test_every_defect_in_the_list_has_a_test_that_exists() -> None:
    written = re.sub(r"<!-- generated.*?<!-- end -->", "", CORRECTNESS, flags=re.DOTALL)
    rows = [line for line in written.splitlines() if line.startswith("|") and not line.startswith("|---")]
    cited = [re.findall(r"`(tests/[^\s`]+\.py)::(test_\w+)`", row) for row in rows]
    assert [row for row, tests in zip(rows, cited, strict=True) if not tests] == [
        row for row in rows if row.startswith(("| Defect |", "| What happens |"))
    ]
    for file, name in {test for tests in cited for test in tests}:
        assert name in defined(file), f"{file}::{name}"


def test_every_point_of_the_service_has_tests_that_exist() -> None:
    text = (ROOT / "docs/service.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(number) for number, *_ in rows] == list(range(1, 25))
    assert all("::" in tests for *_, tests in rows)
    for path, name in re.findall(r"`(tests/\S+\.py)::(\w+)`", text):
        assert name in defined(path), f"{path}::{name}"


def test_every_bound_on_callers_has_tests_metrics_and_knobs_that_exist() -> None:
    taken = (ROOT / "docs/security.md").read_text().partition("## What a caller can take")[2]
    rows = [line for line in taken.splitlines() if re.match(r"\| (?!---|resource \||\| attack|found \|)", line)]
    assert len(rows) >= 20
    for row in rows:
        cited = re.findall(r"`(tests/\S+\.py)::(\w+)`", row)
        assert cited, row
        for path, name in cited:
            assert name in defined(path), f"{path}::{name}"
    declared = {metric.name for metric in Metrics(POLICIES, RPCS).declared}
    assert set(re.findall(r"`((?:trimserve|grpc_server)_\w+)`", taken)) <= declared


def test_every_reason_that_a_caller_may_get_is_explained_with_its_status() -> None:
    rows = set(re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|", (ROOT / "docs/api.md").read_text(), re.MULTILINE))
    at_start = {CheckpointError, CredentialsError, CannotListen}
    assert {(code.name, error.reason) for error, code in STATUS.items() if error not in at_start} <= rows


def test_every_kind_of_checkpoint_has_a_test_that_exists() -> None:
    text = (ROOT / "docs/checkpoints.md").read_text()
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| **", "| A checkpoint"))
    ]
    assert len(rows) > 40
    for row in rows:
        (file, name, case), *others = re.findall(r"`(tests/\S+\.py)::(\w+)`(?: \"([^\"]+)\")? \|$", row)
        assert not others, row
        assert name in defined(file), row
        fixtures = {fixture.stem for fixture in (ROOT / file).parent.glob("quantized/*.safetensors")}
        assert not case or case in fixtures or f'    "{case}": ' in (ROOT / file).read_text(), row


def defined(file: str) -> set[str]:
    """Functions and classes at the top of a file of the repository."""
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, definitions)}


def test_every_policy_has_a_source_a_formula_code_and_a_test_that_exists() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| `([^`]+):(\w+)` \| `tests/", ALGORITHMS, re.MULTILINE)
    assert [(name, symbol) for name, *_, symbol in rows] == [(name, each.__name__) for name, each in POLICIES.items()]
    for name, _, _, file, _ in rows:
        assert importlib.import_module(module_name(ROOT / file)).__name__ == POLICIES[name].__module__
    for file, symbol in re.findall(r"`((?:trimserve|tests)/[^\s`]+\.py)::?(\w+)`", ALGORITHMS):
        assert symbol in defined(file), f"{file}:{symbol}"
