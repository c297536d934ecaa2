"""One call: counted, timed, logged, and ended with a status that has details."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc.aio import ServicerContext

from trimserve.errors import TrimserveError
from trimserve.server.deadline import Deadline
from trimserve.server.grpc.convert import adopt_request_id
from trimserve.server.grpc.statuses import REQUEST_ID_KEY, code_of, trailer
from trimserve.server.metrics import Metrics
from trimserve.server.tally import Count
from trimserve.server.tracing import current_trace

__all__ = ["Rpc"]

log = logging.getLogger(__name__)

MAX_USER_AGENT_CHARS = 128
"""Of a user agent in the log."""

MAX_METHOD_CHARS = 128
"""Of a method that does not exist in the log."""

Context = ServicerContext[Any, Any]
Labels = tuple[str, str, str]


class Rpc:
    """A call, from its arrival to its status."""

    def __init__(self, metrics: Metrics, method: str, labels: Labels | None, context: Context) -> None:
        """Look at what gRPC tells of it now; once it has ended, gRPC tells less.

        Args:
            metrics: count it.
            method: its path.
            labels: of its metrics; None for calls that are counted and logged only if they are refused: health checks,
                whose number says nothing, and methods that do not exist, of which clients could make up any number.
            context: gRPC's.
        """
        self.context = context
        self.peer = context.peer()
        """Address and port."""
        self.client = ""
        """Empty until it is admitted."""
        self.is_accepted = False
        """Whether its message was read."""
        self.metadata: dict[str, str | bytes] = dict(context.invocation_metadata() or ())
        self.request_id = adopt_request_id(None, str(self.metadata.get(REQUEST_ID_KEY, "")))
        self._metrics = metrics
        self._method = method[:MAX_METHOD_CHARS]
        self._labels = labels
        self._sent = Count() if labels is None else metrics.rpc_messages_sent.labels(*labels)
        self.request_bytes = 0
        """Of its message, once it is read."""
        self._num_sent = 0

    @property
    def address(self) -> str:
        """Of the client, without its port."""
        return self.peer.rpartition(":")[0]

    @property
    def name(self) -> str:
        """What the client is called if it has no token: the name in its certificate, else its address."""
        if identities := self.context.peer_identities():
            return min(identities).decode(errors="replace")
        return self.address

    def accept(self, request: Message) -> None:
        """Its message was read."""
        self.is_accepted = True
        self.request_bytes = request.ByteSize()
        if self._labels is not None:
            self._metrics.rpc_messages_received.labels(*self._labels).inc()
        self.request_id = adopt_request_id(request, self.request_id)

    async def send(self, response: Message) -> None:
        """Send a message."""
        try:
            await self.context.write(response)
        except grpc.aio.InternalError as error:  # the client went away during the write
            raise asyncio.CancelledError from error
        self._sent.inc()
        self._num_sent += 1

    @asynccontextmanager
    async def answered(self) -> AsyncIterator[None]:
        """Around its handler; turns any exception into its status."""
        begin, deadline, refused = time.monotonic(), Deadline(self.context.time_remaining()), False
        told: dict[str, str] = {}
        if self._labels is not None:
            self._metrics.rpcs_started.labels(*self._labels).inc()
        code = grpc.StatusCode.OK
        try:
            yield
            self.context.set_trailing_metadata(((REQUEST_ID_KEY, self.request_id),))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            if deadline.has_passed():
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        except Exception as error:  # noqa: BLE001  # becomes the status of the call
            code, refused, told = code_of(error), self._count_refusal(error), _log_fields(error)
            await self._abort(error, code)
        finally:
            _tell_trace(self.request_id)
            seconds = time.monotonic() - begin
            if self._labels is not None:
                self._metrics.rpcs_handled.labels(*self._labels, code.name).inc()
                self._metrics.rpc_handling_seconds.labels(*self._labels).observe(seconds)
            if self._labels is not None or refused:
                log.info("rpc", extra={**self._account(), "code": code.name, **told, "seconds": round(seconds, 6)})

    async def _abort(self, error: Exception, code: grpc.StatusCode) -> None:
        if code is grpc.StatusCode.INTERNAL:
            log.error("rpc failed", exc_info=error, extra={"request_id": self.request_id})
        _forget_frames(error)
        try:
            await self.context.abort(code, *trailer(error, self.request_id))
        except grpc.aio.InternalError as gone:  # gRPC has ended the call itself
            raise asyncio.CancelledError from gone

    def _count_refusal(self, error: Exception) -> bool:
        if self.is_accepted or not isinstance(error, TrimserveError):
            return False
        self._metrics.refused_calls.labels(error.reason.lower()).inc()
        return True

    def _account(self) -> dict[str, str | int]:
        """Its fields in the log: who called what, and how much was sent each way; no content."""
        service, _, method = self._method.removeprefix("/").rpartition("/")
        return {
            "service": service,
            "method": method,
            "request_id": self.request_id,
            "client": self.client,
            "peer": self.peer,
            "user_agent": str(self.metadata.get("user-agent", ""))[:MAX_USER_AGENT_CHARS],
            "request_bytes": self.request_bytes,
            "messages_sent": self._num_sent,
        }


def _log_fields(error: Exception) -> dict[str, str]:
    return error.log_fields if isinstance(error, TrimserveError) else {}


def _forget_frames(error: BaseException) -> None:
    """Let go of what the frames of an error and its causes hold: gRPC keeps the error after the call has ended."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__


def _tell_trace(request_id: str) -> None:
    trace = current_trace()
    if trace is not None:
        trace.describe({"trimserve.request_id": request_id})
