"""The life of a server, whatever its transports.

Order: listen (health NOT_SERVING) -> load and warm up -> SERVING -> drain: NOT_SERVING, new requests are refused,
running ones finish or are cut at the end of the grace period -> closed.
"""

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from trimserve.api.status import EngineStatus
from trimserve.config import Config
from trimserve.errors import EngineStopped
from trimserve.server.core import Core
from trimserve.server.listening import address_of, listening
from trimserve.server.loop_lag import LoopLag
from trimserve.server.metrics import Metrics
from trimserve.server.metrics_http import MetricsServer
from trimserve.server.transport import Transport

__all__ = ["Server"]

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 0.25
"""How often health follows the engine's state."""

LAST_WORDS_SECONDS = 1.0
"""For the last messages of cut requests to reach their clients."""

STATUS_TIMEOUT_SECONDS = 5.0
"""For the event loop to answer a probe; a slower loop is not healthy."""


class Server:
    """An engine behind its transports, with health and metrics; used once, on one event loop."""

    def __init__(self, core: Core, transports: Sequence[Transport]) -> None:
        """Put it together; nothing listens yet.

        Args:
            core: its engine is not started; the server starts and stops it.
            transports: at least one.
        """
        self._core = core
        self._backend = core.backend
        self._transports = transports
        self._backend.watch_steps(core.metrics.saw_step)
        self._metrics_server: MetricsServer | None = None
        self._follower: asyncio.Task[None] | None = None
        self._lag = LoopLag(core.metrics.event_loop_lag_seconds.labels().observe)
        core.metrics.event_loop_stalled_seconds.set_function(lambda: self._lag.stalled_seconds)
        self._lag_follower: asyncio.Task[None] | None = None

    @property
    def metrics(self) -> Metrics:
        """All metrics."""
        return self._core.metrics

    @property
    def config(self) -> Config:
        """All knobs."""
        return self._core.config

    @property
    def address(self) -> str:
        """`HOST:PORT` of the first transport, once it listens."""
        return self._transports[0].address

    @property
    def http_address(self) -> str | None:
        """`HOST:PORT` of the second transport, HTTP, once it listens; None if it is off."""
        return self._transports[1].address if len(self._transports) > 1 else None

    @property
    def metrics_address(self) -> str | None:
        """`HOST:PORT` of `/metrics`, `/healthz` and `/readyz`, once it listens."""
        server = self._metrics_server
        return None if server is None else address_of(self.config.server.host, server.port)

    async def listen(self) -> None:
        """Accept connections; requests are refused with EngineStopped until `warm_up` is done.

        Raises:
            CredentialsError: the certificate files cannot be used.
            CannotListen: a port is taken, or the host is not ours.
        """
        for transport in self._transports:
            await transport.listen()
        self._lag_follower = asyncio.create_task(self._lag.follow())
        config = self.config.server
        with listening("--metrics-port", config.host, config.metrics_port):
            self._metrics_server = MetricsServer(
                config.host, config.metrics_port, self._core.metrics, self._status_reader()
            )

    async def warm_up(self) -> None:
        """Start the engine; once it is ready, report SERVING.

        Raises:
            Exception: whatever loading or warm-up raised.
        """
        begin = time.monotonic()
        await self._backend.start()
        self._core.metrics.describe_model(self._backend.info)
        self._follower = asyncio.create_task(self._follow())
        self._set_serving(True)
        fields = {"model": self._backend.info.model_id, "address": self.address}
        log.info("serving", extra={**fields, "warm_up_seconds": round(time.monotonic() - begin, 3)})

    async def serve_until(self, is_over: asyncio.Future[Any]) -> None:
        """Wait for a future.

        Raises:
            EngineStopped: the engine died first; without it the server would refuse every request forever.
        """
        death = asyncio.ensure_future(self._backend.death())
        try:
            await asyncio.wait((death, is_over), return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise EngineStopped(f"the engine died: {death.result()!r}") from death.result()
        finally:
            death.cancel()

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain and close: report NOT_SERVING, refuse new requests, let running ones finish, cut the rest.

        Args:
            grace_seconds: for running requests; None is the config's `drain_grace_seconds`.
        """
        grace = self.config.server.drain_grace_seconds if grace_seconds is None else grace_seconds
        end = time.monotonic() + grace
        if self._follower is not None:
            self._follower.cancel()
        self._set_serving(False)
        await self._backend.stop(grace)
        remaining = max(LAST_WORDS_SECONDS, end - time.monotonic())
        await asyncio.gather(*(transport.close(remaining) for transport in self._transports))
        self._core.offload.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        if self._lag_follower is not None:
            self._lag_follower.cancel()
        if self._core.tracing is not None:
            await asyncio.to_thread(self._core.tracing.close)
        log.info("stopped")

    def _set_serving(self, is_serving: bool) -> None:
        for transport in self._transports:
            transport.set_serving(is_serving)

    async def _follow(self) -> None:
        """Keep health in step with the engine."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            self._set_serving(self._backend.status().is_ready)

    def _status_reader(self) -> Callable[[], Awaitable[EngineStatus]]:
        """Reads the status from other threads: the engine's interface belongs to the event loop's thread."""
        loop = asyncio.get_running_loop()

        async def read() -> EngineStatus:
            """Ask the thread of the event loop, and wait a moment."""
            answer: concurrent.futures.Future[EngineStatus] = concurrent.futures.Future()

            def tell() -> None:
                if answer.set_running_or_notify_cancel():
                    answer.set_result(self._backend.status())

            try:
                loop.call_soon_threadsafe(tell)
                return await asyncio.wait_for(asyncio.wrap_future(answer), STATUS_TIMEOUT_SECONDS)
            except (RuntimeError, TimeoutError) as error:  # the loop is closed, or stalls
                raise EngineStopped("the event loop does not answer") from error

        return read
