"""HTTP by hand, for what no client library would send."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.patience import soon

HELLO = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}).encode()


@dataclass
class Raw:
    """A connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, body: bytes, *headers: str, length: int | None = None) -> None:
        """Send a request for a chat completion."""
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            "host: x",
            f"content-length: {len(body) if length is None else length}",
        ]
        if not any(header.startswith("content-type") for header in headers):
            lines.append("content-type: application/json")
        self.send("\r\n".join([*lines, *headers, "", ""]).encode() + body)

    async def answer(self) -> tuple[int, Any]:
        """Status and content of the next answer."""
        head = (await soon(self.reader.readuntil(b"\r\n\r\n"))).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return int(head.split()[1]), json.loads(await soon(self.reader.readexactly(length)))

    async def code(self) -> tuple[int, str]:
        """Status and code of the next answer, which is an error."""
        status, content = await self.answer()
        return status, content["error"]["code"]

    async def is_closed(self) -> bool:
        """Wait until the server has closed it."""
        return await soon(self.reader.read()) == b""


@asynccontextmanager
async def connected(address: tuple[str, int], tls: ssl.SSLContext | None = None) -> AsyncIterator[Raw]:
    """A connection during the block."""
    reader, writer = await asyncio.open_connection(*address, ssl=tls)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)
