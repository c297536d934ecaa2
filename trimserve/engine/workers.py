"""Threads beside the event loop: a pool that does the most urgent job first, and one that can be left behind."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from queue import PriorityQueue
from typing import TypeVar

from trimserve.api.status import WorkersStatus

__all__ = ["Workers", "in_daemon_thread", "is_any_left_behind", "leave_behind"]

Job = Callable[[], object]
T = TypeVar("T")

_LEFT_BEHIND = "trimserve-left-behind"
"""Name of the threads that nobody waits for."""


async def in_daemon_thread(function: Callable[[], T], discard: Callable[[T], object] = lambda _: None) -> T:
    """Call a function beside the event loop; unlike `asyncio.to_thread`, the loop can end while it runs.

    A program that then ends while the function is in compiled code must do so by `os._exit`, see
    `is_any_left_behind`.

    Args:
        function: called in a thread of its own.
        discard: called there with the result if nobody waits for it any more.
    Raises:
        BaseException: what the function raises.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        """The thread: hand the result over, or discard it if nobody waits any more."""
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  # handed to whoever awaits it
            with suppress(InvalidStateError):
                outcome.set_exception(error)
            return
        try:
            outcome.set_result(result)
        except InvalidStateError:  # cancelled
            discard(result)

    threading.Thread(target=call, name=_LEFT_BEHIND, daemon=True).start()
    return await asyncio.wrap_future(outcome)


def leave_behind(thread: threading.Thread) -> None:
    """Wait no longer for a thread that hangs."""
    thread.name = _LEFT_BEHIND


def is_any_left_behind() -> bool:
    """Whether a function that `in_daemon_thread` called still runs, or a thread that was left behind."""
    return any(thread.name == _LEFT_BEHIND for thread in threading.enumerate())


class Workers:
    """A thread pool whose queue is ordered by key; first come first served among equals."""

    def __init__(self, num_threads: int, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Start no thread before there is a job.

        Args:
            num_threads: at least 1.
            name: the threads' names begin with it.
            clock: in seconds.
        """
        self._num_threads = num_threads
        self._clock = clock
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._busy_since: dict[int, float] = {}
        """By thread; each thread changes its own entry."""
        self._jobs: PriorityQueue[tuple[tuple[float, ...], int, Job]] = PriorityQueue()
        self._arrivals = count()

    def submit(self, key: tuple[float, ...], job: Job) -> None:
        """Queue a job.

        Args:
            key: the job with the smallest one is next.
            job: must not raise.
        Raises:
            RuntimeError: after `stop`.
        """
        self._jobs.put((key, next(self._arrivals), job))
        self._threads.submit(self._run_next)

    def status(self) -> WorkersStatus:
        """What the threads are doing now; from any thread."""
        since, now = list(self._busy_since.values()), self._clock()
        return WorkersStatus(self._num_threads, len(since), now - min(since, default=now))

    def stop(self) -> None:
        """Begin no more jobs; those that run are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run_next(self) -> None:
        *_, job = self._jobs.get_nowait()
        thread = threading.get_ident()
        self._busy_since[thread] = self._clock()
        try:
            job()
        finally:
            del self._busy_since[thread]
