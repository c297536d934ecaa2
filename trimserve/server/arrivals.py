"""The clocks of what is arriving: each has its time, and all end when the server stops."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from trimserve.errors import EngineStopped

__all__ = ["Arrivals"]


class Arrivals:
    """Of one port; belongs to the event loop's thread."""

    def __init__(self) -> None:
        """Nothing arrives yet."""
        self._clocks: set[asyncio.Timeout] = set()
        self._is_closed = False

    def close(self) -> None:
        """End all that has not arrived, and let nothing else begin, so that the server can stop."""
        self._is_closed = True
        for clock in self._clocks:
            clock.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def until(self, end: float, late: Exception) -> AsyncIterator[None]:
        """Bound the time of a block.

        Args:
            end: by the event loop's clock.
            late: raised if the block takes longer.
        Raises:
            EngineStopped: the server stops.
        """
        stopped = EngineStopped("the server stops")
        if self._is_closed:
            raise stopped
        try:
            async with asyncio.timeout_at(end) as clock:
                self._clocks.add(clock)
                try:
                    yield
                finally:
                    self._clocks.discard(clock)
        except TimeoutError:
            raise (stopped if self._is_closed else late) from None
