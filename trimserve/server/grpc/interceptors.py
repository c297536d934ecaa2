"""What every RPC has in common: admission, and statuses with details for exceptions.

Handlers are wrapped so that they read their messages themselves: nothing is read of a call that is not admitted, and
bytes that do not parse get a status of ours. Calls come through one of four doors: trimserve's own methods, health
checks, which need no token, reflection, which takes any client's, and methods that do not exist, which only clients are
told.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc.aio import ServicerContext
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from trimserve.errors import UnknownMethod
from trimserve.server.core import Core
from trimserve.server.grpc.codec import Codec
from trimserve.server.grpc.inbox import Inbox
from trimserve.server.grpc.rpc import Rpc
from trimserve.server.offload import LARGE_BYTES

__all__ = ["OWN_METHODS", "RpcInterceptor", "request_types"]

OWN_METHODS = "/trimserve."
"""How the names of our own methods begin."""

OPEN_METHODS = tuple(f"/{health.SERVICE_NAME}/{name}" for name in ("Check", "Watch"))
"""Open to all, because Kubernetes' probes cannot send a token."""

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

MAX_SMALL_BYTES = 4096
"""Of the messages of health checks and reflection."""

Context = ServicerContext[Any, Any]
RpcHandler: TypeAlias = Any  # gRPC has types for handlers of its synchronous API only
Behaviour = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every RPC."""

    def __init__(self, core: Core, inbox: Inbox, requests: dict[str, type[Message]]) -> None:
        """Count RPCs.

        Args:
            core: its gate admits calls, and its metrics count them.
            inbox: reads their messages.
            requests: type of the request of each of our own methods, by its path.
        """
        self._core = core
        self._metrics = core.metrics
        self._gate = core.gate
        self._inbox = inbox
        self._receive_seconds = core.config.server.receive_timeout_seconds
        most = core.config.server.max_message_bytes
        self._codecs = {method: Codec(kind, most) for method, kind in requests.items()}
        bound = "not configurable"
        self._health_codec = Codec(health_pb2.HealthCheckRequest, MAX_SMALL_BYTES, bound)
        self._reflection_codec = Codec(reflection_pb2.ServerReflectionRequest, MAX_SMALL_BYTES, bound)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcHandler:
        """The wrapped handler of a call."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._unknown(method))
        if method in self._codecs:
            behaviour = self._own(method, handler)
        elif method in OPEN_METHODS:
            behaviour = self._probe(method, handler)
        elif method == REFLECTION:
            behaviour = self._reflection(handler)
        else:
            behaviour = self._unknown(method)
        return grpc.stream_stream_rpc_method_handler(behaviour, None, handler.response_serializer)

    def _own(self, method: str, handler: RpcHandler) -> Behaviour:
        _, service, name = method.split("/")
        labels = ("server_stream" if handler.response_streaming else "unary", service, name)
        codec = self._codecs[method]

        async def handle(_requests: AsyncIterator[bytes], context: Context) -> None:
            """A call of trimserve's own services: admitted before its message is read."""
            rpc = Rpc(self._metrics, method, labels, context)
            try:
                async with rpc.answered():
                    with self._gate.admit(service, rpc.metadata, rpc.name) as admission:
                        rpc.client = admission.client

                        async def receive() -> Message:
                            request = await self._inbox.receive(context.read, codec, admission, self._receive_seconds)
                            rpc.accept(request)
                            return request

                        # No frame here keeps the message: handlers let go of its images once they have them.
                        if handler.response_streaming:
                            async with aclosing(handler.unary_stream(await receive(), context)) as responses:
                                async for response in responses:
                                    await rpc.send(response)
                        else:
                            await rpc.send(await handler.unary_unary(await receive(), context))
            finally:
                if rpc.request_bytes >= LARGE_BYTES:
                    self._core.offload.trim_soon()

        return handle

    def _probe(self, method: str, handler: RpcHandler) -> Behaviour:
        async def handle(_requests: AsyncIterator[bytes], context: Context) -> None:
            """A health check: read only for a caller with a token, and only if there is room."""
            rpc = Rpc(self._metrics, method, None, context)
            async with rpc.answered():
                with ExitStack() as places:
                    caller = self._gate.known(rpc.metadata, rpc.name)
                    if handler.response_streaming:
                        places.enter_context(self._gate.watch(rpc.address, None if caller else rpc.peer))
                    # All services have one state, so only the name of one that does not exist goes unnoticed.
                    request = health_pb2.HealthCheckRequest()
                    if caller is not None:
                        request = await self._inbox.probe(context.read, self._health_codec, caller.name) or request
                    rpc.accept(request)
                    if handler.response_streaming:
                        async with aclosing(handler.unary_stream(request, context)) as responses:
                            async for response in responses:
                                await rpc.send(response)
                    else:
                        await rpc.send(await handler.unary_unary(request, context))

        return handle

    def _reflection(self, handler: RpcHandler) -> Behaviour:
        async def handle(_requests: AsyncIterator[bytes], context: Context) -> None:
            """Reflection: admitted, then as many small messages as the client sends."""
            rpc = Rpc(self._metrics, REFLECTION, None, context)
            async with rpc.answered():
                with self._gate.admit(None, rpc.metadata, rpc.name) as admission:
                    rpc.client = admission.client
                    messages = self._inbox.stream(context.read, self._reflection_codec, admission)
                    async for response in handler.stream_stream(messages, context):
                        await rpc.send(response)

        return handle

    def _unknown(self, method: str) -> Behaviour:
        async def handle(_requests: AsyncIterator[bytes], context: Context) -> None:
            """A method that does not exist, which only a known caller is told."""
            rpc = Rpc(self._metrics, method, None, context)
            async with rpc.answered():
                rpc.client = self._gate.identify(rpc.metadata, rpc.name).name
                raise UnknownMethod(f"there is no {method[:128]}; the server may be older than the client")

        return handle


def request_types(*files: Any) -> dict[str, type[Message]]:
    """Type of the request of each method of some proto files, by the method's path."""
    return {
        f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
