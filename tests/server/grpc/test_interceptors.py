"""Statuses: every error of the tree, unary and mid-stream, and what gRPC itself refuses."""

import logging
from collections.abc import Awaitable

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.server.conftest import Loopback, rich_status
from tests.server.fakes import CHUNKS, DELTAS, STARTED, Script, chat_request
from tests.server.logged import line_of
from trimserve import errors
from trimserve.errors import TrimserveError
from trimserve.server.grpc.responses import fold
from trimserve.server.grpc.statuses import STATUS, status_of
from trimserve.v1 import generation_pb2 as pb

ROWS = [
    (errors.InvalidRequest("raw_prompt", "too long"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (errors.MessageTooLarge("inflates to more"), grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE"),
    (errors.UnknownMethod("no such method"), grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD"),
    (errors.EngineBusy("64 wait", retry_after_seconds=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (errors.OutOfMemory("no memory for 2 GiB"), grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    (errors.EngineStopped("draining"), grpc.StatusCode.UNAVAILABLE, "ENGINE_STOPPED"),
    (errors.RankFailed("rank 1 was ended by SIGKILL"), grpc.StatusCode.UNAVAILABLE, "ENGINE_STOPPED"),
    (errors.DeadlinePassed("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    (errors.MessageLate("no body"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    (errors.RequestFailed("NaN in the logits"), grpc.StatusCode.INTERNAL, "REQUEST_FAILED"),
    (errors.CheckpointError("not an Mllama"), grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_REFUSED"),
    (errors.AdapterError("a rank that does not fit"), grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_REFUSED"),
    (errors.UnknownAdapter("not loaded"), grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
    (errors.AdapterExists("loaded"), grpc.StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS"),
    (errors.Unauthenticated("no token"), grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (errors.PermissionDenied("not yours"), grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    (errors.TooManyCalls("server", "a_knob", 3), grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS"),
    (errors.TooManyBytes("no room"), grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_BYTES"),
    (errors.TooFast("shop", "a_knob", 3, 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_FAST"),
    (errors.UnknownService("no such service"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_SERVICE"),
    (errors.CredentialsError("no PEM"), grpc.StatusCode.FAILED_PRECONDITION, "CREDENTIALS_REFUSED"),
    (errors.CannotListen("the port is taken"), grpc.StatusCode.FAILED_PRECONDITION, "CANNOT_LISTEN"),
    (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
]


DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.QuotaFailure,
)


async def failure(loopback: Loopback, rpc: str) -> grpc.aio.AioRpcError:
    request = chat_request()
    request.request_id = "mine"
    stream = loopback.generation.GenerateStream
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (fold(stream(request)) if rpc == "GenerateStream" else loopback.generation.Generate(request))
    return caught.value


async def failed(call: Awaitable[object]) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo]:
    """Code and `ErrorInfo` of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    _, (info, *_) = details(caught.value)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    return caught.value.code(), info


def details(error: grpc.aio.AioRpcError) -> tuple[status_pb2.Status, list[object]]:
    """The rich status and its unpacked details."""
    status = rich_status(error)
    kinds = {kind.DESCRIPTOR.full_name: kind for kind in DETAILS}
    unpacked = []
    for detail in status.details:
        message = kinds[detail.TypeName()]()
        detail.Unpack(message)
        unpacked.append(message)
    return status, unpacked


def test_every_error_of_the_tree_has_a_status() -> None:
    tree = {getattr(errors, name) for name in errors.__all__} - {TrimserveError}
    assert set(STATUS) == tree
    assert {type(error) for error, _, _ in ROWS if isinstance(error, TrimserveError)} == tree


@pytest.mark.parametrize("rpc", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("script", [(), (STARTED, *DELTAS)], ids=["at once", "mid-stream"])
@pytest.mark.parametrize(("error", "code", "reason"), ROWS, ids=lambda value: type(value).__name__)
async def test_an_error_becomes_its_status_with_details(
    loopback: Loopback, rpc: str, script: Script, error: Exception, code: object, reason: str
) -> None:
    loopback.runner.script = (*script, error)
    caught = await failure(loopback, rpc)
    assert caught.code() == code
    status, (info, *_) = details(caught)
    assert status.message == caught.details()
    assert info == error_details_pb2.ErrorInfo(reason=reason, domain="trimserve", metadata={"request_id": "mine"})
    loopback.runner.script = CHUNKS
    assert (await loopback.generation.Generate(chat_request())).text


async def test_an_unforeseen_error_tells_nothing_but_the_request_and_is_logged(
    loopback: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.runner.script = (ZeroDivisionError("secret"),)
    caught = await failure(loopback, "Generate")
    assert "secret" not in repr(caught)
    assert "mine" in (caught.details() or "")
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    assert record.__dict__["request_id"] == "mine"


async def test_a_full_queue_says_when_to_try_again(loopback: Loopback) -> None:
    loopback.runner.script = (errors.EngineBusy("64 wait", retry_after_seconds=2.5),)
    caught = await failure(loopback, "Generate")
    _, (_, retry) = details(caught)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 2500
    assert caught.trailing_metadata()["grpc-retry-pushback-ms"] == "2500"


async def test_an_error_names_the_id_that_the_server_drew(loopback: Loopback) -> None:
    loopback.runner.script = (errors.RequestFailed("NaN"),)
    _, info = await failed(loopback.generation.Generate(chat_request()))
    assert info.metadata["request_id"] == loopback.runner.requests[0].request_id


@pytest.mark.parametrize(
    ("field", "header", "expected"),
    [("", "from.header", "from.header"), ("mine", "from.header", "mine"), ("", "no spaces", None)],
)
async def test_a_call_goes_by_the_id_of_its_request_or_its_header_and_is_told_it(
    loopback: Loopback, caplog: pytest.LogCaptureFixture, field: str, header: str, expected: str | None
) -> None:
    caplog.set_level(logging.INFO, "trimserve")
    request = chat_request()
    request.request_id = field
    call = loopback.generation.Generate(request, metadata=(("x-request-id", header),))
    await call
    expected = expected or loopback.runner.requests[0].request_id
    assert (await call.trailing_metadata())["x-request-id"] == expected
    assert loopback.runner.requests[0].request_id == expected
    assert (await line_of("rpc", caplog))["request_id"] == expected
    loopback.runner.script = (errors.RequestFailed("NaN"),)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loopback.generation.Generate(request, metadata=(("x-request-id", header),))
    error_id = caught.value.trailing_metadata()["x-request-id"]
    assert error_id == loopback.runner.requests[1].request_id
    assert (error_id == expected) == (expected in ("mine", "from.header"))


async def test_an_id_that_is_refused_is_not_repeated(loopback: Loopback) -> None:
    request = chat_request()
    request.request_id = "no spaces"
    _, info = await failed(loopback.generation.Generate(request))
    assert len(info.metadata["request_id"]) == 32


def test_a_long_message_is_cut_between_characters() -> None:
    status = status_of(errors.RequestFailed("☃" * 1000), "mine")
    assert status.message == "☃" * 170


async def test_a_65_mib_message_is_refused_and_the_next_one_answered(loopback: Loopback) -> None:
    large = pb.GenerateRequest(raw_prompt="<|image|>", images=[pb.Image(data=bytes(65 * 2**20))])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loopback.generation.Generate(large)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(64 * 2**20) in (caught.value.details() or "")
    assert (await loopback.generation.Generate(chat_request())).text


async def test_every_call_is_logged_without_its_content(loopback: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trimserve")
    request = chat_request("confidential")
    request.request_id = "mine"
    await loopback.generation.Generate(request)
    fields = await line_of("rpc", caplog)
    assert (fields["method"], fields["code"], fields["request_id"]) == ("Generate", "OK", "mine")
    assert fields["service"] == "trimserve.v1.GenerationService"
    assert (fields["request_bytes"], fields["messages_sent"]) == (request.ByteSize(), 1)
    assert fields["peer"].startswith("ipv4:127.0.0.1:")
    assert fields["user_agent"].startswith("grpc-python")
    assert "confidential" not in str(fields)


async def test_the_line_of_a_refused_call_says_why_without_its_content(
    loopback: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trimserve")
    request = chat_request("confidential")
    request.trim.policy = "confidential"
    await failed(loopback.generation.Generate(request))
    fields = await line_of("rpc", caplog)
    assert (fields["code"], fields["reason"], fields["field"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "trim.policy")
    assert "confidential" not in str(fields)
