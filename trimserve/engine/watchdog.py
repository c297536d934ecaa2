"""Watches what may hang: a step of the engine, and the event loop that watches it.

It knows nothing of requests: who awaits `hang` decides what becomes of them.
"""

import asyncio
import faulthandler
import logging
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["hang", "loop_watched"]

log = logging.getLogger(__name__)

_NUM_NAPS = 10
"""In which a timeout passes."""


async def hang(
    thread: threading.Thread, step_began_at: Callable[[], float | None], timeout_seconds: float
) -> TimeoutError:
    """Wait, for ever in the good case, until a step takes too long; log where its thread is.

    Time is counted in naps of our own, so that a process that was stopped for a while has not hung.

    Args:
        thread: that takes the steps.
        step_began_at: None between two steps.
        timeout_seconds: for one step, above 0.
    Returns:
        What happened.
    """
    step, num_naps = None, 0
    while num_naps < _NUM_NAPS:
        await asyncio.sleep(timeout_seconds / _NUM_NAPS)
        before, step = step, step_began_at()
        num_naps = 0 if step is None or step != before else num_naps + 1
    log.critical("the engine thread hangs", extra={"stack": _stack(thread)})
    return TimeoutError(f"a step has not returned for {timeout_seconds:g} s (step_timeout_seconds)")


@asynccontextmanager
async def loop_watched(timeout_seconds: float) -> AsyncIterator[None]:
    """End this process, with all stacks on standard error and status 1, when its event loop stands still in the block.

    For what `hang` cannot see: compiled code that holds Python's lock stops every other thread of Python, too.

    Args:
        timeout_seconds: for the loop to come round, above 0.
    """

    async def come_round() -> None:
        while True:
            faulthandler.dump_traceback_later(timeout_seconds, exit=True)
            await asyncio.sleep(timeout_seconds / _NUM_NAPS)

    task = asyncio.create_task(come_round())
    try:
        yield
    finally:
        task.cancel()
        faulthandler.cancel_dump_traceback_later()


def _stack(thread: threading.Thread) -> str:
    """The innermost call last; without the values of variables, which hold prompts."""
    assert thread.ident is not None
    return "".join(traceback.format_stack(sys._current_frames()[thread.ident]))
