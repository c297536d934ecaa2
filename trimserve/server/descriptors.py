"""File descriptors: as many as the system allows, with a few kept back for the metrics port.

Whoever opens connections to the gRPC port can take all descriptors of the process. Those kept back let the process
answer health checks and open what a page of metrics reads.
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["SpareDescriptors", "are_exhausted", "raise_descriptor_limit"]

MOST_DESCRIPTORS = 65_536
"""Asked of the system at most: some allow a billion, which other libraries walk through."""


def raise_descriptor_limit() -> None:
    """Raise this process's limit of open files towards the hard limit; systemd starts services with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def are_exhausted(error: OSError) -> bool:
    """Whether an error says that the process, or the machine, has no descriptors left."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


class SpareDescriptors:
    """Descriptors held open for nothing but to be given up when there are no others; for one thread."""

    def __init__(self, number: int) -> None:
        """Hold them.

        Args:
            number: at least 1.
        """
        self._number = number
        self._held: list[int] = []
        self.refill()

    def give_up(self) -> bool:
        """Close one, so that the next file or connection can be opened; False if none is left."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True

    def refill(self) -> None:
        """Hold as many as at first, or as there are."""
        with suppress(OSError):
            while len(self._held) < self._number:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give one up for the block, which opens one file after the other."""
        self.give_up()
        try:
            yield
        finally:
            self.refill()

    def close(self) -> None:
        """Hold none any more."""
        self._number = 0
        while self.give_up():
            pass
