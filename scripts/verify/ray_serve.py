"""examples/ray on a Ray of this machine: what its README promises, and what it says is lost.

Refusals are as direct, deadlines end calls, questions on an image go where it is cached, cancelled streams leave no
pages, and no stream is lost when a second replica comes and goes. Takes three minutes.

Usage: PYTHONPATH=build/ray:. python -m scripts.verify.ray_serve [--haproxy]
"""

import argparse
import asyncio
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from scripts.verify import fleet_checks as checks
from scripts.verify.walkthrough import free_ports
from trimserve.serve import in_process_server
from trimserve.v1 import model_pb2, model_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/ray"
METADATA = (("application", "trimserve"),)
"""By which Ray's proxy finds the application."""
MAX_BATCH = 4
TOKENS = 1500


@contextmanager
def ray_serve(*, is_haproxy: bool) -> Iterator[tuple[str, Any, Callable[[int | None], None]]]:
    """A Ray of its own: the address of gRPC, Serve, and what deploys so many replicas, or as many as it takes."""
    # Workers find what is found here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1" if is_haproxy else "0", "RAY_USAGE_STATS_ENABLED": "0"}
    sys.path.insert(0, str(FOLDER))
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, gRPCOptions

    application = importlib.import_module("deployment")  # by the name that workers know
    port, http_port = free_ports(2)
    servicers = [
        "trimserve.v1.generation_pb2_grpc.add_GenerationServiceServicer_to_server",
        "trimserve.v1.model_pb2_grpc.add_ModelServiceServicer_to_server",
    ]
    ray.init(num_cpus=8, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(
            http_options={"port": http_port}, grpc_options=gRPCOptions(port=port, grpc_servicer_functions=servicers)
        )
        quick = AutoscalingConfig(
            min_replicas=1,
            max_replicas=2,
            upscale_delay_s=0.5,
            downscale_delay_s=2,
            look_back_period_s=1,
            metrics_interval_s=0.5,
            policy=AutoscalingPolicy(policy_function="deployment:by_queue"),
        )
        engine = {"max_batch": MAX_BATCH, "max_queue": 512, "num_threads": 1}

        def deploy(num_replicas: int | None) -> None:
            scaling = None if num_replicas else quick
            options = {"num_replicas": num_replicas or "auto", "autoscaling_config": scaling}
            serve.run(application.Trimserve.options(**options).bind({}, engine), name="trimserve")

        yield f"127.0.0.1:{port}", serve, deploy
    finally:
        serve.shutdown()
        ray.shutdown()


def say(what: str) -> None:
    """Tell what holds."""
    print(f"ray: {what}", flush=True)


class Replicas:
    """What Serve and the servers say of themselves."""

    def __init__(self, serve: Any, address: str) -> None:
        """Look at nothing yet."""
        self._serve = serve
        self._stub = model_pb2_grpc.ModelServiceStub(grpc.insecure_channel(address))

    def count(self) -> int:
        """Replicas that run."""
        [deployment] = self._serve.status().applications["trimserve"].deployments.values()
        return int(deployment.replica_states.get("RUNNING", 0))

    def status(self) -> Any:
        """Of one of them."""
        return self._stub.GetServerStatus(model_pb2.GetServerStatusRequest(), metadata=METADATA)

    def both(self) -> list[Any]:
        """Of two that began at different times; each call is answered by one of them."""
        found: dict[float, Any] = {}
        while len(found) < 2:
            status = self.status()
            began_at = time.monotonic() - status.uptime_seconds
            if all(abs(began_at - other) > 0.1 for other in found):
                found[began_at] = status
        return [*found.values()]

    def image_cache_hits(self) -> int:
        """Of two of them."""
        return sum(status.image_cache_hits for status in self.both())

    def is_idle(self) -> bool:
        """Whether a lone replica holds no pages."""
        status = self.status()
        return not status.self_kv_bytes + status.cross_kv_bytes + status.num_waiting


async def scale(front: checks.Caller, replicas: Replicas) -> int:
    """More requests than a replica runs make a second one come, fewer make it go; how many streams came whole."""
    streams: set[asyncio.Task[str]] = set()
    done = 0

    async def keep(number: int, wanted: int) -> None:
        """So many streams at a time, until there are as many replicas as wanted."""
        nonlocal streams, done
        scaled = asyncio.create_task(checks.until(lambda: replicas.count() == wanted, f"{wanted} replicas"))
        while not scaled.done():
            asked = [checks.request(tokens=TOKENS) for _ in range(number - len(streams))]
            streams |= {asyncio.create_task(front.text(each)) for each in asked}
            ended, streams = await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
            done += len([stream.result() for stream in ended])
        await scaled

    await keep(8 * MAX_BATCH, 2)
    say("a second replica came")
    await keep(1, 1)
    say("and went")
    await asyncio.gather(*streams)
    return done + len(streams)


def seconds_of_ray() -> float:
    """Processor time of all of Ray's processes, the replicas' among them."""
    total = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            if b"ray::" in words or b"/ray/" in words or b"haproxy" in words:
                total += checks.processor_seconds(int(folder.name))
        except OSError:  # it ended
            continue
    return total


async def milliseconds_a_token(front: checks.Caller) -> float:
    """Processor time of all of Ray for a stream that is alone."""
    before = seconds_of_ray()
    await front.text(checks.request(tokens=TOKENS))
    return (seconds_of_ray() - before) * 1e3 / TOKENS


async def verify(address: str, serve: Any, deploy: Callable[[int | None], None], *, is_haproxy: bool) -> None:
    """All of it."""
    replicas = Replicas(serve, address)
    with in_process_server() as server:
        async with checks.calling(address, METADATA) as front, checks.calling(server.address) as direct:
            if not is_haproxy:
                await asyncio.to_thread(deploy, 2)
                where = await checks.images_stay_where_they_are(front, replicas.image_cache_hits)
                say(f"{where}, by one of two replicas")
            await asyncio.to_thread(deploy, None)
            await checks.until(lambda: replicas.count() == 1, "a replica")
            await checks.same_refusals(front, direct)
            await checks.deadlines(front, TOKENS)
            say("codes and details are as direct, deadlines end calls")
            await checks.until(replicas.is_idle, "no pages are held")
            say(f"{await milliseconds_a_token(front):.2f} ms of processor a token, all of Ray together")
            await checks.cancel_many(front, TOKENS)
            await checks.until(replicas.is_idle, "no pages are held")
            say("cancelled streams leave no pages")
            await checks.until(lambda: replicas.count() == 1, "a replica")
            say(f"{await scale(front, replicas)} streams came whole meanwhile")


def main() -> int:
    """Run Ray."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--haproxy", action="store_true", help="Ray's HAProxy mode in place of its own proxy")
    is_haproxy = parser.parse_args().haproxy
    with ray_serve(is_haproxy=is_haproxy) as (address, serve, deploy):
        asyncio.run(verify(address, serve, deploy, is_haproxy=is_haproxy))
    return 0


if __name__ == "__main__":
    sys.exit(main())
