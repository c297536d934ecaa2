"""What clients of the HTTP door may take: bytes, time, connections; others go on being served meanwhile."""

import asyncio
import json
from contextlib import AsyncExitStack

import grpc
import pytest

from tests.patience import soon, until
from tests.server.fakes import CHUNKS, FINISHED, STARTED, FakeRunner, Pause, chat_request
from tests.server.http.conftest import Door, open_door
from tests.server.http.raw import HELLO, connected
from trimserve.api.chunks import TokenDelta
from trimserve.server.http import connection
from trimserve.v1 import generation_pb2_grpc

BAD_BODIES = [
    (b"", "EOF"),
    (b"{", "JSON"),
    (b"[]", "object"),
    (b"\xff\xfe", "JSON"),
    (b'{"model": "\\ud800"}', "JSON"),
    (b"[" * 100_000, "recursion"),
    (b'{"model": "fake", "messages": [], "temperature": NaN}', "finite"),
    (b"[" + b"[]," * 200_000 + b"[]]", "at most 262144"),
]


async def served(door: Door) -> int:
    """The status of a plain request on a connection of its own."""
    async with connected(door.address) as client:
        client.post(HELLO)
        status, _ = await client.answer()
        return status


def metric(door: Door, name: str) -> float | None:
    """A sample of the server's metrics."""
    return door.server.metrics.registry.get_sample_value(name)


@pytest.mark.parametrize(("body", "words"), BAD_BODIES, ids=[words for _, words in BAD_BODIES])
async def test_a_bad_body_is_refused_and_the_connection_goes_on(door: Door, body: bytes, words: str) -> None:
    async with connected(door.address) as client:
        client.post(body)
        status, content = await client.answer()
        assert (status, content["error"]["code"]) == (400, "INVALID_REQUEST")
        assert words in content["error"]["message"]
        client.post(HELLO)
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    ("headers", "param"),
    [(["content-type: text/plain"], "content-type"), (["content-encoding: gzip"], "content-encoding")],
)
async def test_a_body_of_another_kind_is_refused(door: Door, headers: list[str], param: str) -> None:
    async with connected(door.address) as client:
        client.post(HELLO, *headers)
        status, content = await client.answer()
        assert (status, content["error"]["param"]) == (400, param)


async def test_a_65_mib_body_is_refused_before_it_is_read(door: Door) -> None:
    async with connected(door.address) as client:
        client.post(b"", length=65 * 2**20)
        assert await client.code() == (413, "MESSAGE_TOO_LARGE")
        client.writer.write_eof()
        assert await client.is_closed()
    assert await served(door) == 200


async def test_a_65_mib_body_in_chunks_is_refused_when_it_has_more_than_it_may() -> None:
    async with open_door(max_message_bytes=4096) as door, connected(door.address) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.send(head + b"transfer-encoding: chunked\r\n\r\n" + b"1001\r\n" + b" " * 4097 + b"\r\n")
        assert await client.code() == (413, "MESSAGE_TOO_LARGE")
        client.writer.write_eof()
        assert await client.is_closed()
        assert await served(door) == 200


async def test_a_body_that_does_not_arrive_in_time_ends_its_request() -> None:
    async with open_door(receive_timeout_seconds=0.05) as door, connected(door.address) as client:
        client.post(HELLO[:5], length=len(HELLO))
        assert await client.code() == (408, "DEADLINE_PASSED")
        await until(lambda: metric(door, "trimserve_message_bytes_in_flight") == 0)
        assert await served(door) == 200


async def test_a_body_that_is_late_holds_room_for_as_much_as_it_declares() -> None:
    async with open_door(max_message_bytes=2**18) as door, AsyncExitStack() as stack:
        for _ in range(8):
            slow = await stack.enter_async_context(connected(door.address))
            slow.post(b"{", length=1000)
        await until(lambda: metric(door, "trimserve_message_bytes_in_flight") == 8000)
        assert await served(door) == 200


async def test_headers_that_do_not_arrive_in_time_end_their_connection(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.02)
    async with connected(door.address) as client:
        client.send(b"POST /v1/chat")
        assert await client.code() == (408, "DEADLINE_PASSED")
        assert await client.is_closed()


async def test_the_headers_of_a_later_request_have_a_time_too(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(door.address) as client:
        client.post(HELLO)
        assert (await client.answer())[0] == 200
        monkeypatch.setattr(connection, "HEADER_SECONDS", 0.02)
        client.send(b"POST /v1/chat")
        assert await client.code() == (408, "DEADLINE_PASSED")


async def test_what_is_no_http_is_told_so(door: Door) -> None:
    async with connected(door.address) as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
        assert await client.code() == (400, "INVALID_REQUEST")
        assert await client.is_closed()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://here:80/health", 200),
        ("HTTPS://here/health?x=/", 200),
        ("http://here", 404),
        ("*", 404),
        ("/a%0Ab", 404),
        ("/v1/models/a%0Ab", 404),
    ],
)
async def test_a_target_of_any_form_is_answered_in_json(door: Door, target: str, status: int) -> None:
    async with connected(door.address) as client:
        client.send(f"GET {target} HTTP/1.1\r\nhost: here\r\n\r\n".encode())
        answered, content = await client.answer()
        assert answered == status
        assert status == 200 or content["error"]["code"] == "UNKNOWN_METHOD"


async def test_five_hundred_idle_connections_hold_up_no_door(door: Door) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(100):  # 500 in `make verify-http`
            await stack.enter_async_context(connected(door.address))
        await until(lambda: metric(door, "trimserve_http_connections") == 100)
        assert await served(door) == 200
        async with grpc.aio.insecure_channel(door.server.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            assert (await stub.Generate(chat_request())).text == "Hello ☃!"


async def test_beyond_the_bound_the_oldest_idle_connection_makes_room(door: Door) -> None:
    door.server._transports[1]._connections.most = 2  # type: ignore[attr-defined]  # of HttpTransport
    async with connected(door.address) as oldest, connected(door.address) as older:
        assert await served(door) == 200
        assert await oldest.is_closed()
        older.post(HELLO)
        assert (await older.answer())[0] == 200


async def test_beyond_the_bound_nobody_who_waits_for_an_answer_is_closed() -> None:
    async with open_door(FakeRunner([*CHUNKS[:2], Pause.UNTIL_RELEASED, *CHUNKS[2:]])) as door:
        door.server._transports[1]._connections.most = 1  # type: ignore[attr-defined]  # of HttpTransport
        async with connected(door.address) as busy:
            busy.post(HELLO)
            await soon(door.runner.paused.wait())
            async with connected(door.address) as later:
                assert await later.is_closed()
            door.runner.released.set()
            assert (await busy.answer())[0] == 200


async def test_a_reader_that_never_reads_is_left_and_frees_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TAKE_SECONDS", 0.05)
    much = TokenDelta("x" * 2**20, (5,))
    async with open_door(FakeRunner([STARTED, *[much] * 64, Pause.UNTIL_RELEASED, FINISHED])) as door:
        async with connected(door.address) as client:
            client.reader._limit = 1  # type: ignore[attr-defined]  # asyncio stops reading at twice as much
            asked = {**json.loads(HELLO), "stream": True}
            client.post(json.dumps(asked).encode())
            await soon(door.runner.cancelled.wait())
        assert door.runner.num_running == 0


async def test_a_client_has_as_many_requests_open_as_it_may() -> None:
    runner = FakeRunner([*CHUNKS[:2], Pause.UNTIL_RELEASED, *CHUNKS[2:]])
    async with open_door(runner, max_concurrent_rpcs_per_client=1) as door:
        async with connected(door.address) as first, connected(door.address) as second:
            first.post(HELLO)
            await soon(runner.paused.wait())
            second.post(HELLO)
            assert await second.code() == (429, "TOO_MANY_CALLS")
            runner.released.set()
            assert (await first.answer())[0] == 200
        assert door.server.metrics.registry.get_sample_value(
            "trimserve_refused_calls_total", {"reason": "too_many_calls"}
        )


async def test_requests_are_counted_by_route_and_status(door: Door) -> None:
    assert await served(door) == 200
    labels = {"route": "/v1/chat/completions", "status": "200"}
    await until(lambda: door.server.metrics.registry.get_sample_value("trimserve_http_requests_total", labels) == 1)
    finished = {"method": "Generate", "finish_reason": "stop"}
    assert door.server.metrics.registry.get_sample_value("trimserve_requests_total", finished) == 1


async def test_a_body_that_never_ends_does_not_delay_a_drain(door: Door) -> None:
    async with connected(door.address) as client:
        client.post(HELLO[:5], length=len(HELLO))
        await until(lambda: (metric(door, "trimserve_message_bytes_in_flight") or 0) > 0)
        stopping = asyncio.ensure_future(door.server.stop())
        assert await client.code() == (503, "ENGINE_STOPPED")
        client.writer.write_eof()
        await soon(stopping)
