"""`trimserve serve`: serves until it is told to end, and says meanwhile what it does."""

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from trimserve import __version__
from trimserve.config import Config
from trimserve.knobs import with_knobs

if TYPE_CHECKING:
    from trimserve.server.lifecycle import Server

__all__ = ["serve"]

log = logging.getLogger(__name__)

_FIRST_LINE_SECONDS = 1.0
"""How long standard error may take the first line."""


@with_knobs("model", "engine", "server")
def serve(*, config: Config) -> None:
    """Serve a model over gRPC until SIGTERM, SIGINT or SIGHUP."""
    from trimserve.server.logs import configure_logging

    begin = time.monotonic()
    lines = configure_logging(config.server.log_level)  # before the slow imports, to say so
    log.info("loading", extra={"model": config.model.model or "trimserve-tiny", "version": __version__})
    lines.drain(_FIRST_LINE_SECONDS)

    from trimserve.model.loading import describe_model
    from trimserve.serve import make_runner, make_server
    from trimserve.server import running

    describe_model(config.model, config.engine)  # refuses a bad checkpoint before anything listens

    def announce(serving: "Server") -> None:
        """Say where it listens, once it does."""
        metrics = f"metrics on {serving.metrics_address}"
        ready = f"ready after {time.monotonic() - begin:.1f} s"
        http = f", HTTP on {serving.http_address}" if serving.http_address else ""
        print(f"trimserve {__version__}: gRPC on {serving.address}, {metrics}{http} ({ready})", flush=True)

    server = make_server(make_runner(config), config)
    asyncio.run(running.serve(server, on_serving=announce))
