"""One HTTP connection: how long it may be silent, how many there may be, and who is at its other end."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from trimserve.errors import InvalidRequest, MessageLate
from trimserve.server.http.exchange import CLIENT_KEY
from trimserve.server.http.statuses import error_body
from trimserve.server.transport import KEEPALIVE_SECONDS

__all__ = ["Connection", "Connections"]

HEADER_SECONDS = 10.0
"""From accepting a connection, or the first byte of another request on it, until the request's headers are there."""

TAKE_SECONDS = 30.0
"""In which a client must take something of an answer that fills the system's buffers."""

PROBES = 4
"""Signs of life that a silent client is asked for before it counts as gone, within 20 seconds."""

PROBE_SECONDS = 5


class Connections:
    """All connections of a server; when there are too many, those go that have no request."""

    def __init__(self) -> None:
        """Hold none yet."""
        self.most = 0
        """Open at once."""
        self._open: dict[Connection, None] = {}
        """The one that has been open for longest first."""

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def add(self, connection: "Connection") -> bool:
        """Take one more; False if there is no room for it."""
        if len(self._open) >= self.most:
            idle = next((each for each in self._open if each.is_idle), None)
            if idle is None:
                return False
            idle.abort()
        self._open[connection] = None
        return True

    def remove(self, connection: "Connection") -> None:
        """One is closed."""
        self._open.pop(connection, None)

    def abort(self) -> None:
        """Close all at once."""
        for connection in list(self._open):
            connection.abort()

    def shut_down(self) -> None:
        """Close those without a request now, the others once they have their answer."""
        for connection in list(self._open):
            connection.shutdown()


class Connection(H11Protocol):
    """uvicorn's protocol, with bounds on the time of everything that a client does."""

    def __init__(self, connections: Connections, config: Config, state: ServerState) -> None:
        """Not connected yet.

        Args:
            connections: all of the server.
            config: uvicorn's.
            state: what uvicorn's protocols share.
        """
        super().__init__(config, state, {})
        self._connections = connections
        self._header_clock = _Clock(self._headers_are_late)
        self._take_clock = _Clock(self.abort)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def abort(self) -> None:
        """Close it at once."""
        self._connections.remove(self)
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected, and shook hands where there is TLS."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        if not self._connections.add(self):
            transport.abort()
            return
        self.app_state = {CLIENT_KEY: _client_of(transport)}
        _ask_for_life(transport.get_extra_info("socket"), round(KEEPALIVE_SECONDS))
        self._header_clock.start(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by whomever."""
        self._connections.remove(self)
        self._header_clock.stop()
        self._take_clock.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        super().data_received(data)
        if not self.is_idle:
            self._header_clock.stop()
        elif not self.transport.is_closing():
            self._header_clock.start(HEADER_SECONDS)

    def pause_writing(self) -> None:
        """The client takes less than there is for it."""
        super().pause_writing()
        self._take_clock.start(TAKE_SECONDS)

    def resume_writing(self) -> None:
        """It took what there was."""
        super().resume_writing()
        self._take_clock.stop()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's
        """Answer what is no HTTP."""
        self._answer(400, InvalidRequest("request", "must be HTTP/1.1"))

    def _headers_are_late(self) -> None:
        if self.is_idle and not self.transport.is_closing():
            late = MessageLate(f"the request's headers did not arrive within {HEADER_SECONDS:g} seconds")
            self._answer(408, late)

    def _answer(self, status: int, error: Exception) -> None:
        """Send an error before, or instead of, a request's own answer, and close."""
        body = json.dumps(error_body(error, "")).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer has begun
            self.transport.abort()
        else:
            self.transport.close()


class _Clock:
    """Calls something after a time, unless it is stopped before."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Begin, unless it runs already."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(seconds, self._strike)

    def stop(self) -> None:
        """Do nothing any more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _strike(self) -> None:
        self._handle = None
        self._then()


def _client_of(transport: asyncio.Transport) -> str:
    """What gRPC would call the client: the name in its certificate, else its address."""
    certificate: dict[str, Any] = transport.get_extra_info("peercert") or {}
    names: list[str] = [name for _, name in certificate.get("subjectAltName", ())]
    names = names or [value for each in certificate.get("subject", ()) for key, value in each if key == "commonName"]
    if names:
        return min(names)
    host = str(transport.get_extra_info("peername", ("",))[0])
    return f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}"


def _ask_for_life(connection: socket.socket, idle_seconds: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", idle_seconds), ("TCP_KEEPINTVL", PROBE_SECONDS), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):  # of Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
