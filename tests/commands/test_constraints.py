"""`trimserve generate` asks for answers of a form."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.server.fakes import FakeRunner
from trimserve.api.constraint import Choice, Constraint, JsonSchema, Regex
from trimserve.cli import app


@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        (["--json-schema", "schema.json"], JsonSchema('{"type": "object"}')),
        (["--regex", "a+"], Regex("a+")),
        (["--choice", "yes", "--choice", "no"], Choice(("yes", "no"))),
        ([], None),
    ],
)
def test_an_option_becomes_a_constraint(
    runner: FakeRunner,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    constraint: Constraint | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    done = CliRunner().invoke(app, ["generate", "--prompt", "Hi", "--address", address, *options])
    assert done.exit_code == 0, done.output
    assert [request.constraint for request in runner.requests] == [constraint]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--regex", "a", "--choice", "b"], "--regex and --choice exclude each other"),
        (["--json-schema", "missing.json"], "missing.json: No such file"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["generate", "--prompt", "Hi", "--address", "localhost:1", *options])
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())
