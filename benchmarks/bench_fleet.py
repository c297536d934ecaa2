"""What a token costs in processor time behind Envoy and under Ray Serve, beside the server alone, in turns.

    PYTHONPATH=build/ray:. python -m benchmarks.bench_fleet            # Ray's own proxy
    PYTHONPATH=build/ray:. python -m benchmarks.bench_fleet --haproxy  # its HAProxy mode

`make verify-envoy verify-ray` installs what it needs. A stream is alone, so each token is a message. All processes that
take part are counted, the server's too. Each run writes its half of the report and keeps the other's.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.serve.report import about, write_json
from scripts.fleet_checks import calling, processor_seconds, request, until
from scripts.verify_envoy import envoy
from scripts.verify_ray import METADATA, Replicas, ray_serve, seconds_of_ray
from trimserve.process import server_process

OUT: Final = Path(__file__).with_name("results") / "fleet.json"
TOKENS: Final = 1500


async def milliseconds_a_token(
    address: str, metadata: tuple[tuple[str, str], ...], seconds: Callable[[], float]
) -> float:
    """Of a stream, by the processor time until now of all that take part."""
    async with calling(address, metadata) as front:
        before = seconds()
        await front.text(request(tokens=TOKENS))
        return (seconds() - before) * 1e3 / TOKENS


async def measure(ways: dict[str, tuple[str, tuple[tuple[str, str], ...], Callable[[], float]]], rounds: int) -> Any:
    """Rounds of all ways in turn, after one that warms up: figures by way."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            cost = await milliseconds_a_token(*way)
            if number:
                taken[name].append(round(cost, 4))
    return {
        name: {"median": statistics.median(costs), "low": min(costs), "high": max(costs), "rounds": costs}
        for name, costs in taken.items()
    }


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--haproxy", action="store_true", help="Ray's HAProxy mode")
    parser.add_argument("--rounds", type=int, default=7, help="of each; default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="the report; default: %(default)s")
    options = parser.parse_args()
    name = "ray_haproxy" if options.haproxy else "ray"
    with (
        server_process("--num-threads", "1") as server,
        envoy([int(server.address.rpartition(":")[2])]) as (proxy, pid),
        ray_serve(is_haproxy=options.haproxy) as (address, serve, deploy),
    ):
        deploy(1)
        asyncio.run(until(lambda: Replicas(serve, address).count() == 1, "a replica"))
        ways = {
            "direct": (server.address, (), lambda: processor_seconds(server.pid)),
            "envoy": (proxy, (), lambda: processor_seconds(server.pid) + processor_seconds(pid)),
            name: (address, METADATA, seconds_of_ray),
        }
        found = asyncio.run(measure(ways, options.rounds))
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    report |= {"benchmark": "fleet", **about(1), "model": "trimserve-tiny", "tokens": TOKENS, "beside_" + name: found}
    write_json(report, options.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
