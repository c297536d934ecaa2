"""What every RPC has in common: admission, counting, timing, logging, and statuses with details for exceptions.

Handlers of trimserve's own services are wrapped so that they read their message themselves: nothing is read of a call
that is not admitted, and bytes that do not parse get a status of ours. Health checks and reflection only get the bound
on what a compressed message inflates to, and reflection needs a token.
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
from grpc_health.v1 import health

from trimserve.config import ServerConfig
from trimserve.errors import DeadlinePassed, InvalidRequest, TrimserveError, Unauthenticated, UnknownMethod
from trimserve.server.deadline import Deadline
from trimserve.server.gate import Gate
from trimserve.server.grpc.codec import bounded
from trimserve.server.grpc.convert import adopt_request_id
from trimserve.server.grpc.statuses import REQUEST_ID_KEY, code_of, trailer
from trimserve.server.metrics import Metrics
from trimserve.server.tracing import current_trace

__all__ = ["OWN_METHODS", "RpcInterceptor"]

log = logging.getLogger(__name__)

OWN_METHODS = "/trimserve."
"""How the names of our own methods begin."""

OPEN_METHODS = f"/{health.SERVICE_NAME}/"
"""Open to all, because Kubernetes' probes cannot send a token."""

MAX_USER_AGENT_CHARS = 128
"""Of a user agent in the log."""

Context = ServicerContext[Any, Any]
RpcHandler: TypeAlias = Any  # gRPC has types for handlers of its synchronous API only


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every RPC."""

    def __init__(self, metrics: Metrics, gate: Gate, config: ServerConfig) -> None:
        """Count RPCs.

        Args:
            metrics: gets the `grpc_server_*` series.
            gate: admits calls.
            config: limits on messages.
        """
        self._metrics = metrics
        self._gate = gate
        self._max_message_bytes = config.max_message_bytes
        self._receive_seconds = config.receive_timeout_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcHandler:
        """The wrapped handler of a call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            if method.startswith(OWN_METHODS):  # not counted: clients could make up any number of labels
                return _refusal(UnknownMethod(f"there is no {method[:128]}; the server may be older than the client"))
            return None
        parse = bounded(handler.request_deserializer, self._max_message_bytes)
        if method.startswith(OWN_METHODS):
            behaviour = self._behaviour(method, handler)
            return grpc.stream_stream_rpc_method_handler(behaviour, parse, handler.response_serializer)
        if not method.startswith(OPEN_METHODS):
            try:
                self._gate.identify(dict(handler_call_details.invocation_metadata or ()))
            except Unauthenticated as error:
                return _refusal(error)
        return handler._replace(request_deserializer=parse)

    def _behaviour(self, method: str, handler: RpcHandler) -> Callable[[AsyncIterator[Message], Context], Any]:
        kind = "server_stream" if handler.response_streaming else "unary"
        _, service, name = method.split("/")

        async def handle(requests: AsyncIterator[Message], context: Context) -> None:
            rpc = _Rpc(self._metrics, (kind, service, name), context)
            async with self._answered(rpc):
                with self._gate.admit(service, rpc.metadata, _peer_of(context)) as rpc.client:
                    request = await rpc.receive(requests, self._receive_seconds)
                    if handler.response_streaming:
                        async with aclosing(handler.unary_stream(request, context)) as responses:
                            async for response in responses:
                                await rpc.send(response)
                    else:
                        await rpc.send(await handler.unary_unary(request, context))

        return handle

    @asynccontextmanager
    async def _answered(self, rpc: "_Rpc") -> AsyncIterator[None]:
        """Around one RPC; turns any exception into its status."""
        metrics, begin, deadline = self._metrics, time.monotonic(), Deadline(rpc.context.time_remaining())
        metrics.rpcs_started.labels(*rpc.labels).inc()
        code = grpc.StatusCode.OK
        try:
            yield
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
            _tell_trace(rpc.request_id)
            seconds = time.monotonic() - begin
            metrics.rpcs_handled.labels(*rpc.labels, code.name).inc()
            metrics.rpc_handling_seconds.labels(*rpc.labels).observe(seconds)
            log.info("rpc", extra={**rpc.account(), "code": code.name, "seconds": round(seconds, 6)})


class _Rpc:
    """One call: its client, its id, and its messages, counted."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str], context: Context) -> None:
        self.labels = labels
        self.context = context
        self.client = ""
        """Empty until it is admitted."""
        self.metadata = dict(context.invocation_metadata() or ())
        self.request_id = adopt_request_id(None, str(self.metadata.get(REQUEST_ID_KEY, "")))
        self._metrics = metrics
        self._request_bytes = self._num_sent = 0
        self._sent = metrics.rpc_messages_sent.labels(*labels)

    async def receive(self, requests: AsyncIterator[Message], timeout_seconds: float) -> Message:
        """The client's one message."""
        try:
            async with asyncio.timeout(timeout_seconds):
                request = await anext(requests)
        except StopAsyncIteration:
            raise InvalidRequest("request", "must be sent, got none") from None
        except TimeoutError:
            limit = f"{timeout_seconds:g} seconds (receive_timeout_seconds)"
            raise DeadlinePassed(f"the request did not arrive within {limit}") from None
        self._metrics.rpc_messages_received.labels(*self.labels).inc()
        self._request_bytes = request.ByteSize()
        self.request_id = adopt_request_id(request, self.request_id)
        return request

    async def send(self, response: Message) -> None:
        """Send a message."""
        try:
            await self.context.write(response)
        except grpc.aio.InternalError as error:  # the client went away during the write
            raise asyncio.CancelledError from error
        self._sent.inc()
        self._num_sent += 1

    def account(self) -> dict[str, str | int]:
        """Its fields in the log: who called what, and how much was sent each way; no content."""
        _, service, method = self.labels
        return {
            "service": service,
            "method": method,
            "request_id": self.request_id,
            "client": self.client,
            "peer": self.context.peer(),
            "user_agent": str(self.metadata.get("user-agent", ""))[:MAX_USER_AGENT_CHARS],
            "request_bytes": self._request_bytes,
            "messages_sent": self._num_sent,
        }


def _peer_of(context: Context) -> str:
    """The name in the client's certificate, else its address."""
    if identities := context.peer_identities():
        return min(identities).decode(errors="replace")
    return context.peer().rpartition(":")[0]


def _tell_trace(request_id: str) -> None:
    trace = current_trace()
    if trace is not None:
        trace.describe({"trimserve.request_id": request_id})


def _refusal(error: TrimserveError) -> RpcHandler:
    """Answers with an error and reads nothing."""

    async def refuse(_requests: AsyncIterator[bytes], context: Context) -> None:
        request_id = adopt_request_id(None)
        _tell_trace(request_id)
        await context.abort(code_of(error), *trailer(error, request_id))

    return grpc.stream_stream_rpc_method_handler(refuse)
