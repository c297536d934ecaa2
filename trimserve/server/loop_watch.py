"""Ends the process if its event loop stalls."""

import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

__all__ = ["loop_watched"]

_CHECKS_PER_TIMEOUT = 10

_LAST_WORDS_SECONDS = 5.0
"""For the stacks to be written."""


@asynccontextmanager
async def loop_watched(timeout_seconds: float) -> AsyncIterator[None]:
    """During the block, end the process with all stacks on standard error and status 1 if the event loop stalls.

    This catches what the engine's own watch of its steps cannot: compiled code that holds the GIL stops every other
    Python thread, too. It takes nobody's help: faulthandler needs no GIL, and should its write wait for a reader for
    ever, the kernel's alarm ends the process.

    Args:
        timeout_seconds: longest time between two turns of the loop, above 0.
    """
    with _patient_standard_error() as descriptor:

        async def postpone() -> None:
            """Put the end of the process off, for as long as this is called in time."""
            while True:
                faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=descriptor)
                signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _LAST_WORDS_SECONDS)
                await asyncio.sleep(timeout_seconds / _CHECKS_PER_TIMEOUT)

        task = asyncio.create_task(postpone())
        try:
            yield
        finally:
            task.cancel()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def _patient_standard_error() -> Iterator[int]:
    """Standard error, opened anew so that writing to a full pipe fails at once; as it is where it cannot be opened."""
    as_it_is = sys.stderr.fileno()
    flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(f"/proc/self/fd/{as_it_is}", flags)
    except OSError:  # a socket, or no Linux
        yield as_it_is
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
