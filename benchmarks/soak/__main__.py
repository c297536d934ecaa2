"""Serves the embedded model at full load for some minutes, with clients that give up and input that is bad.

    python -m benchmarks.soak [--minutes 10] [--out benchmarks/results/soak.json]

A closed loop of more clients than the batch has places asks about text, one image and several images, trimmed and not,
streamed and unary; a tenth of the requests is cancelled at a random moment, a twentieth cannot be answered. Page pool
and image cache are small, so that both are full all the time. Afterwards must hold:

- the page pool is empty, and nothing runs or waits;
- resident memory is flat: its median in the last fifth of the time is at most 3 % above that in the second fifth
  (the first fifth warms up);
- no request ended otherwise than provoked, as the clients and as the server's own counters tell it;
- every stream had its start, all of its tokens and its end, and no call is still open.

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

from benchmarks.serve.report import about, write_json
from benchmarks.serve.service import Server, running_server
from benchmarks.soak.asks import Asks, Shares
from benchmarks.soak.clients import Tally, full_load
from benchmarks.soak.memory import Growth, Sample, growth, watched_memory
from trimserve.v1 import model_pb2, model_pb2_grpc

__all__ = ["main"]

_OUT = Path(__file__).parent.parent / "results" / "soak.json"
_MAX_GROWTH = 0.03
_KV_CACHE_BYTES = 12 * 2**20  # the prefill scratch, and less than what a full batch of these requests takes
_IMAGE_CACHE_BYTES = 4 * 2**20  # some twenty images
_SECONDS_TO_SETTLE = 10.0
_GENERATION = 'grpc_service="trimserve.v1.GenerationService"'
_NUM_POINTS = 40
"""Of the memory curve that is written down."""


@dataclass(frozen=True, slots=True)
class _Plan:
    minutes: float
    clients: int
    threads: int
    seed: int


@dataclass(frozen=True, slots=True)
class _Run:
    """What was seen."""

    tally: Tally
    samples: list[Sample]
    status: model_pb2.GetServerStatusResponse
    """Once all was quiet."""
    metrics: dict[str, float]
    seconds: float


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    arguments = _arguments()
    plan = _Plan(arguments.minutes, arguments.clients, arguments.threads, arguments.seed)
    console = Console(stderr=True)
    flags = ("--kv-cache-bytes", str(_KV_CACHE_BYTES), "--image-cache-bytes", str(_IMAGE_CACHE_BYTES))
    with running_server(None, num_threads=plan.threads, flags=flags) as server:
        run = asyncio.run(_soak(server, plan, console))
    report = _report(run, plan)
    write_json(report, arguments.out)
    console.print({name: report[name] for name in ("requests", "memory", "checks")})
    print(json.dumps(report))
    if not all(report["checks"].values()):
        console.print("[red]failed[/]", report["faults"], [name for name, held in report["checks"].items() if not held])
        sys.exit(1)


async def _soak(server: Server, plan: _Plan, console: Console) -> _Run:
    async with grpc.aio.insecure_channel(server.address) as channel:
        model = model_pb2_grpc.ModelServiceStub(channel)
        tile_size = (await model.GetModel(model_pb2.GetModelRequest())).tile_size
        start = time.monotonic()
        async with watched_memory(server.pid) as samples:
            watcher = asyncio.create_task(_show(samples, plan, console))
            asks = Asks(tile_size, Shares(), plan.seed)
            tally = await full_load(channel, asks, num_clients=plan.clients, seconds=plan.minutes * 60)
            watcher.cancel()
        seconds = time.monotonic() - start
        status = await _settled(model)
    return _Run(tally, samples, status, server.metrics(), seconds)


async def _show(samples: list[Sample], plan: _Plan, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=plan.minutes * 60)
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


def _report(run: _Run, plan: _Plan) -> dict[str, Any]:
    tally, status = run.tally, run.status
    memory = growth(run.samples)
    return {
        "benchmark": "soak",
        **about(plan.threads),
        "seconds": round(run.seconds, 1),
        "plan": {**asdict(plan), **asdict(Shares())},
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
    }


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
    add("--minutes", type=float, default=10, help="of full load")
    add("--clients", type=int, default=32, help="that always have a request; more than the batch has places")
    add("--threads", type=int, default=1, help="of one op; leave a core to the clients")
    add("--seed", type=int, default=0, help="of the requests")
    add("--out", type=Path, default=_OUT, help="the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
