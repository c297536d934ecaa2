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
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final

import torch

from benchmarks.driven import UNCUT, Driven, Output
from benchmarks.models import MODELS, under_test
from benchmarks.ours import QUESTION, chat
from benchmarks.report import finish, options
from benchmarks.workload import draw_picture
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main"]

_SLICES: Final = (0.0, 0.03, 0.1, 0.3, 1.0, UNCUT)
_MAX_NEW_TOKENS: Final = 512  # of the running requests, which never come to their end


@dataclass(frozen=True, slots=True)
class _Plan:
    """How much is generated at every slice."""

    num_running: int = 8
    num_newcomers: int = 3
    tokens_between: int = 25
    """Of each running request, from one newcomer to the next; more than a prefill has layers."""
    newcomer_tokens: int = 8


def _measure(model: Mllama, plan: _Plan, trim: TrimRequest, slice_seconds: float, rng: random.Random) -> dict[str, Any]:
    """Figures of one slice."""
    driven = Driven(model, clock=time.monotonic, max_batch=plan.num_running + 1, prefill_slice_seconds=slice_seconds)

    def begin(num_tokens: int, *images: bytes) -> Output:
        sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        return driven.begin(GenerationRequest("slices", chat(QUESTION, *images), sampling, trim))

    watched = [begin(_MAX_NEW_TOKENS) for _ in range(plan.num_running)][-1].arrivals
    while not watched:  # their own prefill is not what is measured
        driven.step()
    start, paused = time.monotonic(), 0.0
    gaps: list[float] = []
    firsts: list[float] = []
    for number in range(1, plan.num_newcomers + 1):
        while len(watched) <= number * plan.tokens_between:
            driven.step()
        came = time.monotonic()
        newcomer = begin(plan.newcomer_tokens, draw_picture(rng, 2 * model.info.tile_size))
        num_seen, added = len(watched), time.monotonic()
        paused += added - came
        while not newcomer.arrivals:
            driven.step()
        firsts.append(newcomer.arrivals[0] - added)
        gaps += [later - earlier for earlier, later in pairwise([added, *watched[num_seen:]])]
    while len(watched) <= plan.tokens_between * (plan.num_newcomers + 2):  # newcomers are long done by then
        driven.step()
    num_tokens = plan.num_running * (len(watched) - 1) + plan.num_newcomers * plan.newcomer_tokens
    return {
        "slice_seconds": None if slice_seconds == UNCUT else slice_seconds,
        "undisturbed_gap_seconds": round(median(b - a for a, b in pairwise(watched[: plan.tokens_between])), 4),
        "median_gap_seconds": round(median(gaps), 4),
        "longest_gap_seconds": round(max(gaps), 4),
        "time_to_first_token_seconds": round(median(firsts), 4),
        "tokens_per_second": round(num_tokens / (time.monotonic() - start - paused), 1),
    }


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    parser = options(__doc__, "slices.json", bench_model=True, quick=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: both")
    arguments = parser.parse_args()
    plan = _Plan(num_running=2, num_newcomers=1) if arguments.quick else _Plan()
    torch.set_num_threads(1)
    models: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.models:
        tested = under_test(name, arguments.bench_model)
        model, rng = load_model(ModelConfig(model=str(tested.checkpoint)), EngineConfig()), random.Random(0)
        trim = TrimRequest(k_ratio=model.info.default_k_ratio, max_kept_fraction=tested.max_kept_fraction)
        rows = models[name] = []
        for slice_seconds in (UNCUT, *_SLICES):  # the first warms up
            rows.append(_measure(model, plan, trim, slice_seconds, rng))
            print(name, rows[-1], flush=True)
        del rows[0]
    finish("slices", arguments.out, {"plan": asdict(plan), "models": models})


if __name__ == "__main__":
    main()
