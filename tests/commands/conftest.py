"""A server whose engine is a script, for commands that ask one."""

from collections.abc import Iterator

import pytest

from tests.server.fakes import CONFIG, FakeRunner
from trimserve.serve import make_server
from trimserve.server.running import InProcessServer


@pytest.fixture
def runner() -> FakeRunner:
    """Remembers what it was asked."""
    return FakeRunner()


@pytest.fixture
def address(runner: FakeRunner) -> Iterator[str]:
    """Of its server."""
    with InProcessServer(make_server(runner, CONFIG)) as server:
        yield server.address
