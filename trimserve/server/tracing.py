"""Traces: a span for each call, continuing its caller's W3C trace context, and a span within it for each stage.

OpenTelemetry is optional (`trimserve[tracing]`) and is imported only if traces are exported. Its own variables, such as
`OTEL_TRACES_SAMPLER`, set everything but the endpoint.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trimserve import __version__
from trimserve.api.chunks import StageSpan
from trimserve.loopback import proxy_options

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

__all__ = ["Trace", "Tracing", "current_trace"]

Attributes = Mapping[str, str | int | float | bool | list[str]]


class Trace:
    """The span of the call that is being answered."""

    def __init__(self, tracer: "Tracer", span: "Span") -> None:
        """Wrap OpenTelemetry's objects.

        Args:
            tracer: makes the spans of stages.
            span: of the call.
        """
        self._tracer = tracer
        self._span = span
        # Read once, so that stages keep their distances when the wall clock is set.
        self._clock_began_ns = time.time_ns() - time.monotonic_ns()

    @property
    def trace_id(self) -> str | None:
        """32 hexadecimal digits, for logs and exemplars; None if the trace is not kept."""
        context = self._span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def describe(self, attributes: Attributes) -> None:
        """Add attributes to the call's span."""
        self._span.set_attributes(attributes)

    def fail(self) -> None:
        """Mark the call as failed through the server's fault."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR))

    def add_stage(self, stage: StageSpan) -> None:
        """Add a span within the call's for a stage that is over."""
        from opentelemetry.trace import set_span_in_context

        begin, end = (self._clock_began_ns + round(at * 1e9) for at in (stage.begin, stage.end))
        self._tracer.start_span(stage.stage, set_span_in_context(self._span), start_time=begin).end(end)


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current_trace() -> Trace | None:
    """The trace of the call in whose context this runs; None without tracing and outside of calls."""
    return _current.get()


class Tracing:
    """Exports traces to one collector."""

    def __init__(self, endpoint: str) -> None:
        """Export on a thread of its own; nothing is sent before there is a span.

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
        # Set from the scheme, because otherwise OTEL_EXPORTER_OTLP_INSECURE could override it.
        exporter = OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http://"), channel_options=options)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("trimserve", __version__)

    def close(self) -> None:
        """Send what is left; blocks for seconds if the collector does not answer."""
        self._provider.shutdown()

    @contextmanager
    def call(self, name: str, metadata: Mapping[str, str], attributes: Attributes) -> Iterator[Trace]:
        """A span around the block, which answers one call; `current_trace` returns it there.

        Args:
            name: of the span.
            metadata: of the call, with lower-case keys; holds the caller's trace context if there is one.
            attributes: known from the start.
        Yields:
            The call's trace.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        with self._tracer.start_as_current_span(
            name,
            TraceContextTextMapPropagator().extract(metadata),
            SpanKind.SERVER,
            attributes,
            record_exception=False,  # messages quote requests
            set_status_on_exception=False,
        ) as span:
            trace = Trace(self._tracer, span)
            token = _current.set(trace)
            try:
                yield trace
            finally:
                _current.reset(token)
