"""Messages between a server and a process that decodes: a small JSON object, and at most one descriptor."""

import json
import socket
from collections.abc import Mapping
from typing import Any

__all__ = ["receive", "send"]

_MOST_BYTES = 8192


def send(connection: socket.socket, message: Mapping[str, Any], descriptor: int | None = None) -> None:
    """Send one message; the other side gets a descriptor of its own.

    Raises:
        OSError: the other side is gone.
    """
    socket.send_fds(connection, [json.dumps(message).encode()], [] if descriptor is None else [descriptor])


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """Wait for one message, and its descriptor, to be closed by the caller; None once the other side is gone.

    Raises:
        TimeoutError: the connection's timeout passed.
        ValueError: it is no message.
    """
    try:
        content, descriptors, *_ = socket.recv_fds(connection, _MOST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    if not content:
        return None
    message = json.loads(content)
    if not isinstance(message, dict):
        raise ValueError("a message must be a JSON object")
    return message, descriptors[0] if descriptors else None
