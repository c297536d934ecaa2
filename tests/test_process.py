"""A server in a process of its own: found, read, drained; or what it said when it could not be had."""

import os
import signal
from pathlib import Path

import pytest

from trimserve.client import Client
from trimserve.model.loading import embedded_model_folder
from trimserve.process import ServerFailed, server_process


def test_a_server_is_asked_read_and_drained(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    options = ("--model", str(embedded_model_folder()), "--num-threads", "1")
    with server_process(*options, log=log) as server, Client(server.address) as client:
        assert client.status().is_ready
        assert server.metrics()["trimserve_model_ready"] == 1
    assert "stopped" in log.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(ServerFailed, match=r"ended with status 1: (?s:.*)no-such-model"),
        server_process("--model", "./no-such-model"),
    ):
        pytest.fail("it must not serve")


def test_a_server_that_is_killed_in_the_block_is_told_at_its_end() -> None:
    with pytest.raises(ServerFailed, match="ended with status -9"), server_process("--num-threads", "1") as server:
        os.kill(server.pid, signal.SIGKILL)
