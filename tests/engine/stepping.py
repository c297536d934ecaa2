"""What tests of the engine have in common: requests driven step by step, and what became of them."""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

from tests.engine.fake_model import FakeModel
from trimserve.api.chunks import Finished, GenerationChunk, TokenDelta
from trimserve.api.request import GenerationRequest
from trimserve.api.status import StepListener
from trimserve.config import EngineConfig
from trimserve.engine.engine import Engine
from trimserve.engine.processor import Processor
from trimserve.engine.sequence import Sequence
from trimserve.errors import TrimserveError
from trimserve.executor.local import LocalExecutor
from trimserve.executor.model import Model

__all__ = ["Clock", "Output", "alone", "deltas", "finished", "make_engine", "run", "start", "text", "tokens"]


class ProcessorAndModel(Processor, Model, Protocol):
    """What prepares requests, and what runs them, in one."""


Output = list[GenerationChunk | TrimserveError]


def make_engine(
    model: ProcessorAndModel,
    *,
    on_step: StepListener | None = None,
    clock: Callable[[], float] = time.monotonic,
    **config: Any,
) -> Engine:
    """An engine over a model of this process, without an image cache unless one is asked for."""
    knobs = EngineConfig(**{"image_cache_bytes": 0, **config})
    return Engine(model, LocalExecutor(model, knobs.image_cache_bytes, clock), knobs, on_step, clock)


class Clock:
    """A clock that stands still while nothing works."""

    def __init__(self) -> None:
        """At some time."""
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        """A hook that takes so long."""

        def work() -> None:
            self.now += seconds

        return work


def start(engine: Engine, wanted: GenerationRequest) -> tuple[Sequence, Output]:
    """Queue a request; its chunks gather in the list."""
    output: Output = []
    sequence = engine.prepare(wanted, output.append, time.monotonic())
    engine.add(sequence)
    return sequence, output


def run(engine: Engine, *wanted: GenerationRequest) -> list[Output]:
    """Generate all to the end."""
    outputs = [start(engine, one)[1] for one in wanted]
    while engine.has_work:
        engine.step()
    return outputs


def alone(model: FakeModel, wanted: GenerationRequest) -> Output:
    """Generate one in an engine of its own."""
    [output] = run(make_engine(model, max_batch=1), wanted)
    return output


def deltas(output: SequenceOf[GenerationChunk | TrimserveError]) -> list[TokenDelta]:
    return [chunk for chunk in output if isinstance(chunk, TokenDelta)]


def text(output: SequenceOf[GenerationChunk | TrimserveError]) -> str:
    return "".join(delta.text for delta in deltas(output))


def tokens(output: SequenceOf[GenerationChunk | TrimserveError]) -> list[int]:
    return [token_id for delta in deltas(output) for token_id in delta.token_ids]


def finished(output: Output) -> Finished:
    last = output[-1]
    assert isinstance(last, Finished), last
    return last
