"""The gRPC services. Errors are raised; `interceptors.py` turns them into statuses."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from grpc.aio import ServicerContext

from trimserve.api.adapter import LoadedAdapter
from trimserve.api.info import ModelInfo
from trimserve.api.request import GenerationRequest
from trimserve.errors import InvalidRequest
from trimserve.server.admission import Admission, current_admission
from trimserve.server.core import Core
from trimserve.server.deadline import Deadline
from trimserve.server.grpc import responses
from trimserve.server.grpc.codec import SMALL_BYTES
from trimserve.server.grpc.convert import adapter_name, to_generation_request
from trimserve.server.observer import RequestObserver
from trimserve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = ["GRANTED_BY_NAME", "RPCS", "SERVICES", "AdapterService", "GenerationService", "ModelService"]

_DESCRIPTORS = tuple(
    service
    for file in (generation_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)

SERVICES = tuple(service.full_name for service in _DESCRIPTORS)
"""Full names of the services that the protos define."""

GRANTED_BY_NAME = (adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,)
"""Those that change the server: no client may use them unless the token file says so."""

RPCS = tuple(
    ("server_stream" if method.server_streaming else "unary", service.full_name, method.name)
    for service in _DESCRIPTORS
    for method in service.methods
)
"""(grpc_type, grpc_service, grpc_method) of every RPC."""

Context = ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """`Generate` and `GenerateStream` over one code path: the unary answer is a fold over the stream."""

    def __init__(self, core: Core) -> None:
        """Serve an engine.

        Args:
            core: until its engine is started, requests are refused with EngineStopped.
        """
        self._backend = core.backend
        self._config = core.config
        self._metrics = core.metrics
        self._offload = core.offload

    async def Generate(  # noqa: N802 the RPC's name
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """The whole answer at once."""
        chunks = self._events(request, context, "Generate")
        del request  # see `_events`
        async with aclosing(chunks) as events:
            return await responses.fold(events)

    async def GenerateStream(  # noqa: N802 the RPC's name
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[generation_pb2.GenerateStreamResponse, None]:
        """The answer, token by token."""
        chunks = self._events(request, context, "GenerateStream")
        del request
        async with aclosing(chunks) as events:
            async for event in events:
                yield event

    async def _events(
        self, request: generation_pb2.GenerateRequest, context: Context, method: str
    ) -> AsyncGenerator[generation_pb2.GenerateStreamResponse, None]:
        """The request's messages; no frame keeps the request, so that its images are free once the engine has them."""
        deadline, admission = Deadline(context.time_remaining()), current_admission()
        observer = RequestObserver(self._metrics, method)
        try:
            info = self._backend.info
            generation = await self._converted(request, info, admission)
            del request
            admission.check_priority(generation.priority)
            observer.accepted(generation)
            chunks = self._backend.submit(generation, deadline=deadline.bounded(self._config.server))
            del generation
            writer = responses.EventWriter(info)
            # Closing the generator is what cancels a request whose client has gone.
            async with aclosing(chunks):
                async for chunk in chunks:
                    observer.saw(chunk)
                    admission.saw(chunk)
                    yield writer.event(chunk)
        except BaseException as error:
            observer.failed(error, is_past_deadline=deadline.has_passed())
            raise

    async def _converted(
        self, request: generation_pb2.GenerateRequest, info: ModelInfo, admission: Admission
    ) -> GenerationRequest:
        convert_now = partial(to_generation_request, request, info, self._config.engine)
        return convert_now() if admission.held_bytes <= SMALL_BYTES else await self._offload.run(convert_now)


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """What is served, and how it is doing."""

    def __init__(self, core: Core) -> None:
        """Describe an engine and its model.

        Args:
            core: its engine need not be started yet.
        """
        self._backend = core.backend
        self._config = core.config

    async def GetModel(  # noqa: N802 the RPC's name
        self, _request: model_pb2.GetModelRequest, _context: Context
    ) -> model_pb2.GetModelResponse:
        """Identity, geometry, limits and defaults."""
        return responses.model_response(self._backend.info, self._config.engine)

    async def GetServerStatus(  # noqa: N802 the RPC's name
        self, _request: model_pb2.GetServerStatusRequest, _context: Context
    ) -> model_pb2.GetServerStatusResponse:
        """Load and memory now."""
        return responses.status_response(self._backend.status())


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """The adapters that requests may name."""

    def __init__(self, core: Core) -> None:
        """Change an engine.

        Args:
            core: until its engine is started, calls are refused with EngineStopped.
        """
        self._backend = core.backend

    async def LoadAdapter(  # noqa: N802 the RPC's name
        self, request: adapter_pb2.LoadAdapterRequest, _context: Context
    ) -> adapter_pb2.LoadAdapterResponse:
        """Load one."""
        name = adapter_name("name", request.name)
        if not request.folder or "\0" in request.folder:
            raise InvalidRequest("folder", f"must be a path, got {request.folder!r}")
        info = await self._backend.load_adapter(name, Path(request.folder))
        loaded = LoadedAdapter(info, num_requests=0, is_unloading=False)
        return adapter_pb2.LoadAdapterResponse(adapter=responses.adapter(loaded))

    async def UnloadAdapter(  # noqa: N802 the RPC's name
        self, request: adapter_pb2.UnloadAdapterRequest, _context: Context
    ) -> adapter_pb2.UnloadAdapterResponse:
        """Unload one, when no request has it any more."""
        await self._backend.unload_adapter(adapter_name("name", request.name))
        return adapter_pb2.UnloadAdapterResponse()

    async def ListAdapters(  # noqa: N802 the RPC's name
        self, _request: adapter_pb2.ListAdaptersRequest, _context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        """All that are loaded."""
        adapters = [responses.adapter(each) for each in self._backend.adapters()]
        return adapter_pb2.ListAdaptersResponse(adapters=adapters)
