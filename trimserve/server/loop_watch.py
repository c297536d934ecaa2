"""Ends the process if its event loop stalls."""

import asyncio
import faulthandler
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["loop_watched"]

_CHECKS_PER_TIMEOUT = 10


@asynccontextmanager
async def loop_watched(timeout_seconds: float) -> AsyncIterator[None]:
    """During the block, end the process with all stacks on standard error and status 1 if the event loop stalls.

    This catches what the engine's own watch of its steps cannot: compiled code that holds the GIL stops every other
    Python thread, too.

    Args:
        timeout_seconds: longest time between two turns of the loop, above 0.
    """

    async def postpone() -> None:
        while True:
            faulthandler.dump_traceback_later(timeout_seconds, exit=True)
            await asyncio.sleep(timeout_seconds / _CHECKS_PER_TIMEOUT)

    task = asyncio.create_task(postpone())
    try:
        yield
    finally:
        task.cancel()
        faulthandler.cancel_dump_traceback_later()
