"""Connections: dead, half open, old, and full of what is not HTTP/2."""

import asyncio
import random
from contextlib import AsyncExitStack

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.patience import soon
from tests.server.conftest import Loopback
from tests.server.fakes import CHUNKS, STARTED, Pause, chat_request
from tests.server.test_access import serving
from tests.server.test_app import health
from tests.server.wire import Relay
from trimserve.client import channel_options
from trimserve.server.grpc import transport
from trimserve.server.grpc.responses import fold
from trimserve.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

NUM_HALF_OPEN = 1000
NUM_MALFORMED = 10_000


async def test_limits_beyond_what_grpc_counts_to_are_none() -> None:
    month = 30 * 24 * 3600
    lengths = {"max_connection_age_seconds": month, "drain_grace_seconds": month}
    async with serving(max_message_bytes=3 * 2**30, max_concurrent_rpcs=2**31, **lengths) as loopback:
        await health(loopback.channel).Check(health_pb2.HealthCheckRequest())


async def test_a_client_that_vanishes_without_a_word_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PING_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(transport, "KEEPALIVE_SECONDS", 1.0)
    async with (
        serving() as loopback,
        Relay(loopback.server.address) as relay,
        grpc.aio.insecure_channel(relay.address) as channel,
    ):
        loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED)
        stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.GenerateStream(chat_request())
        await stream.read()
        relay.freeze()
        await soon(loopback.runner.cancelled.wait())


async def test_connections_that_never_begin_are_closed_and_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HANDSHAKE_SECONDS", 1.0)
    async with serving() as loopback, AsyncExitStack() as stack:
        host, _, port = loopback.server.address.rpartition(":")
        readers = []
        for _ in range(NUM_HALF_OPEN):
            reader, writer = await asyncio.open_connection(host, port)
            stack.callback(writer.close)
            readers.append(reader)
        assert (await health(loopback.channel).Check(health_pb2.HealthCheckRequest(), timeout=60)).status
        assert (await loopback.generation.Generate(chat_request(), timeout=60)).text
        async with asyncio.timeout(60):
            await asyncio.gather(*(reader.read() for reader in readers))


def malformed(rng: random.Random) -> bytes:
    """A frame whose length, type, flags and content do not fit together."""
    payload = rng.randbytes(rng.randrange(40))
    length = rng.choice((len(payload), rng.randrange(2**24)))
    return length.to_bytes(3, "big") + rng.randbytes(2) + rng.randbytes(4) + payload


async def test_malformed_frames_end_their_connection_only(loopback: Loopback) -> None:
    rng = random.Random(0)
    host, _, port = loopback.server.address.rpartition(":")
    loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED, *CHUNKS[1:])
    answer = asyncio.ensure_future(fold(loopback.generation.GenerateStream(chat_request())))
    await soon(loopback.runner.paused.wait())
    num_sent = 0
    while num_sent < NUM_MALFORMED:
        _, writer = await asyncio.open_connection(host, port)
        frames = [malformed(rng) for _ in range(rng.randrange(1, 200))]
        writer.write(rng.choice((b"", PREFACE, PREFACE + SETTINGS)) + b"".join(frames))
        num_sent += len(frames)
        writer.close()
    assert (await health(loopback.channel).Check(health_pb2.HealthCheckRequest(), timeout=60)).status
    loopback.runner.released.set()
    assert (await answer).text == "Hello ☃!"


async def test_an_old_connection_is_renewed_without_a_lost_call() -> None:
    async with (
        serving(max_connection_age_seconds=0.5) as loopback,
        Relay(loopback.server.address) as relay,
        grpc.aio.insecure_channel(relay.address, channel_options()) as channel,
    ):
        loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED, *CHUNKS[1:])
        generation: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
        model: model_pb2_grpc.ModelServiceAsyncStub = model_pb2_grpc.ModelServiceStub(channel)
        answer = asyncio.ensure_future(fold(generation.GenerateStream(chat_request())))
        await soon(loopback.runner.paused.wait())
        async with asyncio.timeout(60):
            while relay.num_connections < 3:
                assert await model.GetModel(model_pb2.GetModelRequest())
                await asyncio.sleep(0.02)
        loopback.runner.released.set()
        assert (await answer).text == "Hello ☃!"
