"""A server as a process of its own: signals under load, a kill, an engine that hangs, a disk that is full."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.forked import Program, forked
from trimserve.client import Client
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

PROGRAM = """
import asyncio, sys, time
from tests.engine.fake_model import FakeModel
from trimserve.config import Config, ServerConfig
from tests.engine.driving import make_runner
from trimserve.server.running import serve
from trimserve.serve import make_server

def load():
    return FakeModel(before_decode=lambda: time.sleep(0.01))

port, grace = int(sys.argv[1]), float(sys.argv[2])
runner = make_runner(load, max_batch=8, max_queue=64, num_preprocess_workers=1)
config = Config(server=ServerConfig(port=port, metrics_port=0, drain_grace_seconds=grace))
asyncio.run(serve(make_server(runner, config), on_serving=lambda server: print(server.address, flush=True)))
"""

NUM_STREAMS = 40


@contextmanager
def server(
    port: int = 0, grace: float = 30, log: int | IO[str] = subprocess.DEVNULL, before: str = ""
) -> Iterator[tuple[Program, str]]:
    """A process that serves a model of 10 ms a step, and its address; ended at the end of the block."""
    with forked(before + PROGRAM, port, grace, stderr=log) as process:
        yield process, process.stdout.readline().strip()


def long_request(num_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        raw_prompt="hi", sampling=pb.SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=num_tokens)
    )


def until_answered(client: Client, seconds: float = 60) -> pb.GenerateResponse:
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


@contextmanager
def full_pipe() -> Iterator[IO[str]]:
    """What to log to: a pipe that is full, and that nobody reads."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    with open(writer, "w") as stream:
        yield stream
    os.close(reader)


def test_a_log_that_nobody_reads_stops_neither_calls_nor_the_drain() -> None:
    with full_pipe() as pipe, server(log=pipe) as (process, address), Client(address) as client:
        for _ in range(3):
            assert client.generate(long_request(3)).usage.num_generated_tokens == 3
        process.terminate()
        assert process.wait(60) == 0


def test_a_terminal_that_closes_drains() -> None:
    with server() as (process, address), Client(address) as client:
        stream = client.stream(long_request(100))
        next(stream)
        for _ in range(2):  # the kernel's and the shell's
            process.send_signal(signal.SIGHUP)
        assert list(stream)[-1].finished.usage.num_generated_tokens == 100
        assert process.wait(60) == 0


def test_under_nohup_a_terminal_that_closes_changes_nothing() -> None:
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # which is what nohup does
    with server(before=ignored) as (process, address), Client(address) as client:
        process.send_signal(signal.SIGHUP)
        assert client.generate(long_request(3)).usage.num_generated_tokens == 3
        assert process.returncode is None


HANGING = """
import asyncio, ctypes, sys, time
from tests.engine.fake_model import FakeModel
from trimserve.config import Config, EngineConfig, ServerConfig
from tests.engine.driving import make_runner
from trimserve.server.running import serve
from trimserve.serve import make_server

def sleep_for_ever():
    time.sleep(1000)

def sleep_with_the_lock_of_python():
    ctypes.PyDLL(None).sleep(1000)

hang, good_steps = globals()[sys.argv[1]], iter(range(int(sys.argv[2])))
runner = make_runner(
    lambda: FakeModel(before_decode=lambda: next(good_steps, None) is not None or hang()),
    max_batch=1, max_queue=4, num_preprocess_workers=1, step_timeout_seconds=4,
)
config = Config(
    engine=EngineConfig(step_timeout_seconds=4),
    server=ServerConfig(port=0, metrics_port=0),
)
asyncio.run(serve(make_server(runner, config), on_serving=lambda server: print(server.address, flush=True)))
"""


def hanging_server(
    how: str, num_good_steps: int, log: int | IO[str] = subprocess.PIPE
) -> AbstractContextManager[Program]:
    """A process whose model hangs after some decode steps; must have ended by itself at the end of the block."""
    return forked(HANGING, how, num_good_steps, stderr=log)


def test_an_engine_that_hangs_is_no_longer_served_and_ends_the_process_with_the_cause() -> None:
    with hanging_server("sleep_for_ever", num_good_steps=10) as process:
        with grpc.insecure_channel(process.stdout.readline().strip()) as channel:
            make_stub: Any = health_pb2_grpc.HealthStub
            watch = make_stub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            running, waiting = (stub.GenerateStream(long_request(100)) for _ in range(2))
            for stream in (running, waiting):
                with pytest.raises(grpc.RpcError) as caught:
                    list(stream)
                assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine died")
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        log = process.rest()
    assert process.returncode == 1
    cause = "a step has not returned for 4 s (step_timeout_seconds)"
    assert log.splitlines()[-1] == f"trimserve.errors.EngineStopped: the engine died: TimeoutError('{cause}')"
    [line] = (line for line in log.splitlines() if "the engine thread hangs" in line)
    assert "in sleep_for_ever" in json.loads(line)["stack"]


def test_an_engine_that_hangs_while_it_warms_up_ends_the_process_with_the_cause() -> None:
    with hanging_server("sleep_for_ever", num_good_steps=0) as process:
        log = process.rest()
    assert process.returncode == 1
    assert log.splitlines()[-1] == "TimeoutError: a step has not returned for 4 s (step_timeout_seconds)"


def test_an_engine_that_hangs_with_the_lock_of_python_ends_the_process_with_all_stacks() -> None:
    with hanging_server("sleep_with_the_lock_of_python", num_good_steps=10) as process:
        with (
            grpc.insecure_channel(process.stdout.readline().strip()) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            list(generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(long_request(100)))
        log = process.rest()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert process.returncode == 1
    assert "in sleep_with_the_lock_of_python" in log


@pytest.mark.parametrize("how", ["sleep_for_ever", "sleep_with_the_lock_of_python"])
def test_an_engine_that_hangs_ends_the_process_though_nobody_reads_the_log(how: str) -> None:
    with full_pipe() as pipe, hanging_server(how, num_good_steps=10, log=pipe) as process:
        with (
            grpc.insecure_channel(process.stdout.readline().strip()) as channel,
            pytest.raises(grpc.RpcError),
        ):
            list(generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(long_request(100)))
        assert process.wait(60) == 1


def test_an_engine_that_dies_ends_the_process_though_nobody_reads_the_log() -> None:
    with full_pipe() as pipe, server(log=pipe) as (process, address), grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError):
            generation_pb2_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(raw_prompt="!kill"))
        assert process.wait(60) == 1
