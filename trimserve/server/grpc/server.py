"""The gRPC server: services, interceptors, health and reflection on one port."""

import socket

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trimserve.server.core import Core
from trimserve.server.grpc.credentials import server_credentials
from trimserve.server.grpc.health import Health
from trimserve.server.grpc.inbox import Inbox
from trimserve.server.grpc.interceptors import RpcInterceptor, request_types
from trimserve.server.grpc.services import SERVICES, AdapterService, GenerationService, ModelService
from trimserve.server.grpc.tracing_interceptor import TracingInterceptor
from trimserve.server.grpc.transport import server_options
from trimserve.server.listening import address_of, listening, socket_family
from trimserve.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc

__all__ = ["GrpcTransport"]


class GrpcTransport:
    """The `Transport` of gRPC."""

    def __init__(self, core: Core) -> None:
        """Listen on nothing yet.

        Args:
            core: what is served, and its limits.
        """
        self._core = core
        self._config = core.config.server
        self._health = Health(SERVICES)
        self._inbox = Inbox(core.gate.message_bytes, core.offload)
        self._server: grpc.aio.Server | None = None
        self._port: int | None = None

    @property
    def address(self) -> str:
        """`HOST:PORT`, once it listens."""
        return address_of(self._config.host, self._port)

    async def listen(self) -> None:
        """Accept connections; health says NOT_SERVING.

        Raises:
            CredentialsError: the certificate files cannot be used.
            CannotListen: the port is taken, or the host is not ours.
        """
        host, port = self._config.host, self._config.port
        server = self._make_server()
        with listening("--port", host, port):
            # gRPC does not say why it cannot listen; a plain socket does.
            socket.create_server((host, port), family=socket_family(host)).close()
            credentials = server_credentials(self._config, self._core.metrics)
            if credentials is None:
                self._port = server.add_insecure_port(address_of(host, port))
            else:
                self._port = server.add_secure_port(address_of(host, port), credentials)
        await server.start()

    def set_serving(self, is_serving: bool) -> None:
        """Change what health says."""
        self._health.set_serving(is_serving)

    async def close(self, grace_seconds: float) -> None:
        """End health watches and calls that have not arrived, stop listening, and close; also if it never listened.

        Args:
            grace_seconds: for the last messages of open calls.
        """
        self._health.close()
        self._inbox.close()
        if self._server is not None:
            await self._server.stop(grace_seconds)

    def _make_server(self) -> grpc.aio.Server:
        """Made here, because gRPC binds it to the event loop of its making."""
        core, config = self._core, self._config
        tracing = [] if core.tracing is None else [TracingInterceptor(core.tracing)]
        requests = request_types(generation_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR)
        # Calls are bounded by the gate: gRPC's `maximum_concurrent_rpcs` would count health watches and tell nobody.
        self._server = server = grpc.aio.server(
            interceptors=[*tracing, RpcInterceptor(core, self._inbox, requests)],
            options=server_options(config),
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(core), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(core), server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(core), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server
