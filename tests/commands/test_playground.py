"""`trimserve playground` where Gradio is not; `make verify-playground` uses the page itself."""

import sys

import pytest
from typer.testing import CliRunner

from trimserve.cli import app


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["playground", "--address", "127.0.0.1:1"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "pip install 'trimserve[playground]'" in result.output
