"""The server's life: listening, warm-up, health, reflection, drain, signals, threads."""

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.forked import Program, forked
from tests.patience import PATIENCE_SECONDS, soon
from tests.server.conftest import Loopback
from tests.server.fakes import CHUNKS, CONFIG, DELTAS, FINISHED, STARTED, FakeRunner, Pause, chat_request
from trimserve.client import Client
from trimserve.config import Config, ServerConfig
from trimserve.errors import CannotListen, EngineStopped
from trimserve.serve import make_server
from trimserve.server.grpc.services import SERVICES
from trimserve.server.running import InProcessServer, running_server
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc

NAMES = ("", *SERVICES)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(channel: grpc.aio.Channel) -> Any:
    """The health service's stub, whose methods the type stubs do not have."""
    return health_pb2_grpc.HealthStub(channel)


async def states(channel: grpc.aio.Channel) -> set[int]:
    """What health says of the server and of each service."""
    stub = health(channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in NAMES}


async def test_health_is_not_serving_and_calls_are_refused_until_warm() -> None:
    runner = FakeRunner()
    runner.start_gate = asyncio.Event()
    server = make_server(runner, CONFIG)
    await server.listen()
    warm_up = asyncio.ensure_future(server.warm_up())
    async with grpc.aio.insecure_channel(server.address) as channel:
        assert await states(channel) == {NOT_SERVING}
        for call in (
            generation_pb2_grpc.GenerationServiceStub(channel).Generate(chat_request()),
            model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        status = await model_pb2_grpc.ModelServiceStub(channel).GetServerStatus(model_pb2.GetServerStatusRequest())
        assert not status.is_ready
        runner.start_gate.set()
        await warm_up
        assert await states(channel) == {SERVING}
    await server.stop(0)


async def test_health_of_an_unknown_service_is_not_found(loopback: Loopback) -> None:
    stub = health(loopback.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_watchers_hear_of_an_engine_that_died_also_when_another_watcher_left(
    loopback: Loopback,
) -> None:
    stub = health(loopback.channel)
    leaver, stayer = (stub.Watch(health_pb2.HealthCheckRequest(service=NAMES[1])) for _ in range(2))
    assert (await leaver.read()).status == SERVING
    assert (await stayer.read()).status == SERVING
    leaver.cancel()
    await asyncio.sleep(0.05)
    loopback.runner.is_ready = False
    assert (await soon(stayer.read())).status == NOT_SERVING


async def test_watching_an_unknown_service_says_so(loopback: Loopback) -> None:
    watch = health(loopback.channel).Watch(health_pb2.HealthCheckRequest(service="other"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def listed(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> set[str]:
    make_stub: Any = reflection_pb2_grpc.ServerReflectionStub
    stub = make_stub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([question]), metadata=metadata)
    return {service.name for service in (await call.read()).list_services_response.service}


async def test_reflection_lists_every_service(loopback: Loopback) -> None:
    others = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert await listed(loopback.channel) == {*NAMES[1:], *others}


async def test_draining_refuses_new_requests_and_finishes_running_ones(loopback: Loopback) -> None:
    loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED, *DELTAS, FINISHED)
    running = asyncio.ensure_future(loopback.generation.Generate(chat_request()))
    await soon(loopback.runner.paused.wait())
    watch = health(loopback.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    stopping = asyncio.ensure_future(loopback.server.stop(3600))
    assert (await soon(watch.read())).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loopback.generation.Generate(chat_request())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    loopback.runner.released.set()
    assert (await running).text == "Hello ☃!"
    await soon(stopping)  # an open watch does not hold the server for the whole grace
    assert loopback.runner.stop_graces == [3600]


async def test_draining_cuts_requests_at_the_end_of_the_grace(loopback: Loopback) -> None:
    loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED)
    stream = loopback.generation.GenerateStream(chat_request())
    await stream.read()
    await loopback.server.stop(0.1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_failed_start_is_raised_and_closes_the_server() -> None:
    with pytest.raises(ValueError, match="no such model"):
        async with running_server(make_server(FakeRunner(start_error=ValueError("no such model")), CONFIG)):
            pytest.fail("it must not serve")


async def test_a_port_that_is_taken_is_an_error_that_names_it(loopback: Loopback) -> None:
    assert loopback.server.metrics_address is not None
    grpc_port, metrics_port = (
        int(address.rpartition(":")[2]) for address in (loopback.server.address, loopback.server.metrics_address)
    )
    for config, message in (
        (
            ServerConfig(port=grpc_port, metrics_port=0),
            rf"^cannot listen on 127\.0\.0\.1:{grpc_port} \(--host, --port\): Address already in use",
        ),
        (
            ServerConfig(port=0, metrics_port=metrics_port),
            rf"^cannot listen on 127\.0\.0\.1:{metrics_port} \(--host, --metrics-port\): Address already in use",
        ),
    ):
        with pytest.raises(CannotListen, match=message):
            async with running_server(make_server(FakeRunner(), Config(server=config))):
                pytest.fail("it must not serve")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "::2"])
async def test_a_host_that_is_not_ours_is_an_error(host: str) -> None:
    with pytest.raises(CannotListen, match=rf"^cannot listen on \S*{host}\S*:0 \(--host, --port\): [A-Z]"):
        async with running_server(
            make_server(FakeRunner(), Config(server=ServerConfig(host=host, port=0, allow_plaintext=True)))
        ):
            pytest.fail("it must not serve")


@pytest.mark.parametrize(
    ("knobs", "client_seconds"), [({"max_deadline_seconds": 0.2}, None), ({"max_deadline_seconds": 0.2}, 60)]
)
async def test_the_servers_deadlines_hold_for_calls_with_none_or_a_longer_one(
    knobs: dict[str, float], client_seconds: float | None
) -> None:
    config = Config(server=ServerConfig.model_validate({"port": 0, "metrics_port": 0, **knobs}))
    async with (
        running_server(make_server(FakeRunner((STARTED, Pause.UNTIL_RELEASED)), config)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generation_pb2_grpc.GenerationServiceStub(channel).Generate(chat_request(), timeout=client_seconds)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert caught.value.details() == "the fake was too slow"


def test_a_server_in_a_thread_serves_a_program_without_an_event_loop() -> None:
    with InProcessServer(make_server(FakeRunner(CHUNKS), CONFIG)) as server, Client(server.address) as client:
        assert client.generate("Hello").text == "Hello ☃!"
        assert server.metrics_address is not None
    with pytest.raises(grpc.RpcError), Client(server.address) as client:
        client.generate("Hello", timeout_seconds=5)


def test_a_server_in_a_thread_raises_what_its_start_raised() -> None:
    server = InProcessServer(make_server(FakeRunner(start_error=ValueError("no such model")), CONFIG))
    with pytest.raises(ValueError, match="no such model"), server:
        pytest.fail("it must not serve")


class InterruptingGate(asyncio.Event):
    """Interrupts the main thread once somebody waits."""

    async def wait(self) -> Literal[True]:
        await asyncio.sleep(0.3)  # the main thread comes to wait, too
        os.kill(os.getpid(), signal.SIGINT)
        return await super().wait()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts: shells start programs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_server_in_a_thread_warms_up_ends_both() -> None:
    runner = FakeRunner()
    runner.start_gate = InterruptingGate()
    with pytest.raises(KeyboardInterrupt), InProcessServer(make_server(runner, CONFIG)):
        pytest.fail("it must not serve")
    for thread in threading.enumerate():
        if thread.name == "trimserve-server":
            thread.join(PATIENCE_SECONDS)
    assert runner.stop_graces
    assert "trimserve-server" not in {thread.name for thread in threading.enumerate()}


PROGRAM = """
import asyncio, sys
from tests.server.fakes import CHUNKS, STARTED, FINISHED, FakeRunner, Pause
from trimserve.config import Config, ServerConfig
from trimserve.server.running import serve
from trimserve.serve import make_server

runner = FakeRunner((STARTED, Pause.UNTIL_RELEASED, FINISHED))
config = Config(server=ServerConfig(port=0, metrics_port=0, drain_grace_seconds={grace}))

async def main():
    if {gated}:
        runner.start_gate = asyncio.Event()
    await serve(make_server(runner, config), on_serving=lambda server: print(server.address, flush=True))

asyncio.run(main())
"""


def run_server(grace: float, *, gated: bool = False) -> AbstractContextManager[Program]:
    return forked(PROGRAM.format(grace=grace, gated=gated), stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_cuts_at_the_grace_and_exits_cleanly(number: signal.Signals) -> None:
    with run_server(0.3) as process:
        address = process.stdout.readline().strip()
        with Client(address) as client:
            stream = client.stream("Hello")
            assert next(stream).started.num_prompt_tokens == 20
            process.send_signal(number)
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        log = process.rest()
    assert process.returncode == 0, log
    for event in ("listening", "serving", "draining", "rpc", "stopped"):
        assert f'"event": "{event}"' in log


def test_a_signal_during_warm_up_ends_the_server() -> None:
    with run_server(5, gated=True) as process:
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        log = process.rest()
    assert process.returncode == 0, log


KILLED_ENGINE = """
import asyncio
from tests.engine.fake_model import FakeModel
from trimserve.config import Config, ServerConfig
from tests.engine.driving import make_runner
from trimserve.server.running import serve
from trimserve.serve import make_server

runner = make_runner(FakeModel, max_batch=4, max_queue=4, num_preprocess_workers=1)
config = Config(server=ServerConfig(port=0, metrics_port=0))
asyncio.run(serve(make_server(runner, config), on_serving=lambda server: print(server.address, flush=True)))
"""


def test_a_dead_engine_fails_its_requests_and_ends_the_process_with_the_cause() -> None:
    with forked(KILLED_ENGINE, stderr=subprocess.PIPE) as process:
        with grpc.insecure_channel(process.stdout.readline().strip()) as channel:  # one that does not try again
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            assert stub.Generate(pb.GenerateRequest(raw_prompt="hi")).text
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(pb.GenerateRequest(raw_prompt="!kill"))
        log = process.rest()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine died")
    assert process.returncode == 1
    assert log.splitlines()[-1] == "trimserve.errors.EngineStopped: the engine died: Killed()"


def test_a_server_in_a_thread_whose_engine_died_says_so_at_its_end() -> None:
    runner = FakeRunner([Pause.DEATH])
    with (
        pytest.raises(EngineStopped, match="the engine died: ZeroDivisionError"),
        InProcessServer(make_server(runner, CONFIG)) as server,
        Client(server.address) as client,
        pytest.raises(grpc.RpcError),
    ):
        client.generate("Hello", timeout_seconds=60)


SIGTERM_WHILE_LOADING = """
import asyncio, os, signal, threading, time
from trimserve.config import Config, ServerConfig
from tests.engine.driving import make_runner
from trimserve.server.running import serve
from trimserve.serve import make_server

def load():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1000)

runner = make_runner(load, max_batch=1, max_queue=1, num_preprocess_workers=1)
asyncio.run(serve(make_server(runner, Config(server=ServerConfig(port=0, metrics_port=0)))))
"""


def test_sigterm_does_not_wait_for_a_long_load() -> None:
    with forked(SIGTERM_WHILE_LOADING, stderr=subprocess.PIPE) as process:
        errors = process.rest()
    assert process.returncode == 0, errors
