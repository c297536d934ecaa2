"""Who may use the HTTP door: tokens, TLS, renewed certificates; health is open to all."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme

from tests.patience import until
from tests.server.fakes import FakeRunner
from tests.server.http.conftest import Door, ask, open_door
from tests.server.http.raw import HELLO, connected
from tests.server.test_access import GENERATION, MODEL, entry, write
from tests.server.test_tls import Files
from trimserve.server.http.connection import _client_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of three clients: `both` may do everything, the others use one service each."""
    path = tmp_path / "clients.toml"
    write(
        path,
        entry("both", "all"),
        entry("asker", "ask", services=(GENERATION,)),
        entry("watcher", "watch", services=(MODEL,)),
    )
    return path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize(
    ("token", "chat", "models"),
    [
        ("wrong", openai.AuthenticationError, openai.AuthenticationError),
        ("all", None, None),
        ("ask", None, openai.PermissionDeniedError),
        ("watch", openai.PermissionDeniedError, None),
    ],
)
async def test_a_token_opens_the_routes_of_its_clients_services(
    file: Path, token: str, chat: type[Exception] | None, models: type[Exception] | None
) -> None:
    async with open_door(token=token, auth_file=file) as door:

        async def listed() -> Any:
            return await door.client.models.list()

        for expected, call in ((chat, ask(door)), (models, listed())):
            if expected is None:
                assert await call
            else:
                with pytest.raises(expected):
                    await call
        assert len(door.runner.requests) == (chat is None)


async def test_without_a_token_nothing_is_read_or_told_but_health(file: Path) -> None:
    async with open_door(auth_file=file) as door, connected(door.address) as client:
        client.post(HELLO[:5], length=65 * 2**20)
        status, content = await client.answer()
        assert (status, content["error"]["code"]) == (401, "UNAUTHENTICATED")
        async with connected(door.address) as other:
            other.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/no HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await other.answer() == (200, {"status": "serving"})
            assert await other.code() == (401, "UNAUTHENTICATED")


async def test_health_follows_the_engine() -> None:
    async with open_door(FakeRunner()) as door, connected(door.address) as client:
        door.server._set_serving(False)
        client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await client.answer() == (503, {"status": "not serving"})


def tls_knobs(files: Files, *, is_mutual: bool = False) -> dict[str, Any]:
    client_ca = {"tls_client_ca": files.path("clients.pem")} if is_mutual else {}
    return {"tls_cert": files.path("server.pem"), "tls_key": files.path("server.key"), **client_ca}


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def status_over(door: Door, tls: ssl.SSLContext | None) -> int:
    async with connected(door.address, tls) as client:
        client.post(HELLO)
        return (await client.answer())[0]


async def test_over_tls_only_who_trusts_the_server_is_answered_and_plaintext_is_not(files: Files) -> None:
    async with open_door(**tls_knobs(files)) as door:
        assert await status_over(door, trusting(files.authority)) == 200
        with pytest.raises(ssl.SSLError):
            await status_over(door, trusting(trustme.CA()))
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await status_over(door, None)


async def test_over_mutual_tls_a_client_is_called_by_its_certificate(files: Files) -> None:
    async with open_door(**tls_knobs(files, is_mutual=True)) as door:
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await status_over(door, trusting(files.authority))
        mine = trusting(files.authority)
        files.authority.issue_cert("a-client").configure_cert(mine)
        async with connected(door.address, mine) as client:
            client.post(HELLO, length=len(HELLO) + 1)
            held = door.server._core.gate.message_bytes._held
            await until(lambda: set(held) == {"a-client"})


async def test_a_new_connection_has_the_renewed_certificate(files: Files) -> None:
    async with open_door(**tls_knobs(files)) as door:
        old = trusting(files.authority)
        async with connected(door.address, old) as kept:
            files.renew()
            assert await status_over(door, trusting(files.authority)) == 200
            with pytest.raises(ssl.SSLError):
                await status_over(door, old)
            kept.post(HELLO)
            assert (await kept.answer())[0] == 200


class _Transport(asyncio.Transport):
    """Of a client at an address."""

    def __init__(self, host: str) -> None:
        super().__init__({"peername": (host, 1)})


@pytest.mark.parametrize(("host", "name"), [("10.0.0.1", "ipv4:10.0.0.1"), ("::1", "ipv6:[::1]")])
def test_a_client_is_called_as_grpc_would(host: str, name: str) -> None:
    assert _client_of(_Transport(host)) == name
