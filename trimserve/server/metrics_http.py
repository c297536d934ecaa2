"""The pages `/metrics`, `/healthz` and `/readyz`, which also come when the event loop of the calls stands still.

`/healthz` is liveness: the event loop answers and the engine has not died. `/readyz` is readiness: requests are
accepted, and what was accepted gets done.
"""

import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from wsgiref.types import WSGIEnvironment

from prometheus_client import make_wsgi_app

from trimserve.api.status import EngineStatus
from trimserve.errors import EngineStopped
from trimserve.server.metrics import Metrics
from trimserve.server.small_http import Page, Question, SmallHttpServer

__all__ = ["MetricsServer"]

REFUSED = re.compile(r"q=0(?:\.0*)?", re.IGNORECASE)
"""Parameter of what a scraper does not take."""

VERSION = re.compile(r"version=(?!\d{1,4}(?:\.\d{1,4})*\Z)", re.IGNORECASE | re.ASCII)
"""How a version begins at which prometheus_client fails; without one it takes its own."""


class MetricsServer:
    """Serves one server's metrics and probes from construction until `close`."""

    def __init__(
        self, host: str, port: int, metrics: Metrics, read_status: Callable[[], Awaitable[EngineStatus]]
    ) -> None:
        """Listen.

        Args:
            host: address to listen on.
            port: 0 is any free one.
            metrics: what `/metrics` shows.
            read_status: called for every page, on a thread of this server; EngineStopped makes the probes 503, and
                the gauges of the engine stay as they were but for `trimserve_model_ready`.
        Raises:
            OSError: the port is taken, or the host is not ours.
        """
        self._metrics = metrics
        self._read_status = read_status
        self._exposition = make_wsgi_app(metrics.registry)
        self._http = SmallHttpServer(host, port, self._page, "trimserve-metrics")

    @property
    def port(self) -> int:
        """The port in use."""
        return self._http.port

    def close(self) -> None:
        """Stop listening."""
        self._http.close()

    async def _page(self, question: Question) -> Page:
        if question.path not in ("/metrics", "/healthz", "/readyz"):
            return Page.of(HTTPStatus.NOT_FOUND)
        try:
            status = await self._read_status()
        except EngineStopped:
            status = None
        if question.path == "/metrics":
            return self._exposed(question, status)
        is_well = status is not None and (status.is_alive if question.path == "/healthz" else status.is_ready)
        return Page.of(HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE)

    def _exposed(self, question: Question, status: EngineStatus | None) -> Page:
        """All metrics, in the format and the encoding that the scraper asks for."""
        environ: WSGIEnvironment = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": question.query}
        for name in ("accept", "accept-encoding"):
            if name in question.headers:
                environ[f"HTTP_{name.upper().replace('-', '_')}"] = _taken(question.headers[name])
        headers: dict[str, str] = {}
        with self._http.spare_descriptor():  # to look at files, of the process and of credentials
            self._metrics.refresh(status)
            content = b"".join(self._exposition(environ, lambda _status, pairs: headers.update(pairs)))
        return Page(HTTPStatus.OK, content, headers)


def _taken(accepted: str) -> str:
    """A list of what a scraper takes, such as the header `accept`, in words that prometheus_client reads."""
    taken = []
    for each in accepted.replace('"', "").split(","):
        parameters = [parameter.strip() for parameter in each.split(";")]
        if not any(map(REFUSED.fullmatch, parameters)):
            taken.append(";".join(parameter for parameter in parameters if not VERSION.match(parameter)))
    return ",".join(taken)
