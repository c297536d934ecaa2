"""Puts `trimserve serve` under load over gRPC, and transformers under the same load, in one run.

    python -m benchmarks.bench_serve [--bench-model DIR] [--rival-venv VENV] [--out DIR] [--quick]

For each model, in the same dtype, on the same number of threads and with the same requests:

- closed loop: a fixed number of clients with one request at a time each; trimmed, untrimmed, and against transformers:
  `generate` in a process of its own, one request at a time; `generate` of as many requests at once as there are
  clients; and `transformers serve`, where an environment with `transformers[serving]` is given;
- open loop: requests come at random times, at a share of the rate that the closed loop reached;
- probes of an idle server: what the service adds to a token, and what a repeated image saves.

End tokens are ignored everywhere, so every answer has as many tokens. Writes `report.json`.
"""

import random
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import torch

from benchmarks.load import (
    Ask,
    Exchange,
    Item,
    Kind,
    closed_loop,
    make_workload,
    num_equal_answers,
    open_loop,
    picture_of,
    poisson_arrivals,
    summary,
)
from benchmarks.machine import memory_bytes
from benchmarks.models import BENCH_MODEL, MODELS, UnderTest, under_test
from benchmarks.ours import QUESTION, SETTINGS, Ours
from benchmarks.report import command_line, finish, markdown, origin
from benchmarks.rival import Transformers, transformers_serve
from benchmarks.service import asking, running_server
from trimserve.client import Client
from trimserve.config import Dtype, EngineConfig, ModelConfig
from trimserve.model.loading import describe_model
from trimserve.process import ServerFailed

__all__ = ["Plan", "main", "table"]

_WARM_UP: Final = Item(0, "text", "Hello?", ())
"""Asked before a load is timed, as transformers answers a request before its own is."""
_PROBED: Final[dict[Kind, str]] = {"four_tiles": "4 tiles", "one_tile": "1 tile"}
_QUESTIONS: Final = ("What is in the image?", "Which colour is the largest thing?")
_NAMES: Final = {
    "trimserve": "trimserve",
    "trimserve_untrimmed": "trimserve, untrimmed",
    "transformers_sequential": "transformers, one at a time",
    "transformers_batched": "transformers, batched",
    "transformers_serve": "`transformers serve`",
    "trimserve_open_loop": "trimserve, open loop",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is asked."""

    num_requests: int
    concurrency: int = 16
    """Clients of the closed loop, and requests of one of transformers' batches."""
    max_new_tokens: int = 128
    open_loop_load: float = 0.7
    """Rate of the open loop as a share of the rate that the closed loop reached."""
    num_probe_images: int = 3
    latency_rounds: int = 5
    num_threads: int = 1
    """Of one op, in every process; the load generator takes another core."""
    dtype: Dtype = "float32"
    """What everyone computes in."""


_PLANS: Final = (("embedded", Plan(192)), ("bench", Plan(16)), ("bench", Plan(16, dtype="bfloat16")))
"""What is asked of which model. One at a time, `bench` takes transformers up to ten seconds a request."""
_QUICK: Final = Plan(6, concurrency=3, max_new_tokens=8, num_probe_images=1, latency_rounds=1)


class _Comparison:
    """All loads and probes of one model: trimserve first, then transformers with the same requests."""

    def __init__(self, model: UnderTest, plan: Plan, rival_venv: str | None) -> None:
        self._model, self._plan, self._rival_venv = model, plan, rival_venv
        config = ModelConfig(model=str(model.checkpoint))
        self._tile_size = describe_model(config, EngineConfig()).tile_size
        self._items = make_workload(plan.num_requests, self._tile_size)
        self._loads: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Everything, as plain data."""
        with self._serving(is_trimmed=True) as served:
            self._closed_loop("trimserve", *served)
        probes = self._probes()
        with self._serving(is_trimmed=False) as served:
            untrimmed = self._closed_loop("trimserve_untrimmed", *served)
        exchanges = self._transformers()
        if self._rival_venv is not None:
            self._transformers_serve(Path(self._rival_venv))
        return {
            "model": self._model.name,
            "max_kept_fraction": self._model.max_kept_fraction,
            "loads": self._loads,
            **probes,
            "num_untrimmed_answers_as_transformers": num_equal_answers(untrimmed, exchanges),
            "plan": asdict(self._plan),
        }

    def _loaded(self, name: str, load: dict[str, Any]) -> None:
        self._loads[name] = load
        print(self._model.name, name, load, file=sys.stderr, flush=True)

    @contextmanager
    def _serving(self, *, is_trimmed: bool) -> Iterator[tuple[Ask, int]]:
        """A fresh server, which has seen no image yet: what asks it, and its process id."""
        with (
            running_server(
                self._model.checkpoint, num_threads=self._plan.num_threads, flags=("--dtype", self._plan.dtype)
            ) as server,
            Client(server.address) as client,
        ):
            yield asking(client, self._plan.max_new_tokens, self._model.trim(is_on=is_trimmed)), server.pid

    def _closed_loop(self, name: str, ask: Ask, pid: int, warm_up: Item = _WARM_UP) -> list[Exchange]:
        ask(warm_up)
        exchanges = closed_loop(ask, self._items, self._plan.concurrency)
        self._loaded(name, {**summary(exchanges), "peak_rss_bytes": memory_bytes(pid)})
        return exchanges

    def _probes(self) -> dict[str, Any]:
        """The open loop, and what needs an idle server."""
        plan = self._plan
        with self._serving(is_trimmed=True) as (ask, _):
            rate = plan.open_loop_load * self._loads["trimserve"]["requests_per_second"]
            items = make_workload(plan.num_requests, self._tile_size, seed=1)
            exchanges = open_loop(ask, items, poisson_arrivals(plan.num_requests, rate))
            self._loaded("trimserve_open_loop", {"offered_requests_per_second": round(rate, 4), **summary(exchanges)})
            images, latency = self._repeated_images(ask), self._added_latency(ask)
        return {"repeated_images": images, "added_latency": latency}

    def _repeated_images(self, ask: Ask) -> dict[str, Any]:
        """Time to first token of a new image and of another question on it, one request at a time, by kind."""
        rng, number = random.Random(2), self._plan.num_probe_images
        found: dict[str, Any] = {}
        for kind in _PROBED:
            pictures = [picture_of(kind, rng, self._tile_size) for _ in range(number)]
            items = [Item(0, kind, question, (picture,)) for picture in pictures for question in _QUESTIONS]
            waited = [each.time_to_first_token for each in closed_loop(ask, items, 1)]
            first, repeated = median(waited[::2]), median(waited[1::2])
            found[kind] = {
                "num_images": number,
                "first_seconds": round(first, 5),
                "repeated_seconds": round(repeated, 5),
                "repeated_over_first": round(repeated / first, 4),
            }
        return found

    @torch.inference_mode()
    def _added_latency(self, ask: Ask) -> dict[str, Any]:
        """Seconds per token through the service at batch 1 beside the bare decode step of the same model, in turns.

        Medians of the rounds' means, because several tokens may come in one message.
        """
        setting, plan = SETTINGS["default"], self._plan
        torch.set_num_threads(plan.num_threads)
        ours = Ours.load(self._model.checkpoint, 1, plan.max_new_tokens, dtype=plan.dtype)
        bare = ours.ask(setting, self._model.max_kept_fraction)
        item = Item(0, "four_tiles", QUESTION, (setting.picture(self._tile_size),))
        num_tokens = ask(item).num_tokens  # also the first use of the image
        bare.answer(4)  # warms up
        served, steps = [], []
        for _ in range(plan.latency_rounds):
            [exchange] = closed_loop(ask, [item], 1)
            served.append(exchange.time_per_output_token)
            steps.append(fmean(bare.answer(num_tokens - 1)))
        service, step = median(served), median(steps)
        return {
            "rounds": plan.latency_rounds,
            "tokens_per_round": num_tokens,
            "service_seconds_per_token": round(service, 6),
            "bare_step_seconds": round(step, 6),
            "added_seconds_per_token": round(service - step, 6),
            "added_over_bare_step": round((service - step) / step, 4),
        }

    def _transformers(self) -> list[Exchange]:
        """One at a time, then in batches."""
        with Transformers(self._model.checkpoint, **self._options) as rival:
            pid = rival.warm_up(self._items[0])
            exchanges = self._closed_loop("transformers_sequential", rival.ask, pid)
            size, count = self._plan.concurrency, len(self._items)
            try:
                seconds = sum(rival.batch(self._items[first : first + size]) for first in range(0, count, size))
                rate = round(count * self._plan.max_new_tokens / seconds, 2)
                batched = {"tokens_per_second": rate, "errors": [], "peak_rss_bytes": memory_bytes(pid)}
            except BrokenProcessPool as error:  # such as killed for its memory
                batched = {"errors": [str(error)]}
            self._loaded("transformers_batched", batched)
        return exchanges

    def _transformers_serve(self, venv: Path) -> None:
        try:
            with transformers_serve(venv, self._model.checkpoint, **self._options) as (ask, pid):
                self._closed_loop("transformers_serve", ask, pid, self._items[0])
        except (ServerFailed, OSError) as error:
            self._loaded("transformers_serve", {"errors": [str(error)]})

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "dtype": self._plan.dtype,
            "num_threads": self._plan.num_threads,
            "max_new_tokens": self._plan.max_new_tokens,
        }


def table(report: dict[str, Any]) -> str:
    """Rates and latencies under load by target, and the probes of an idle server, as Markdown."""
    return "\n\n".join([*(_table_of_model(model) for model in report["models"]), origin(report)])


def _table_of_model(model: dict[str, Any]) -> str:
    plan, loads, latency, images = (model[name] for name in ("plan", "loads", "added_latency", "repeated_images"))
    asked = f"{plan['num_requests']} requests of {plan['max_new_tokens']} tokens, {plan['concurrency']} clients"
    head = ["target", "tokens/s", "first token p50", "p99", "between messages p50", "p99", "whole answer p50", "p99"]
    rows = [[name, *_cells(loads[key])] for key, name in _NAMES.items() if key in loads]
    rates = {key: load["tokens_per_second"] for key, load in loads.items() if not load["errors"]}
    rivals = [key for key in _NAMES if {key, "trimserve"} <= rates.keys() and key.startswith("transformers")]
    told = ", ".join(f"{rates['trimserve'] / rates[key]:.1f} times that of {_NAMES[key]}" for key in rivals)
    added, step = (f"{1e3 * latency[name]:.2f} ms" for name in ("added_seconds_per_token", "bare_step_seconds"))
    waits = " and ".join(f"{images[kind]['repeated_over_first']:.2f} ({_PROBED[kind]})" for kind in _PROBED)
    share, equal = f"{latency['added_over_bare_step']:.0%}", model["num_untrimmed_answers_as_transformers"]
    lines = [
        f"**{model['model']}** in {plan['dtype']}: {asked}, half of the images repeated; milliseconds:",
        "",
        markdown(head, rows),
        "",
        f"- Rate of trimserve: {told}." if told else "- No rival answered every request.",
        f"- First token of another question on an image, over that of the first question on it: {waits}.",
        f"- The service adds {added} to a token at batch 1, {share} of the bare decode step of {step}.",
        f"- Untrimmed, {equal} of {plan['num_requests']} answers are those of transformers to the last token.",
    ]
    return "\n".join(lines)


def _cells(load: dict[str, Any]) -> list[str]:
    if "tokens_per_second" not in load:
        return [f"failed: {load['errors'][0].splitlines()[-1][:80]}", *[""] * 6]
    cells = [f"{load['tokens_per_second']:,.1f}"]
    for name in ("time_to_first_token", "inter_token", "duration"):
        found = load.get(f"{name}_seconds") or {}
        cells += [f"{1e3 * found[point]:,.1f}" if found else "" for point in ("p50", "p99")]
    return cells


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "serve", bench_model=BENCH_MODEL, models=[*MODELS], rival_venv=None, quick=False)
    models = []
    for name, full in _PLANS:
        if name not in arguments.models:
            continue
        asked = replace(_QUICK, dtype=full.dtype) if arguments.quick else full
        plan = replace(asked, num_threads=arguments.threads)
        comparison = _Comparison(under_test(name, arguments.bench_model), plan, arguments.rival_venv)
        models.append(comparison.run())
    print(table(finish(arguments, {"models": models}, "report.json")), file=sys.stderr)


if __name__ == "__main__":
    main()
