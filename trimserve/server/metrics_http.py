"""Serves `/metrics`, `/healthz` and `/readyz` over HTTP, on threads of its own.

`/healthz` is liveness: the event loop answers and the engine has not died. `/readyz` is readiness: requests are
accepted.
"""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import MetricsHandler

from trimserve.api.status import EngineStatus
from trimserve.errors import EngineStopped
from trimserve.server.listening import socket_family
from trimserve.server.metrics import Metrics

__all__ = ["MetricsServer"]


class MetricsServer:
    """Serves one server's metrics from construction until `close`."""

    def __init__(self, host: str, port: int, metrics: Metrics, read_status: Callable[[], EngineStatus]) -> None:
        """Listen.

        Args:
            host: address to listen on.
            port: 0 is any free one.
            metrics: what `/metrics` shows.
            read_status: called for every request, in a thread of this server; EngineStopped is answered with 503.
        Raises:
            OSError: the port is taken, or the host is not ours.
        """

        class Server(ThreadingHTTPServer):
            address_family = socket_family(host)

        self._http = Server((host, port), _handler(metrics, read_status))
        self._thread = threading.Thread(
            target=self._http.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="trimserve-metrics",
            daemon=True,
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port in use."""
        return self._http.server_port

    def close(self) -> None:
        """Stop listening; blocks for less than 0.1 seconds."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def _handler(metrics: Metrics, read_status: Callable[[], EngineStatus]) -> type[MetricsHandler]:
    class Handler(MetricsHandler):
        registry = metrics.registry

        def do_GET(self) -> None:  # noqa: N802 the name that http.server calls
            path = urlsplit(self.path).path
            if path not in ("/metrics", "/healthz", "/readyz"):
                self._answer(HTTPStatus.NOT_FOUND)
                return
            try:
                status = read_status()
            except EngineStopped:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE)
                return
            if path == "/metrics":
                metrics.show_status(status)
                super().do_GET()
            else:
                is_well = status.is_alive if path == "/healthz" else status.is_ready
                self._answer(HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE)

        def _answer(self, status: HTTPStatus) -> None:
            body = f"{status.phrase}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
