"""Break one of two ranks of a server, many times, and see that the server ends with the cause and leaves no process.

    python -m scripts.verify.ranks [--attempts 20]

Each attempt starts a server of the embedded model on two processes and sends streams. Then a layer of one rank raises,
after a drawn number of calls and between two sums; in further attempts rank 1 is killed or stopped, and rank 0 is
killed while rank 1 is stopped. Streams must end with UNAVAILABLE, and the process with a status other than 0, in time.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc

from trimserve.client import Client
from trimserve.v1 import generation_pb2 as pb

__all__ = ["attempt", "main"]

_TIMEOUT_SECONDS: Final = 5
"""`step_timeout_seconds` of the server."""
_NUM_STREAMS: Final = 4

_FAULT: Final = """
import sys, time
from trimserve.model.decoder_layers import SelfLayer
finish, good_calls = SelfLayer.finish, iter(range({num_good}))
def broken(self, *arguments):
    if next(good_calls, None) is None:
        print("broken at", time.monotonic(), file=sys.stderr, flush=True)
        raise ValueError("injected")
    return finish(self, *arguments)
SelfLayer.finish = broken
"""
_RANK: Final = "{fault}\nfrom trimserve.executor.rank_main import main; main()"
_SERVER: Final = """
from functools import partial
import trimserve.serve
from trimserve.executor.tensor_parallel import start_ranks
trimserve.serve.start_ranks = partial(start_ranks, module=("-c", {rank!r}))
{fault}
from trimserve.cli import main; main()
"""


def attempt(
    name: str, within_seconds: float, faults: tuple[str, str] = ("", ""), act: Callable[[int, int], None] | None = None
) -> str | None:
    """Start a server, break it, and look at its end.

    Args:
        name: of the attempt.
        within_seconds: in which the streams must end once something is broken.
        faults: programs that rank 0 and rank 1 run before they begin.
        act: called with the process ids of rank 0 and rank 1 while streams run.
    Returns:
        What is wrong, None if nothing is.
    """
    program = _SERVER.format(rank=_RANK.format(fault=faults[1]), fault=faults[0])
    options = ["--port", "0", "--metrics-port", "0", "--tensor-parallel", "2", "--num-threads", "1"]
    options += ["--step-timeout-seconds", str(_TIMEOUT_SECONDS), "--kv-cache-bytes", "256MiB"]
    command = [sys.executable, "-c", program, "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[4].strip(",")
        rank = _other_rank(process.pid)
        broken_at = None
        with Client(address) as client, ThreadPoolExecutor(_NUM_STREAMS) as pool:
            ends = [pool.submit(_end_of, client) for _ in range(_NUM_STREAMS)]
            if act is not None:
                time.sleep(0.5)  # into the middle of the answers
                broken_at = time.monotonic()
                act(process.pid, rank)
            codes, times = zip(*(end.result() for end in ends), strict=True)
        try:
            _, log = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"{name}: the server did not end; streams ended with {codes}"
    last = log.splitlines()[-1]
    if broken_at is None:
        broken_at = float(log.partition("broken at ")[2].split()[0])
    seconds = max(times) - broken_at
    print(f"{name}: {sorted({code.name for code in codes})} after {seconds:.2f} s, status {process.returncode}: {last}")
    if {*codes} != {grpc.StatusCode.UNAVAILABLE}:
        return f"{name}: streams ended with {codes}"
    if not process.returncode:
        return f"{name}: the server ended with status 0"
    if not _ends(rank, within_seconds):
        return f"{name}: rank 1 is still there"
    return f"{name}: took {seconds:.1f} s" if seconds > within_seconds else None


def main() -> None:
    """Exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=20)
    rng, wrong = random.Random("ranks"), []
    for number in range(parser.parse_args().attempts):
        # After the calls of the warm-up, which are about a hundred.
        fault = _FAULT.format(num_good=rng.randint(150, 600))
        faults = (fault, "") if number % 2 == 0 else ("", fault)
        wrong.append(attempt(f"rank {number % 2} raises", 2, faults))
    wrong.append(attempt("rank 1 is killed", 2, act=lambda _, rank: os.kill(rank, signal.SIGKILL)))
    wrong.append(attempt("rank 1 is stopped", _TIMEOUT_SECONDS + 2, act=lambda _, rank: os.kill(rank, signal.SIGSTOP)))
    wrong.append(attempt("rank 0 is killed while rank 1 is stopped", 2, act=_kill_rank_0))
    found = [each for each in wrong if each is not None]
    print("\n".join(found) or "all as it must be")
    sys.exit(bool(found))


def _kill_rank_0(server: int, rank: int) -> None:
    os.kill(rank, signal.SIGSTOP)
    os.kill(server, signal.SIGKILL)


def _end_of(client: Client) -> tuple[grpc.StatusCode, float]:
    """How a stream ends that is longer than the server lives, and when."""
    sampling = pb.SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=1500)
    try:
        for _ in client.stream(pb.GenerateRequest(raw_prompt="hi", sampling=sampling)):
            pass
    except grpc.RpcError as error:
        return error.code(), time.monotonic()
    return grpc.StatusCode.OK, time.monotonic()


def _ends(pid: int, within_seconds: float) -> bool:
    """Whether a process ends in time; one that nobody has waited for yet has ended, too."""
    end = time.monotonic() + within_seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)  # another process's end is told to its parent only
    return False


def _other_rank(pid: int) -> int:
    children: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end meanwhile
            children += (task / "children").read_text().split()
    [rank] = (int(each) for each in children if b"rank_main" in Path(f"/proc/{each}/cmdline").read_bytes())
    return rank


if __name__ == "__main__":
    main()
