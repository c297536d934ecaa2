"""One HTTP request: counted, timed, logged, traced, and ended with an answer or an error in OpenAI's shape."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from http import HTTPStatus
from typing import Any

from starlette.types import Receive, Scope, Send

from trimserve.api.bounds import REQUEST_ID
from trimserve.errors import TrimserveError
from trimserve.server.core import Core
from trimserve.server.http.inbox import linger
from trimserve.server.http.statuses import CLIENT_LEFT, error_body, headers_of, status_of
from trimserve.server.tracing import Trace

__all__ = ["CLIENT_KEY", "DONE", "Exchange", "event"]

log = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
"""Header that names a request, in both directions."""

CLIENT_KEY = "trimserve_client"
"""In the state of ASGI's scope: what the transport calls the client."""

MAX_USER_AGENT_CHARS = 128
"""Of a user agent in the log."""

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def event(content: Mapping[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + _json(content) + b"\n\n"


class Exchange:
    """A request, from its arrival to the end of its answer."""

    def __init__(self, core: Core, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at its headers.

        Args:
            core: its metrics count it, its tracing traces it.
            route: what it is counted as.
            scope: ASGI's.
            receive: ASGI's.
            send: ASGI's.
        """
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        wanted = self.headers.get(REQUEST_ID_KEY, "")
        self.request_id = wanted if REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex
        self.peer: str = scope["state"].get(CLIENT_KEY, "")
        """What the client is called if it has no token: the name in its certificate, else its address."""
        self.client = ""
        """Empty until it is admitted."""
        self.request_bytes = 0
        """Of its body, once it is read."""
        self.receive = receive
        self._core = core
        self._route = route
        self._method: str = scope["method"]
        self._send = send
        self._status: int | None = None
        self._num_sent = 0
        self._log_fields: dict[str, str] = {}
        """Of what it was refused for."""
        self._is_read = False
        self._is_accepted = False
        self._watcher: asyncio.Task[None] | None = None

    def received(self, num_bytes: int) -> None:
        """Its body is there."""
        self._is_read, self.request_bytes = True, num_bytes

    def accepted(self) -> None:
        """Its body was understood."""
        self._is_accepted = True

    @asynccontextmanager
    async def answered(self) -> AsyncIterator[None]:
        """Around its handler; turns any exception into an answer, and the leaving of the client into nothing."""
        begin = time.monotonic()
        status: int | None = None
        with self._span() as trace:
            try:
                try:
                    yield
                except Exception as error:  # noqa: BLE001  # becomes the answer
                    status = status_of(error)
                    await self._refuse(error, HTTPStatus(status))
                status = status or self._status
            except asyncio.CancelledError:
                status = CLIENT_LEFT
                # The one who cancels is the watcher, or a server that has waited long enough: neither waits for this.
            finally:
                if self._watcher is not None:
                    self._watcher.cancel()
                self._end(status or CLIENT_LEFT, time.monotonic() - begin, trace)

    @asynccontextmanager
    async def until_client_leaves(self) -> AsyncIterator[None]:
        """Cancel the block when the client leaves; to be entered once the body is read."""
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await self.receive())["type"] != "http.disconnect":
                pass
            task.cancel()

        self._watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            self._watcher.cancel()

    async def answer(
        self, content: Mapping[str, Any], status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole answer.

        Args:
            content: becomes JSON.
            status: of HTTP.
            headers: more than those of the content.
        """
        body = _json(content)
        kind = {"content-type": "application/json", "content-length": str(len(body))}
        await self._begin(status, {**kind, **(headers or {})})
        await self.say(body, more_body=False)

    async def begin_stream(self) -> None:
        """Begin an answer of events."""
        # Proxies that collect answers, as nginx does, would keep tokens back.
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        await self._begin(HTTPStatus.OK, {**headers, "x-accel-buffering": "no"})

    async def say(self, content: bytes, *, more_body: bool = True) -> None:
        """Send a part of an answer that has begun."""
        await self._send({"type": "http.response.body", "body": content, "more_body": more_body})
        self._num_sent += 1

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        pairs = {**headers, REQUEST_ID_KEY: self.request_id}.items()
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _refuse(self, error: Exception, status: HTTPStatus) -> None:
        if isinstance(error, TrimserveError):
            self._log_fields = error.log_fields
            if not self._is_accepted:
                self._core.metrics.refused_calls.labels(error.reason.lower()).inc()
        if status is HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("request failed", exc_info=error, extra={"request_id": self.request_id})
        content = error_body(error, self.request_id)
        if self._status is not None:  # the stream has begun
            await self.say(event(content), more_body=False)
            return
        headers = headers_of(error)
        if self._is_read or self._method in ("GET", "HEAD"):
            await self.answer(content, status, headers)
            return
        body = _json(content)
        kind = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        await self._begin(status, {**kind, **headers})
        await self.say(body)
        await linger(self.receive)
        await self.say(b"", more_body=False)

    def _span(self) -> Any:
        tracing = self._core.tracing
        if tracing is None:
            return nullcontext()
        attributes = {"http.request.method": self._method, "http.route": self._route}
        return tracing.call(f"{self._method} {self._route}", self.headers, attributes)

    def _end(self, status: int, seconds: float, trace: Trace | None) -> None:
        if trace is not None:
            trace.describe({"http.response.status_code": int(status), "trimserve.request_id": self.request_id})
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                trace.fail()
        self._core.metrics.http_requests.labels(self._route, str(int(status))).inc()
        account = {
            "method": self._method,
            "route": self._route,
            "request_id": self.request_id,
            "client": self.client,
            "peer": self.peer,
            "user_agent": self.headers.get("user-agent", "")[:MAX_USER_AGENT_CHARS],
            "request_bytes": self.request_bytes,
            "messages_sent": self._num_sent,
        }
        log.info("http", extra={**account, "status": int(status), **self._log_fields, "seconds": round(seconds, 6)})


def _json(content: Mapping[str, Any]) -> bytes:
    # ASCII, because some clients take U+2028 and its like for the end of an event's line.
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
