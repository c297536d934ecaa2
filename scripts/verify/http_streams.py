"""The HTTP door of a live server, under what its tests do in small.

A hundred streams at once, beside five hundred silent connections, bodies that never end and one that is too large.
Every stream must come whole and equal gRPC's text, the doors of gRPC and of the probes must answer meanwhile, silent
connections must be closed in time, and nothing may be held of clients that leave. Takes a minute.

Usage: python -m scripts.verify.http_streams
"""

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from tests.server.http.raw import Raw, connected
from trimserve.client import Client, make_request
from trimserve.process import ServerProcess, read_page, server_process
from trimserve.server.http.connection import HEADER_SECONDS

NUM_STREAMS = 100
NUM_IDLE = 500
NUM_SLOW = 20
NUM_LEAVING = 20
TOKENS = 32
PROMPT = "Which number do you see?"

PATIENCE_SECONDS = 60.0
"""For what must happen soon, on a busy machine."""


async def stream(client: AsyncOpenAI, model: str) -> AsyncStream[ChatCompletionChunk]:
    """A greedy stream of always as many tokens."""
    messages: Any = [{"role": "user", "content": PROMPT}]
    extra = {"ignore_eos": True}
    return await client.chat.completions.create(
        model=model, messages=messages, max_tokens=TOKENS, temperature=0, stream=True, extra_body=extra
    )


async def text_of(client: AsyncOpenAI, model: str) -> str:
    """The text of a whole stream."""
    chunks = await stream(client, model)
    return "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])


async def besiege(places: AsyncExitStack, address: tuple[str, int]) -> list[Raw]:
    """Silent connections, and requests whose body never ends; the silent ones are returned."""
    idle = [await places.enter_async_context(connected(address)) for _ in range(NUM_IDLE)]
    for each in idle[::2]:
        each.send(b"POST /v1/chat")
    slow = [await places.enter_async_context(connected(address)) for _ in range(NUM_SLOW)]
    for each in slow:
        each.post(b"{", length=1000)
    return idle


async def leave(client: AsyncOpenAI, model: str) -> None:
    """Begin a stream and go away."""
    chunks = await stream(client, model)
    await anext(aiter(chunks))
    await chunks.close()


def grpc_text(server: ServerProcess) -> str:
    """The same answer through the other door."""
    request = make_request(PROMPT)
    request.sampling.max_new_tokens = TOKENS
    request.sampling.ignore_eos = True
    request.sampling.temperature = 0
    with Client(server.address) as client:
        return client.generate(request).text


async def verify(server: ServerProcess) -> None:
    """All of it.

    Raises:
        AssertionError: something is not as it should be.
    """
    assert server.http_address is not None
    host, _, port = server.http_address.rpartition(":")
    address, expected = (host, int(port)), await asyncio.to_thread(grpc_text, server)
    url = f"http://{server.http_address}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client, AsyncExitStack() as places:
        model = (await client.models.list()).data[0].id
        idle = await besiege(places, address)
        texts = asyncio.gather(*(text_of(client, model) for _ in range(NUM_STREAMS)))
        assert await asyncio.to_thread(grpc_text, server) == expected
        assert await asyncio.to_thread(read_page, f"http://{server.metrics_address}/readyz")
        async with connected(address) as large:
            large.post(b"", length=65 * 2**20)
            assert await large.code() == (413, "MESSAGE_TOO_LARGE")
        assert await texts == [expected] * NUM_STREAMS
        async with asyncio.timeout(HEADER_SECONDS + PATIENCE_SECONDS):
            for each in idle:
                await each.reader.read()
        await asyncio.gather(*(leave(client, model) for _ in range(NUM_LEAVING)))
    await asyncio.to_thread(wait_until_nothing_is_held, server)


def wait_until_nothing_is_held(server: ServerProcess) -> None:
    """Of the requests of all who have left."""
    names = ("trimserve_requests_running", "trimserve_message_bytes_in_flight", "trimserve_http_connections")
    end = time.monotonic() + PATIENCE_SECONDS
    while any(held := {name: server.metrics()[name] for name in names}.values()):
        assert time.monotonic() < end, held
        time.sleep(0.1)  # gauges are asked, they call nobody


def main() -> int:
    """Run a server and besiege it."""
    options = ("--http-port", "0", "--max-batch", "32", "--max-queue", str(2 * NUM_STREAMS))
    with server_process(*options) as server:
        asyncio.run(verify(server))
    print(f"{NUM_STREAMS} streams came whole beside {NUM_IDLE} silent connections; nothing is held of those that left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
