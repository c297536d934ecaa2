"""A server of a checkpoint in this process: what `config.py` says, put together."""

import torch

from trimserve.config import Config, ModelConfig, ServerConfig
from trimserve.engine.runner import Runner
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.server.app import InProcessServer

__all__ = ["in_process_server", "make_runner"]


def make_runner(config: Config) -> Runner:
    """An engine that is not started; its model is loaded when it starts.

    Args:
        config: which checkpoint, and how much the engine takes on.
    """
    engine = config.engine

    def load() -> Mllama:
        if engine.num_threads is not None:
            torch.set_num_threads(engine.num_threads)
        return load_model(config.model, engine)

    return Runner(
        load,
        max_batch=engine.max_batch,
        max_queue=engine.max_queue,
        num_preprocess_workers=engine.num_preprocess_workers,
        kv_cache_bytes=engine.kv_cache_bytes,
        kv_layers_per_page=engine.kv_layers_per_page,
        image_cache_bytes=engine.image_cache_bytes,
        prefill_slice_seconds=engine.prefill_slice_seconds,
        step_timeout_seconds=engine.step_timeout_seconds,
    )


def in_process_server(model: ModelConfig | None = None) -> InProcessServer:
    """A server in a thread of this process, on a free port of loopback, without metrics; a context manager.

    Args:
        model: which checkpoint, and how it is read; None is the embedded model.
    """
    config = Config(model=model or ModelConfig(), server=ServerConfig(port=0, metrics=False))
    return InProcessServer(make_runner(config), config)
