"""The HTTP server: uvicorn's protocol and Starlette's routes on the event loop that gRPC has.

uvicorn's own server is not used: it would handle signals, and it knows no certificates that change.
"""

import asyncio
import contextlib
import resource
import socket

from uvicorn.config import Config
from uvicorn.server import ServerState

from trimserve.server.core import Core
from trimserve.server.http.connection import Connection, Connections
from trimserve.server.http.inbox import Inbox
from trimserve.server.http.routes import Routes
from trimserve.server.http.tls import server_context
from trimserve.server.listening import address_of, listening, socket_family

__all__ = ["HttpTransport"]

MAX_CONNECTIONS = 1024
"""Open at once."""

MAX_CONNECTIONS_RATIO = 0.25
"""The same, as a share of the descriptors that the process may have; the others are for gRPC, files and metrics."""

MAX_HEADER_BYTES = 32 * 2**10
"""Of a request's line and headers."""

IDLE_SECONDS = 75
"""A connection without requests is closed then: later than clients close theirs, so that none uses a closing one."""

HANDSHAKE_SECONDS = 5.0
"""For TLS."""

BACKLOG = 512
"""Connections that the system keeps until they are accepted."""

LAST_CLOSE_SECONDS = 1.0
"""For sockets to close."""


class HttpTransport:
    """The `Transport` of HTTP."""

    def __init__(self, core: Core) -> None:
        """Listen on nothing yet.

        Args:
            core: what is served, and its limits; `http_port` is set.
        """
        self._core = core
        self._config = core.config.server
        self._inbox = Inbox(core)
        self._routes = Routes(core, self._inbox)
        self._connections = Connections()
        core.metrics.http_connections.set_function(lambda: len(self._connections))
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._port: int | None = None

    @property
    def address(self) -> str:
        """`HOST:PORT`, once it listens."""
        return address_of(self._config.host, self._port)

    async def listen(self) -> None:
        """Accept connections; `/health` says that nothing is served.

        Raises:
            CredentialsError: the certificate files cannot be used.
            CannotListen: the port is taken, or the host is not ours.
        """
        host, port = self._config.host, self._config.http_port
        assert port is not None
        uvicorn = Config(
            self._routes.app(),
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,  # anybody could claim an address
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=IDLE_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._connections.most = _max_connections()
        tls = server_context(self._config, self._core.metrics)
        with listening("--http-port", host, port):
            listener = socket.create_server((host, port), family=socket_family(host), backlog=BACKLOG)
        self._port = listener.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self._connections, uvicorn, self._state),
            sock=listener,
            ssl=tls,
            backlog=BACKLOG,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_SECONDS,
        )

    def set_serving(self, is_serving: bool) -> None:
        """Change what `/health` says."""
        self._routes.is_serving = is_serving

    async def close(self, grace_seconds: float) -> None:
        """End requests whose body has not arrived, stop listening, and close; also if it never listened.

        Args:
            grace_seconds: for the last words of open answers.
        """
        self._inbox.close()
        if self._server is None:
            return
        self._server.close()
        self._connections.shut_down()
        if tasks := list(self._state.tasks):
            _, late = await asyncio.wait(tasks, timeout=grace_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._connections.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), LAST_CLOSE_SECONDS)


def _max_connections() -> int:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, int(MAX_CONNECTIONS_RATIO * descriptors))
