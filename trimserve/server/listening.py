"""Addresses to listen on, and errors that name the options that set them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from trimserve.errors import CannotListen

__all__ = ["address_of", "listening", "socket_family"]


def address_of(host: str, port: int | None) -> str:
    """`HOST:PORT`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def socket_family(host: str) -> socket.AddressFamily:
    """The address family of a host; names are taken as IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextmanager
def listening(option: str, host: str, port: int) -> Iterator[None]:
    """Translate errors of the block, which starts to listen.

    Args:
        option: of the command line that sets the port.
        host: to listen on.
        port: to listen on.
    Raises:
        CannotListen: the block raised OSError or RuntimeError; names the address and its options.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise CannotListen(f"cannot listen on {address_of(host, port)} (--host, {option}): {why}") from error
