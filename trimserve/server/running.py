"""Three ways to run a server: until a signal, within a program's event loop, and in a thread."""

import asyncio
import concurrent.futures
import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any

from trimserve.server.descriptors import raise_descriptor_limit
from trimserve.server.lifecycle import Server
from trimserve.server.logs import configure_logging
from trimserve.server.loop_watch import loop_watched

__all__ = ["InProcessServer", "running_server", "serve"]

log = logging.getLogger(__name__)


_LOOK_UP_SECONDS = 0.5
LAST_LINES_SECONDS = 2.0
"""For the last lines of the log to be written."""


async def serve(server: Server, *, on_serving: Callable[[Server], None] | None = None) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain; a second SIGTERM or SIGINT ends the process at once.

    The process is taken to be the server's: this configures its logging and raises its limit of open files. Where an
    exception would be raised but nobody reads standard error, the process ends with status 1 instead: Python would wait
    for ever to print a traceback.

    Args:
        server: not listening.
        on_serving: called once requests are accepted, for instance to print the address.
    Raises:
        CredentialsError: the certificate files cannot be used.
        CannotListen: a port is taken, or the host is not ours.
        EngineStopped: the engine died or hangs; the process should end, so that a supervisor restarts it.
        Exception: whatever loading or warm-up raised.
    """
    config = server.config
    raise_descriptor_limit()
    lines = configure_logging(config.server.log_level, server.metrics.log_lines_dropped.inc)
    try:
        async with loop_watched(config.engine.step_timeout_seconds):
            await _serve_until(_signalled(), server, on_serving or (lambda _: None))
    except BaseException:
        if not lines.drain(LAST_LINES_SECONDS):
            os._exit(1)
        raise
    lines.drain(LAST_LINES_SECONDS)


async def _serve_until(is_over: asyncio.Future[Any], server: Server, on_serving: Callable[[Server], None]) -> None:
    """Listen, warm up, serve and close; `is_over` may be done at any time, even before warm-up is."""
    try:
        await server.listen()
        log.info("listening", extra=_addresses(server))
        warm_up = asyncio.ensure_future(server.warm_up())
        await asyncio.wait((warm_up, is_over), return_when=asyncio.FIRST_COMPLETED)
        if warm_up.done():
            await warm_up
            gc.collect()
            gc.freeze()  # what is loaded by now stays: scanning it again would stall every stream
            on_serving(server)
            await server.serve_until(is_over)
        else:
            warm_up.cancel()
            with suppress(asyncio.CancelledError):
                await warm_up
    finally:
        await server.stop()


def _addresses(server: Server) -> dict[str, str | None]:
    http = {} if server.http_address is None else {"http": server.http_address}
    return {"address": server.address, **http, "metrics": server.metrics_address}


@asynccontextmanager
async def running_server(server: Server) -> AsyncIterator[Server]:
    """Serve during the block, then drain; for programs with an event loop.

    Args:
        server: not listening.
    Raises:
        CredentialsError: the certificate files cannot be used.
        CannotListen: a port is taken, or the host is not ours.
        Exception: whatever loading or warm-up raised.
    """
    try:
        await server.listen()
        await server.warm_up()
        yield server
    finally:
        await server.stop()


class InProcessServer:
    """A server in a thread of this process, for programs without an event loop. A context manager.

    >>> with InProcessServer(make_server(runner, config)) as server:  # doctest: +SKIP
    ...     client = Client(server.address)
    """

    def __init__(self, server: Server) -> None:
        """Start nothing yet.

        Args:
            server: not listening.
        """
        self._server = server
        self._ready: concurrent.futures.Future[tuple[str, str | None, str | None]] = concurrent.futures.Future()
        self._is_over: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="trimserve-server", daemon=True)

    def __enter__(self) -> "InProcessServer":
        """Wait until requests are accepted; raises what `running_server` raises.

        An exception in this thread, such as KeyboardInterrupt, also ends the server, without waiting for a model that
        is being loaded.
        """
        self._thread.start()
        try:
            # Python may miss a signal that comes while a thread begins to wait, so this one looks up now and then.
            while not concurrent.futures.wait([self._ready], _LOOK_UP_SECONDS).done:
                pass
            self._ready.result()
        except BaseException:
            self._is_over.set_result(None)
            if self._ready.done():
                self._thread.join()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain and close; raises what ended the server early, unless the block itself raised."""
        self._is_over.set_result(None)
        self._thread.join()
        if error is None and self._failure is not None:
            raise self._failure

    @property
    def address(self) -> str:
        """`HOST:PORT` of the first transport."""
        return self._ready.result()[0]

    @property
    def http_address(self) -> str | None:
        """`HOST:PORT` of HTTP; None if it is off."""
        return self._ready.result()[1]

    @property
    def metrics_address(self) -> str | None:
        """`HOST:PORT` of `/metrics`, `/healthz` and `/readyz`; None if they are off."""
        return self._ready.result()[2]

    async def _serve(self) -> None:
        def announce(server: Server) -> None:
            self._ready.set_result((server.address, server.http_address, server.metrics_address))

        try:
            await _serve_until(asyncio.wrap_future(self._is_over), self._server, announce)
        except BaseException as error:  # noqa: BLE001  # handed to the other thread
            if self._ready.done():
                self._failure = error
            else:
                self._ready.set_exception(error)


def _signalled() -> asyncio.Future[signal.Signals]:
    """Done at the first signal to stop; a later SIGTERM or SIGINT has its default effect, a SIGHUP none.

    A terminal that closes sends SIGHUP, once or twice; `nohup` has it ignored, and so it stays.
    """
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[signal.Signals] = loop.create_future()

    def hear(number: signal.Signals) -> None:
        """Begin to drain; a second signal ends the process as it does by default."""
        if signalled.done():
            return
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        log.info("draining", extra={"signal": number.name})
        signalled.set_result(number)

    is_without_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    for number in (signal.SIGTERM, signal.SIGINT, *(() if is_without_terminal else (signal.SIGHUP,))):
        loop.add_signal_handler(number, hear, number)
    return signalled
