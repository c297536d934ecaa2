"""Log format: on standard error, lines for people where that is a terminal, JSON for machines elsewhere.

Modules log through the standard library with `extra=` fields, so a program that embeds the server keeps its own
logging; only `serve` calls `configure_logging`.
"""

import logging
import sys
from collections.abc import Callable

import structlog

from trimserve.server.queued_log import QueuedHandler
from trimserve.server.tracing import current_trace

__all__ = ["configure_logging"]


def configure_logging(level: str, dropped: Callable[[int], None] = lambda _: None) -> QueuedHandler:
    """Log to standard error, without waiting for whoever reads it.

    Args:
        level: lowest severity of trimserve's own records; those of other packages are logged from `warning` on.
        dropped: told of lines that could not be written, on any thread.
    Returns:
        What holds the lines that are not written yet.
    """
    # Plain tracebacks: rich ones show local variables, which hold prompts and images.
    renderers: list[structlog.types.Processor]
    renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    if sys.stderr.isatty():
        renderers = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    handler = QueuedHandler(sys.stderr, dropped)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _add_trace_id,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderers,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("trimserve").setLevel(level.upper())
    return handler


def _add_trace_id(_logger: object, _method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """Link a line about a call to its trace."""
    trace = current_trace()
    if trace is not None and trace.trace_id is not None:
        event["trace_id"] = trace.trace_id
    return event
