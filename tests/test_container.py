"""What can be told of the image without building it; scripts/verify/image.sh builds it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.server.fakes import CONFIG, FakeRunner
from tests.test_repository import ROOT
from trimserve.config import ServerConfig
from trimserve.serve import make_server
from trimserve.server.running import InProcessServer

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
VARIABLES = {name.lower(): value for name, value in re.findall(r"TRIMSERVE__SERVER__(\w+)=(\S+)", DOCKERFILE)}
"""Of the server, by knob."""


@pytest.fixture
def metrics_port() -> Iterator[str]:
    """Of a server that takes requests, until the test is over."""
    with InProcessServer(make_server(FakeRunner(), CONFIG)) as server:
        assert server.metrics_address is not None
        yield server.metrics_address.rpartition(":")[2]


def health(port: str) -> subprocess.CompletedProcess[str]:
    """Run the image's health check."""
    environment = {"TRIMSERVE__SERVER__METRICS_PORT": port, "http_proxy": "http://127.0.0.1:1"}
    command: list[str | Path] = [sys.executable, ROOT / "docker/healthcheck.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_serving_server_is_healthy_whatever_the_proxy(metrics_port: str) -> None:
    done = health(metrics_port)
    assert done.returncode == 0, done.stderr


def test_an_absent_server_is_unhealthy_in_one_line() -> None:
    done = health("1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_the_image_has_the_makefiles_torch() -> None:
    for name, value in re.findall(r"^(TORCH\w*) \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert f"ARG {name}={value}\n" in DOCKERFILE.replace("$DEVICE", "cpu")


def test_its_variables_are_knobs_and_its_ports_their_defaults() -> None:
    config = ServerConfig.model_validate({**VARIABLES, "allow_plaintext": True})
    defaults = ServerConfig()
    assert (config.port, config.metrics_port) == (defaults.port, defaults.metrics_port)
    assert f"EXPOSE {config.port} {config.metrics_port}\n" in DOCKERFILE


def test_it_starts_neither_without_a_certificate_nor_without_a_word_for_plaintext() -> None:
    with pytest.raises(ValidationError, match="allow_plaintext"):
        ServerConfig.model_validate(VARIABLES)
