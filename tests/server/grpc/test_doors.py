"""What a caller can take before, and after, its token is checked; `docs/security.md` lists it all."""

import asyncio
import gzip
import logging
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from scripts.verify.raw_http2 import RawConnection, framed
from tests.patience import soon, until
from tests.server.conftest import Loopback
from tests.server.fakes import FINISHED, STARTED, Pause, Script, chat_request
from tests.server.grpc.test_interceptors import details, failed
from tests.server.grpc.test_messages import GENERATE, raw
from tests.server.test_access import bearer, entry, file, serving, write
from tests.server.test_app import health
from trimserve.errors import EngineStopped
from trimserve.server import gate
from trimserve.server.grpc import inbox, services
from trimserve.server.grpc.census import MAX_FIELDS
from trimserve.server.grpc.convert import to_generation_request
from trimserve.server.grpc.transport import MAX_METADATA_BYTES, UNREAD_BYTES
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import model_pb2

__all__ = ["file"]

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
ENOUGH = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
MIB = 2**20
NEVER_SECONDS = 3600.0


def metric(loopback: Loopback, name: str, **labels: str) -> float | None:
    """A sample of the server's metrics."""
    return loopback.server.metrics.registry.get_sample_value(name, labels)


def refused(loopback: Loopback, reason: str) -> float | None:
    """Calls that were refused for a reason."""
    return metric(loopback, "trimserve_refused_calls_total", reason=reason)


async def test_a_health_check_without_a_token_is_answered_without_its_message(file: Path) -> None:
    async with serving(auth_file=file) as loopback, RawConnection(loopback.server.address) as attacker:
        call = attacker.call(CHECK)
        sending = asyncio.ensure_future(attacker.send(call, framed(bytes(MIB), announced=63 * MIB)))
        assert await soon(attacker.status(call)) == 0
        assert await soon(sending) <= 4 * UNREAD_BYTES
        assert metric(loopback, "trimserve_message_bytes_in_flight") == 0


async def test_a_health_check_that_never_ends_is_ended_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "PROBE_SECONDS", 0.1)
    async with serving() as loopback, RawConnection(loopback.server.address) as attacker:
        call = attacker.call(CHECK)
        await attacker.send(call, framed(b"", announced=63 * MIB))
        assert await soon(attacker.status(call)) == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert refused(loopback, "deadline_passed") == 1
        assert metric(loopback, "trimserve_message_bytes_in_flight") == 0


async def test_health_is_told_while_messages_take_all_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MESSAGES_IN_FLIGHT", 1)
    knobs = {"max_message_bytes": MIB, "receive_timeout_seconds": NEVER_SECONDS}
    async with serving(**knobs) as loopback, RawConnection(loopback.server.address) as attacker:
        await attacker.send(attacker.call(GENERATE), framed(b"", announced=MIB))
        await until(lambda: metric(loopback, "trimserve_message_bytes_in_flight") == MIB)
        assert (await soon(health(loopback.channel).Check(health_pb2.HealthCheckRequest()))).status


@pytest.mark.parametrize("with_tokens", [True, False])
async def test_a_compressed_health_check_is_not_inflated(file: Path, with_tokens: bool) -> None:
    bomb = gzip.compress(bytes(60 * MIB))
    knobs = {"auth_file": file} if with_tokens else {}
    async with serving(**knobs) as loopback, RawConnection(loopback.server.address) as attacker:
        call = attacker.call(CHECK, [("grpc-encoding", "gzip")])
        sending = asyncio.ensure_future(attacker.send(call, framed(bomb, is_compressed=True), is_last=True))
        assert await soon(attacker.status(call)) == (0 if with_tokens else ENOUGH)
        sending.cancel()


async def test_an_address_has_sixteen_watches_and_others_go_on_being_served(file: Path) -> None:
    async with serving(auth_file=file) as loopback, AsyncExitStack() as stack:
        attackers = [
            await stack.enter_async_context(RawConnection(loopback.server.address))
            for _ in range(gate.MAX_WATCHES_PER_ADDRESS + 1)
        ]
        for attacker in attackers[:-1]:
            attacker.call(WATCH)
        await until(lambda: metric(loopback, "trimserve_health_watches") == gate.MAX_WATCHES_PER_ADDRESS)
        assert await soon(attackers[-1].status(attackers[-1].call(WATCH))) == ENOUGH
        assert refused(loopback, "too_many_calls") == 1
        assert (await loopback.generation.Generate(chat_request(), metadata=bearer("ask"))).text
        assert (await health(loopback.channel).Check(health_pb2.HealthCheckRequest())).status
    assert metric(loopback, "trimserve_health_watches") == 0


async def test_a_second_watch_on_a_connection_takes_a_token(file: Path) -> None:
    async with serving(auth_file=file) as loopback:
        watch = health(loopback.channel).Watch
        first = watch(health_pb2.HealthCheckRequest())
        await first.read()
        code, _ = await failed(watch(health_pb2.HealthCheckRequest()).read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        known = watch(health_pb2.HealthCheckRequest(), metadata=bearer("ask"))
        assert (await known.read()).status
        first.cancel()
        known.cancel()


async def test_two_thousand_watches_take_no_place_of_a_call() -> None:
    async with serving() as loopback, AsyncExitStack() as stack:
        for _ in range(3):
            attacker = await stack.enter_async_context(RawConnection(loopback.server.address))
            for _ in range(1000):
                await attacker.send(attacker.call(WATCH), framed(b""), is_last=True)
        await until(lambda: (refused(loopback, "too_many_calls") or 0) >= 3000 - gate.MAX_WATCHES_PER_ADDRESS)
        assert (await soon(loopback.generation.Generate(chat_request()))).text


async def test_what_nobody_asked_for_is_not_taken_from_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MESSAGES_IN_FLIGHT", 1)
    knobs = {"max_message_bytes": MIB, "receive_timeout_seconds": NEVER_SECONDS}
    async with serving(**knobs) as loopback, AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(RawConnection(loopback.server.address)) for _ in range(2)]
        await first.send(first.call(GENERATE), framed(b"", announced=MIB))
        await until(lambda: metric(loopback, "trimserve_message_bytes_in_flight") == MIB)
        calls = [second.call(GENERATE) for _ in range(10)]
        sending = [asyncio.ensure_future(second.send(call, framed(bytes(MIB)))) for call in calls]
        await until(lambda: all(second.room(call) == 0 for call in calls))
        for task in sending:
            task.cancel()
        assert second.num_sent <= len(calls) * 2 * UNREAD_BYTES


async def test_calls_beyond_all_bounds_are_told_so_and_counted() -> None:
    async with serving(max_concurrent_rpcs=50) as loopback, AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(loopback.server.address, options))
            for _ in range(30)
        ]
        stubs = [Loopback(loopback.runner, loopback.server, channel).model for channel in channels]
        calls = [stub.GetModel(model_pb2.GetModelRequest()) for _ in range(100) for stub in stubs]
        codes = Counter([await soon(call.code()) for call in calls])
        assert codes.keys() <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert refused(loopback, "too_many_calls") == codes[grpc.StatusCode.RESOURCE_EXHAUSTED]


@pytest.mark.parametrize("method", [GENERATE, "/trimserve.v1.GenerationService/Embed", "/other.Service/Method"])
async def test_without_a_token_all_methods_look_alike(file: Path, method: str) -> None:
    async with serving(auth_file=file) as loopback:
        code, info = await failed(raw(loopback.channel, method)(b""))
        assert (code.name, info.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert refused(loopback, "unauthenticated") == 1


async def test_a_refused_caller_is_logged_with_its_address(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trimserve")
    async with serving(auth_file=file) as loopback:
        for method in (GENERATE, "/trimserve.v1.GenerationService/Embed"):
            await failed(raw(loopback.channel, method)(b""))
    records = [record.__dict__ for record in caplog.records if record.message == "rpc"]
    assert [record["method"] for record in records] == ["Generate", "Embed"]
    assert all(record["peer"].startswith("ipv4:127.0.0.1:") for record in records)


async def test_open_watches_and_messages_that_never_end_do_not_delay_a_drain() -> None:
    async with serving() as loopback, AsyncExitStack() as stack:
        attacker = await stack.enter_async_context(RawConnection(loopback.server.address))
        calls = [attacker.call(method) for method in (WATCH, WATCH, CHECK, GENERATE)]
        await attacker.send(calls[0], framed(b""), is_last=True)
        for call in calls[1:]:
            await attacker.send(call, framed(b"", announced=100))
        await until(lambda: (metric(loopback, "trimserve_message_bytes_in_flight") or 0) > 0)
        await soon(loopback.server.stop(NEVER_SECONDS))


async def test_a_call_that_began_before_the_end_is_told_of_it() -> None:
    async with serving() as loopback, RawConnection(loopback.server.address) as client:
        call = client.call(GENERATE)
        await until(lambda: (metric(loopback, "trimserve_message_bytes_in_flight") or 0) > 0)
        stopping = asyncio.ensure_future(loopback.server.stop(NEVER_SECONDS))
        assert await soon(client.status(call)) == grpc.StatusCode.UNAVAILABLE.value[0]
        assert refused(loopback, EngineStopped.reason.lower()) == 1
        await stopping


async def test_metadata_is_taken_up_to_an_exact_bound() -> None:
    async with serving() as loopback:
        for _ in range(20):
            metadata = (("x-large", "x" * (MAX_METADATA_BYTES - 1000)),)
            assert (await loopback.generation.Generate(chat_request(), metadata=metadata)).text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await loopback.generation.Generate(chat_request(), metadata=(("x-large", "x" * MAX_METADATA_BYTES),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_of_two_million_parts_is_refused_before_it_is_parsed(loopback: Loopback) -> None:
    part = pb.Part(text="a").SerializeToString()
    parts = (b"\x12" + bytes([len(part)]) + part) * (2 * MIB)
    message = pb.Message(role=pb.ROLE_USER).SerializeToString() + parts
    for level in (1, 2):  # of Chat.messages, of GenerateRequest.chat
        message = bytes([level << 3 | 2]) + varint(len(message)) + message
    with pytest.raises(grpc.aio.AioRpcError, match=f"at most {MAX_FIELDS} fields in all") as caught:
        await soon(raw(loopback.channel, GENERATE)(message))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not loopback.runner.requests


def varint(number: int) -> bytes:
    """As protobuf writes lengths."""
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


@pytest.mark.parametrize(
    ("script", "are_held"),
    [((Pause.UNTIL_RELEASED, STARTED), True), ((STARTED, Pause.UNTIL_RELEASED), False)],
    ids=["waiting", "started"],
)
async def test_bytes_of_a_message_are_counted_until_its_images_are_with_the_engine(
    loopback: Loopback, script: Script, are_held: bool
) -> None:
    loopback.runner.script = (*script, FINISHED)
    request = pb.GenerateRequest(raw_prompt="x" * 100_000)
    answer = asyncio.ensure_future(loopback.generation.Generate(request))
    await soon(loopback.runner.paused.wait())
    assert metric(loopback, "trimserve_message_bytes_in_flight") == (request.ByteSize() if are_held else 0)
    loopback.runner.released.set()
    await soon(answer)
    assert metric(loopback, "trimserve_message_bytes_in_flight") == 0


async def test_calls_wait_for_room_and_are_told_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MESSAGES_IN_FLIGHT", 1)
    knobs = {"max_message_bytes": MIB, "receive_timeout_seconds": 1}
    async with serving(**knobs) as loopback:
        loopback.runner.script = (Pause.UNTIL_RELEASED, STARTED, FINISHED)
        first = asyncio.ensure_future(loopback.generation.Generate(chat_request()))
        await soon(loopback.runner.paused.wait())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await loopback.generation.Generate(chat_request())
        _, (info, *_) = details(caught.value)
        assert (caught.value.code().name, getattr(info, "reason", "")) == ("RESOURCE_EXHAUSTED", "TOO_MANY_BYTES")
        assert refused(loopback, "too_many_bytes") == 1
        loopback.runner.released.set()
        await soon(first)
        assert await loopback.generation.Generate(chat_request())


@pytest.mark.parametrize(("size", "is_beside"), [(100, False), (100_000, True)])
async def test_large_messages_are_converted_beside_the_event_loop(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch, size: int, is_beside: bool
) -> None:
    seen = []

    def spy(*arguments: object) -> object:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            seen.append(True)
        else:
            seen.append(False)
        return to_generation_request(*arguments)  # type: ignore[arg-type]  # passed on as they come

    monkeypatch.setattr(services, "to_generation_request", spy)
    assert (await loopback.generation.Generate(pb.GenerateRequest(raw_prompt="x" * size))).text
    assert seen == [is_beside]


async def test_the_priority_of_a_client_is_capped_by_its_entry(file: Path) -> None:
    write(file, entry("plain", "plain"), entry("urgent", "urgent") + "max_priority = 10\n")
    async with serving(auth_file=file) as loopback:
        for token, priority, bound in (("plain", 1, "at most 0 for client plain"), ("urgent", 11, "at most 10")):
            request = chat_request()
            request.priority = priority
            with pytest.raises(grpc.aio.AioRpcError, match=bound) as caught:
                await loopback.generation.Generate(request, metadata=bearer(token))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            request.priority = priority - 1
            assert (await loopback.generation.Generate(request, metadata=bearer(token))).text


@pytest.mark.parametrize("allowance", ["requests_per_minute", "tokens_per_minute", "bytes_per_minute"])
async def test_a_client_that_has_used_up_an_allowance_is_told_when_to_come_again(file: Path, allowance: str) -> None:
    write(file, entry("slow", "slow") + f"{allowance} = 1\n", entry("other", "other"))
    async with serving(auth_file=file) as loopback:
        assert (await loopback.generation.Generate(chat_request(), metadata=bearer("slow"))).text
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await loopback.generation.Generate(chat_request(), metadata=bearer("slow"))
        _, (info, retry, quota) = details(caught.value)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert getattr(info, "reason", "") == "TOO_FAST"
        assert retry.retry_delay.seconds >= 59
        assert allowance in str(quota)
        assert refused(loopback, "too_fast") == 1
        assert (await loopback.generation.Generate(chat_request(), metadata=bearer("other"))).text
