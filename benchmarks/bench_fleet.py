"""What a token costs in processor time behind Envoy and under Ray Serve, beside the server alone, in turns.

    PYTHONPATH=build/ray:. python -m benchmarks.bench_fleet            # Ray's own proxy
    PYTHONPATH=build/ray:. python -m benchmarks.bench_fleet --haproxy  # its HAProxy mode

`make verify-envoy verify-ray` installs what it needs. A stream is alone, so each token is a message. All processes that
take part are counted, the server's too. Each run writes its half of the report and keeps the other's.
"""

import asyncio
import json
from collections.abc import Callable
from statistics import median
from typing import Any, Final

from benchmarks.report import command_line, finish, markdown, origin
from scripts.verify.envoy import envoy
from scripts.verify.fleet_checks import calling, processor_seconds, request, until
from scripts.verify.ray_serve import METADATA, Replicas, ray_serve, seconds_of_ray
from trimserve.process import server_process

__all__ = ["main", "table"]

_TOKENS: Final = 1500

_Way = tuple[str, tuple[tuple[str, str], ...], Callable[[], float]]
"""Address, metadata, and the processor time until now of all that take part."""


async def _milliseconds_a_token(address: str, metadata: tuple[tuple[str, str], ...], seconds: Any) -> float:
    async with calling(address, metadata) as front:
        before = seconds()
        await front.text(request(tokens=_TOKENS))
        return float(seconds() - before) * 1e3 / _TOKENS


async def _measure(ways: dict[str, _Way], rounds: int) -> dict[str, Any]:
    """Rounds of all ways in turn, after one that warms up: figures by way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            cost = await _milliseconds_a_token(*way)
            if number:
                taken[name].append(round(cost, 4))
    return {
        name: {"median": median(costs), "low": min(costs), "high": max(costs), "rounds": costs}
        for name, costs in taken.items()
    }


def table(report: dict[str, Any]) -> str:
    """Processor time of a token by what stands before the server, as Markdown."""
    rows = [
        [
            f"{name.replace('_', ', ')}, {run.replace('_', ' ', 1)}",
            f"{cost['median']:.3f}",
            f"{cost['low']:.3f} to {cost['high']:.3f}",
        ]
        for run in (key for key in report if key.startswith("beside_"))
        for name, cost in report[run].items()
    ]
    head = ["way", "processor ms a token, median", "lowest to highest"]
    return f"{markdown(head, rows)}\n\n{origin(report)}"


def main() -> None:
    """Measure and write down."""
    arguments = command_line(__doc__, "fleet.json", haproxy=False, rounds=7)
    name = "ray_haproxy" if arguments.haproxy else "ray"
    with (
        server_process("--num-threads", str(arguments.threads)) as server,
        envoy([int(server.address.rpartition(":")[2])]) as (proxy, pid),
        ray_serve(is_haproxy=arguments.haproxy, num_threads=arguments.threads) as (address, serve, deploy),
    ):
        deploy(1)
        asyncio.run(until(lambda: Replicas(serve, address).count() == 1, "a replica"))
        ways: dict[str, _Way] = {
            "direct": (server.address, (), lambda: processor_seconds(server.pid)),
            "envoy": (proxy, (), lambda: processor_seconds(server.pid) + processor_seconds(pid)),
            name: (address, METADATA, seconds_of_ray),
        }
        found = asyncio.run(_measure(ways, arguments.rounds))
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    others = {key: value for key, value in before.items() if key.startswith("beside_")}
    finish(arguments, {"model": "trimserve-tiny", "tokens": _TOKENS, **others, "beside_" + name: found})


if __name__ == "__main__":
    main()
