"""Traces: a span for each RPC, which continues its caller's W3C trace context, and one within it for each stage.

OpenTelemetry is optional (`trimserve[tracing]`) and is imported only when traces are asked for. Where they go, how many
are kept and what the service is called is also set by OpenTelemetry's own variables, such as `OTEL_TRACES_SAMPLER`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import grpc
from grpc.aio import ServicerContext

from trimserve import __version__
from trimserve.api.chunks import StageSpan
from trimserve.loopback import proxy_options
from trimserve.server.grpc.deadline import Deadline

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

__all__ = ["Trace", "Tracing", "current_trace"]

OWN_METHODS = "/trimserve."

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
Attributes = dict[str, str | int | float | bool | list[str]]


class Trace:
    """The span of the RPC that is being answered."""

    def __init__(self, tracer: "Tracer", span: "Span") -> None:
        """Wrap what OpenTelemetry gave.

        Args:
            tracer: makes the spans within.
            span: of the RPC.
        """
        self._tracer = tracer
        self._span = span
        # Once, so that stages lie as they did, whatever happens to the clock.
        self._clock_began_ns = time.time_ns() - time.monotonic_ns()

    @property
    def trace_id(self) -> str | None:
        """32 hexadecimal digits, in logs and exemplars; None when the trace is not kept."""
        context = self._span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def describe(self, attributes: Attributes) -> None:
        """Say more about the RPC."""
        self._span.set_attributes(attributes)

    def add_stage(self, stage: StageSpan) -> None:
        """Add a span within the RPC's, after the fact."""
        from opentelemetry.trace import set_span_in_context

        begin, end = (self._clock_began_ns + round(at * 1e9) for at in (stage.begin, stage.end))
        self._tracer.start_span(stage.stage, set_span_in_context(self._span), start_time=begin).end(end)


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current_trace() -> Trace | None:
    """Of the RPC in whose context this is called; None without tracing and outside of RPCs."""
    return _current.get()


class Tracing(grpc.aio.ServerInterceptor):
    """Traces every RPC of trimserve's services; to be the first interceptor."""

    def __init__(self, endpoint: str) -> None:
        """Export in a thread of its own; nothing is sent before there is a span.

        Args:
            endpoint: of a collector that takes OTLP over gRPC, such as `http://localhost:4317`; `http` is plaintext.
        Raises:
            ImportError: `trimserve[tracing]` is not installed.
        """
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        own = Resource.create({"service.name": "trimserve", "service.version": __version__})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        options: Any = tuple(proxy_options(urlsplit(endpoint).netloc))  # declared to be one pair of strings
        # The scheme decides: else OTEL_EXPORTER_OTLP_INSECURE could.
        exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"), channel_options=options)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("trimserve", __version__)

    def close(self) -> None:
        """Send what is left; blocks for seconds when the collector does not answer."""
        self._provider.shutdown()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Give gRPC the traced handler of a call."""
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
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        _, service, name = method.split("/")
        deadline = Deadline(context)
        with self._tracer.start_as_current_span(
            f"{service}/{name}",
            TraceContextTextMapPropagator().extract(metadata),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
            record_exception=False,  # messages quote requests
            set_status_on_exception=False,
        ) as span:
            trace = Trace(self._tracer, span)
            token = _current.set(trace)
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
                _current.reset(token)
                trace.describe({"rpc.grpc.status_code": code.value[0]})
                if code in SERVER_FAULTS:
                    span.set_status(Status(StatusCode.ERROR))
