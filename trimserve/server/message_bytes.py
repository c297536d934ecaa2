"""Bytes of requests that are arriving or held, bounded for the whole server and for each client.

gRPC tells the length of a message only once it is there. So room for the largest one is set aside before anything is
read, and shrunk to the real size afterwards. A call that finds no room waits, in order of arrival; a client that has
its share lets others pass.
"""

import asyncio
from collections import Counter, deque

__all__ = ["Hold", "MessageBytes"]


class Hold:
    """Room for one message; belongs to the event loop's thread."""

    def __init__(self, owner: "MessageBytes", client: str, num_bytes: int) -> None:
        """Made by `MessageBytes`."""
        self._owner = owner
        self.client = client
        self.num_bytes = num_bytes
        """Set aside now."""

    def shrink(self, num_bytes: int) -> None:
        """Keep no more than this; 0 gives all of it back. Larger than what is held changes nothing."""
        freed = max(0, self.num_bytes - num_bytes)
        self.num_bytes -= freed
        self._owner.give_back(self.client, freed)


class MessageBytes:
    """Hands out room for messages."""

    def __init__(self, capacity: int, largest: int) -> None:
        """Hold nothing yet.

        Args:
            capacity: bytes of all messages together, at least `largest`.
            largest: bytes of one message.
        """
        self._capacity = capacity
        self._share = max(capacity // 2, largest)
        self._largest = largest
        self._held: Counter[str] = Counter()
        self._total = 0
        self._waiters: deque[tuple[str, asyncio.Future[Hold]]] = deque()

    @property
    def in_flight(self) -> int:
        """Bytes that are set aside or held now."""
        return self._total

    def take_now(self, client: str) -> Hold | None:
        """Room for one message, if there is some at once and nobody waits for it."""
        return None if self._waiters or not self._fits(client) else self._take(client)

    async def take(self, client: str) -> Hold:
        """Wait for the room of one message.

        Args:
            client: whose share it is of.
        """
        if hold := self.take_now(client):
            return hold
        arrival: asyncio.Future[Hold] = asyncio.get_running_loop().create_future()
        self._waiters.append((client, arrival))
        self._grant()  # those who wait may all be at their share
        try:
            return await arrival
        except asyncio.CancelledError:
            if arrival.done() and not arrival.cancelled():
                arrival.result().shrink(0)
            raise

    def give_back(self, client: str, num_bytes: int) -> None:
        """Called by `Hold.shrink`."""
        self._held[client] -= num_bytes
        self._total -= num_bytes
        if not self._held[client]:
            del self._held[client]
        if num_bytes:
            self._grant()

    @property
    def _is_full(self) -> bool:
        return self._total + self._largest > self._capacity

    def _fits(self, client: str) -> bool:
        return not self._is_full and self._held[client] + self._largest <= self._share

    def _take(self, client: str) -> Hold:
        self._held[client] += self._largest
        self._total += self._largest
        return Hold(self, client, self._largest)

    def _grant(self) -> None:
        """Serve those who wait, in order, but for clients that are at their share."""
        if self._is_full:
            return
        left: deque[tuple[str, asyncio.Future[Hold]]] = deque()
        for client, arrival in self._waiters:
            if arrival.done():
                continue
            if self._fits(client):
                arrival.set_result(self._take(client))
            else:
                left.append((client, arrival))
        self._waiters = left
