"""Messages as bytes: damaged, missing, compressed, too large, for methods that do not exist."""

import gzip

import grpc
import pytest

from tests.server.conftest import Loopback
from tests.server.fakes import FINISHED, STARTED, chat_request
from tests.server.grpc.test_interceptors import failed
from tests.server.wire import Relay
from trimserve.api.chunks import TokenDelta
from trimserve.server.grpc.codec import Codec
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

GENERATE = "/trimserve.v1.GenerationService/Generate"
BOMB_BYTES = 100 * 2**20


def raw(channel: grpc.aio.Channel, method: str) -> "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]":
    """A call that sends and gets bytes."""
    return channel.unary_unary(method)


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"\x0a\x05ab", b"\x12\x02\xff\xff", b"\x1f\x8b", gzip.compress(b"\xff"), gzip.compress(bytes(100))[:-9]],
    ids=["no tag", "cut", "not a Chat", "gzip magic only", "gzip of no message", "cut gzip"],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument_and_tell_nothing(
    loopback: Loopback, data: bytes
) -> None:
    code, info = await failed(raw(loopback.channel, GENERATE)(data))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert (await loopback.generation.Generate(chat_request())).text


async def test_a_call_without_a_message_is_an_invalid_argument(loopback: Loopback) -> None:
    stub: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = loopback.channel.stream_unary(GENERATE)
    code, info = await failed(stub(iter(())))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


@pytest.mark.parametrize("method", ["/trimserve.v1.GenerationService/Embed", "/trimserve.v2.Other/Generate"])
async def test_a_method_that_does_not_exist_is_told_with_details(loopback: Loopback, method: str) -> None:
    code, info = await failed(raw(loopback.channel, method)(b""))
    assert (code, info.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD")


async def test_requests_may_be_gzip_and_answers_are_plain(loopback: Loopback) -> None:
    text = "x" * 500_000
    loopback.runner.script = (STARTED, TokenDelta(text, (1,)), FINISHED)
    async with Relay(loopback.server.address) as relay, grpc.aio.insecure_channel(relay.address) as channel:
        stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
        answer = await stub.Generate(chat_request(text), compression=grpc.Compression.Gzip)
        assert answer.text == text
        assert relay.num_bytes_up < 10_000
        assert relay.num_bytes_down > 500_000


async def test_a_compressed_message_is_inflated_up_to_the_limit_only(loopback: Loopback) -> None:
    code, info = await failed(raw(loopback.channel, GENERATE)(bytes(BOMB_BYTES), compression=grpc.Compression.Gzip))
    # gRPC's own refusal, which comes after it has inflated everything, has no details.
    assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
    assert (await loopback.generation.Generate(chat_request())).text


async def test_health_checks_may_be_gzip_too(loopback: Loopback) -> None:
    unknown_field = b"\x7a\xb8\x17" + bytes(3000)
    check = raw(loopback.channel, "/grpc.health.v1.Health/Check")
    assert await check(unknown_field, compression=grpc.Compression.Gzip) == b"\x08\x01"


async def test_other_compressions_are_refused(loopback: Loopback) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(loopback.channel, GENERATE)(bytes(1000), compression=grpc.Compression.Deflate)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_message_of_exactly_the_limit_is_read_compressed_or_not() -> None:
    request = chat_request("x" * 100)
    plain = request.SerializeToString()
    read = Codec(pb.GenerateRequest, len(plain)).read
    assert read(plain) == read(gzip.compress(plain)) == request
