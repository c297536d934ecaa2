"""The server that a command asks: a running one, or one of its own in this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from trimserve.client import Client
from trimserve.config import Config
from trimserve.connection import Connection, connected

__all__ = ["OWN_SERVER", "asked_server"]

OWN_SERVER = "start one, with the knobs of the model below"
"""What `asked_server` does without an address, for the help of `--address`."""


@contextmanager
def asked_server(connection: Connection, config: Config) -> Iterator[Client]:
    """A client of the server at an address, or of a new one in this process.

    Args:
        connection: without an address, a server is started.
        config: of that server's model and engine.
    """
    if connection.address is not None:
        with connected(connection) as client:
            yield client
        return
    console = Console(stderr=True)
    waiting = console.status(f"loading {escape(config.model.model or 'the embedded model')}")
    if console.is_terminal:
        waiting.start()
    try:
        from trimserve.serve import in_process_server

        server = in_process_server(config.model, config.engine)
        with server, Client(server.address) as client:
            waiting.stop()
            yield client
    finally:
        waiting.stop()
