"""Measures how late an event loop runs what is due."""

import asyncio
import time
from collections.abc import Callable

__all__ = ["LoopLag"]

INTERVAL_SECONDS = 0.25
"""Between two measurements."""


class LoopLag:
    """Measures while `follow` runs."""

    def __init__(self, saw: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Measure nothing yet.

        Args:
            saw: gets each measurement, in seconds.
            clock: in seconds.
        """
        self._saw = saw
        self._clock = clock
        self._due: float | None = None

    @property
    def stalled_seconds(self) -> float:
        """For how long the loop is overdue now; may be read from any thread."""
        due = self._due
        return 0.0 if due is None else max(0.0, self._clock() - due)

    async def follow(self) -> None:
        """Measure until cancelled."""
        try:
            while True:
                self._due = self._clock() + INTERVAL_SECONDS
                await asyncio.sleep(INTERVAL_SECONDS)
                self._saw(self.stalled_seconds)
        finally:
            self._due = None
