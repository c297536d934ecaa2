"""Batch equals alone: whatever is mixed, whenever it comes, leaves or is cancelled, and however small the pool.

`--mixes 200` tries more of them than the usual 20.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from pydantic import ByteSize

from tests.engine.stepping import make_engine
from tests.engine.test_real_model import GREEDY, ONE, OTHER, SAMPLED, THREE, model, noise
from trimserve.api.chunks import Finished, GenerationChunk, Started, TokenDelta
from trimserve.api.prompt import RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.trim import FixedCount, FixedRatio, TopP, TrimRequest
from trimserve.config import EngineConfig
from trimserve.engine.engine import Engine
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.engine.sequence import Sequence, SequenceState
from trimserve.errors import TrimserveError
from trimserve.executor.local import LocalExecutor
from trimserve.executor.model import Model
from trimserve.model.mllama import Mllama

__all__ = ["model"]  # the fixture

Output = list[GenerationChunk | TrimserveError]

TOKEN_GAP = 1e-3
"""Of the log-probabilities of the two likeliest tokens: below it rounding may decide between them."""

PROMPTS = (
    RawPrompt("just a few words"),
    RawPrompt("and many more of them, " * 4),
    ONE,
    OTHER,
    THREE,
    RawPrompt("First<|image|>one, then<|image|>another", (noise(1, 1, 6), noise(2, 2, 1))),
)
TRIMS = (
    TrimRequest(enabled=False),
    TrimRequest(k_ratio=0.1),
    TrimRequest(k_ratio=0.3, max_kept_fraction=0.4),
    TrimRequest(k_ratio=0.05, merge_ratio=0.2),
    TrimRequest(policy="strided", k_ratio=0.1),
    TrimRequest(policy="mmr", budget=FixedRatio(0.3), merge_ratio=0.1),
    TrimRequest(policy="sparsevlm", budget=TopP(0.7)),
    TrimRequest(policy="sparsevlm", budget=FixedCount(12), parameters={"recycle_ratio": 1.0}),
    TrimRequest(policy="cls", budget=FixedRatio(0.3)),
    TrimRequest(policy="divprune", merge_ratio=0.2),
    TrimRequest(policy="visiondrop", budget=FixedRatio(0.4)),
    TrimRequest(policy="pool"),
    TrimRequest(policy="sparsevlm", budget=FixedRatio(0.5), parameters={"cascade_ratio": 0.5}),
    TrimRequest(policy="todre", budget=FixedRatio(0.5), parameters={"late_exit_threshold": 0.3}),
)


def draw_request(rng: random.Random, name: str, most_tokens: int) -> GenerationRequest:
    is_greedy = rng.random() < 0.5
    params = replace(
        GREEDY if is_greedy else SAMPLED,
        max_new_tokens=rng.randint(most_tokens // 2 if rng.random() < 0.9 else 1, most_tokens),
        seed=rng.randint(0, 2),
        num_top_logprobs=2,
    )
    trim = replace(rng.choice(TRIMS), return_selection=True)
    num_choices = rng.choice([1, 1, 1, 1, 3])
    return GenerationRequest(
        name, rng.choice(PROMPTS), params, trim, num_choices=num_choices, priority=rng.randint(0, 1)
    )


def answer(output: Output, choice: int) -> Output:
    """What a request with this answer alone would have got."""
    of_all = (chunk for chunk in output if getattr(chunk, "choice", choice) == choice)
    return [replace(chunk, choice=0) if isinstance(chunk, TokenDelta | Finished) else chunk for chunk in of_all]


def choices_of(wanted: GenerationRequest) -> list[GenerationRequest]:
    """Requests for each answer alone."""
    numbers = range(wanted.num_choices)
    return [replace(wanted, num_choices=1, sampling=wanted.sampling.of_choice(number)) for number in numbers]


def deltas(output: Output) -> Iterator[TokenDelta]:
    return (chunk for chunk in output if isinstance(chunk, TokenDelta))


def assert_same(output: Output, expected: Output, wanted: GenerationRequest) -> int:
    """Compare as far as tokens agree; they may part only where rounding decides.

    Returns:
        How often it did: 0 or 1.
    """
    if not output:
        return 0
    first, alone = output[0], expected[0]
    assert isinstance(first, Started)
    assert isinstance(alone, Started)
    assert (first.images, first.selections) == (alone.images, alone.selections)
    for one, other in zip(deltas(output), deltas(expected), strict=False):
        if one.token_ids != other.token_ids:
            (_, best), (_, second) = other.logprobs[0].top
            assert wanted.sampling.temperature > 0 or best - second < TOKEN_GAP
            assert abs(one.logprobs[0].top[0][1] - best) < 1e-4
            return 1
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-4)
        assert one.text == other.text
    return 0


class Mix:
    """A few requests that come and go in one engine, and each of their answers alone."""

    def __init__(self, model: Mllama, seed: int, computing: Model | None = None) -> None:
        """Draw the requests.

        Args:
            model: that answers each alone.
            seed: of everything.
            computing: the same model for the mix, which may fail where several are computed together.
        """
        rng = self._rng = random.Random(f"mix/{seed}")
        self._model = model
        self.is_tight = rng.random() < 0.5
        """Whether the pool holds little more than the largest request, and answers are long."""
        most_tokens = 96 if self.is_tight else 24
        self.arrivals = [
            (rng.randint(0, 20), draw_request(rng, f"r{n}", most_tokens)) for n in range(rng.randint(2, 7))
        ]
        largest = max(self._most_bytes(wanted) for _, wanted in self.arrivals)
        config = EngineConfig(
            max_batch=rng.randint(2, 8),
            kv_cache_bytes=ByteSize(
                prefill_scratch_bytes(model.info) + int(largest * rng.uniform(1.1, 1.7)) if self.is_tight else 2**24
            ),
            image_cache_bytes=ByteSize(rng.choice([0, 2**16, 2**24])),
            prefill_slice_seconds=rng.choice([0.0, 0.005, 0.1]),
        )
        computing = computing or model
        self._executor = LocalExecutor(computing, config.image_cache_bytes, runs_ahead=seed % 2 == 1)
        self.engine = Engine(model, self._executor, config)
        assert self._executor.pages is not None
        self._executor.pages.fill_(math.nan)  # what a request has not written itself reaches none of its tokens

    def _most_bytes(self, wanted: GenerationRequest) -> int:
        engine = make_engine(self._model)
        sequence = engine.prepare(wanted, lambda _: None, time.monotonic())
        return engine.pool.self_bytes(sequence.max_positions) + engine.pool.cross_bytes(sequence.max_cross_rows)

    def run(self) -> int:
        """Check all; how often rounding decided."""
        rng, engine = self._rng, self.engine
        live: list[tuple[GenerationRequest, Sequence, Output, int | None]] = []
        step = 0
        while engine.has_work or step <= 40:
            for arrives, wanted in self.arrivals:
                if arrives == step:
                    output: Output = []
                    sequence = engine.prepare(wanted, output.append, time.monotonic())
                    engine.add(sequence)
                    cancelled = step + rng.randint(0, 30) if rng.random() < 0.3 else None
                    live.append((wanted, sequence, output, cancelled))
            for _, sequence, _, cancelled in live:
                if cancelled == step:
                    engine.cancel(sequence)
                for each in sequence.family:
                    if not self.is_tight and each.state is SequenceState.RUNNING and rng.random() < 0.05:
                        engine.preempt(each)
            engine.step()
            step += 1
        assert engine.pool.num_free_pages == engine.pool.num_pages
        self._executor.free_pages()  # it knows no sequence any more, or it would complain
        by_rounding = 0
        for wanted, _, output, cancelled in live:
            assert cancelled is not None or sum(isinstance(chunk, Finished) for chunk in output) == wanted.num_choices
            for choice, one in enumerate(choices_of(wanted)):
                by_rounding += assert_same(answer(output, choice), self._alone(one), one)
        return by_rounding

    def _alone(self, wanted: GenerationRequest) -> Output:
        output: Output = []
        engine = make_engine(self._model, max_batch=1)
        engine.add(engine.prepare(wanted, output.append, time.monotonic()))
        while engine.has_work:
            engine.step()
        return output


def test_a_mix_gives_each_request_what_it_gets_alone(model: Mllama, mixes: int) -> None:
    by_rounding = num_requests = num_preemptions = 0
    for seed in range(mixes):
        mix = Mix(model, seed)
        by_rounding += mix.run()
        if mix.is_tight:
            num_requests += len(mix.arrivals)
            num_preemptions += mix.engine.num_preemptions
    assert by_rounding <= mixes // 10
    assert num_preemptions >= num_requests / 3
