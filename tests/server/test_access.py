"""Who may call what, and how much at once: tokens, services, limits of a client."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from tests.patience import soon, until
from tests.server.conftest import Loopback
from tests.server.fakes import CONFIG, FINISHED, STARTED, FakeRunner, Pause, chat_request
from tests.server.grpc.test_interceptors import details, failed
from tests.server.test_app import health, listed
from tests.server.test_tls import YESTERDAY, Files, stub_of
from tests.server.wire import Relay
from trimserve.config import Config, ServerConfig
from trimserve.errors import CredentialsError
from trimserve.serve import make_server
from trimserve.server.running import running_server
from trimserve.v1 import adapter_pb2, model_pb2

GENERATION, MODEL = "trimserve.v1.GenerationService", "trimserve.v1.ModelService"
ADAPTERS = "trimserve.v1.AdapterService"

Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    """What a client sends with each call."""
    return (("authorization", f"Bearer {token}"),)


def write(path: Path, *entries: str) -> None:
    """The file of clients anew."""
    path.write_text("".join(entries))


def entry(name: str, *tokens: str, services: tuple[str, ...] | None = None) -> str:
    """A client in the file."""
    digests = [hashlib.sha256(token.encode()).hexdigest() for token in tokens]
    lines = [f"[clients.{name}]", f"token_sha256 = {digests}"]
    if services is not None:
        lines.append(f"services = {list(services)}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of three clients: `both` may do everything, the others use one service each."""
    path = tmp_path / "clients.toml"
    only = [entry("asker", "ask", services=(GENERATION,)), entry("watcher", "watch", services=(MODEL,))]
    write(path, entry("both", "old", "new"), *only)
    return path


@asynccontextmanager
async def serving(**knobs: object) -> AsyncIterator[Loopback]:
    """A server with knobs of its own."""
    config = Config(engine=CONFIG.engine, server=ServerConfig.model_validate({"port": 0, "metrics_port": 0, **knobs}))
    runner = FakeRunner()
    async with (
        running_server(make_server(runner, config)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Loopback(runner, server, channel)


@pytest.mark.parametrize(
    ("metadata", "generation", "model"),
    [
        ((), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer("wrong"), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer(""), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ((("authorization", "Basic old"),), "UNAUTHENTICATED", "UNAUTHENTICATED"),
        (bearer("old"), "OK", "OK"),
        ((("authorization", "bearer new"),), "OK", "OK"),
        ((("x-api-key", "new"),), "OK", "OK"),
        (bearer("ask"), "OK", "PERMISSION_DENIED"),
        (bearer("watch"), "PERMISSION_DENIED", "OK"),
    ],
)
async def test_a_token_opens_the_services_of_its_client(
    file: Path, metadata: Metadata, generation: str, model: str
) -> None:
    async with serving(auth_file=file) as loopback:
        calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
            (generation, lambda: loopback.generation.Generate(chat_request(), metadata=metadata)),
            (model, lambda: loopback.model.GetModel(model_pb2.GetModelRequest(), metadata=metadata)),
        ]
        for expected, call in calls:
            if expected == "OK":
                assert await call()
            else:
                code, info = await failed(call())
                assert (code.name, info.reason) == (expected, expected)
        assert len(loopback.runner.requests) == (generation == "OK")


LISTING = adapter_pb2.ListAdaptersRequest()


async def test_a_token_opens_the_service_that_changes_the_server_only_by_its_name(file: Path) -> None:
    write(file, entry("unnamed", "all"), entry("named", "changer", services=(ADAPTERS,)))
    async with serving(auth_file=file) as loopback:
        code, _ = await failed(loopback.adapters.ListAdapters(LISTING, metadata=bearer("all")))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert not (await loopback.adapters.ListAdapters(LISTING, metadata=bearer("changer"))).adapters
        await loopback.generation.Generate(chat_request(), metadata=bearer("all"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_without_tokens_only_a_server_on_loopback_can_be_changed(host: str) -> None:
    async with serving(host=host, allow_plaintext=True) as loopback:
        if host == "127.0.0.1":
            assert not (await loopback.adapters.ListAdapters(LISTING)).adapters
        else:
            code, info = await failed(loopback.adapters.ListAdapters(LISTING))
            assert (code.name, info.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert (await loopback.generation.Generate(chat_request())).text


async def test_four_outcomes_over_mutual_tls(file: Path, tmp_path: Path) -> None:
    files = Files(tmp_path)
    names = {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "clients.pem"}
    async with serving(auth_file=file, **{knob: files.path(name) for knob, name in names.items()}) as loopback:
        for credentials, metadata, expected in (
            (files.client(), (), grpc.StatusCode.UNAUTHENTICATED),
            (files.client(), bearer("wrong"), grpc.StatusCode.UNAUTHENTICATED),
            (files.client(not_after=YESTERDAY), bearer("new"), grpc.StatusCode.UNAVAILABLE),
            (files.client(), bearer("new"), None),
        ):
            async with stub_of(loopback.server.address, credentials) as stub:
                if expected is None:
                    assert (await stub.Generate(chat_request(), metadata=metadata)).text
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(chat_request(), metadata=metadata)
                assert caught.value.code() is expected


async def test_health_needs_no_token_and_reflection_any(file: Path) -> None:
    async with serving(auth_file=file) as loopback:
        assert (await health(loopback.channel).Check(health_pb2.HealthCheckRequest())).status
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await listed(loopback.channel)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert MODEL in await listed(loopback.channel, bearer("ask"))


async def test_nothing_is_read_of_a_call_that_is_not_let_in(file: Path) -> None:
    async with (
        serving(auth_file=file) as loopback,
        Relay(loopback.server.address) as relay,
        grpc.aio.insecure_channel(relay.address, [("grpc.max_send_message_length", -1)]) as channel,
    ):
        stub = Loopback(loopback.runner, loopback.server, channel).generation
        code, _ = await failed(stub.Generate(chat_request("x" * 60 * 2**20)))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert relay.num_bytes_up < 10 * 2**20


async def test_tokens_change_while_the_server_runs(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(auth_file=file) as loopback:

        async def code(token: str) -> grpc.StatusCode:
            call = loopback.generation.Generate(chat_request(), metadata=bearer(token))
            return await call.code()

        assert await code("old") is grpc.StatusCode.OK
        write(file, entry("both", "new", "newest"))
        assert await code("old") is grpc.StatusCode.UNAUTHENTICATED
        assert await code("newest") is grpc.StatusCode.OK
        write(file, "[clients.both]\ntoken_sha256 = ['secret']\n")
        assert await code("newest") is grpc.StatusCode.OK
    (why,) = (record.__dict__["why"] for record in caplog.records if record.message == "credentials not reloaded")
    assert "clients.both.token_sha256.0" in why
    assert "'secret'" not in why


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"\(--auth-file\) must be TOML with clients: .*No such file"),
        ("[clients", r"\(--auth-file\) must be TOML with clients: "),
        ("", "clients: Field required"),
        ("[clients.a]", "clients.a.token_sha256: Field required"),
        ("[clients.a]\ntoken_sha256 = []", "clients.a.token_sha256: List should have at least 1 item"),
        ("[clients.a]\ntoken_sha256 = ['plain']", r"clients.a.token_sha256.0: String should match pattern '[^']*'$"),
        (entry("a", "t", services=("Other",)), r"clients.a.services: .*got Other"),
        (entry("a", "t") + "service = 'x'", "clients.a.service: Extra inputs are not permitted"),
        (
            entry("a", "t") + entry("b", "u") + entry("c", "t"),
            "clients: a and c must have different tokens",
        ),
    ],
)
def test_a_file_that_says_something_else_is_refused_at_start(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "clients.toml"
    if text is not None:
        path.write_text(text)

    async def serve() -> None:
        async with serving(auth_file=path):
            pytest.fail("it must not serve")

    with pytest.raises(CredentialsError, match=message):
        asyncio.run(serve())


async def test_a_client_has_as_many_calls_open_as_it_may_and_others_still_get_in(file: Path) -> None:
    async with serving(auth_file=file, max_concurrent_rpcs_per_client=2) as loopback:
        loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED, FINISHED)

        def ask(token: str) -> Awaitable[object]:
            return loopback.generation.Generate(chat_request(), metadata=bearer(token))

        running = [asyncio.ensure_future(ask(token)) for token in ("old", "new", "ask")]
        await until(lambda: loopback.runner.num_running == 3)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask("new")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        _, (info, retry, quota) = details(caught.value)
        assert isinstance(info, error_details_pb2.ErrorInfo)
        assert isinstance(quota, error_details_pb2.QuotaFailure)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert info.reason == "TOO_MANY_CALLS"
        assert quota.violations[0].subject == "both"
        assert caught.value.trailing_metadata()["grpc-retry-pushback-ms"] == "1000"
        loopback.runner.released.set()
        await asyncio.gather(*running)
        assert await ask("new")


async def test_without_tokens_a_client_is_its_address(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trimserve")
    async with serving(max_concurrent_rpcs_per_client=1) as loopback:
        loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED, FINISHED)
        first = asyncio.ensure_future(loopback.generation.Generate(chat_request()))
        await soon(loopback.runner.paused.wait())
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(loopback.server.address, options) as other:
            stub = Loopback(loopback.runner, loopback.server, other).generation
            code, _ = await failed(stub.Generate(chat_request()))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        loopback.runner.released.set()
        await first
    assert {record.__dict__["client"] for record in caplog.records if record.message == "rpc"} == {"", "ipv4:127.0.0.1"}


async def test_a_full_server_still_answers_health_checks() -> None:
    async with serving(max_concurrent_rpcs=1) as loopback:
        loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED, FINISHED)
        first = asyncio.ensure_future(loopback.generation.Generate(chat_request()))
        await soon(loopback.runner.paused.wait())
        code, info = await failed(loopback.generation.Generate(chat_request()))
        assert (code, info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        assert (await health(loopback.channel).Check(health_pb2.HealthCheckRequest())).status
        loopback.runner.released.set()
        await first


async def test_a_message_that_does_not_arrive_in_time_ends_its_call() -> None:
    async with serving(receive_timeout_seconds=2) as loopback:
        stub: grpc.aio.StreamUnaryMultiCallable[bytes, bytes]
        stub = loopback.channel.stream_unary("/trimserve.v1.GenerationService/Generate")
        call = stub()
        await call.wait_for_connection()
        code, info = await failed(call)
        assert (code, info.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED")
        assert (await loopback.generation.Generate(chat_request())).text
