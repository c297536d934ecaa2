"""What every RPC has in common: exceptions become statuses with details, RPCs are counted, timed and logged.

Handlers of trimserve's own services are turned into ones that read their message themselves: what is refused
without looking at it is never read, and bytes that are no message get a status of ours. Health checks and
reflection pass by, but for the bound on what a compressed message unpacks to.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from grpc.aio import ServicerContext

from trimserve.errors import InvalidRequest, UnknownMethod
from trimserve.server.codec import bounded
from trimserve.server.convert import adopt_request_id
from trimserve.server.deadline import Deadline
from trimserve.server.metrics import Metrics
from trimserve.server.statuses import REQUEST_ID_KEY, code_of, trailer

__all__ = ["RpcInterceptor"]

log = logging.getLogger(__name__)

OWN_METHODS = "/trimserve."

Context = ServicerContext[Any, Any]
RpcHandler: TypeAlias = Any  # gRPC has types for handlers of its synchronous API only


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every RPC."""

    def __init__(self, metrics: Metrics, max_message_bytes: int) -> None:
        """Count RPCs.

        Args:
            metrics: gets the `grpc_server_*` series.
            max_message_bytes: largest message, once it is unpacked.
        """
        self._metrics = metrics
        self._max_message_bytes = max_message_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcHandler:
        """Give gRPC the wrapped handler of a call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return _unknown(method) if method.startswith(OWN_METHODS) else None
        parse = bounded(handler.request_deserializer, self._max_message_bytes)
        if method.startswith(OWN_METHODS):
            behaviour = self._behaviour(method, handler)
            return grpc.stream_stream_rpc_method_handler(behaviour, parse, handler.response_serializer)
        return handler._replace(request_deserializer=parse)

    def _behaviour(self, method: str, handler: RpcHandler) -> Callable[[AsyncIterator[Message], Context], Any]:
        kind = "server_stream" if handler.response_streaming else "unary"
        labels = (kind, *_split(method))

        async def handle(requests: AsyncIterator[Message], context: Context) -> None:
            async with self._rpc(_Rpc(self._metrics, labels, context)) as rpc:
                request = await rpc.receive(requests)
                if handler.response_streaming:
                    async with aclosing(handler.unary_stream(request, context)) as responses:
                        async for response in responses:
                            await rpc.send(response)
                else:
                    await rpc.send(await handler.unary_unary(request, context))

        return handle

    @asynccontextmanager
    async def _rpc(self, rpc: "_Rpc") -> AsyncIterator["_Rpc"]:
        """Around one RPC, which ends with a status for any exception."""
        metrics, begin, deadline = self._metrics, time.monotonic(), Deadline(rpc.context)
        metrics.rpcs_started.labels(*rpc.labels).inc()
        code = grpc.StatusCode.OK
        try:
            yield rpc
            rpc.context.set_trailing_metadata(((REQUEST_ID_KEY, rpc.request_id),))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            if deadline.has_passed():
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        except Exception as error:
            code = code_of(error)
            if code is grpc.StatusCode.INTERNAL:
                log.error("rpc failed", exc_info=error, extra={"request_id": rpc.request_id})
            await rpc.context.abort(code, *trailer(error, rpc.request_id))
        finally:
            seconds = time.monotonic() - begin
            metrics.rpcs_handled.labels(*rpc.labels, code.name).inc()
            metrics.rpc_handling_seconds.labels(*rpc.labels).observe(seconds)
            fields = {"method": rpc.labels[2], "code": code.name, "seconds": round(seconds, 6)}
            log.info("rpc", extra={**fields, "request_id": rpc.request_id})


class _Rpc:
    """One call: its id, and its messages, counted."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str], context: Context) -> None:
        self.labels = labels
        self.context = context
        self._metrics = metrics
        self._asked_id = str(dict(context.invocation_metadata() or ()).get(REQUEST_ID_KEY, ""))
        self.request_id = adopt_request_id(None, self._asked_id)

    async def receive(self, requests: AsyncIterator[Message]) -> Message:
        """The one message of the client."""
        try:
            request = await anext(requests)
        except StopAsyncIteration:
            raise InvalidRequest("request", "must be sent, got none") from None
        self._metrics.rpc_messages_received.labels(*self.labels).inc()
        self.request_id = adopt_request_id(request, self.request_id)
        return request

    async def send(self, response: Message) -> None:
        """Send a message."""
        try:
            await self.context.write(response)
        except grpc.aio.InternalError as error:  # the client went away during the write
            raise asyncio.CancelledError from error
        self._metrics.rpc_messages_sent.labels(*self.labels).inc()


def _unknown(method: str) -> RpcHandler:
    """Says so; uncounted, because clients make such names up."""

    async def refuse(_requests: AsyncIterator[bytes], context: Context) -> None:
        error = UnknownMethod(f"there is no method {method[:128]}; the server may be older than the client")
        await context.abort(code_of(error), *trailer(error, adopt_request_id(None)))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _split(method: str) -> tuple[str, str]:
    """Service and name of `/package.Service/Method`."""
    _, service, name = method.split("/")
    return service, name
