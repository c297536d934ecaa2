"""Threads that do the most urgent job first."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from queue import PriorityQueue

__all__ = ["Workers"]

Job = Callable[[], object]


class Workers:
    """A thread pool whose queue is ordered by key; first come first served among equals."""

    def __init__(self, num_threads: int, name: str) -> None:
        """Start no thread before there is a job.

        Args:
            num_threads: at least 1.
            name: the threads' names begin with it.
        """
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
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

    def stop(self) -> None:
        """Begin no more jobs; those that run are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run_next(self) -> None:
        *_, job = self._jobs.get_nowait()
        job()
