"""What tests of the runner have in common: a started runner, gates in its model, a request's whole output."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pydantic import ByteSize

from tests.engine.fake_model import FakeModel, request
from tests.patience import PATIENCE_SECONDS
from trimserve.api.chunks import GenerationChunk
from trimserve.api.request import GenerationRequest
from trimserve.config import EngineConfig
from trimserve.engine.runner import Runner
from trimserve.executor.local import LocalExecutor

__all__ = ["LONG", "Gate", "collect", "held_bytes", "make_runner", "running"]

LONG = request("long", ignore_eos=True, max_new_tokens=120)


class Gate:
    """Holds a thread of the model in one place until it is opened; waits no longer than a test would."""

    def __init__(self) -> None:
        """Open."""
        self._is_open = threading.Event()
        self._is_open.set()
        self.is_reached = threading.Event()
        """Set by the first thread that comes by after `close`."""

    def close(self) -> None:
        self.is_reached.clear()
        self._is_open.clear()

    def open(self) -> None:
        self._is_open.set()

    def __call__(self) -> None:
        self.is_reached.set()
        assert self._is_open.wait(PATIENCE_SECONDS)


def make_runner(load: Callable[[], FakeModel], **config: float) -> Runner:
    """A runner that is not started, without an image cache."""

    def load_both() -> tuple[FakeModel, LocalExecutor]:
        model = load()
        return model, LocalExecutor(model)

    return Runner(load_both, EngineConfig(image_cache_bytes=ByteSize(0), **config))  # type: ignore[arg-type]  # knobs of every type


@asynccontextmanager
async def running(
    model: FakeModel, *, max_batch: int = 4, max_queue: int = 8, num_preprocess_workers: int = 2
) -> AsyncIterator[Runner]:
    """A started runner, stopped at the end."""
    runner = make_runner(
        lambda: model,
        max_batch=max_batch,
        max_queue=max_queue,
        num_preprocess_workers=num_preprocess_workers,
    )
    await runner.start()
    try:
        yield runner
    finally:
        await runner.stop(0.0)


async def collect(runner: Runner, wanted: GenerationRequest, deadline: float | None = None) -> list[GenerationChunk]:
    return [chunk async for chunk in runner.submit(wanted, deadline=deadline)]


def held_bytes(runner: Runner) -> int:
    status = runner.status()
    return status.self_kv_bytes + status.cross_kv_bytes + status.cross_kv_untrimmed_bytes
