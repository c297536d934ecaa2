"""What tests of the engine have in common: requests driven step by step, and what became of them."""

import time

from tests.engine.fake_model import FakeModel
from trimserve.api.chunks import Finished, GenerationChunk, TokenDelta
from trimserve.api.request import GenerationRequest
from trimserve.engine.engine import Engine
from trimserve.engine.sequence import Sequence
from trimserve.errors import TrimserveError

__all__ = ["Output", "alone", "deltas", "finished", "run", "start", "text"]

Output = list[GenerationChunk | TrimserveError]


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
    [output] = run(Engine(model, max_batch=1), wanted)
    return output


def deltas(output: Output) -> list[TokenDelta]:
    return [chunk for chunk in output if isinstance(chunk, TokenDelta)]


def text(output: Output) -> str:
    return "".join(delta.text for delta in deltas(output))


def finished(output: Output) -> Finished:
    last = output[-1]
    assert isinstance(last, Finished), last
    return last
