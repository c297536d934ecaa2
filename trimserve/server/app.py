"""Puts the server together and runs it: until a signal, within a program's event loop, or in a thread.

Order of life: listen (health NOT_SERVING) -> load and warm up -> SERVING -> SIGTERM -> NOT_SERVING, new
requests are refused -> running ones finish or are cut at the end of the grace period -> closed.
"""

import asyncio
import concurrent.futures
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trimserve.api.status import EngineStatus
from trimserve.config import Config
from trimserve.engine.watchdog import loop_watched
from trimserve.errors import CannotListen, EngineStopped
from trimserve.server.certificates import server_credentials
from trimserve.server.gate import Gate
from trimserve.server.grpc.health import Health
from trimserve.server.grpc.interceptors import RpcInterceptor
from trimserve.server.grpc.service import SERVICES, GenerationService, ModelService
from trimserve.server.grpc.transport import OTHER_RPCS, server_options
from trimserve.server.logs import configure_logging
from trimserve.server.metrics import Metrics
from trimserve.server.metrics_http import MetricsServer, socket_family
from trimserve.server.runner import Runner
from trimserve.server.tracing import Tracing
from trimserve.v1 import generation_pb2_grpc, model_pb2_grpc

__all__ = ["InProcessServer", "Server", "running_server", "serve"]

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 0.25
"""How late health may tell that the engine has died."""

LAST_WORDS_SECONDS = 1.0
"""For the last messages of requests that were cut to reach their clients."""

STATUS_TIMEOUT_SECONDS = 5.0
"""For the event loop to answer a scrape; a loop that takes longer is not healthy."""


class Server:
    """One gRPC server around one runner, with health, metrics and reflection; used once, in one loop."""

    def __init__(self, runner: Runner, config: Config) -> None:
        """Put it together; nothing listens yet.

        Args:
            runner: not started; the server starts and stops it.
            config: all of it.
        Raises:
            CredentialsError: the file of clients cannot be used.
        """
        self._runner = runner
        self._config = config.server
        self._metrics = Metrics()
        runner.watch_steps(self._metrics.saw_step)
        endpoint = self._config.tracing_endpoint
        self._tracing = [] if endpoint is None else [Tracing(endpoint)]
        self._health = Health(SERVICES)
        self._server = grpc.aio.server(
            interceptors=[*self._tracing, RpcInterceptor(self._metrics, Gate(self._config), self._config)],
            options=server_options(self._config),
            maximum_concurrent_rpcs=self._config.max_concurrent_rpcs + OTHER_RPCS,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(runner, config, self._metrics), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(runner, config), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._config.reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._port: int | None = None
        self._metrics_server: MetricsServer | None = None
        self._follower: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """`HOST:PORT` of gRPC, once it listens."""
        return _address(self._config.host, self._port)

    @property
    def metrics_address(self) -> str | None:
        """`HOST:PORT` of `/metrics`, `/healthz` and `/readyz`; None when they are off."""
        server = self._metrics_server
        return None if server is None else _address(self._config.host, server.port)

    async def listen(self) -> None:
        """Take connections; requests are refused with UNAVAILABLE until `warm_up` is done.

        Raises:
            CredentialsError: the files of certificates cannot be used.
            CannotListen: a port is taken, or the host is not ours.
        """
        host, port, metrics_port = self._config.host, self._config.port, self._config.metrics_port
        with _listening("--port", host, port):
            # gRPC does not tell why it cannot listen; a plain socket does.
            socket.create_server((host, port), family=socket_family(host)).close()
            self._port = self._add_port(_address(host, port))
        if self._config.metrics:
            with _listening("--metrics-port", host, metrics_port):
                self._metrics_server = MetricsServer(host, metrics_port, self._metrics, self._status_reader())
        await self._server.start()

    def _add_port(self, address: str) -> int:
        credentials = server_credentials(self._config)
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def warm_up(self) -> None:
        """Start the runner and, when it is ready, tell that we are serving.

        Raises:
            Exception: whatever loading or warm-up raised.
        """
        begin = time.monotonic()
        await self._runner.start()
        self._metrics.describe_model(self._runner.info)
        self._follower = asyncio.create_task(self._follow())
        self._health.set_serving(True)
        fields = {"model": self._runner.info.model_id, "address": self.address}
        log.info("serving", extra={**fields, "warm_up_seconds": round(time.monotonic() - begin, 3)})

    async def serve_until(self, is_over: asyncio.Future[Any]) -> None:
        """Wait until something else is done.

        Raises:
            EngineStopped: the engine died first; a server without one would refuse everything for ever.
        """
        death = asyncio.ensure_future(self._runner.death())
        try:
            await asyncio.wait((death, is_over), return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise EngineStopped(f"the engine died: {death.result()!r}") from death.result()
        finally:
            death.cancel()

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain and close: NOT_SERVING, refuse new requests, let running ones finish, cut the rest.

        Args:
            grace_seconds: for running requests; None is the config's `drain_grace_seconds`.
        """
        grace = self._config.drain_grace_seconds if grace_seconds is None else grace_seconds
        end = time.monotonic() + grace
        if self._follower is not None:
            self._follower.cancel()
        self._health.set_serving(False)
        await self._runner.stop(grace)
        self._health.close()
        await self._server.stop(max(LAST_WORDS_SECONDS, end - time.monotonic()))
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        for tracing in self._tracing:
            await asyncio.to_thread(tracing.close)
        log.info("stopped")

    async def _follow(self) -> None:
        """Let health tell what becomes of the engine."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            self._health.set_serving(self._runner.status().is_ready)

    def _status_reader(self) -> Callable[[], EngineStatus]:
        """Reads the status from other threads: the runner belongs to the event loop's."""
        loop = asyncio.get_running_loop()

        def read() -> EngineStatus:
            answer: concurrent.futures.Future[EngineStatus] = concurrent.futures.Future()
            try:
                loop.call_soon_threadsafe(lambda: answer.set_result(self._runner.status()))
                return answer.result(STATUS_TIMEOUT_SECONDS)
            except (RuntimeError, TimeoutError) as error:  # the loop is closed, or stalls
                raise EngineStopped("the event loop does not answer") from error

        return read


async def serve(runner: Runner, config: Config, *, on_serving: Callable[[Server], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once. Sets up the log.

    Args:
        runner: not started.
        config: all of it.
        on_serving: called once requests are taken, such as to print the address.
    Raises:
        CannotListen: a port is taken, or the host is not ours.
        EngineStopped: the engine died or hangs, and with it the server, so that something starts it anew.
        Exception: whatever loading or warm-up raised.
    """
    configure_logging(config.server.log_level, config.server.log_format)
    async with loop_watched(config.engine.step_timeout_seconds):
        await _serve_until(_signalled(), Server(runner, config), on_serving or (lambda _: None))


async def _serve_until(is_over: asyncio.Future[Any], server: Server, on_serving: Callable[[Server], None]) -> None:
    """Listen, warm up, serve and close; `is_over` may be done at any time, before warm-up is done too."""
    try:
        await server.listen()
        log.info("listening", extra={"address": server.address, "metrics": server.metrics_address})
        warm_up = asyncio.ensure_future(server.warm_up())
        await asyncio.wait((warm_up, is_over), return_when=asyncio.FIRST_COMPLETED)
        if warm_up.done():
            await warm_up
            gc.collect()
            gc.freeze()  # what is loaded by now stays: looking through it again and again stalls every stream
            on_serving(server)
            await server.serve_until(is_over)
        else:
            warm_up.cancel()
            with suppress(asyncio.CancelledError):
                await warm_up
    finally:
        await server.stop()


@asynccontextmanager
async def running_server(runner: Runner, config: Config) -> AsyncIterator[Server]:
    """A server that takes requests, for programs with an event loop; drained at the end of the block.

    Args:
        runner: not started.
        config: all of it; port 0 is any free one.
    Raises:
        CannotListen: a port is taken, or the host is not ours.
        Exception: whatever loading or warm-up raised.
    """
    server = Server(runner, config)
    try:
        await server.listen()
        await server.warm_up()
        yield server
    finally:
        await server.stop()


class InProcessServer:
    """A server in a thread of this process, for programs without an event loop. A context manager.

    >>> with InProcessServer(runner, config) as server:  # doctest: +SKIP
    ...     client = Client(server.address)
    """

    def __init__(self, runner: Runner, config: Config) -> None:
        """Start nothing yet.

        Args:
            runner: not started.
            config: all of it; port 0 is any free one.
        """
        self._runner = runner
        self._config = config
        self._ready: concurrent.futures.Future[tuple[str, str | None]] = concurrent.futures.Future()
        self._is_over: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="trimserve-server", daemon=True)

    def __enter__(self) -> "InProcessServer":
        """Wait until requests are taken; raises what `running_server` raises.

        An exception of this thread, such as KeyboardInterrupt, ends the server, too, but is not held up by a model
        that is being loaded.
        """
        self._thread.start()
        try:
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
        """`HOST:PORT` of gRPC."""
        return self._ready.result()[0]

    @property
    def metrics_address(self) -> str | None:
        """`HOST:PORT` of `/metrics`, `/healthz` and `/readyz`; None when they are off."""
        return self._ready.result()[1]

    async def _serve(self) -> None:
        def tell(server: Server) -> None:
            self._ready.set_result((server.address, server.metrics_address))

        try:
            await _serve_until(asyncio.wrap_future(self._is_over), Server(self._runner, self._config), tell)
        except BaseException as error:  # noqa: BLE001  # handed to the other thread
            if self._ready.done():
                self._failure = error
            else:
                self._ready.set_exception(error)


def _signalled() -> asyncio.Future[signal.Signals]:
    """Done at the first SIGTERM or SIGINT, after which they do again what they did before."""
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[signal.Signals] = loop.create_future()

    def hear(number: signal.Signals) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        log.info("draining", extra={"signal": number.name})
        signalled.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hear, number)
    return signalled


@contextmanager
def _listening(option: str, host: str, port: int) -> Iterator[None]:
    """Name the address, and the options that set it, of what cannot listen."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise CannotListen(f"cannot listen on {_address(host, port)} (--host, {option}): {why}") from error


def _address(host: str, port: int | None) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
