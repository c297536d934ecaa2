"""A Ray Serve application of trimserve: each replica runs a server of its own and passes calls on to it.

serve run deployment:app, or serve_config.yaml, from this folder. An exception would reach clients as INTERNAL, because
Ray cannot unpickle it: a status is set on Ray's context instead, and an empty message carries it.
"""

import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.grpc_util import RayServegRPCContext
from router import ImageRouter

from trimserve.client import channel_options
from trimserve.config import EngineConfig, ModelConfig
from trimserve.serve import in_process_server
from trimserve.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc

PASSED_ON = ("authorization", "x-api-key", "x-request-id", "traceparent", "tracestate")
"""Metadata of a call that the server reads."""

MOST_WAITING = 4
"""Requests that wait for each replica before there is one more."""
BUSY, IDLE = 0.8, 0.3
"""Shares of the pools of keys and values above which there is one more replica, and below which one less."""


# In Ray's HAProxy mode that balances calls by itself, and a router is refused.
IS_HAPROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
ROUTING = {} if IS_HAPROXY else {"request_router_config": RequestRouterConfig(request_router_class=ImageRouter)}


def by_queue(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas by what the servers say of themselves, one step at a time."""
    told, replicas = context.aggregated_metrics or {}, context.current_num_replicas
    waiting, usage = (sum(told.get(name, {}).values()) for name in ("waiting", "usage"))
    wanted = replicas
    if waiting > MOST_WAITING * replicas or usage > BUSY * replicas:
        wanted += 1
    elif not waiting and usage < IDLE * replicas:
        wanted -= 1
    return min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas), {}


@serve.deployment(
    # The server's own queue is the one that counts, so Ray holds nothing back.
    max_ongoing_requests=1024,
    graceful_shutdown_timeout_s=600,  # a replica that is scaled away lets its streams end
    autoscaling_config=AutoscalingConfig(
        min_replicas=1,
        max_replicas=4,
        upscale_delay_s=10,
        downscale_delay_s=300,
        policy=AutoscalingPolicy(policy_function=by_queue),
    ),
    **ROUTING,
)
class Trimserve:
    """One replica."""

    def __init__(self, model: dict[str, Any], engine: dict[str, Any]) -> None:
        """Load the model.

        Args:
            model: knobs of `ModelConfig`.
            engine: knobs of `EngineConfig`.
        """
        self._server = in_process_server(ModelConfig(**model), EngineConfig(**engine))
        self._server.__enter__()
        self._channel: grpc.aio.Channel | None = None

    async def Generate(  # noqa: N802 the RPC's name
        self, request: generation_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> generation_pb2.GenerateResponse:
        """See the service's contract."""
        call = generation_pb2_grpc.GenerationServiceStub(self._connected()).Generate
        return await _answer(call, request, grpc_context, generation_pb2.GenerateResponse())

    async def GenerateStream(  # noqa: N802 the RPC's name
        self, request: generation_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[generation_pb2.GenerateStreamResponse]:
        """See the service's contract."""
        stub = generation_pb2_grpc.GenerationServiceStub(self._connected())
        call = stub.GenerateStream(request, metadata=_passed_on(grpc_context))
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            _refuse(grpc_context, error)
            yield generation_pb2.GenerateStreamResponse()
        finally:
            call.cancel()  # who went away frees his pages

    async def GetModel(  # noqa: N802 the RPC's name
        self, request: model_pb2.GetModelRequest, grpc_context: RayServegRPCContext
    ) -> model_pb2.GetModelResponse:
        """See the service's contract."""
        call = model_pb2_grpc.ModelServiceStub(self._connected()).GetModel
        return await _answer(call, request, grpc_context, model_pb2.GetModelResponse())

    async def GetServerStatus(  # noqa: N802 the RPC's name
        self, request: model_pb2.GetServerStatusRequest, grpc_context: RayServegRPCContext
    ) -> model_pb2.GetServerStatusResponse:
        """Of one replica."""
        call = model_pb2_grpc.ModelServiceStub(self._connected()).GetServerStatus
        return await _answer(call, request, grpc_context, model_pb2.GetServerStatusResponse())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `by_queue` reads."""
        status = await model_pb2_grpc.ModelServiceStub(self._connected()).GetServerStatus(
            model_pb2.GetServerStatusRequest()
        )
        used = status.self_kv_bytes + status.cross_kv_bytes
        return {"waiting": float(status.num_waiting), "usage": used / max(1, status.kv_capacity_bytes)}

    async def check_health(self) -> None:
        """Ray replaces a replica whose engine died.

        Raises:
            RuntimeError: it takes no requests.
        """
        stub = model_pb2_grpc.ModelServiceStub(self._connected())
        if not (await stub.GetServerStatus(model_pb2.GetServerStatusRequest())).is_ready:
            raise RuntimeError("the server takes no requests")

    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:  # first asked for on the loop that it then belongs to
            address = self._server.address
            self._channel = grpc.aio.insecure_channel(address, channel_options(address=address))
        return self._channel


async def _answer(call: Any, request: Any, context: RayServegRPCContext, nothing: Any) -> Any:
    try:
        return await call(request, metadata=_passed_on(context))
    except grpc.aio.AioRpcError as error:
        _refuse(context, error)
        return nothing


def _passed_on(context: RayServegRPCContext) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in context.invocation_metadata() if key in PASSED_ON)


def _refuse(context: RayServegRPCContext, error: grpc.aio.AioRpcError) -> None:
    context.set_code(error.code())
    context.set_details(error.details() or "")
    context.set_trailing_metadata([(key, value) for key, value in error.trailing_metadata() or ()])


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application, with knobs by section, as in `serve_config.yaml`."""
    return Trimserve.bind(arguments.get("model", {}), arguments.get("engine", {}))


app = build({})
