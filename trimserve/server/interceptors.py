"""What every RPC has in common: exceptions become statuses with details, RPCs are counted, timed and logged.

`STATUS` is the one table from errors to gRPC codes. Only trimserve's own services pass through here; health
checks and reflection do not.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc.aio import ServicerContext
from grpc_status import rpc_status

from trimserve.errors import (
    CannotListen,
    CheckpointError,
    DeadlinePassed,
    EngineBusy,
    EngineStopped,
    InvalidRequest,
    OutOfMemory,
    RequestFailed,
    TrimserveError,
)
from trimserve.server.convert import adopt_request_id
from trimserve.server.deadline import Deadline
from trimserve.server.metrics import Metrics

__all__ = ["DOMAIN", "STATUS", "RpcInterceptor", "status_of"]

log = logging.getLogger(__name__)

STATUS: Mapping[type[TrimserveError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,  # the caller can fix it
    EngineBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry later
    OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,  # retry later
    EngineStopped: grpc.StatusCode.UNAVAILABLE,  # another replica may serve it
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestFailed: grpc.StatusCode.INTERNAL,  # this request only
    CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,  # at load time, before there are RPCs
    CannotListen: grpc.StatusCode.FAILED_PRECONDITION,  # the same
}
"""Anything else is INTERNAL, with the request id only; its stack is in the log."""

DOMAIN = "trimserve"
"""`ErrorInfo.domain` of every error."""

OWN_METHODS = "/trimserve."

MAX_MESSAGE_BYTES = 512
"""Of a status message. It travels three times in the trailers, of which clients take 8 KiB."""

Context = ServicerContext[Any, Any]
Behaviour = Callable[[Any, Context], Any]
RpcHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # generic for type checkers only


def status_of(error: Exception, request_id: str) -> status_pb2.Status:
    """The status, with details, that a client gets for an exception.

    Args:
        error: a TrimserveError, or anything else, of which nothing is told.
        request_id: told in `ErrorInfo.metadata`.
    """
    if isinstance(error, TrimserveError):
        reason, message = error.reason, str(error)
    else:
        reason, message = "INTERNAL", f"internal error; the server's log tells more of request {request_id}"
    status = status_pb2.Status(code=code_pb2.Code.Value(_code(error).name), message=_cut(message))
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata={"request_id": request_id})
    for detail in (info, *_details(error)):
        status.details.add().Pack(detail)
    return status


def _cut(message: str) -> str:
    return message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def _code(error: Exception) -> grpc.StatusCode:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), grpc.StatusCode.INTERNAL)


def _details(error: Exception) -> list[Message]:
    match error:
        case InvalidRequest():
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_cut(error.message))
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case EngineBusy():
            delay = Duration()
            delay.FromMilliseconds(_retry_milliseconds(error))
            return [error_details_pb2.RetryInfo(retry_delay=delay)]
        case _:
            return []


def _trailer(error: Exception, request_id: str) -> tuple[str, tuple[tuple[str, str | bytes], ...]]:
    """Message and trailing metadata of a status, as `abort` takes them."""
    status = rpc_status.to_status(status_of(error, request_id))
    pushback: tuple[tuple[str, str], ...] = ()
    if isinstance(error, EngineBusy):
        pushback = (("grpc-retry-pushback-ms", str(_retry_milliseconds(error))),)
    return status.details, (*status.trailing_metadata, *pushback)


def _retry_milliseconds(error: EngineBusy) -> int:
    return round(error.retry_after_seconds * 1000)


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary and server-streaming RPC of trimserve's services."""

    def __init__(self, metrics: Metrics) -> None:
        """Count RPCs.

        Args:
            metrics: gets the `grpc_server_*` series.
        """
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcHandler:
        """Give gRPC the wrapped handler of a call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OWN_METHODS):
            return handler
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            stream = self._stream(method, cast(Behaviour, handler.unary_stream))
            return grpc.unary_stream_rpc_method_handler(stream, *codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, cast(Behaviour, handler.unary_unary)), *codec)

    def _unary(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def handle(request: Message, context: Context) -> Message:
            async with self._rpc(("unary", *_split(method)), request, context) as count_sent:
                response: Message = await behaviour(request, context)
                count_sent()
                return response

        return handle

    def _stream(self, method: str, behaviour: Behaviour) -> Behaviour:
        # A coroutine that writes, not a generator: gRPC leaves a generator open when the client goes.
        async def handle(request: Message, context: Context) -> None:
            async with (
                self._rpc(("server_stream", *_split(method)), request, context) as count_sent,
                aclosing(behaviour(request, context)) as stream,
            ):
                async for response in stream:
                    try:
                        await context.write(response)
                    except grpc.aio.InternalError as error:  # the client went away during the write
                        raise asyncio.CancelledError from error
                    count_sent()

        return handle

    @asynccontextmanager
    async def _rpc(
        self, labels: tuple[str, str, str], request: Message, context: Context
    ) -> AsyncIterator[Callable[[], None]]:
        """Around one RPC: yields what counts a sent message, ends with a status for any exception."""
        metrics, begin, deadline = self._metrics, time.monotonic(), Deadline(context)
        request_id = adopt_request_id(request)
        metrics.rpcs_started.labels(*labels).inc()
        metrics.rpc_messages_received.labels(*labels).inc()
        code = grpc.StatusCode.OK
        try:
            yield metrics.rpc_messages_sent.labels(*labels).inc
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            if deadline.has_passed():
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        except Exception as error:
            code = _code(error)
            if code is grpc.StatusCode.INTERNAL:
                log.error("rpc failed", exc_info=error, extra={"request_id": request_id})
            await context.abort(code, *_trailer(error, request_id))
        finally:
            seconds = time.monotonic() - begin
            metrics.rpcs_handled.labels(*labels, code.name).inc()
            metrics.rpc_handling_seconds.labels(*labels).observe(seconds)
            fields = {"method": labels[2], "code": code.name, "seconds": round(seconds, 6)}
            log.info("rpc", extra={**fields, "request_id": request_id})


def _split(method: str) -> tuple[str, str]:
    """Service and name of `/package.Service/Method`."""
    _, service, name = method.split("/")
    return service, name
