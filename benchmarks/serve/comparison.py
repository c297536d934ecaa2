"""All loads and probes of one model, in one run: trimserve first, then transformers with the same requests."""

from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.serve.bare import BareModel
from benchmarks.serve.figures import agreement, median_round, ratios, summary
from benchmarks.serve.load import Exchange, closed_loop, open_loop
from benchmarks.serve.models import UnderTest
from benchmarks.serve.probes import added_latency, repeated_images
from benchmarks.serve.rivals import Transformers, transformers_serve
from benchmarks.serve.service import GrpcTarget, peak_rss_bytes, running_server
from benchmarks.serve.workload import Item, Kind, WorkloadSettings, make_workload, poisson_arrivals
from trimserve.process import ServerFailed

__all__ = ["NUM_STAGES", "Comparison", "Plan"]

NUM_STAGES = 7
"""How often a comparison tells what it begins."""

_WARM_UP: Final = Item(0, "text", "Hello?", (), is_repeated=False)
"""Asked before a load is timed, as transformers answers a request before its own is."""

_LEAST_SECONDS = 8.0

_PROBED_KINDS: Final[tuple[Kind, ...]] = ("four_tiles", "one_tile")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is asked."""

    num_requests: int
    concurrency: int
    """Clients of the closed loop, and requests of one of transformers' batches."""
    max_new_tokens: int
    repeated_share: float
    open_loop_load: float
    """Rate of the open loop as a share of the rate that the closed loop reached."""
    num_probe_images: int
    latency_rounds: int
    num_threads: int
    seed: int


class Comparison:
    """The figures of one model."""

    def __init__(self, model: UnderTest, plan: Plan, rival_venv: Path | None, begin: Callable[[str], None]) -> None:
        """Set out; `run` does it.

        Args:
            model: which.
            plan: how much.
            rival_venv: an environment with `transformers[serving]`; None leaves `transformers serve` out.
            begin: told the name of each stage, `NUM_STAGES` times.
        """
        self._model = model
        self._plan = plan
        self._rival_venv = rival_venv
        self._begin = begin
        self._tile_size = 0
        self._items: tuple[Item, ...] = ()
        self._loads: dict[str, dict[str, Any]] = {}
        self._probes: dict[str, Any] = {}

    async def run(self) -> dict[str, Any]:
        """Everything, as plain data.

        Raises:
            ServerFailed: trimserve did not start.
        """
        self._begin("closed loop")
        async with self._serving(is_trimmed=True) as (target, _):
            self._tile_size = (await target.model()).tile_size
        self._items = self._workload(self._plan.seed)
        await self._closed_loops("trimserve", is_trimmed=True)
        await self._idle_probes()
        self._begin("closed loop, untrimmed")
        untrimmed = await self._closed_loops("trimserve_untrimmed", is_trimmed=False)
        equal = await self._transformers(untrimmed)
        self._begin("transformers serve")
        if self._rival_venv is not None:
            await self._transformers_serve(self._rival_venv)
        return {
            "model": self._model.name,
            "max_kept_fraction": self._model.max_kept_fraction,
            "loads": self._loads,
            "ratios": ratios(self._loads),
            **self._probes,
            "untrimmed_answers_and_transformers": equal,
        }

    async def _idle_probes(self) -> None:
        """What needs a server that has time left."""
        plan = self._plan
        self._begin("open loop")
        async with self._serving(is_trimmed=True) as (target, _):
            rate = plan.open_loop_load * self._loads["trimserve"]["requests_per_second"]
            arrivals = poisson_arrivals(plan.num_requests, rate, plan.seed)
            exchanges = await open_loop(target.ask, self._workload(plan.seed + 1), arrivals)
            self._loads["trimserve_open_loop"] = {"offered_requests_per_second": round(rate, 4), **summary(exchanges)}
            self._begin("probes")
            self._probes["repeated_images"] = await repeated_images(
                target.ask, self._tile_size, _PROBED_KINDS, plan.num_probe_images, plan.seed + 2
            )
            item = next(item for item in self._items if item.kind == "four_tiles")
            threads, cap = plan.num_threads, self._model.max_kept_fraction
            with BareModel(self._model.folder, num_threads=threads, max_kept_fraction=cap) as bare:
                self._probes["added_latency"] = await added_latency(target, bare, item, plan.latency_rounds)

    @asynccontextmanager
    async def _serving(self, *, is_trimmed: bool) -> AsyncIterator[tuple[GrpcTarget, int]]:
        """A fresh server, which has seen no image yet: a client and the process id."""
        with running_server(self._model.folder, num_threads=self._plan.num_threads) as server:
            trim = self._model.trim(is_on=is_trimmed)
            async with GrpcTarget(server.address, max_new_tokens=self._plan.max_new_tokens, trim=trim) as target:
                yield target, server.pid

    def _workload(self, seed: int) -> tuple[Item, ...]:
        plan = self._plan
        settings = WorkloadSettings(plan.num_requests, self._tile_size, repeated_share=plan.repeated_share, seed=seed)
        return make_workload(settings)

    async def _closed_loops(self, name: str, *, is_trimmed: bool) -> list[Exchange]:
        """The same load on fresh servers until it was measured for long enough.

        The median round counts, of an even number the slower one in the middle; one with errors counts at once.
        """
        rounds: list[dict[str, Any]] = []
        seconds = 0.0
        exchanges: list[Exchange] = []
        while seconds < _LEAST_SECONDS:
            async with self._serving(is_trimmed=is_trimmed) as (target, pid):
                await target.ask(_WARM_UP)
                async with target.watched() as peak:
                    exchanges = await closed_loop(target.ask, self._items, self._plan.concurrency)
                found = summary(exchanges)
                seconds += found["seconds"]
                found |= {"peak_pool_bytes": peak.pool_bytes, "peak_cross_kv_bytes": peak.cross_bytes}
                rounds.append(found | {"peak_rss_bytes": peak_rss_bytes(pid)})
                if found["errors"]:
                    break
        self._loads[name] = median_round(rounds)
        return exchanges

    async def _transformers(self, untrimmed: Sequence[Exchange]) -> dict[str, Any]:
        """Returns how far the untrimmed answers are transformers' own."""
        plan = self._plan
        self._begin("transformers, one at a time")
        with Transformers(
            self._model.checkpoint, num_threads=plan.num_threads, max_new_tokens=plan.max_new_tokens
        ) as rival:
            await rival.warm_up(self._items[0])
            exchanges = await closed_loop(rival.ask, self._items, plan.concurrency)
            rss = await rival.peak_rss_bytes()
            self._loads["transformers_sequential"] = {**summary(exchanges), "peak_rss_bytes": rss}
            self._begin("transformers, batched")
            try:
                self._loads["transformers_batched"] = await self._batched(rival)
            except BrokenProcessPool as error:  # such as killed for its memory
                self._loads["transformers_batched"] = {"errors": [str(error)]}
        return agreement(untrimmed, exchanges)

    async def _batched(self, rival: Transformers) -> dict[str, Any]:
        size, count = self._plan.concurrency, len(self._items)
        seconds = [await rival.batch(self._items[start : start + size]) for start in range(0, count, size)]
        num_tokens = count * self._plan.max_new_tokens
        return {
            "num_requests": count,
            "batch_size": min(size, count),
            "errors": [],
            "seconds": round(sum(seconds), 3),
            "num_tokens": num_tokens,
            "tokens_per_second": round(num_tokens / sum(seconds), 2),
            "peak_rss_bytes": await rival.peak_rss_bytes(),
        }

    async def _transformers_serve(self, venv: Path) -> None:
        plan = self._plan
        options = {"num_threads": plan.num_threads, "max_new_tokens": plan.max_new_tokens}
        try:
            with transformers_serve(venv, self._model.checkpoint, **options) as target:
                await target.ask(self._items[0])
                exchanges = await closed_loop(target.ask, self._items, plan.concurrency)
                found = {**summary(exchanges), "peak_rss_bytes": peak_rss_bytes(target.pid)}
        except (ServerFailed, OSError) as error:
            found = {"errors": [str(error)]}
        self._loads["transformers_serve"] = found
