"""What `prefill_slice_seconds` costs and buys: how long streams stall while others are prefilled.

    python -m benchmarks.bench_slices [--bench-model DIR] [--out FILE] [--quick]

Some requests about text run; while they do, requests with a new four-tile image each come one after the other, at the
same token of the running ones for every slice, and the run ends at the same token, so that the work is the same. The
engine is driven without service and sockets, on one thread. For each slice:

- the gap between two tokens of the running requests: median when nobody came, median and longest while a newcomer was
  prefilled;
- time to first token of the newcomers, from the moment at which the engine has their pixels;
- tokens per second over everything.

`null` in the place of a slice is a prefill in one piece.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bench_model import BENCH_MODEL, max_kept_fraction, write_bench_model
from benchmarks.serve.report import about, write_json
from benchmarks.serve.workload import draw_picture
from trimserve.api.chunks import GenerationChunk, TokenDelta
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
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

_OUT = Path(__file__).parent / "results" / "slices.json"
_WHOLE = 1e6
"""Seconds that no prefill takes: it is not cut."""
_SLICES = (0.0, 0.03, 0.1, 0.3, 1.0, _WHOLE)
_MAX_NEW_TOKENS = 512  # of the running requests, which never come to their end
_QUESTION = "Describe what you see in a few words, and name every colour."


@dataclass(frozen=True, slots=True)
class _Plan:
    """How much is generated at every slice."""

    num_running: int = 8
    num_newcomers: int = 3
    tokens_between: int = 25
    """Of each running request, from one newcomer to the next; more than a prefill has layers."""
    newcomer_tokens: int = 8
    num_threads: int = 1

    @property
    def num_steps(self) -> int:
        """Tokens of each running request, at least; newcomers are long done by then."""
        return self.tokens_between * (self.num_newcomers + 2)


@dataclass(slots=True)
class _Output:
    """When the tokens of one request came."""

    arrivals: list[float] = field(default_factory=list)

    def __call__(self, chunk: GenerationChunk | TrimserveError) -> None:
        if isinstance(chunk, TrimserveError):
            raise chunk
        if isinstance(chunk, TokenDelta):
            self.arrivals.append(time.monotonic())


class _Traffic:
    """The same requests for every slice, but for their images, which must be new."""

    def __init__(self, model: Mllama, plan: _Plan, cap: float | None) -> None:
        self._model = model
        self._plan = plan
        self._trim = TrimRequest(k_ratio=model.info.default_k_ratio, max_kept_fraction=cap)
        self._rng = random.Random(0)

    def measure(self, slice_seconds: float) -> dict[str, Any]:
        """Figures of one slice."""
        plan = self._plan
        config = EngineConfig(max_batch=plan.num_running + 1, prefill_slice_seconds=slice_seconds)
        engine = Engine(self._model, LocalExecutor(self._model), config)
        running = [self._begin(engine, _MAX_NEW_TOKENS) for _ in range(plan.num_running)]
        while not running[-1].arrivals:  # their own prefill is not what is measured
            engine.step()
        watched = running[-1].arrivals
        start, paused = time.monotonic(), 0.0
        gaps: list[float] = []
        firsts: list[float] = []
        for number in range(1, plan.num_newcomers + 1):
            while len(watched) <= number * plan.tokens_between:
                engine.step()
            came = time.monotonic()
            image = draw_picture(self._rng, 2 * self._model.info.tile_size)
            newcomer = self._begin(engine, plan.newcomer_tokens, image)
            num_seen, added = len(watched), time.monotonic()
            paused += added - came
            while not newcomer.arrivals:
                engine.step()
            firsts.append(newcomer.arrivals[0] - added)
            gaps += [later - earlier for earlier, later in pairwise([added, *watched[num_seen:]])]
        while len(watched) <= plan.num_steps:
            engine.step()
        num_tokens = plan.num_running * (len(watched) - 1) + plan.num_newcomers * plan.newcomer_tokens
        return {
            "slice_seconds": None if slice_seconds == _WHOLE else slice_seconds,
            "undisturbed_gap_seconds": round(median(b - a for a, b in pairwise(watched[: plan.tokens_between])), 4),
            "median_gap_seconds": round(median(gaps), 4),
            "longest_gap_seconds": round(max(gaps), 4),
            "time_to_first_token_seconds": round(median(firsts), 4),
            "tokens_per_second": round(num_tokens / (time.monotonic() - start - paused), 1),
        }

    def _begin(self, engine: Engine, num_tokens: int, image: bytes | None = None) -> _Output:
        """Hand a prepared request to the engine: in a server, other threads prepare it."""
        shown = () if image is None else (ImageFile(image),)
        request = GenerationRequest(
            request_id="slices",
            prompt=ChatPrompt((Message("user", (*shown, Text(_QUESTION))),)),
            sampling=SamplingParams(max_new_tokens=num_tokens, ignore_eos=True),
            trim=self._trim,
        )
        output = _Output()
        engine.add(engine.prepare(request, output, time.monotonic()))
        return output


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    arguments = _arguments()
    console, plan, start = Console(stderr=True), _Plan(), time.monotonic()
    if arguments.quick:
        plan = _Plan(num_running=2, num_newcomers=1)
    torch.set_num_threads(plan.num_threads)
    models = {name: _measure(name, arguments.bench_model, plan, console) for name in arguments.models}
    report = {
        "benchmark": "slices",
        **about(plan.num_threads),
        "seconds": round(time.monotonic() - start, 1),
        "plan": asdict(plan),
        "models": models,
    }
    write_json(report, arguments.out)
    for name, rows in models.items():
        console.print(_table(name, rows))
    print(json.dumps(report))


def _measure(name: str, bench_model: Path, plan: _Plan, console: Console) -> list[dict[str, Any]]:
    folder, cap = None, None
    if name == "bench":
        folder, cap = str(bench_model), max_kept_fraction()
        if not (bench_model / "config.json").exists():
            write_bench_model(bench_model)
    traffic = _Traffic(load_model(ModelConfig(model=folder), EngineConfig()), plan, cap)
    traffic.measure(_WHOLE)  # warms up
    return [traffic.measure(each) for each in track(_SLICES, name, console=console)]


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=name, title_justify="left")
    for column in rows[0]:
        table.add_column(column.removesuffix("_seconds"), justify="right")
    for row in rows:
        table.add_row(*("whole" if value is None else str(value) for value in row.values()))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ("embedded", "bench")
    add("--models", nargs="+", choices=names, default=list(names), help="default: both")
    add("--bench-model", type=Path, default=BENCH_MODEL, help="folder of the checkpoint; written if it is not there")
    add("--out", type=Path, default=_OUT, help="the report")
    add("--quick", action="store_true", help="little of everything, to see whether it works")
    return parser.parse_args()


if __name__ == "__main__":
    main()
