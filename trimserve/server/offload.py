"""What takes long for a large message, beside the event loop: one message at a time, so that few copies exist at once.

What is freed of a large message stays with the C library, which keeps it for later; `trim_soon` has it given back to
the system.
"""

import asyncio
import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["LARGE_BYTES", "Offload"]

LARGE_BYTES = 2**20
"""Memory of a message that is larger is given back to the system once it is not needed any more."""

TRIM_SECONDS = 1.0
"""Between the end of a large message and the trimming: one pass serves all that end meanwhile."""

T = TypeVar("T")


class Offload:
    """A thread for large messages; it starts with the first one. Belongs to the event loop's thread."""

    def __init__(self, trim: Callable[[], object] | None = None) -> None:
        """Start no thread yet.

        Args:
            trim: gives free memory back to the system; None is that of Python and the C library.
        """
        self._thread = ThreadPoolExecutor(1, "trimserve-large")
        self._trim = trim or _give_back
        self._trimming: asyncio.TimerHandle | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """The result of work that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def trim_soon(self) -> None:
        """Give memory back to the system; to be called when a large message is not needed any more."""
        if self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(TRIM_SECONDS, self._begin_trimming)

    def close(self) -> None:
        """Take no more work."""
        if self._trimming is not None:
            self._trimming.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_trimming(self) -> None:
        self._trimming = None
        self._thread.submit(self._trim)


def _give_back() -> None:
    """Errors of refused requests are cycles, which Python frees late; glibc keeps what was freed until it is asked."""
    gc.collect()  # what a server has loaded is frozen, so this looks at little
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
