"""Files that are read again when they change, so that certificates and tokens are renewed while the server runs."""

import logging
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, Literal, TypeVar

from trimserve.errors import CredentialsError
from trimserve.server.metrics import Metrics

__all__ = ["Reloaded"]

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Before files whose content cannot be used are read again unchanged: a certificate may have become valid."""

T = TypeVar("T")

Stamp = tuple[tuple[int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """The parsed content of some files. Checking for changes takes microseconds; thread-safe.

    What could not be read is read again: at the next look if it could not be opened, as when descriptors are short,
    else a second later.
    """

    def __init__(
        self,
        kind: Literal["tokens", "certificates"],
        paths: Sequence[Path],
        read: Callable[[], T],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the files.

        Args:
            kind: of what they hold, for the metrics.
            paths: files to watch; a new time, size or inode means a change.
            read: reads and checks all of them; raises CredentialsError.
            metrics: tells of failures and of the last success; each scrape looks for changes, too.
            clock: in seconds.
        Raises:
            CredentialsError: they cannot be used.
        """
        self._paths = paths
        self._read = read
        self._clock = clock
        self._failures = metrics.credential_reload_failures.labels(kind)
        self._loaded = metrics.credentials_loaded.labels(kind)
        self._lock = Lock()
        self._complaint = ""
        self._retry_at: float | None = None
        """When to read again although nothing changes; None if the last reading succeeded."""
        self._stamp = self._look()
        self._value = read()
        self._loaded.set_to_current_time()
        metrics.before_scrape.append(self.get)

    def get(self) -> T:
        """The newest usable content; the same object while nothing changes."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp or (self._retry_at is not None and self._clock() >= self._retry_at):
                self._reload(stamp)
            return self._value

    def _reload(self, stamp: Stamp) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            value = self._read()
        except CredentialsError as error:
            self._failures.inc()
            self._retry_at = self._clock() + (0 if _is_unopened(error) else RETRY_SECONDS)
            if stamp != self._stamp or str(error) != self._complaint:  # once for each change
                log.error("credentials not reloaded", extra={"files": names, "why": str(error)})
            self._complaint = str(error)
        else:
            if self._look() != stamp:  # changed while being read: may mix old and new
                return
            self._value, self._retry_at, self._complaint = value, None, ""
            self._loaded.set_to_current_time()
            log.info("credentials reloaded", extra={"files": names})
        self._stamp = stamp

    def _look(self) -> Stamp:
        return tuple(map(_stamp, self._paths))


def _is_unopened(error: CredentialsError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)  # which is about the content


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
