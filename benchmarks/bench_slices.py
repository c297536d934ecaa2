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

import random
import time
from itertools import pairwise
from statistics import median
from typing import Any, Final

from benchmarks.driven import UNCUT, Driven
from benchmarks.load import draw_picture
from benchmarks.models import BENCH_MODEL, MODELS, under_test
from benchmarks.ours import QUESTION, chat
from benchmarks.report import command_line, finish, noted
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main"]

_SLICES: Final = (0.0, 0.03, 0.1, 0.3, 1.0, UNCUT)
_MAX_NEW_TOKENS: Final = 512  # of the running requests, which never come to their end
_BETWEEN: Final = 25
"""Tokens of each running request from one newcomer to the next; more than a prefill has layers."""
_NEWCOMERS_TOKENS: Final = 8


def _measure(
    model: Mllama, trim: TrimRequest, slice_seconds: float, num_running: int, pictures: list[bytes]
) -> dict[str, Any]:
    """Figures of one slice, with a newcomer for each picture."""
    driven = Driven(model, clock=time.monotonic, max_batch=num_running + 1, prefill_slice_seconds=slice_seconds)

    def begin(num_tokens: int, *images: bytes) -> list[float]:
        sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        return driven.begin(GenerationRequest("slices", chat(QUESTION, *images), sampling, trim)).arrivals

    def go_on(arrivals: list[float], num_arrivals: int) -> None:
        while len(arrivals) < num_arrivals:
            driven.step()

    watched = [begin(_MAX_NEW_TOKENS) for _ in range(num_running)][-1]
    go_on(watched, 1)  # their own prefill is not what is measured
    start, paused = time.monotonic(), 0.0
    gaps: list[float] = []
    firsts: list[float] = []
    for number, picture in enumerate(pictures, 1):
        go_on(watched, number * _BETWEEN + 1)
        came = time.monotonic()
        newcomer = begin(_NEWCOMERS_TOKENS, picture)
        num_seen, added = len(watched), time.monotonic()
        paused += added - came
        go_on(newcomer, 1)
        firsts.append(newcomer[0] - added)
        gaps += [later - earlier for earlier, later in pairwise([added, *watched[num_seen:]])]
    go_on(watched, _BETWEEN * (len(pictures) + 2) + 1)  # newcomers are long done by then
    num_tokens = num_running * (len(watched) - 1) + len(pictures) * _NEWCOMERS_TOKENS
    return {
        "slice_seconds": None if slice_seconds == UNCUT else slice_seconds,
        "undisturbed_gap_seconds": round(median(b - a for a, b in pairwise(watched[:_BETWEEN])), 4),
        "median_gap_seconds": round(median(gaps), 4),
        "longest_gap_seconds": round(max(gaps), 4),
        "time_to_first_token_seconds": round(median(firsts), 4),
        "tokens_per_second": round(num_tokens / (time.monotonic() - start - paused), 1),
    }


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "slices.json", bench_model=BENCH_MODEL, models=[*MODELS], quick=False)
    num_running, num_newcomers = (2, 1) if arguments.quick else (8, 3)
    models: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.models:
        tested, rng = under_test(name, arguments.bench_model), random.Random(0)
        model = load_model(ModelConfig(model=str(tested.checkpoint)), EngineConfig())
        trim = TrimRequest(k_ratio=model.info.default_k_ratio, max_kept_fraction=tested.max_kept_fraction)
        rows = models[name] = []
        for slice_seconds in (UNCUT, *_SLICES):  # the first warms up
            pictures = [draw_picture(rng, 2 * model.info.tile_size) for _ in range(num_newcomers)]
            noted(rows, _measure(model, trim, slice_seconds, num_running, pictures))
        del rows[0]
    finish(arguments, {"num_running": num_running, "num_newcomers": num_newcomers, "models": models})


if __name__ == "__main__":
    main()
