"""Reads the messages of calls: within a time, in room that was set aside, large ones beside the event loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from trimserve.errors import DeadlinePassed, InvalidRequest, TooManyBytes
from trimserve.server.admission import Admission
from trimserve.server.arrivals import Arrivals
from trimserve.server.grpc.codec import Codec, is_small
from trimserve.server.message_bytes import MessageBytes
from trimserve.server.offload import Offload

__all__ = ["Inbox"]

PROBE_SECONDS = 5.0
"""For the message of a health check."""

IDLE_SECONDS = 10.0
"""Between two messages of a stream from the client, as reflection has them."""

M = TypeVar("M", bound=Message)
Reader = Callable[[], Awaitable[Any]]
"""Reads from gRPC's context: its iterator of messages would keep the last one until the call has ended."""


class Inbox:
    """Of all calls of a server; belongs to the event loop's thread."""

    def __init__(self, room: MessageBytes, offload: Offload) -> None:
        """Read nothing yet.

        Args:
            room: for messages.
            offload: reads the large ones.
        """
        self._room = room
        self._offload = offload
        self._arrivals = Arrivals()

    def close(self) -> None:
        """End all calls whose message is not there yet, and let no other begin, so that the server can stop."""
        self._arrivals.close()

    async def receive(self, read: Reader, codec: Codec[M], admission: Admission, seconds: float) -> M:
        """The one message of an admitted call, which holds room for it from then on.

        Args:
            read: the next message of the call, or `grpc.aio.EOF`.
            codec: reads them.
            admission: of the call.
            seconds: for the message to arrive (`receive_timeout_seconds`).
        Raises:
            TooManyBytes: there was no room for it in time.
            DeadlinePassed: it did not arrive in time.
            EngineStopped: the server stops.
            InvalidRequest: there is no message, or no valid one.
            MessageTooLarge: it inflates to more than it may.
        """
        no_room = TooManyBytes(f"no room for a message within {seconds:g} seconds (max_message_bytes)")
        late = DeadlinePassed(f"the request did not arrive within {seconds:g} seconds (receive_timeout_seconds)")
        end = asyncio.get_running_loop().time() + seconds
        async with self._arrivals.until(end, no_room):
            admission.holds(await self._room.take(admission.client))
        async with self._arrivals.until(end, late):
            data = await _next(read)
        parse = partial(codec.read, data)
        message = parse() if is_small(data) else await self._offload.run(parse)
        admission.received(max(len(data), message.ByteSize()))
        return message

    async def stream(self, read: Reader, codec: Codec[M], admission: Admission) -> AsyncIterator[M]:
        """The messages of an admitted call whose client sends several small ones."""
        late = f"no request came within {IDLE_SECONDS:g} seconds"
        while True:
            async with self._arrivals.until(asyncio.get_running_loop().time() + IDLE_SECONDS, DeadlinePassed(late)):
                admission.holds(await self._room.take(admission.client))
                data = await read()
            if data is grpc.aio.EOF:
                return
            message = codec.read(data)
            admission.received(len(data))
            admission.release_message()
            yield message

    async def probe(self, read: Reader, codec: Codec[M], client: str) -> M | None:
        """The message of a health check by a known client; None if there is no room at once, so that none waits.

        Raises:
            DeadlinePassed: it did not arrive in time.
            EngineStopped: the server stops.
            InvalidRequest: there is no message, or no valid one.
            MessageTooLarge: it is larger than such a message is.
        """
        hold = self._room.take_now(client)
        if hold is None:
            return None
        late = DeadlinePassed(f"the request did not arrive within {PROBE_SECONDS:g} seconds")
        try:
            async with self._arrivals.until(asyncio.get_running_loop().time() + PROBE_SECONDS, late):
                return codec.read(await _next(read))
        finally:
            hold.shrink(0)


async def _next(read: Reader) -> bytes:
    received: object = await read()
    if not isinstance(received, bytes):  # gRPC's end of a stream
        raise InvalidRequest("request", "must be sent, got none")
    return received
