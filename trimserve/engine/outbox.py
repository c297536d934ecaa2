"""What other threads have for the streams of the event loop: in order, and many things with one wake-up.

A message of one token can cost the loop more than the token cost the engine, and both share the interpreter. So the
more streams there are, the smaller the part of its time that the loop may spend on messages: tokens that come faster
than that wait a moment for each other. A stream that is alone hardly waits, and with a large model none does.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from trimserve.api.chunks import GenerationChunk
from trimserve.engine.stream import Stream
from trimserve.errors import RequestFailed, TrimserveError

__all__ = ["Outbox", "call_on", "settle"]

log = logging.getLogger(__name__)

Item = GenerationChunk | TrimserveError

_LONGEST_WAIT_SECONDS = 0.02
"""Nobody reads so fast as to notice."""


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
            deliver: called on the loop with what was `put`; what it raises ends that stream, with RequestFailed.
        """
        self._loop = loop
        self._deliver = deliver
        self._lock = threading.Lock()
        self._items: list[tuple[Stream, Item]] = []
        self._delivered_at = self._busy_seconds = 0.0
        self._num_streams = 0
        """That something was delivered to, the last time."""

    def put(self, stream: Stream, item: Item) -> None:
        """Have an item delivered soon."""
        with self._lock:
            self._items.append((stream, item))
            is_first = len(self._items) == 1
        if is_first:  # what follows before the loop gets to it goes with it
            call_on(self._loop, self._deliver_soon)

    def flush(self) -> None:
        """Deliver now, on the loop, before something else is said to the streams."""
        with self._lock:
            items, self._items = self._items, []
        self._num_streams = len({id(stream) for stream, _ in items})
        for stream, item in items:
            if not self._has_delivered(stream, item):
                request_id = stream.request_id
                self._has_delivered(stream, RequestFailed(f"the answer to request {request_id} could not be delivered"))

    def _has_delivered(self, stream: Stream, item: Item) -> bool:
        try:
            self._deliver(stream, item)
        except Exception:  # the others have nothing to do with it
            log.exception("delivering to request %s failed", stream.request_id)
            return False
        return True

    def _deliver_soon(self) -> None:
        now, busy_seconds = time.monotonic(), time.thread_time()
        pause = min((busy_seconds - self._busy_seconds) * self._num_streams, _LONGEST_WAIT_SECONDS)
        if now < self._delivered_at + pause:
            self._loop.call_at(self._delivered_at + pause, self._deliver_soon)
            return
        self._delivered_at, self._busy_seconds = now, busy_seconds
        self.flush()


def settle(future: "asyncio.Future[None]", error: BaseException | None) -> None:
    """Give a future its result, or an error, unless nobody waits any more."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
