"""Serves the embedded model at full load for some minutes.

    python -m scripts.verify.load [soak|load] [--seconds 600] [--out benchmarks/results/soak.json]

Clients in a closed loop ask about text, one image and several images, trimmed and not.

- soak: more clients than the batch has places, streamed and unary; a tenth of the requests is cancelled at a random
  moment, a twentieth cannot be answered. Page pool and image cache are small, so that both are full all the time.
- load: two hundred streams that all decode together, and all to their end.

Meanwhile another process asks for health, metrics and reflection. Afterwards must hold:

- the page pool is empty, and nothing runs or waits;
- resident memory is flat: its median in the last fifth of the time is at most 3 % above that in the second fifth
  (the first fifth warms up);
- no request ended otherwise than provoked, as the clients and as the server's own counters tell it;
- every stream had its start, all of its tokens and its end, and no call is still open;
- of health, metrics and reflection, 99 of 100 answers came within a tenth of a second.

Exits with status 1 if one of these does not hold.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.load import percentiles
from benchmarks.machine import about
from benchmarks.report import write_json
from benchmarks.service import running_server
from scripts.verify.load.asks import Asks, Shares
from scripts.verify.load.clients import Tally, full_load
from scripts.verify.load.memory import Growth, Sample, growth, watched_memory
from scripts.verify.load.onlookers import asked
from trimserve.loopback import proxy_options
from trimserve.process import ServerProcess
from trimserve.v1 import model_pb2, model_pb2_grpc

__all__ = ["main"]

_RESULTS = Path(__file__).parents[3] / "benchmarks/results"
_MAX_GROWTH = 0.03
_MAX_ANSWER_SECONDS = 0.1
"""For 99 of 100 onlookers."""
_IMAGE_CACHE = ("--image-cache-bytes", str(4 * 2**20))  # some twenty images
_SECONDS_TO_SETTLE = 10.0
_GENERATION = 'grpc_service="trimserve.v1.GenerationService"'
_NUM_POINTS = 40
"""Of the memory curve that is written down."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a server is used."""

    clients: int
    """That always have a request."""
    shares: Shares
    flags: tuple[str, ...]
    """Of the server."""


_PLANS = {
    # The prefill scratch, and less than what a full batch of these requests takes.
    "soak": _Plan(32, Shares(), ("--kv-cache-bytes", str(12 * 2**20), *_IMAGE_CACHE)),
    "load": _Plan(200, Shares(cancelled=0, refused=0, streamed=1), ("--max-batch", "200", *_IMAGE_CACHE)),
}


@dataclass(frozen=True, slots=True)
class _Run:
    """What was seen."""

    tally: Tally
    samples: list[Sample]
    status: model_pb2.GetServerStatusResponse
    """Once all was quiet."""
    metrics: dict[str, float]
    onlookers: dict[str, list[float]]
    """Seconds that each of them waited, by what was asked."""
    seconds: float


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    arguments = _arguments()
    plan, console = _PLANS[arguments.plan], Console(stderr=True)
    with running_server(None, num_threads=arguments.threads, flags=plan.flags) as server:
        run = asyncio.run(_use(server, plan, arguments, console))
    report = _report(run, plan, arguments)
    write_json(report, arguments.out or _RESULTS / f"{arguments.plan}.json")
    console.print({name: report[name] for name in ("requests", "memory", "onlookers_seconds", "checks")})
    print(json.dumps(report))
    if not all(report["checks"].values()):
        console.print("[red]failed[/]", report["faults"], [name for name, held in report["checks"].items() if not held])
        sys.exit(1)


async def _use(server: ServerProcess, plan: _Plan, arguments: argparse.Namespace, console: Console) -> _Run:
    async with grpc.aio.insecure_channel(server.address, proxy_options(server.address)) as channel:
        model = model_pb2_grpc.ModelServiceStub(channel)
        tile_size = (await model.GetModel(model_pb2.GetModelRequest())).tile_size
        start = time.monotonic()
        async with (
            asked(server.address, server.metrics_address) as onlookers,
            watched_memory(server.pid) as samples,
        ):
            watcher = asyncio.create_task(_show(samples, arguments.seconds, console))
            asks = Asks(tile_size, plan.shares, arguments.seed)
            tally = await full_load(channel, asks, num_clients=plan.clients, seconds=arguments.seconds)
            watcher.cancel()
        seconds = time.monotonic() - start
        status = await _settled(model)
    return _Run(tally, samples, status, server.metrics(), onlookers, seconds)


async def _show(samples: list[Sample], seconds: float, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=seconds)
        while True:
            await asyncio.sleep(1)
            last = samples[-1]
            progress.update(task, description=f"{last.rss_bytes / 2**20:.0f} MiB", completed=last.seconds)


async def _settled(model: "model_pb2_grpc.ModelServiceAsyncStub") -> model_pb2.GetServerStatusResponse:
    """The status once nothing runs, or when that takes too long: what was cancelled last ends within a step."""
    end = time.monotonic() + _SECONDS_TO_SETTLE
    while True:
        status = await model.GetServerStatus(model_pb2.GetServerStatusRequest())
        if not _is_busy(status) or time.monotonic() > end:
            return status
        await asyncio.sleep(0.05)


def _is_busy(status: model_pb2.GetServerStatusResponse) -> bool:
    return bool(status.num_running or status.num_waiting or status.self_kv_bytes or status.cross_kv_bytes)


def _report(run: _Run, plan: _Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    tally, status = run.tally, run.status
    memory = growth(run.samples)
    return {
        "benchmark": arguments.plan,
        **about(arguments.threads),
        "seconds": round(run.seconds, 1),
        "plan": {**asdict(plan), "seconds": arguments.seconds, "seed": arguments.seed},
        "requests": {**tally.ended, "not_as_provoked": tally.num_faults},
        "answered_by_kind": dict(sorted(tally.answered.items())),
        "tokens_per_second": round(tally.num_tokens / run.seconds, 1),
        "faults": tally.faults,
        "pool": {
            "capacity_bytes": status.kv_capacity_bytes,
            "used_bytes_after": status.self_kv_bytes + status.cross_kv_bytes,
        },
        "image_cache": {"hits": status.image_cache_hits, "misses": status.image_cache_misses},
        "memory": {
            "second_fifth_median_bytes": memory.early_bytes,
            "last_fifth_median_bytes": memory.late_bytes,
            "growth": round(memory.fraction, 4),
            "most_growth": _MAX_GROWTH,
        },
        "memory_curve": _curve(run.samples),
        "onlookers_seconds": {name: _waited(seconds) for name, seconds in run.onlookers.items()},
        "checks": _checks(run, memory),
    }


def _checks(run: _Run, memory: Growth) -> dict[str, bool]:
    started, handled, failed, refused = (
        _total(run.metrics, name, label)
        for name, label in (
            ("grpc_server_started_total", _GENERATION),
            ("grpc_server_handled_total", _GENERATION),
            ("trimserve_engine_errors_total", ""),
            ("trimserve_admission_rejections_total", ""),
        )
    )
    return {
        "pool_is_empty": not _is_busy(run.status),
        "memory_is_flat": memory.fraction <= _MAX_GROWTH,
        "no_error_but_those_provoked": run.tally.num_faults + failed + refused == 0,
        "no_call_is_open": started == handled > 0,
        "onlookers_are_answered": all(_waited(each)["p99"] <= _MAX_ANSWER_SECONDS for each in run.onlookers.values()),
    }


def _waited(seconds: list[float]) -> dict[str, float]:
    return {**(percentiles(seconds) or {}), "max": round(max(seconds), 5), "num": len(seconds)}


def _total(metrics: Mapping[str, float], name: str, label: str = "") -> float:
    """Sum of a metric's series, of those with a label when one is given, such as `grpc_method="Generate"`."""
    return sum(value for series, value in metrics.items() if series.startswith(name) and label in series)


def _curve(samples: list[Sample]) -> list[tuple[float, int]]:
    """Seconds and bytes of some of the samples, evenly spaced."""
    step = max(1, len(samples) // _NUM_POINTS)
    return [(round(each.seconds, 1), each.rss_bytes) for each in samples[::step]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("plan", nargs="?", choices=_PLANS, default="soak", help="how the server is used")
    add("--seconds", type=float, default=600, help="of full load")
    add("--threads", type=int, default=1, help="of one op; leave a core to the clients")
    add("--seed", type=int, default=0, help="of the requests")
    add("--out", type=Path, help="the report; default: PLAN.json in benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
