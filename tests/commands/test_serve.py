"""`trimserve serve`: its knobs, what it refuses before it listens, and signals while it loads."""

import io
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.forked import forked
from trimserve.cli import app
from trimserve.config import Config
from trimserve.server import logs, running
from trimserve.server.lifecycle import Server
from trimserve.server.queued_log import QueuedHandler


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs of servers that `serve` would have run; it configures no logging."""
    configs: list[Config] = []
    monkeypatch.setattr(logs, "configure_logging", lambda *_: QueuedHandler(io.StringIO(), lambda _: None))

    async def remember(server: Server, **_: object) -> None:
        configs.append(server.config)

    monkeypatch.setattr(running, "serve", remember)
    return configs


def test_serve_takes_its_knobs_from_options_then_from_variables(
    served: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMSERVE_PORT", "tcp://10.0.0.1:50051")  # from Kubernetes, for a service named trimserve
    monkeypatch.setenv("TRIMSERVE__ENGINE__MAX_BATCH", "3")
    monkeypatch.setenv("TRIMSERVE__ENGINE__MAX_QUEUE", "4")
    CliRunner().invoke(app, ["serve", "--max-queue", "5"], catch_exceptions=False)
    [config] = served
    assert (config.engine.max_batch, config.engine.max_queue, config.server.port) == (3, 5, 50051)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("TRIMSERVE__ENGINE__MAX_BATHC", "; did you mean TRIMSERVE__ENGINE__MAX_BATCH?"),
        ("trimserve__engine__max_batch", "; did you mean TRIMSERVE__ENGINE__MAX_BATCH?"),
        ("TRIMSERVE__ENGINE__PORT", "; did you mean TRIMSERVE__SERVER__PORT?"),
        ("TRIMSERVE__X", ""),
    ],
)
def test_a_variable_that_looks_like_a_knob_but_is_none_is_refused(
    served: list[Config], monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "3")
    for command in ("serve", "info"):  # whatever section it would be of
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command])
        assert result.exit_code == 2
        assert f"the environment has {variable}, which is no knob{meant}" in result.output
    assert not served


def test_serve_refuses_a_checkpoint_before_anything_listens(served: list[Config], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path)])
    assert "config.json" in str(result.exception)
    assert not served


SIGTERM_WHILE_LOADING = """
import os, signal, sys, threading
import torch
import trimserve.serve
from trimserve.cli import main

def load(*_):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while True:  # in compiled code nearly always, as a load is
        torch.ones(256, 256) @ torch.ones(256, 256)

trimserve.serve.load_model = load
sys.argv = ["trimserve", "serve", "--port", "0", "--metrics-port", "0"]
main()
"""


def test_serve_ends_cleanly_when_a_signal_comes_while_its_model_loads() -> None:
    with forked(SIGTERM_WHILE_LOADING, stderr=subprocess.PIPE) as process:
        errors = process.rest()
    assert process.returncode == 0, errors
