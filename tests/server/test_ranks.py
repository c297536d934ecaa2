"""A server whose model is shared by two processes, one of which is killed or stopped."""

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.forked import forked
from trimserve.client import Client
from trimserve.v1 import generation_pb2 as pb

OPTIONS = (
    *("serve", "--port", 0, "--metrics-port", "0", "--tensor-parallel", 2, "--num-threads", 1),
    *("--kv-cache-bytes", "256MiB", "--step-timeout-seconds", 3),
)
LONG = pb.GenerateRequest(
    raw_prompt="hi", sampling=pb.SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=1500)
)


def other_rank(pid: int) -> int:
    """The process of rank 1."""
    children: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread may end meanwhile
            children += (task / "children").read_text().split()
    [rank] = (int(child) for child in children if b"rank_main" in Path(f"/proc/{child}/cmdline").read_bytes())
    return rank


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "rank 1 was ended by SIGKILL"),
        (signal.SIGSTOP, "(Timed out waiting 3000ms|a step has not returned for 3 s)"),
    ],
)
def test_a_rank_that_is_killed_or_stopped_ends_the_server_with_the_cause(number: signal.Signals, cause: str) -> None:
    with forked("from trimserve.cli import main; main()", *OPTIONS, stderr=subprocess.PIPE) as process:
        address = process.stdout.readline().split()[4].strip(",")
        rank = other_rank(process.pid)
        with Client(address) as client:
            stream = client.stream(LONG)
            next(stream)
            next(stream)
            os.kill(rank, number)
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine died")
        last = process.rest().splitlines()[-1]
        assert process.wait() == 1
    assert re.search(f"error: the engine died: .*{cause}", last), last
    assert not Path(f"/proc/{rank}").exists()
