"""Which servers are this machine's own, and that no proxy of the environment stands before them, but before others."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.server.fakes import CONFIG, FakeRunner
from trimserve.client import Client, channel_options
from trimserve.loopback import is_loopback, proxy_options
from trimserve.process import read_page
from trimserve.serve import make_server
from trimserve.server.running import InProcessServer

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
DIRECT = [("grpc.enable_http_proxy", 0)]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_loopback_is_known_by_name_and_by_number(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "127.0.0.1",
        "localhost:50051",
        "LocalHost.:50051",
        "trimserve.localhost:50051",
        "[::1]:50051",
        "::1",
        "0.0.0.0:50051",
        "[::]:50051",
        "dns:localhost:50051",
        "dns:///127.0.0.1:50051",
        "dns://8.8.8.8/localhost:50051",
        "ipv4:127.0.0.1:50051",
        "ipv4:127.0.0.1:1,127.0.0.1:2",
        "ipv6:[::1]:50051",
    ],
)
def test_this_machine_is_reached_without_a_proxy(address: str) -> None:
    assert proxy_options(address) == DIRECT
    assert {*DIRECT} <= {*channel_options(address=address)}


@pytest.mark.parametrize(
    "address", ["example.com:443", "10.0.0.1:50051", "dns:///localhost.example:1", "[2001:db8::1]:1", ""]
)
def test_the_proxy_of_another_machine_is_left_to_the_environment(address: str) -> None:
    assert proxy_options(address) == []
    assert not {*DIRECT} & {*channel_options(address=address), *channel_options()}


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where every variable says that the proxy is; it answers nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        for name in PROXY_VARIABLES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield listening


@pytest.mark.usefixtures("proxy")
def test_a_server_on_loopback_answers_beside_a_proxy() -> None:
    with InProcessServer(make_server(FakeRunner(), CONFIG)) as server:
        port = server.address.rsplit(":", 1)[1]
        for address in (server.address, f"localhost:{port}", f"ipv4:127.0.0.1:{port}"):
            with Client(address) as client:
                assert client.generate("Hi", timeout_seconds=10).text
        assert server.metrics_address is not None
        assert b"trimserve_model_info" in read_page(f"http://{server.metrics_address}/metrics", timeout_seconds=10)


def test_a_server_elsewhere_is_asked_for_at_the_proxy(proxy: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool, Client("trimserve.example:50051") as client:
        answer = pool.submit(client.status, timeout_seconds=10)
        connection, _ = proxy.accept()
        with connection:
            assert connection.recv(1000).startswith(b"CONNECT trimserve.example:50051 ")
        client.close()
        assert isinstance(answer.exception(10), grpc.RpcError | ValueError)
