"""The server of the metrics port against clients that hold, stall, leave and talk nonsense."""

import http.client
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus

import pytest

from tests.patience import PATIENCE_SECONDS
from trimserve.server import small_http
from trimserve.server.small_http import MAX_CONNECTIONS, Page, Question, SmallHttpServer

GREETING = b"Good day.\n"


async def pages(question: Question) -> Page:
    """One page, one that fails, one that is large."""
    match question.path:
        case "/bug":
            raise ZeroDivisionError
        case "/large":
            return Page(HTTPStatus.OK, bytes(64 * 2**20))
        case "/query":
            return Page(HTTPStatus.OK, f"{question.query} {question.headers['x-more']}".encode())
    return Page(HTTPStatus.OK, GREETING)


@pytest.fixture
def server() -> Iterator[SmallHttpServer]:
    server = SmallHttpServer("127.0.0.1", 0, pages, "test-http")
    yield server
    server.close()


def connect(server: SmallHttpServer) -> socket.socket:
    """A connection on which nothing was said yet."""
    return socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS)


def ask(
    server: SmallHttpServer, method: str = "GET", path: str = "/", headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_SECONDS)
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content, dict(response.getheaders())


def said(connection: socket.socket) -> bytes:
    """All that the server says until it closes the connection."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def test_a_page_is_told_its_query_and_headers(server: SmallHttpServer) -> None:
    assert ask(server, path="/query?a=1&b=2", headers={"X-More": "3"})[:2] == (200, b"a=1&b=2 3")


def test_a_page_may_be_asked_for_by_its_whole_address(server: SmallHttpServer) -> None:
    assert ask(server, path="http://here:80/query?a=http://b", headers={"X-More": "3"})[1] == b"a=http://b 3"


def test_head_has_the_status_and_the_headers_of_get_and_no_content(server: SmallHttpServer) -> None:
    status, content, headers = ask(server, "HEAD")
    assert (status, content) == (200, b"")
    assert headers == ask(server)[2]
    assert headers["Content-Length"] == str(len(GREETING))
    with connect(server) as connection:
        connection.sendall(b"HEAD / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert said(connection).endswith(b"\r\n\r\n")


def test_other_methods_are_told_which_there_are(server: SmallHttpServer) -> None:
    status, _, headers = ask(server, "DELETE")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without a host
        (b"GET / HTTP/1.1\r\nHost: here\r\nX: " + b"x" * 20_000, 431),
    ],
)
def test_what_is_no_request_is_told_so(server: SmallHttpServer, message: bytes, status: int) -> None:
    with connect(server) as connection:
        connection.sendall(message)
        assert said(connection).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("beginning", [b"", b"GET / HTTP/1.1\r\nHost: here\r\n"])
def test_a_request_that_does_not_come_ends_its_connection(
    server: SmallHttpServer, beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_http, "CONNECTION_SECONDS", 0.1)
    with connect(server) as connection:
        connection.sendall(beginning)
        assert said(connection) == b""


def test_an_answer_that_is_not_read_ends_its_connection(
    server: SmallHttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_http, "CONNECTION_SECONDS", 0.5)
    with connect(server) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n")
        assert ask(server)[0] == 200
        while open_connections(server):
            pass
        assert len(said(connection)) < 64 * 2**20


def open_connections(server: SmallHttpServer) -> int:
    return len(server._silent) + len(server._answered)


def test_silent_connections_are_few_take_no_threads_and_make_room_for_who_asks(server: SmallHttpServer) -> None:
    num_threads = threading.active_count()
    with ExitStack() as held:
        connections = [held.enter_context(connect(server)) for _ in range(3 * MAX_CONNECTIONS)]
        assert ask(server)[:2] == (200, GREETING)
        assert said(connections[0]) == b""  # the first to come is the first to go
        assert open_connections(server) <= MAX_CONNECTIONS
        assert threading.active_count() == num_threads


def test_clients_that_leave_are_no_errors(
    server: SmallHttpServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for message in (b"", b"GET / HT", b"GET /large HTTP/1.1\r\nHost: here\r\n\r\n"):
        connection = connect(server)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
        connection.sendall(message)
        connection.close()
    assert ask(server)[0] == 200
    assert not [record for record in caplog.records if record.name != "asyncio"]
    assert capfd.readouterr().err == ""


def test_a_page_that_fails_is_logged_and_the_next_one_comes(
    server: SmallHttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(server, path="/bug")[0] == 500
    assert ask(server)[0] == 200
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == ["page failed"]


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Everything that the process may open is open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_pages_come_when_the_process_has_no_descriptors_left(server: SmallHttpServer) -> None:
    with ExitStack() as held:
        clients = [held.enter_context(socket.socket()) for _ in range(3)]  # the test's ends, opened beforehand
        with no_descriptors_left():
            for client in clients:
                client.settimeout(PATIENCE_SECONDS)
                client.connect(("127.0.0.1", server.port))
                client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
                assert said(client).endswith(GREETING)
