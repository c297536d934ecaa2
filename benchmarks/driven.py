"""An engine without service and sockets, driven a step at a time."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from trimserve.api.chunks import GenerationChunk, TokenDelta
from trimserve.api.request import GenerationRequest
from trimserve.config import EngineConfig
from trimserve.engine.engine import Engine
from trimserve.errors import TrimserveError
from trimserve.executor.local import LocalExecutor
from trimserve.model.mllama import Mllama

__all__ = ["UNCUT", "Driven", "Output"]

UNCUT: Final = 1e6
"""Seconds that no prefill takes: as `prefill_slice_seconds` it has every prefill run in one piece."""


@dataclass(slots=True)
class Output:
    """The tokens of one request, and when they came."""

    clock: Callable[[], float]
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)

    def __call__(self, chunk: GenerationChunk | TrimserveError) -> None:
        """Take a chunk; the request must not fail."""
        if isinstance(chunk, TrimserveError):
            raise chunk
        if isinstance(chunk, TokenDelta):
            self.arrivals.append(self.clock())
            self.token_ids += chunk.token_ids


class Driven:
    """An engine over a model that others may share."""

    def __init__(
        self,
        model: Mllama,
        *,
        clock: Callable[[], float] = time.thread_time,
        on_step: Callable[[int, float], None] | None = None,
        **knobs: Any,
    ) -> None:
        """Start an engine that keeps no image.

        Args:
            model: loaded.
            clock: seconds by which tokens come: by default the thread's own, so that other work does not count.
            on_step: see `Engine`.
            knobs: those of `EngineConfig`.
        """
        listener = () if on_step is None else (on_step,)
        self.engine = Engine(model, LocalExecutor(model, 0), EngineConfig(**knobs), *listener)
        self.step, self.clock = self.engine.step, clock

    def begin(self, request: GenerationRequest) -> Output:
        """Hand a prepared request to the engine: in a server, other threads prepare it."""
        output = Output(self.clock)
        self.engine.add(self.engine.prepare(request, output, time.monotonic()))
        return output
