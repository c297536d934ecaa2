"""What callers did to a server to see whether it stands: one function for each attack.

Each goes on until it is cancelled. Errors are what an attacker expects, so they are counted and not raised. Those that
need a token have that of an ordinary client.
"""

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property

import grpc

from scripts.verify.attack_images import endless_jpeg, marker_jpeg, tiled_tiff, tiny_chunk_png
from scripts.verify.raw_http2 import RawConnection, framed
from trimserve.v1 import generation_pb2 as pb

__all__ = ["ATTACKS", "Target", "attack"]

_GENERATE = "/trimserve.v1.GenerationService/Generate"
_CHECK, _WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
_MIB = 2**20
_PAUSE_SECONDS = 0.2


@dataclass
class Target:
    """A server under attack."""

    address: str
    """`HOST:PORT` of gRPC, plaintext."""
    metrics_address: str
    token: str
    """Of an ordinary client."""
    tries: dict[str, int] = field(default_factory=dict)
    """How often each attack was tried."""

    @cached_property
    def channel(self) -> grpc.aio.Channel:
        """Of the client whose token it is."""
        return grpc.aio.insecure_channel(self.address, [("grpc.max_send_message_length", -1)])

    async def call(self, message: bytes, timeout_seconds: float = 60.0) -> None:
        """Send a message to `Generate`, and take what comes."""
        send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(_GENERATE)
        with suppress(grpc.aio.AioRpcError):
            await send(message, metadata=(("authorization", f"Bearer {self.token}"),), timeout=timeout_seconds)

    @property
    def authorised(self) -> Sequence[tuple[str, str]]:
        """Headers of a raw call of the client."""
        return [("authorization", f"Bearer {self.token}")]


Attack = Callable[[Target], Awaitable[None]]


async def tiny_messages(target: Target) -> None:
    """D1: sixteen megabytes of messages, of parts and of ids."""
    part = _field(2, _field(1, b"a"))
    message = b"\x08\x02" + part
    messages = _field(1, message) * (16 * _MIB // len(message))
    parts = _field(1, b"\x08\x02" + part * (16 * _MIB // len(part)))
    ids = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(token_ids=[1] * (16 * _MIB)))
    for request in (_field(2, messages), _field(2, parts), ids.SerializeToString()):
        await target.call(request)


async def watches(target: Target) -> None:
    """D2: two thousand health watches without a token."""
    async with AsyncExitStack() as stack:
        for _ in range(2):
            connection = await stack.enter_async_context(RawConnection(target.address))
            for _ in range(1030):
                await connection.send(connection.call(_WATCH), framed(b""), is_last=True)
        await asyncio.sleep(5)


async def half_messages(target: Target) -> None:
    """D3: health checks, and calls without a token, that announce 63 MiB and never finish."""
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(RawConnection(target.address)) for _ in range(57)]
        half = framed(bytes(62 * _MIB), announced=63 * _MIB)
        sending = [
            connection.send(connection.call(_GENERATE if index % 2 else _CHECK), half)
            for index, connection in enumerate(connections)
        ]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*sending), 20)


async def compressed_checks(target: Target) -> None:
    """D4: health checks of 63 KiB that inflate to 63 MiB."""
    bomb = framed(gzip.compress(bytes(63 * _MIB)), is_compressed=True)
    async with RawConnection(target.address) as connection:
        calls = [connection.call(_CHECK, [("grpc-encoding", "gzip")]) for _ in range(40)]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(connection.send(call, bomb, is_last=True) for call in calls)), 20)


async def tiled_tiffs(target: Target) -> None:
    """D5: a pixel whose tile takes 700 MB."""
    await _images(target, tiled_tiff(), 2)


async def endless_jpegs(target: Target) -> None:
    """D6: images of a hundred thousand scans."""
    await _images(target, endless_jpeg(), 4)


async def long_headers(target: Target) -> None:
    """D7: files whose headers take long to read."""
    await _images(target, tiny_chunk_png(), 2)
    await _images(target, marker_jpeg(), 2)


async def floods(target: Target) -> None:
    """D8: three thousand calls at once."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        calls = []
        for _ in range(30):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target.address, options))
            send: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_GENERATE)
            calls += [send(b"", timeout=30) for _ in range(100)]
        await asyncio.gather(*calls, return_exceptions=True)


async def large_messages(target: Target) -> None:
    """D9: twenty messages of 60 MiB at once, whole and half."""
    images = [pb.Image(data=bytes(30 * _MIB))] * 2
    whole = pb.GenerateRequest(raw_prompt="<|image|>" * 2, images=images).SerializeToString()
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(RawConnection(target.address)) for _ in range(10)]
        half = framed(bytes(60 * _MIB), announced=63 * _MIB)
        sending: list[Awaitable[object]] = [target.call(whole) for _ in range(10)]
        sending += [c.send(c.call(_GENERATE, target.authorised), half) for c in connections]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*sending), 20)


async def slow_scrapes(target: Target) -> None:
    """D10: five hundred clients of the metrics port that never end their request."""
    await _silent(target.metrics_address, 500, b"GET /metrics HTTP/1.1\r\nHost: x\r\n")


async def half_open(target: Target) -> None:
    """D10: five hundred connections to the gRPC port that say nothing."""
    await _silent(target.address, 500, b"")


async def urgent_requests(target: Target) -> None:
    """D14: eight long requests of the highest priority, and of the usual one."""
    requests = [pb.GenerateRequest(raw_prompt="Describe", priority=priority) for priority in (1000, 0)]
    for request in requests:
        request.sampling.ignore_eos = True
        request.sampling.max_new_tokens = 200
    await asyncio.gather(*(target.call(request.SerializeToString()) for request in requests * 8))


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        tiny_messages,
        watches,
        half_messages,
        compressed_checks,
        tiled_tiffs,
        endless_jpegs,
        long_headers,
        floods,
        large_messages,
        slow_scrapes,
        half_open,
        urgent_requests,
    )
}


async def attack(target: Target, names: Sequence[str]) -> None:
    """Try attacks together, over and over, until it is cancelled.

    Args:
        target: counts how often each was tried.
        names: of `ATTACKS`.
    """
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(_again(target, name))


async def _again(target: Target, name: str) -> None:
    while True:
        target.tries[name] = target.tries.get(name, 0) + 1
        with suppress(OSError, grpc.aio.AioRpcError):
            await ATTACKS[name](target)
        await asyncio.sleep(_PAUSE_SECONDS)


async def _images(target: Target, file: bytes, at_once: int) -> None:
    request = pb.GenerateRequest(raw_prompt="<|image|>What is it?", images=[pb.Image(data=file)])
    await asyncio.gather(*(target.call(request.SerializeToString()) for _ in range(at_once)))


async def _silent(address: str, number: int, beginning: bytes) -> None:
    host, _, port = address.rpartition(":")
    writers = []
    try:
        for _ in range(number):
            with suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                writers.append(writer)
                writer.write(beginning)
        await asyncio.sleep(10)
    finally:
        for writer in writers:
            writer.transport.abort()


def _field(number: int, content: bytes) -> bytes:
    """A field as protobuf writes messages and text."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])
