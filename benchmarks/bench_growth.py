"""What pages that grow are worth: requests at once in the same bytes, and what growing and preempting cost.

    python -m benchmarks.bench_growth [--out FILE] [--quick]

The embedded model answers questions about four-tile images with some twenty tokens each, while `max_new_tokens` is
1,024. The engine is driven without service and sockets, on one thread; seconds are the thread's own, so that other work
on the machine does not count. The same requests run

- `reserved`: all of `max_new_tokens` is reserved when a request joins, as it was before ADR-0013;
- `grown`: pages grow with the text;
- `exact`: each request reserves exactly what its answer takes, which no client knows.

Requests about text with long answers run in an `ample` pool, and in a `short` one that they outgrow, so that many are
preempted. The same requests must give the same tokens in every run.

Then one of the requests is asked for eight answers (`num_choices`): its cross-attention KV and its time to first token,
beside those of one answer, each on an image that is new.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from pydantic import ByteSize
from rich.console import Console
from rich.table import Table

from benchmarks.serve.report import about, write_json
from benchmarks.serve.workload import draw_picture
from trimserve.api.chunks import GenerationChunk, TokenDelta
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.engine.memory import prefill_scratch_bytes
from trimserve.engine.sequence import Sequence
from trimserve.errors import TrimserveError
from trimserve.executor.local import LocalExecutor
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "growth.json"
_QUESTION = "What do you see?"
_WHOLE = 1e6
"""Seconds that no prefill takes: whatever the pool has room for joins at once."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """The requests."""

    num_requests: int = 96
    num_pictures: int = 4
    max_new_tokens: int = 1024
    least_answer_tokens: int = 5
    mean_answer_tokens: int = 20
    """Longer answers are the rarer, exponentially."""
    num_reserved: int = 4
    """Requests that fit into the pool when all of `max_new_tokens` is reserved."""
    long_answer_tokens: tuple[int, int] = (60, 100)
    """Least and most, of requests about text that outgrow the pool."""
    long_new_tokens: int = 128
    num_long: int = 2
    """Requests that fit into the short pool when all of `long_new_tokens` is reserved."""
    num_choices: int = 8
    num_repeats: int = 9
    """Measurements of a first token, of which the median counts."""
    num_threads: int = 1


@dataclass(slots=True)
class _Run:
    """What became of the requests in one engine."""

    most_running: int
    num_preemptions: int
    num_recomputed_tokens: int
    tokens_per_second: float
    answers: list[list[int]] = field(repr=False)

    def figures(self) -> dict[str, Any]:
        """Without the answers."""
        figures = asdict(self)
        del figures["answers"]
        return figures


class _Traffic:
    """The same requests for every run."""

    def __init__(self, model: Mllama, plan: _Plan) -> None:
        self._model, self._plan = model, plan
        rng = random.Random(0)
        pictures = [ImageFile(draw_picture(rng, 2 * model.info.tile_size)) for _ in range(plan.num_pictures)]
        least, mean = plan.least_answer_tokens, plan.mean_answer_tokens
        lengths = [least + round(rng.expovariate(1 / (mean - least))) for _ in range(plan.num_requests)]
        self.requests = [
            self._request(pictures[number % plan.num_pictures], length) for number, length in enumerate(lengths)
        ]
        self.exact = [_with(one, length + 1) for one, length in zip(self.requests, lengths, strict=True)]
        self.long = [
            _with(self._request(None, rng.randint(*plan.long_answer_tokens)), plan.long_new_tokens)
            for _ in range(plan.num_requests)
        ]

    def _request(self, picture: ImageFile | None, length: int) -> GenerationRequest:
        """Answered by so many tokens and an end token."""
        end = self._model.info.generation_defaults.eos_token_ids[0]
        sampling = SamplingParams(
            max_new_tokens=self._plan.max_new_tokens, min_new_tokens=length, logit_bias={end: 100.0}, temperature=0.0
        )
        shown = () if picture is None else (picture,)
        prompt = ChatPrompt((Message("user", (*shown, Text(_QUESTION))),))
        return GenerationRequest("growth", prompt, sampling, TrimRequest(k_ratio=self._model.info.default_k_ratio))

    def pool_bytes(self, request: GenerationRequest) -> int:
        """Of a pool that holds a request with all of its `max_new_tokens`."""
        engine = self._engine(2**30)
        sequence, pool = engine.prepare(request, lambda _: None, 0.0), engine.pool
        return pool.self_bytes(sequence.max_positions) + pool.cross_bytes(sequence.max_cross_rows)

    def run(self, requests: Items[GenerationRequest], pool_bytes: int) -> _Run:
        """Answer them all."""
        engine, outputs = self._engine(pool_bytes), [_Output() for _ in requests]
        prepared = [engine.prepare(*one, time.monotonic()) for one in zip(requests, outputs, strict=True)]
        for sequence in prepared:
            engine.add(sequence)
        began, most = time.thread_time(), 0
        while engine.has_work:
            engine.step()
            most = max(most, sum(sequence.holds_pages for sequence in prepared))
        seconds = time.thread_time() - began
        num_tokens = sum(len(output.token_ids) for output in outputs)
        return _Run(
            most,
            engine.num_preemptions,
            engine.num_recomputed_tokens,
            round(num_tokens / seconds, 1),
            [output.token_ids for output in outputs],
        )

    def choices(self) -> dict[str, Any]:
        """What several answers hold and how soon they begin, over what one does."""
        held: dict[int, int] = {}
        firsts: dict[int, list[float]] = {1: [], self._plan.num_choices: []}
        rng = random.Random(1)
        for _ in range(self._plan.num_repeats):
            for number in firsts:
                picture = ImageFile(draw_picture(rng, 2 * self._model.info.tile_size))
                wanted = replace(self._request(picture, 20), num_choices=number)
                engine, output = self._engine(2**28), _Output()
                engine.add(engine.prepare(wanted, output, time.monotonic()))
                began = time.thread_time()
                while not output.token_ids:
                    engine.step()
                firsts[number].append(output.first_at - began)
                engine.step()  # the others have joined
                held[number] = engine.pool.used_cross_bytes
        one, several = (median(seconds) for seconds in firsts.values())
        return {
            "num_choices": self._plan.num_choices,
            "first_token_of_one_seconds": round(one, 4),
            "first_token_ratio": round(several / one, 3),
            "cross_kv_ratio": round(held[self._plan.num_choices] / held[1], 3),
        }

    def _engine(self, pool_bytes: int) -> Engine:
        config = EngineConfig(
            max_batch=self._plan.num_requests,
            prefill_slice_seconds=_WHOLE,
            kv_cache_bytes=ByteSize(prefill_scratch_bytes(self._model.info) + pool_bytes),
        )
        return Engine(self._model, LocalExecutor(self._model, 2**26), config)


def _with(request: GenerationRequest, max_new_tokens: int) -> GenerationRequest:
    return replace(request, sampling=replace(request.sampling, max_new_tokens=max_new_tokens))


@dataclass(slots=True)
class _Output:
    """The tokens of one request."""

    token_ids: list[int] = field(default_factory=list)
    first_at: float = 0.0
    """`time.thread_time()` at the first token."""

    def __call__(self, chunk: GenerationChunk | TrimserveError) -> None:
        if isinstance(chunk, TrimserveError):
            raise chunk
        if isinstance(chunk, TokenDelta):
            self.first_at = self.first_at or time.thread_time()
            self.token_ids += chunk.token_ids


def _measure(traffic: _Traffic, plan: _Plan) -> dict[str, _Run]:
    pool_bytes = plan.num_reserved * traffic.pool_bytes(traffic.requests[0])
    traffic.run(traffic.requests[: plan.num_pictures], pool_bytes)  # warms up
    all_positions = property(lambda sequence: sequence.max_positions)
    with patch.object(Sequence, "first_positions", all_positions):
        reserved = traffic.run(traffic.requests, pool_bytes)
        exact = traffic.run(traffic.exact, pool_bytes)
    grown = traffic.run(traffic.requests, pool_bytes)
    ample = traffic.run(traffic.long, plan.num_requests * traffic.pool_bytes(traffic.long[0]))
    short = traffic.run(traffic.long, plan.num_long * traffic.pool_bytes(traffic.long[0]))
    if not reserved.answers == exact.answers == grown.answers or short.answers != ample.answers:
        raise AssertionError("the same requests have other answers in another run")
    return {"reserved": reserved, "grown": grown, "exact": exact, "ample": ample, "short": short}


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    arguments = _arguments()
    console, plan, start = Console(stderr=True), _Plan(), time.monotonic()
    if arguments.quick:
        plan = _Plan(num_requests=16, num_reserved=2, num_repeats=2)
    torch.set_num_threads(plan.num_threads)
    traffic = _Traffic(load_model(ModelConfig(), EngineConfig()), plan)
    runs = _measure(traffic, plan)
    report = {
        "benchmark": "growth",
        **about(plan.num_threads),
        "seconds": round(time.monotonic() - start, 1),
        "plan": asdict(plan),
        "runs": {name: run.figures() for name, run in runs.items()},
        "at_once_ratio": round(runs["grown"].most_running / runs["reserved"].most_running, 2),
        "throughput_of_exact_ratio": round(runs["grown"].tokens_per_second / runs["exact"].tokens_per_second, 3),
        "preempted_ratio": round(runs["short"].num_preemptions / plan.num_requests, 2),
        "choices": traffic.choices(),
    }
    write_json(report, arguments.out)
    table = Table("run", *runs["grown"].figures())
    for name, run in runs.items():
        table.add_row(name, *map(str, run.figures().values()))
    console.print(table)
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_OUT, help="the report")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see whether it works")
    return parser.parse_args()


if __name__ == "__main__":
    main()
