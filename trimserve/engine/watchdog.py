"""Detects a step of the engine that hangs. It knows nothing of requests: the caller of `hang` decides what follows.

What it logs waits for no reader of the log: the process must end even if nobody reads.
"""

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial

__all__ = ["hang", "log_cause"]

log = logging.getLogger(__name__)

_LOG_SECONDS = 1.0
"""For the cause of an engine's end to be logged."""

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
    log_cause(partial(log.critical, "the engine thread hangs", extra={"stack": _stack(thread)}))
    return TimeoutError(f"a step has not returned for {timeout_seconds:g} s (step_timeout_seconds)")


def log_cause(write: Callable[[], None]) -> None:
    """Log why the engine ends; go on after a second if that takes longer.

    Args:
        write: writes the line.
    """
    writer = threading.Thread(target=write, name="trimserve-last-words", daemon=True)
    writer.start()
    writer.join(_LOG_SECONDS)


def _stack(thread: threading.Thread) -> str:
    """The innermost call last; without the values of variables, which hold prompts."""
    assert thread.ident is not None
    return "".join(traceback.format_stack(sys._current_frames()[thread.ident]))
