"""Puts a server together: config -> model -> engine -> server. The one file that knows all of them."""

import torch

from trimserve.config import Config, EngineConfig, ModelConfig, ServerConfig
from trimserve.engine.runner import Runner
from trimserve.executor.executor import Executor
from trimserve.executor.local import LocalExecutor
from trimserve.executor.tensor_parallel import start_ranks
from trimserve.imaging.limits import Limits
from trimserve.imaging.pool import DecoderPool
from trimserve.model.loading import load_model
from trimserve.model.processor import Processor
from trimserve.server.backend import Backend
from trimserve.server.core import Core
from trimserve.server.gate import Gate
from trimserve.server.grpc.server import GrpcTransport
from trimserve.server.grpc.services import GRANTED_BY_NAME, RPCS, SERVICES
from trimserve.server.lifecycle import Server
from trimserve.server.metrics import Metrics
from trimserve.server.running import InProcessServer
from trimserve.server.tracing import Tracing
from trimserve.server.transport import Transport
from trimserve.trimming.policies.table import POLICIES

__all__ = ["in_process_server", "make_runner", "make_server"]


def make_runner(config: Config) -> Runner:
    """An engine that is not started; it loads its model when it starts.

    Args:
        config: names the checkpoint and the engine's limits.
    """
    engine = config.engine
    decoders = DecoderPool(engine.num_preprocess_workers, Limits(engine.max_image_pixels))

    def load() -> tuple[Processor, Executor]:
        """Called on the engine's thread."""
        if engine.tensor_parallel > 1:
            return start_ranks(config.model, engine, decoders.decode)
        if engine.num_threads is not None:
            torch.set_num_threads(engine.num_threads)
        model = load_model(config.model, engine, decoders.decode)
        return model.processor, LocalExecutor(model, engine.image_cache_bytes)

    return Runner(load, engine, decoders, config.model.adapters)


def make_server(backend: Backend, config: Config) -> Server:
    """A server that does not listen yet, with every transport.

    Args:
        backend: an engine that is not started, such as `make_runner` returns.
        config: all knobs; port 0 is any free one.
    Raises:
        CredentialsError: the token file cannot be used.
    """
    endpoint = config.server.tracing_endpoint
    metrics = Metrics(POLICIES, RPCS)
    core = Core(
        backend=backend,
        config=config,
        metrics=metrics,
        gate=Gate(config.server, SERVICES, metrics, GRANTED_BY_NAME),
        tracing=None if endpoint is None else Tracing(endpoint),
    )
    transports: list[Transport] = [GrpcTransport(core)]
    if config.server.http_port is not None:
        from trimserve.server.http.server import HttpTransport  # its libraries are optional

        transports.append(HttpTransport(core))
    return Server(core, transports)


def in_process_server(
    model: ModelConfig | None = None, engine: EngineConfig | None = None, *, with_http: bool = False
) -> InProcessServer:
    """A server in a thread of this process, on a free port of loopback, without metrics; a context manager.

    Args:
        model: names the checkpoint; None is the embedded model.
        engine: its limits; None is the defaults.
        with_http: open a port of HTTP, too.
    """
    server = ServerConfig(port=0, http_port=0 if with_http else None, metrics_port=0)
    config = Config(model=model or ModelConfig(), engine=engine or EngineConfig(), server=server)
    return InProcessServer(make_server(make_runner(config), config))
