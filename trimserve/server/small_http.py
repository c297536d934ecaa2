"""A small HTTP/1.1 server on a thread of its own, for pages that must come whatever the rest of the process does.

h11 reads and writes the protocol. Uvicorn, hypercorn and waitress bound the time between two requests, but none of them
the time for the first one, and none makes room for a new connection when silent ones have taken all places. Here each
connection has one request and a few seconds for all of it. It knows no page.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus

import h11

from trimserve.server.descriptors import SpareDescriptors, are_exhausted
from trimserve.server.listening import socket_family
from trimserve.server.target import path_of

__all__ = ["Page", "Pages", "Question", "SmallHttpServer"]

log = logging.getLogger(__name__)

CONNECTION_SECONDS = 10.0
"""From accepting a connection until its answer has been taken."""

MAX_CONNECTIONS = 64
"""Open at once; one more closes the one that has been silent for longest."""

NUM_SPARE_DESCRIPTORS = 16
"""Connections that are taken when the process has no descriptors left."""

MAX_HEADER_BYTES = 16 * 1024
"""Of a request line and its headers."""

CHUNK_BYTES = 16 * 1024

PAUSE_SECONDS = 0.05
"""Before accepting again where the system could not."""

STOP_SECONDS = 1.0
"""For the thread to end."""


@dataclass(frozen=True, slots=True)
class Question:
    """A GET request, or a HEAD request, which is answered in the same way but for the content."""

    path: str
    """Without the query."""
    query: str
    headers: Mapping[str, str]
    """By lower-case name."""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    status: HTTPStatus
    content: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "text/plain; charset=utf-8"})

    @classmethod
    def of(cls, status: HTTPStatus) -> "Page":
        """A status alone."""
        return cls(status, f"{status.phrase}\n".encode())


Pages = Callable[[Question], Awaitable[Page]]
"""Answers a question, on the server's thread."""


class SmallHttpServer:
    """Answers from construction until `close`."""

    def __init__(self, host: str, port: int, pages: Pages, name: str) -> None:
        """Listen.

        Args:
            host: address to listen on.
            port: 0 is any free one.
            pages: what is answered.
            name: of the thread.
        Raises:
            OSError: the port is taken, or the host is not ours.
        """
        self._listener = socket.create_server((host, port), family=socket_family(host), backlog=MAX_CONNECTIONS)
        self._listener.setblocking(False)
        self._port: int = self._listener.getsockname()[1]
        self._pages = pages
        self._spares = SpareDescriptors(NUM_SPARE_DESCRIPTORS)
        self._silent: dict[asyncio.Task[None], None] = {}
        """Connections whose request has not arrived yet, the oldest first."""
        self._answered: dict[asyncio.Task[None], None] = {}
        self._loop = asyncio.new_event_loop()
        self._living = self._loop.create_task(self._live())
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port in use."""
        return self._port

    def spare_descriptor(self) -> AbstractContextManager[None]:
        """For a page that opens files one after the other; to be used on the server's thread."""
        return self._spares.lent()

    def close(self) -> None:
        """Stop listening and drop what is open; blocks for a moment. A second call does nothing."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._living.cancel)
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        with self._listener, suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._living)
        self._spares.close()
        self._loop.close()

    async def _live(self) -> None:
        try:
            await self._accept()
        finally:
            open_now = [*self._silent, *self._answered]
            for task in open_now:
                task.cancel()
            await asyncio.gather(*open_now, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listener)
            except OSError as error:
                if not (are_exhausted(error) and self._spares.give_up()):
                    self._make_room()
                    await asyncio.sleep(PAUSE_SECONDS)
                continue
            if len(self._silent) + len(self._answered) >= MAX_CONNECTIONS:
                self._make_room()
            task = self._loop.create_task(self._serve(connection))
            self._silent[task] = None
            task.add_done_callback(partial(self._ended, connection))

    def _make_room(self) -> None:
        """End the connection that has been silent for longest, else the one that takes longest to read its answer."""
        connections = self._silent or self._answered
        for task in connections:
            task.cancel()
            del connections[task]
            return

    def _ended(self, connection: socket.socket, task: "asyncio.Task[None]") -> None:
        connection.close()  # here, because a task that is cancelled before its first step does nothing
        self._silent.pop(task, None)
        self._answered.pop(task, None)
        self._spares.refill()

    async def _serve(self, connection: socket.socket) -> None:
        """One request and its answer; whatever the client does wrong ends its connection only."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES)
        with suppress(OSError, TimeoutError, h11.ProtocolError):
            connection.setblocking(False)
            async with asyncio.timeout(CONNECTION_SECONDS):
                has_content = True
                try:
                    request = await self._request(http, connection)
                except h11.RemoteProtocolError as error:
                    page = Page.of(HTTPStatus(error.error_status_hint))
                else:
                    if request is None:
                        return
                    page, has_content = await self._page(request), request.method != b"HEAD"
                await self._loop.sock_sendall(connection, _written(http, page, has_content=has_content))
                connection.shutdown(socket.SHUT_WR)

    async def _request(self, http: h11.Connection, connection: socket.socket) -> h11.Request | None:
        """The request; None if the client leaves without one."""
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await self._loop.sock_recv(connection, CHUNK_BYTES))
        return event if isinstance(event, h11.Request) else None

    async def _page(self, request: h11.Request) -> Page:
        task = asyncio.current_task()
        if task in self._silent:
            del self._silent[task]
            self._answered[task] = None
        if request.method not in (b"GET", b"HEAD"):
            return replace(Page.of(HTTPStatus.METHOD_NOT_ALLOWED), headers={"Allow": "GET, HEAD"})
        target, _, query = request.target.decode("latin-1").partition("?")
        path = path_of(target)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers}
        try:
            return await self._pages(Question(path, query, headers))
        except Exception:
            log.exception("page failed", extra={"path": path[:128]})
            return Page.of(HTTPStatus.INTERNAL_SERVER_ERROR)


def _written(http: h11.Connection, page: Page, *, has_content: bool) -> bytes:
    """An answer as bytes."""
    headers = {**page.headers, "Content-Length": str(len(page.content)), "Connection": "close"}
    events: list[h11.Event] = [
        h11.Response(status_code=page.status, headers=list(headers.items()), reason=page.status.phrase)
    ]
    if has_content:
        events.append(h11.Data(data=page.content))
    return b"".join(http.send(event) or b"" for event in (*events, h11.EndOfMessage()))
