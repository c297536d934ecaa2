"""A server around a fake runner with both doors open, and an `openai` client of its HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.patience import PATIENCE_SECONDS
from tests.server.fakes import CONFIG, FakeRunner
from trimserve.config import Config, ServerConfig
from trimserve.serve import make_server
from trimserve.server.lifecycle import Server
from trimserve.server.running import running_server

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@dataclass
class Door:
    """Both ends of the HTTP door."""

    runner: FakeRunner
    server: Server
    client: AsyncOpenAI

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        assert self.server.http_address is not None
        host, _, port = self.server.http_address.rpartition(":")
        return host, int(port)


@asynccontextmanager
async def open_door(runner: FakeRunner | None = None, *, token: str = "none", **knobs: object) -> AsyncIterator[Door]:
    """A server with knobs of its own."""
    settings = {"port": 0, "http_port": 0, "metrics_port": 0, **knobs}
    config = Config(engine=CONFIG.engine, server=ServerConfig.model_validate(settings))
    runner = runner or FakeRunner()
    async with running_server(make_server(runner, config)) as server:
        url = f"http://{server.http_address}/v1"
        async with AsyncOpenAI(base_url=url, api_key=token, max_retries=0, timeout=PATIENCE_SECONDS) as client:
            yield Door(runner, server, client)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as each:
        yield each


async def ask(door: Door, **fields: Any) -> Any:
    """A whole answer."""
    asked: Any = {"model": "fake", "messages": HELLO, **fields}
    return await door.client.chat.completions.create(**asked)
