"""A server as a process of its own: signals under load, a kill, a disk that is full."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import grpc
import pytest

from trimserve.client import Client
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

PROGRAM = """
import asyncio, sys, time
from tests.engine.fake_model import FakeModel
from trimserve.config import Config, ServerConfig
from trimserve.engine.runner import Runner
from trimserve.server.app import serve

def load():
    return FakeModel(before_decode=lambda: time.sleep(0.01))

port, grace = int(sys.argv[1]), float(sys.argv[2])
runner = Runner(load, max_batch=8, max_queue=64, num_preprocess_workers=1)
config = Config(server=ServerConfig(port=port, metrics=False, drain_grace_seconds=grace))
asyncio.run(serve(runner, config, on_serving=lambda server: print(server.address, flush=True)))
"""

NUM_STREAMS = 40


@contextmanager
def server(
    port: int = 0, grace: float = 30, log: int | IO[str] = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves a model of 10 ms a step, and its address; ended at the end of the block."""
    command = [sys.executable, "-c", PROGRAM, str(port), str(grace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(60)


def long_request(num_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        raw_prompt="hi", sampling=pb.SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=num_tokens)
    )


def until_answered(client: Client, seconds: float = 30) -> pb.GenerateResponse:
    """An answer, once the client has found the server."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(grpc.RpcError):
            return client.generate(long_request(3))
    pytest.fail("the server was not found")


@pytest.mark.parametrize("grace", [60.0, 0.3], ids=["time to finish", "cut short"])
def test_sigterm_under_load_lets_every_stream_end_or_cuts_it_with_unavailable(grace: float) -> None:
    with (
        server(grace=grace) as (process, address),
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(NUM_STREAMS) as pool,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        def read(num_tokens: int) -> grpc.StatusCode:
            try:
                events = list(stub.GenerateStream(long_request(num_tokens), timeout=120))
            except grpc.RpcError as error:
                return error.code()
            assert events[-1].finished.usage.num_generated_tokens == num_tokens
            return grpc.StatusCode.OK

        first = stub.GenerateStream(long_request(100))
        next(first)
        ends = [pool.submit(read, 20 + number) for number in range(NUM_STREAMS)]
        for _ in first:  # until it ends, the others run and wait
            pass
        process.terminate()
        codes = [end.result(timeout=120) for end in ends]
        assert process.wait(60) == 0
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    if grace > 1:
        assert set(codes) == {grpc.StatusCode.OK}
    else:
        assert grpc.StatusCode.UNAVAILABLE in codes


def test_a_server_that_was_killed_is_found_again() -> None:
    with server() as (process, address), Client(address) as client:
        stream = client.stream(long_request(100))
        next(stream)
        process.kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        process.wait()
        with server(int(address.rpartition(":")[2])) as (_, same):
            assert same == address
            assert until_answered(client).usage.num_generated_tokens == 3


def test_a_full_disk_under_the_log_stops_nothing() -> None:
    with Path("/dev/full").open("w") as full, server(log=full) as (process, address), Client(address) as client:
        for _ in range(3):
            assert client.generate(long_request(3)).usage.num_generated_tokens == 3
        process.terminate()
        assert process.wait(60) == 0
