"""Reads the bodies of requests: within a time, in room that was set aside, up to a size.

What `server/grpc/inbox.py` is for messages.
"""

import asyncio
from contextlib import suppress

from starlette.types import Receive

from trimserve.errors import InvalidRequest, MessageLate, MessageTooLarge, TooManyBytes
from trimserve.server.admission import Admission
from trimserve.server.arrivals import Arrivals
from trimserve.server.core import Core

__all__ = ["Inbox", "linger"]

LINGER_SECONDS = 2.0
"""For what a client still sends of a refused body: closing the connection at once could lose the answer."""


class Inbox:
    """Of all requests of a server; belongs to the event loop's thread."""

    def __init__(self, core: Core) -> None:
        """Read nothing yet.

        Args:
            core: its gate has room for bodies.
        """
        self._room = core.gate.message_bytes
        self._most = core.config.server.max_message_bytes
        self._seconds = core.config.server.receive_timeout_seconds
        self._arrivals = Arrivals()

    def close(self) -> None:
        """End all requests whose body is not there yet, and let no other begin, so that the server can stop."""
        self._arrivals.close()

    async def read(self, receive: Receive, headers: dict[str, str], admission: Admission) -> bytes:
        """The body of an admitted request, which holds room for it from then on.

        Args:
            receive: ASGI's.
            headers: by lower-case name.
            admission: of the request.
        Raises:
            TooManyBytes: there was no room for it in time.
            MessageLate: it did not arrive in time.
            EngineStopped: the server stops.
            InvalidRequest: it is declared to be something else than JSON.
            MessageTooLarge: it is larger than it may be.
            CancelledError: the client left.
        """
        _check_kind(headers)
        length = int(headers.get("content-length", self._most))  # digits, as the protocol has seen to
        if length > self._most:
            raise MessageTooLarge(f"the body has {length} bytes, {self._most} are allowed (max_message_bytes)")
        seconds = self._seconds
        no_room = TooManyBytes(f"no room for a message within {seconds:g} seconds (max_message_bytes)")
        late = MessageLate(f"the request did not arrive within {seconds:g} seconds (receive_timeout_seconds)")
        end = asyncio.get_running_loop().time() + seconds
        async with self._arrivals.until(end, no_room):
            hold = await self._room.take(admission.client)
        admission.holds(hold)
        hold.shrink(length)
        async with self._arrivals.until(end, late):
            body = await self._whole(receive)
        admission.received(len(body))
        return body

    async def _whole(self, receive: Receive) -> bytes:
        body, is_there = bytearray(), False
        while not is_there:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise asyncio.CancelledError
            body += message.get("body", b"")
            if len(body) > self._most:
                raise MessageTooLarge(f"the body has more than {self._most} bytes (max_message_bytes)")
            is_there = not message.get("more_body", False)
        return bytes(body)


async def linger(receive: Receive) -> None:
    """Let what a client still sends of a refused body arrive, for a moment, and forget it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass


def _check_kind(headers: dict[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    # Pages of other sites may have a browser send anything but JSON without asking the server first.
    if kind != "application/json":
        raise InvalidRequest("content-type", f"must be application/json, got {kind[:64]!r}")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("content-encoding", f"must be unset, got {headers['content-encoding'][:64]!r}")
