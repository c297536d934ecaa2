"""What constraints cost a decode step: sixteen requests that must write JSON beside sixteen that may write anything.

    python -m benchmarks.bench_constraints [--steps 400] [--rounds 5] [--out FILE]

Two engines over the embedded model take turns, a step each, so that both meet the same moments of the machine. Both
sample at temperature 1; the engine is driven without service and sockets.
"""

import json
from statistics import median
from typing import Final

from benchmarks.measure import medians, seconds_in_pairs
from benchmarks.ours import chat
from benchmarks.report import command_line, finish
from tests.engine.stepping import Output, make_engine, start, tokens
from trimserve.api.chunks import TokenDelta
from trimserve.api.constraint import Constraint, JsonSchema
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main"]

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


def _round(model: Mllama, num_steps: int) -> tuple[float, float]:
    """Median seconds of a step of each engine."""
    (plain, outputs), (constrained, others) = (
        _running(model, each) for each in (None, JsonSchema(json.dumps(_SCHEMA)))
    )
    pairs = seconds_in_pairs(plain.step, constrained.step, num_steps)
    ends = [output[-1] for output in (*outputs, *others)]
    assert all(isinstance(end, TokenDelta) for end in ends), "a request ended while it was measured"
    return medians(pairs, 6)


def _running(model: Mllama, constraint: Constraint | None) -> tuple[Engine, list[Output]]:
    engine, outputs = make_engine(model, max_batch=_BATCH), []
    for seed in range(_BATCH):
        sampling = SamplingParams(max_new_tokens=1500, ignore_eos=True, temperature=1.0, seed=seed)
        trim, prompt = TrimRequest(k_ratio=0.2), chat("Say something.")
        outputs.append(start(engine, GenerationRequest(f"{seed}", prompt, sampling, trim, constraint=constraint))[1])
    while engine.has_work and sum(len(tokens(output)) for output in outputs) < _BATCH * _WARM_UP_STEPS:
        engine.step()
    return engine, outputs


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "constraints.json", steps=400, rounds=5)
    model = load_model(ModelConfig(), EngineConfig())
    rounds = [_round(model, arguments.steps) for _ in range(arguments.rounds)]
    plain, constrained = medians(rounds, 6)
    figures = {
        "batch": _BATCH,
        "steps": arguments.steps,
        "rounds": rounds,
        "plain_step_seconds": plain,
        "constrained_step_seconds": constrained,
        "slowdown": round(median(other / one for one, other in rounds) - 1, 4),
    }
    finish(arguments, figures)


if __name__ == "__main__":
    main()
