"""`grpc.health.v1.Health`: one state for the whole server and for each of its services.

grpc_health's own asyncio servicer forgets a service's other watchers when one of them leaves, and keeps watches open
while the server stops; here every watcher gets every change, and `close` ends all watches.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trimserve.errors import EngineStopped, UnknownService

__all__ = ["Health"]

LAST_WORDS_SECONDS = 1.0
"""For the last message of a watch to reach its client."""

Context = ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):
    """Answers health checks and streams changes; NOT_SERVING at first."""

    def __init__(self, services: Iterable[str]) -> None:
        """Start as NOT_SERVING.

        Args:
            services: full names; `""`, the server as a whole, is added.
        """
        self._services = {"", *services}
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()
        self._watches: set[asyncio.Task[Any]] = set()

    def set_serving(self, is_serving: bool) -> None:
        """Change the state and notify watchers."""
        if is_serving != self._is_serving:
            self._is_serving = is_serving
            self._wake()

    def close(self) -> None:
        """Report NOT_SERVING and end all watches, so that the server can stop."""
        self._is_serving = False
        self._is_closed = True
        self._wake()
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._cut)

    async def Check(  # noqa: N802 the RPC's name
        self, request: health_pb2.HealthCheckRequest, _context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for an unknown service, as the protocol says."""
        if request.service not in self._services:
            raise UnknownService(f"unknown service {request.service[:128]!r}")
        return self._response(request.service)

    async def Watch(  # noqa: N802 the RPC's name
        self, request: health_pb2.HealthCheckRequest, _context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The state now and after every change; SERVICE_UNKNOWN for an unknown service."""
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        told = None
        try:
            while not self._is_closed:
                changed = self._changed
                response = self._response(request.service)
                if response != told:
                    yield response
                    told = response
                await changed.wait()
        finally:
            self._watches.discard(task)
        raise EngineStopped("the server stops")

    def _cut(self) -> None:
        """End watches whose clients do not read."""
        for task in self._watches:
            task.cancel()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        if service not in self._services:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        if self._is_serving:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
