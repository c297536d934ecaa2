"""A server of a checkpoint in this process: what `config.py` says, put together."""

import torch

from trimserve.config import Config, ModelConfig, ServerConfig
from trimserve.engine.runner import Runner
from trimserve.executor.local import LocalExecutor
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.server.app import InProcessServer

__all__ = ["in_process_server", "make_runner"]


def make_runner(config: Config) -> Runner:
    """An engine that is not started; its model is loaded when it starts.

    Args:
        config: which checkpoint, and how much the engine takes on.
    """

    def load() -> tuple[Mllama, LocalExecutor]:
        if config.engine.num_threads is not None:
            torch.set_num_threads(config.engine.num_threads)
        model = load_model(config.model, config.engine)
        return model, LocalExecutor(model, config.engine.image_cache_bytes)

    return Runner(load, config.engine)


def in_process_server(model: ModelConfig | None = None) -> InProcessServer:
    """A server in a thread of this process, on a free port of loopback, without metrics; a context manager.

    Args:
        model: which checkpoint, and how it is read; None is the embedded model.
    """
    config = Config(model=model or ModelConfig(), server=ServerConfig(port=0, metrics=False))
    return InProcessServer(make_runner(config), config)
