"""Command options for reaching a running server, and the connection that they make."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import grpc
import typer

from trimserve.client import Client, Tls

__all__ = ["Ca", "Token", "connected"]

Ca = Annotated[
    Path | None, typer.Option(help="PEM file of the authorities of the server at --address, which then speaks TLS.")
]
Token = Annotated[str | None, typer.Option(envvar="TRIMSERVE_TOKEN", help="Token for the server at --address.")]


@contextmanager
def connected(address: str, ca: Path | None, token: str | None) -> Iterator[Client]:
    """A client, for the length of the block.

    Args:
        address: `HOST:PORT`.
        ca: None is plaintext.
        token: None sends none.
    Raises:
        OSError: `ca` cannot be read.
        ConnectionError: from within the block, with gRPC's own message, if the server cannot be reached.
    """
    with Client(address, tls=None if ca is None else Tls(ca), token=token) as client:
        try:
            yield client
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or error.trailing_metadata():
                raise  # a status of the server itself
            why = f"{error.code().name}: {error.details()}"
            raise ConnectionError(f"cannot reach {address} (HOST:PORT expected): {why}") from None
