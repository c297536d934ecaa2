"""Watches the resident memory of a process, and says whether it grows."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

from benchmarks.machine import memory_bytes

__all__ = ["Growth", "Sample", "growth", "watched_memory"]

_NUM_PARTS = 5
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident memory at one moment."""

    seconds: float
    """Since the watch began."""
    rss_bytes: int


@dataclass(frozen=True, slots=True)
class Growth:
    """How memory changed once everything that is made on first use was there."""

    early_bytes: float
    """Median of the second fifth of the time."""
    late_bytes: float
    """Median of the last fifth."""

    @property
    def fraction(self) -> float:
        """By which it grew; negative where it shrank."""
        return self.late_bytes / self.early_bytes - 1


def growth(samples: Sequence[Sample]) -> Growth:
    """Compare the median of the last fifth of the time with that of the second: the first one warms up.

    Medians, because a single sample may meet a decoded image or a prefill's scratch; fifths, because a leak that adds
    little per request shows only over most of the run.

    Args:
        samples: in their order, at least one in each fifth.
    """
    seconds = samples[-1].seconds / _NUM_PARTS
    parts = [[each.rss_bytes for each in samples if index <= each.seconds / seconds < index + 1] for index in (1, 4)]
    early, late = (median(part) for part in parts)
    return Growth(early, late)


@asynccontextmanager
async def watched_memory(pid: int) -> AsyncIterator[list[Sample]]:
    """Take samples of a process while the block runs (Linux)."""
    samples: list[Sample] = []
    start = time.monotonic()

    async def watch() -> None:
        while True:
            samples.append(Sample(time.monotonic() - start, _rss_bytes(pid)))
            await asyncio.sleep(_POLL_SECONDS)

    watcher = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        watcher.cancel()


def _rss_bytes(pid: int) -> int:
    num_bytes = memory_bytes(pid, "VmRSS")
    assert num_bytes is not None, "the process has ended"
    return num_bytes
