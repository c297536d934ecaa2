"""docker/envoy.yaml with the real Envoy before two servers of the embedded model, under what a fleet sees.

Refusals and deadlines are as direct; questions on an image go where it is cached; servers that are told to end while
they stream lose no call, and one that is killed only its own streams; cancelled streams leave no pages; and Envoy's own
processor time for a token is bounded. Takes two minutes.

Usage: python -m scripts.verify.envoy
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import yaml

from scripts.verify import fleet_checks as checks
from scripts.verify.walkthrough import free_ports
from trimserve.process import ServerFailed, ServerProcess, server_process

ROOT = Path(__file__).resolve().parents[2]
NUM_STREAMS = 20
TOKENS = 1500
MOST_MS_A_TOKEN = 0.2
"""Of Envoy's processor time."""


@contextmanager
def envoy(ports: list[int]) -> Iterator[tuple[str, int]]:
    """Envoy with our configuration before servers on this machine; its address and its process."""
    config: Any = yaml.safe_load((ROOT / "docker/envoy.yaml").read_text())
    listener, cluster = config["static_resources"]["listeners"][0], config["static_resources"]["clusters"][0]
    [port] = free_ports(1)
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": each}}}} for each in ports
    ]
    del config["admin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).parent / "envoy"), "--config-path", str(path), "--concurrency", "1"]
        process = subprocess.Popen([*command, "--log-level", "error", "--use-dynamic-base-id"])
        try:
            yield f"127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait()


class Fleet:
    """Two servers whose ports outlive them."""

    def __init__(self) -> None:
        """Start both."""
        self.ports = free_ports(2)
        self._places = [ExitStack(), ExitStack()]
        self.servers: list[ServerProcess] = [self.start(number) for number in range(2)]

    def start(self, number: int) -> ServerProcess:
        """Start a server on its port."""
        options = ("--port", str(self.ports[number]), "--max-batch", "32", "--num-threads", "1")
        return self._places[number].enter_context(server_process(*options))

    def restart(self, number: int) -> None:
        """Wait for the end of a server, however it ends, and start it anew."""
        with suppress(ServerFailed):
            self._places[number].close()
        self.servers[number] = self.start(number)

    def signal(self, number: int, sent: signal.Signals) -> None:
        """Signal a server."""
        os.kill(self.servers[number].pid, sent)

    def close(self) -> None:
        """End both."""
        for place in self._places:
            place.close()

    def total(self, name: str) -> float:
        """A metric, summed over servers and labels."""
        pages = [server.metrics() for server in self.servers]
        return sum(value for page in pages for key, value in page.items() if key.partition("{")[0] == name)


async def streams_begun(front: checks.Caller, count: int) -> list[Any]:
    """The rest of streams that have their first message."""
    calls = [aiter(front.stream(checks.request(tokens=TOKENS))) for _ in range(count)]
    await asyncio.gather(*map(anext, calls))
    return calls


async def rest(call: Any) -> bool:
    """Whether a stream comes whole."""
    last = None
    async for event in call:
        last = event
    return last is not None and last.HasField("finished")


async def rolling_restart(front: checks.Caller, fleet: Fleet) -> None:
    """End one server after the other under streams, while new calls come."""
    for number in range(2):
        calls = await streams_begun(front, NUM_STREAMS)
        fleet.signal(number, signal.SIGTERM)
        new = [await front.whole(checks.request(tokens=8)) for _ in range(NUM_STREAMS)]
        assert len(new) == NUM_STREAMS
        assert all(await asyncio.gather(*map(rest, calls)))
        await asyncio.to_thread(fleet.restart, number)
        await wait_for_both(fleet, front)


async def wait_for_both(fleet: Fleet, front: checks.Caller) -> None:
    """Until the front sends calls to each server."""

    def tokens(server: ServerProcess) -> float:
        return server.metrics()["trimserve_generation_tokens_total"]

    before = [tokens(server) for server in fleet.servers]
    end = time.monotonic() + checks.PATIENCE_SECONDS
    while not all(tokens(server) > count for server, count in zip(fleet.servers, before, strict=True)):
        assert time.monotonic() < end, "a server gets no calls"
        with suppress(grpc.aio.AioRpcError):  # at first none is healthy
            await front.whole(checks.request(tokens=1))


async def kill(front: checks.Caller, fleet: Fleet) -> tuple[int, int]:
    """Kill a server under streams; how many it had, and how many came whole."""
    calls = await streams_begun(front, NUM_STREAMS)
    had = int(fleet.servers[0].metrics()["trimserve_requests_running"])
    fleet.signal(0, signal.SIGKILL)
    new = asyncio.gather(*(front.whole(checks.request(tokens=8)) for _ in range(NUM_STREAMS)))
    whole = 0
    for call in calls:
        try:
            whole += await rest(call)
        except grpc.aio.AioRpcError as error:
            # A stream that has begun can only be reset, for which gRPC's own word is INTERNAL.
            if error.code() is not grpc.StatusCode.UNAVAILABLE and "RST_STREAM" not in str(error.details()):
                raise
    await new
    await asyncio.to_thread(fleet.restart, 0)
    return had, whole


async def milliseconds_a_token(front: checks.Caller, pid: int) -> float:
    """Envoy's processor time for a stream that is alone, of which each token is a message."""
    before = checks.processor_seconds(pid)
    [call] = await streams_begun(front, 1)
    assert await rest(call)
    return (checks.processor_seconds(pid) - before) * 1e3 / TOKENS


async def verify(fleet: Fleet) -> None:
    """All of it."""
    with envoy(fleet.ports) as (address, pid):
        async with AsyncExitStack() as places:
            front = await places.enter_async_context(checks.calling(address))
            direct = await places.enter_async_context(checks.calling(fleet.servers[0].address))
            await wait_for_both(fleet, front)
            await checks.same_refusals(front, direct)
            await checks.deadlines(front, TOKENS)
            say("codes, details and deadlines are as direct")
            say(await checks.images_stay_where_they_are(front, lambda: fleet.total("trimserve_image_cache_hits_total")))
            cost = await milliseconds_a_token(front, pid)
            say(f"Envoy takes {cost:.3f} ms of processor a token")
            assert cost <= MOST_MS_A_TOKEN
            await checks.cancel_many(front, TOKENS)
            await checks.until(lambda: fleet.total("trimserve_kv_cache_used_bytes") == 0, "no pages are held")
            say("cancelled streams leave no pages")
            await rolling_restart(front, fleet)
            say(f"SIGTERM of both, one by one, under {NUM_STREAMS} streams and new calls lost none")
            had, whole = await kill(front, fleet)
            assert whole == NUM_STREAMS - had, f"the killed server had {had} of {NUM_STREAMS}, {whole} came whole"
            say(f"kill -9 lost the {had} streams of its server, and no new call")


def say(what: str) -> None:
    """Tell what holds."""
    print(f"envoy: {what}", flush=True)


def main() -> int:
    """Run servers and Envoy."""
    fleet = Fleet()
    try:
        asyncio.run(verify(fleet))
    finally:
        with suppress(ServerFailed):
            fleet.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
