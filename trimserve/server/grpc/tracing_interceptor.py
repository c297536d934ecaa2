"""Traces RPCs: from gRPC's calls to the plain values that `server/tracing.py` takes."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc.aio import ServicerContext

from trimserve.server.deadline import Deadline
from trimserve.server.grpc.interceptors import OWN_METHODS
from trimserve.server.tracing import Tracing

__all__ = ["TracingInterceptor"]

SERVER_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes that make a server's span an error, by OpenTelemetry's conventions for gRPC."""

Context = ServicerContext[Any, Any]


class TracingInterceptor(grpc.aio.ServerInterceptor):
    """Traces every RPC of trimserve's services; must be the first interceptor."""

    def __init__(self, tracing: Tracing) -> None:
        """Trace to an exporter.

        Args:
            tracing: closed by whoever made it.
        """
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The traced handler of a call."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or not method.startswith(OWN_METHODS):
            return handler
        sides = (handler.request_streaming, handler.response_streaming)
        kind = "_".join("stream" if is_stream else "unary" for is_stream in sides)
        behaviour = getattr(handler, kind)

        async def handle(request: Any, context: Context) -> Any:
            with self._span(method, context):
                return await behaviour(request, context)

        return handler._replace(**{kind: handle})

    @contextmanager
    def _span(self, method: str, context: Context) -> Iterator[None]:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        service, _, name = method.removeprefix("/").rpartition("/")  # methods that do not exist may look like anything
        deadline = Deadline(context.time_remaining())
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        with self._tracing.call(f"{service}/{name}", metadata, attributes) as trace:
            code = grpc.StatusCode.OK
            try:
                yield
            except asyncio.CancelledError:
                code = grpc.StatusCode.DEADLINE_EXCEEDED if deadline.has_passed() else grpc.StatusCode.CANCELLED
                raise
            except BaseException:
                code = context.code()
                raise
            finally:
                trace.describe({"rpc.grpc.status_code": code.value[0]})
                if code in SERVER_FAULTS:
                    trace.fail()
