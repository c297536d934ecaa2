"""What constraints cost a decode step: sixteen requests that must write JSON beside sixteen that may write anything.

    python -m benchmarks.bench_constraints [--steps 400] [--rounds 5] [--out FILE]

Two engines over the embedded model take turns, a step each, so that both meet the same moments of the machine. Both
sample at temperature 1; the engine is driven without service and sockets, on one thread.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from benchmarks.serve.report import about, write_json
from trimserve.api.chunks import GenerationChunk, TokenDelta
from trimserve.api.constraint import Constraint, JsonSchema
from trimserve.api.prompt import ChatPrompt, Message, Text
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.errors import TrimserveError
from trimserve.executor.local import LocalExecutor
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "constraints.json"
_BATCH: Final = 16
_WARM_UP_STEPS: Final = 20
_SCHEMA: Final = {  # long enough that no answer is complete while it is measured
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
        "required": ["name", "count"],
        "additionalProperties": False,
    },
}


def main() -> None:
    """Measure, write the report, print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each engine in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(ModelConfig(), EngineConfig())
    rounds = [_round(model, arguments.steps) for _ in range(arguments.rounds)]
    plain, constrained = (median(times) for times in zip(*rounds, strict=True))
    report: dict[str, Any] = {
        "benchmark": "constraints",
        **about(1),
        "batch": _BATCH,
        "steps": arguments.steps,
        "rounds": [{"plain_step_seconds": one, "constrained_step_seconds": other} for one, other in rounds],
        "plain_step_seconds": plain,
        "constrained_step_seconds": constrained,
        "slowdown": median(other / one for one, other in rounds) - 1,
    }
    write_json(report, arguments.out)
    print(json.dumps(report))


def _round(model: Mllama, num_steps: int) -> tuple[float, float]:
    """Median seconds of a step of each engine."""
    engines = [_running(model, constraint) for constraint in (None, JsonSchema(json.dumps(_SCHEMA)))]
    times: list[list[float]] = [[], []]
    for _ in range(num_steps):
        for engine, own in zip(engines, times, strict=True):
            started_at = time.perf_counter()
            engine.step()
            own.append(time.perf_counter() - started_at)
    assert all(engine.has_work for engine in engines), "a request ended while it was measured"
    return median(times[0]), median(times[1])


def _running(model: Mllama, constraint: Constraint | None) -> Engine:
    engine = Engine(model, LocalExecutor(model), EngineConfig(max_batch=_BATCH))
    num_running = 0

    def sink(chunk: GenerationChunk | TrimserveError) -> None:
        nonlocal num_running
        if isinstance(chunk, TrimserveError):
            raise chunk
        num_running += isinstance(chunk, TokenDelta)

    prompt = ChatPrompt((Message("user", (Text("Say something."),)),))
    for seed in range(_BATCH):
        sampling = SamplingParams(max_new_tokens=1500, ignore_eos=True, temperature=1.0, seed=seed)
        request = GenerationRequest(f"{seed}", prompt, sampling, TrimRequest(k_ratio=0.2), constraint=constraint)
        engine.add(engine.prepare(request, sink, time.monotonic()))
    while num_running < _BATCH * _WARM_UP_STEPS:
        engine.step()
    return engine


if __name__ == "__main__":
    main()
