"""All attacks of `attacks.py` at once against one server in 4 GiB, which must go on serving.

Usage: python -m scripts.verify.attack [--seconds 600] [--skip NAME ...] [--only NAME ...] [--out FILE]

Meanwhile a client with a token streams answers, and health is asked every tenth of a second, each from a process of
its own; the log is a pipe that nobody reads. Afterwards must hold:

- 99 of 100 health checks were answered within a quarter of a second;
- every stream of the client was whole, with the answer that it had before;
- the server never held more than 3 GiB that cannot be dropped;
- SIGTERM, during the attacks, ended it with status 0 within its grace.

Exits with status 1 if one of these does not hold. The attackers give way to the server's processor time (nice), since
real ones have machines of their own.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scripts.verify.attacks import ATTACKS, Target, attack
from scripts.verify.control_group import ControlGroup, control_group
from trimserve.client import Client, make_request
from trimserve.loopback import proxy_options
from trimserve.v1 import generation_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]

OUT = ROOT / "benchmarks/results/attack.json"
GIB = 2**30
LIMIT_BYTES = 4 * GIB
MAX_BYTES = 3 * GIB
MAX_HEALTH_SECONDS = 0.25
"""For 99 of 100 checks."""
HEALTH_PAUSE_SECONDS = 0.1
HEALTH_TIMEOUT_SECONDS = 10.0
GRACE_SECONDS = 15
EXIT_SLACK_SECONDS = 5
"""For the process to end once its grace is over."""
NICE = 10
UNREAD_LOG = "unread_log"
"""D11, which is not a caller's: the log goes to a pipe that nobody reads."""
CLIENT, ATTACKER = "client", "attacker"
"""Their tokens."""
QUESTION = make_request(
    "What is in the picture?",
    [ROOT / "trimserve/assets/samples/scene.png"],
    sampling=pb.SamplingParams(max_new_tokens=16, temperature=0),
)


@dataclass
class Seen:
    """What the client and the health checks saw."""

    num_whole: int = 0
    faults: list[str] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Command line; the last line of standard output is the report as one JSON document."""
    # Here, because every process of a witness imports this file, and these import torch.
    from benchmarks.load import percentiles
    from benchmarks.machine import about
    from benchmarks.report import write_json

    arguments = _arguments()
    names = [name for name in arguments.only or [*ATTACKS, UNREAD_LOG] if name not in arguments.skip]
    begin = time.monotonic()
    with control_group(LIMIT_BYTES) as group, _server(group, is_log_read=UNREAD_LOG not in names) as (process, target):
        with Client(target.address, token=CLIENT) as client:
            expected = client.generate(QUESTION).text
        seen, tries, samples, exit_seconds = _watch(process, target, group, names, expected, arguments.seconds)
    report = {
        "benchmark": "attack",
        **about(1),
        "seconds": round(time.monotonic() - begin, 1),
        "memory": {
            "bound": group.description,
            "limit_bytes": LIMIT_BYTES,
            "before_bytes": samples[0],
            "most_bytes": max(samples),
            "after_bytes": samples[-1],
        },
        "tries": tries,
        "health": {"num": len(seen.health_seconds), **(percentiles(seen.health_seconds) or {})},
        "streams": {"num_whole": seen.num_whole, "faults": seen.faults[:20], "num_faults": len(seen.faults)},
        "exit": {"status": process.returncode, "seconds": exit_seconds},
    }
    report["checks"] = {
        "health": bool(seen.health_seconds) and report["health"]["p99"] < MAX_HEALTH_SECONDS,
        "streams": seen.num_whole > 0 and not seen.faults,
        "memory": max(samples) < MAX_BYTES,
        "exit": process.returncode == 0 and exit_seconds < GRACE_SECONDS + EXIT_SLACK_SECONDS,
    }
    write_json(report, arguments.out)
    print(json.dumps(report))
    if not all(report["checks"].values()):
        sys.exit(f"failed: {', '.join(name for name, held in report['checks'].items() if not held)}")


def _watch(
    process: "subprocess.Popen[str]",
    target: Target,
    group: ControlGroup,
    names: Sequence[str],
    expected: str,
    seconds: float,
) -> tuple[Seen, dict[str, int], list[int], float]:
    """Attack for a while, then end the server while the attacks go on."""
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    samples = [group.held_bytes(process.pid)]
    with spawn.Manager() as manager, ProcessPoolExecutor(3, spawn) as pool:
        is_over, is_ended, begin = manager.Event(), manager.Event(), manager.Barrier(4)
        asking = pool.submit(_ask_health, target.address, begin, is_over)
        streaming = pool.submit(_stream, target.address, expected, begin, is_over)
        attacking = pool.submit(_attack, target, [name for name in names if name in ATTACKS], begin, is_ended)
        begin.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            samples.append(group.held_bytes(process.pid))
            time.sleep(HEALTH_PAUSE_SECONDS)  # between two samples
        is_over.set()
        seen = _joined(streaming, asking)
        exit_seconds = _end(process)
        is_ended.set()
        return seen, attacking.result(), samples, exit_seconds


def _joined(streaming: "Future[Seen]", asking: "Future[list[float]]") -> Seen:
    seen = streaming.result()
    seen.health_seconds = asking.result()
    return seen


def _end(process: "subprocess.Popen[str]") -> float:
    """Seconds that it took to end."""
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS + 2 * EXIT_SLACK_SECONDS)
    return round(time.monotonic() - begin, 3)


@contextmanager
def _server(group: ControlGroup, *, is_log_read: bool) -> Iterator[tuple["subprocess.Popen[str]", Target]]:
    with tempfile.TemporaryDirectory() as folder:
        clients = Path(folder) / "clients.toml"
        clients.write_text("".join(_entry(name) for name in (CLIENT, ATTACKER)))
        options = {
            "auth-file": clients,
            "port": 0,
            "metrics-port": 0,
            "max-concurrent-rpcs-per-client": 64,
            "drain-grace-seconds": GRACE_SECONDS,
            "num-threads": 1,
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [*group.command, sys.executable, "-m", "trimserve", "serve", *flags]
        with (
            Path(folder, "log").open("w") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log if is_log_read else subprocess.PIPE, text=True
            ) as process,
        ):
            try:
                assert process.stdout is not None
                found = re.search(r"gRPC on (\S+), metrics on (\S+)", process.stdout.readline())
                if found is None:
                    sys.exit("the server did not start")
                yield process, Target(found[1], found[2], ATTACKER)
            finally:
                process.kill()
                print(Path(folder, "log").read_text()[-2000:], file=sys.stderr)


def _entry(token: str) -> str:
    return f'[clients.{token}]\ntoken_sha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]\n'


def _ask_health(address: str, begin: Barrier, is_over: Event) -> list[float]:
    """Seconds of each check; they are asked in time, whether the earlier ones are answered or not."""
    begin.wait()
    return asyncio.run(_asked(address, is_over))


async def _asked(address: str, is_over: Event) -> list[float]:
    seconds: list[float] = []

    async def check(stub: Any) -> None:
        asked_at = time.monotonic()
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            print(f"health: {error.code().name}: {error.details()}", file=sys.stderr)
            seconds.append(HEALTH_TIMEOUT_SECONDS)
        else:
            seconds.append(time.monotonic() - asked_at)

    async with grpc.aio.insecure_channel(address, proxy_options(address)) as channel, asyncio.TaskGroup() as checks:
        stub = health_pb2_grpc.HealthStub(channel)
        while not await asyncio.to_thread(is_over.is_set):
            checks.create_task(check(stub))
            await asyncio.sleep(HEALTH_PAUSE_SECONDS)
    return seconds


def _stream(address: str, expected: str, begin: Barrier, is_over: Event) -> Seen:
    """One answer after the other."""
    seen = Seen()
    begin.wait()
    with Client(address, token=CLIENT) as client:
        while not is_over.is_set():
            try:
                events = list(client.stream(QUESTION))
            except grpc.RpcError as error:
                seen.faults.append(str(error)[:500])
                time.sleep(HEALTH_PAUSE_SECONDS)  # a server that refuses is not asked in a loop
                continue
            text = "".join(event.delta.text for event in events)
            if (events[0].WhichOneof("event"), events[-1].WhichOneof("event"), text) == (
                "started",
                "finished",
                expected,
            ):
                seen.num_whole += 1
            else:
                seen.faults.append(f"got {text!r}, wanted {expected!r}")
    return seen


def _attack(target: Target, names: Sequence[str], begin: Barrier, is_ended: Event) -> dict[str, int]:
    """How often each attack was tried."""
    os.nice(NICE)
    begin.wait()

    async def until_ended() -> None:
        attacking = asyncio.create_task(attack(target, names))
        await asyncio.to_thread(is_ended.wait)
        attacking.cancel()
        with suppress(asyncio.CancelledError):
            await attacking

    asyncio.run(until_ended())
    return target.tries


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="of attack")
    names = [*ATTACKS, UNREAD_LOG]
    parser.add_argument("--skip", nargs="*", default=[], choices=names, metavar="NAME", help="attacks to leave out")
    parser.add_argument("--only", nargs="*", default=[], choices=names, metavar="NAME", help="attacks to try")
    parser.add_argument("--out", type=Path, default=OUT, help="where the report goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
