"""The two gRPC services: requests in, messages out. Errors are raised; `interceptors.py` answers."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from grpc.aio import ServicerContext

from trimserve.config import Config
from trimserve.server.grpc import convert, responses
from trimserve.server.grpc.deadline import Deadline
from trimserve.server.metrics import Metrics
from trimserve.server.observer import RequestObserver
from trimserve.server.runner import Runner
from trimserve.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = ["SERVICES", "GenerationService", "ModelService"]

SERVICES = tuple(
    service.full_name
    for file in (generation_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)
"""Full names of what the protos define."""

Context = ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """`Generate` and `GenerateStream` over one code path: the unary answer is a fold over the stream."""

    def __init__(self, runner: Runner, config: Config, metrics: Metrics) -> None:
        """Serve what a runner generates.

        Args:
            runner: need not be started yet; until it is, requests are refused with EngineStopped.
            config: limits on requests, default deadline.
            metrics: gets what every request adds.
        """
        self._runner = runner
        self._config = config
        self._metrics = metrics

    async def Generate(  # noqa: N802 the RPC's name
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """The whole answer at once."""
        async with aclosing(self._events(request, context, "Generate")) as events:
            return await responses.fold(events)

    async def GenerateStream(  # noqa: N802 the RPC's name
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[generation_pb2.GenerateStreamResponse, None]:
        """The answer as it comes."""
        async with aclosing(self._events(request, context, "GenerateStream")) as events:
            async for event in events:
                yield event

    async def _events(
        self, request: generation_pb2.GenerateRequest, context: Context, method: str
    ) -> AsyncGenerator[generation_pb2.GenerateStreamResponse, None]:
        deadline = Deadline(context)
        observer = RequestObserver(self._metrics, method)
        try:
            info = self._runner.info
            generation = convert.to_generation_request(request, info, self._config.engine)
            observer.accepted(generation)
            writer = responses.EventWriter(info)
            # Closing the runner's generator is what cancels a request that its client has left.
            async with aclosing(self._runner.submit(generation, deadline=self._latest(deadline))) as chunks:
                async for chunk in chunks:
                    observer.saw(chunk)
                    yield writer.event(chunk)
        except BaseException as error:
            observer.failed(error, is_past_deadline=deadline.has_passed())
            raise

    def _latest(self, deadline: Deadline) -> float | None:
        """The client's deadline, else the server's default, no later than the server's limit; `time.monotonic()`."""
        now, server = time.monotonic(), self._config.server
        wanted = deadline.at
        if wanted is None and server.default_deadline_seconds is not None:
            wanted = now + server.default_deadline_seconds
        if server.max_deadline_seconds is None:
            return wanted
        limit = now + server.max_deadline_seconds
        return limit if wanted is None else min(wanted, limit)


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """What is served, and how it is doing."""

    def __init__(self, runner: Runner, config: Config) -> None:
        """Tell about a runner.

        Args:
            runner: need not be started yet.
            config: limits that the model does not know.
        """
        self._runner = runner
        self._config = config

    async def GetModel(  # noqa: N802 the RPC's name
        self, _request: model_pb2.GetModelRequest, _context: Context
    ) -> model_pb2.GetModelResponse:
        """Identity, geometry, limits and defaults."""
        return responses.model_response(self._runner.info, self._config.engine)

    async def GetServerStatus(  # noqa: N802 the RPC's name
        self, _request: model_pb2.GetServerStatusRequest, _context: Context
    ) -> model_pb2.GetServerStatusResponse:
        """Load and memory now."""
        return responses.status_response(self._runner.status())
