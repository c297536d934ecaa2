"""What other threads have for the streams of the event loop: in order, and many things with one wake-up."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from trimserve.engine.request import GenerationChunk
from trimserve.engine.stream import Stream
from trimserve.errors import TrimserveError

__all__ = ["Outbox", "call_on"]

Item = GenerationChunk | TrimserveError


def call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call something on an event loop, from any thread; not when the loop is closed, since nobody listens any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


class Outbox:
    """Hands items from any thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Stream, Item], None]) -> None:
        """Nothing is in it yet.

        Args:
            loop: may be closed at any time.
            deliver: called on the loop with what was `put`.
        """
        self._loop = loop
        self._deliver = deliver
        self._lock = threading.Lock()
        self._items: list[tuple[Stream, Item]] = []

    def put(self, stream: Stream, item: Item) -> None:
        """Have an item delivered soon."""
        with self._lock:
            self._items.append((stream, item))
            is_first = len(self._items) == 1
        if is_first:  # what follows before the loop gets to it goes with it
            call_on(self._loop, self._deliver_all)

    def _deliver_all(self) -> None:
        with self._lock:
            items, self._items = self._items, []
        for stream, item in items:
            self._deliver(stream, item)
