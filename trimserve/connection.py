"""Command options for reaching a running server, and the connection that they make."""

import inspect
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from trimserve.client import Client, Tls
from trimserve.options import Command, with_options
from trimserve.refusal import Refusal

__all__ = ["Connection", "connected", "with_connection"]

_PANEL = "Server"
_TOKEN_VARIABLE = "TRIMSERVE_TOKEN"

_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Arch
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # macOS
)


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a server is, and what it is shown and told."""

    address: str | None
    """`HOST:PORT`; None is no server."""
    tls: Tls | None = None
    """None is plaintext."""
    token: str | None = None
    """None sends none."""


def with_connection(otherwise: str) -> Callable[[Command], Command]:
    """Add the options of a connection to a command; it receives them as its argument `connection`.

    Args:
        otherwise: what happens without `--address`, for its help.
    """
    options = {
        "address": (str | None, typer.Option(help=f"HOST:PORT of a running server; default: {otherwise}.")),
        "tls": (bool, typer.Option("--tls", help="The server speaks TLS, with a certificate that this system trusts.")),
        "ca": (Path | None, typer.Option(help="PEM file of the authorities of its certificate; implies --tls.")),
        "client_cert": (Path | None, typer.Option(help="PEM file of our certificate, for a server that asks (mTLS).")),
        "client_key": (Path | None, typer.Option(help="PEM file of the key of --client-cert.")),
        "token": (str | None, typer.Option(envvar=_TOKEN_VARIABLE, help="Token that the server is sent.")),
    }

    def decorate(command: Command) -> Command:
        """Give a command the options."""
        parameters = []
        for name, (kind, option) in options.items():
            option.rich_help_panel = _PANEL
            annotation: Any = Annotated[kind, option]
            default = False if kind is bool else None
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
        return with_options(command, "connection", parameters, _connection)

    return decorate


def _connection(values: Mapping[str, Any]) -> Connection:
    address, token = values["address"], values["token"]
    of_tls = {f"--{name.replace('_', '-')}": values[name] for name in ("tls", "ca", "client_cert", "client_key")}
    given = [option for option, value in of_tls.items() if value]
    if given and address is None:
        raise typer.BadParameter(f"{given[0]} needs --address beside it")
    if ("--client-cert" in given) is not ("--client-key" in given):
        raise typer.BadParameter("--client-cert and --client-key need each other")
    tls = Tls(values["ca"] or _system_roots(), values["client_cert"], values["client_key"]) if given else None
    return Connection(address, tls, token)


def _system_roots() -> Path | None:
    """What this system trusts, which gRPC for Python does not look at; None leaves it to the roots that gRPC brings."""
    own = ssl.get_default_verify_paths().cafile  # heeds SSL_CERT_FILE
    return next((path for path in map(Path, (own, *_BUNDLES) if own else _BUNDLES) if path.exists()), None)


@contextmanager
def connected(connection: Connection) -> Iterator[Client]:
    """A client, for the length of the block.

    Args:
        connection: with an address.
    Raises:
        OSError: a PEM file cannot be read.
        ConnectionError: from within the block, with gRPC's own message, if the server cannot be reached.
    """
    address = connection.address
    assert address is not None
    with Client(address, tls=connection.tls, token=connection.token) as client:
        try:
            yield client
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or error.trailing_metadata():
                raise  # a status of the server itself
            raise ConnectionError(f"cannot reach {address} (HOST:PORT expected): {Refusal.of(error)}") from None
