"""Files that are read again when they change, so that certificates and tokens are renewed while the server runs."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from trimserve.errors import CredentialsError

__all__ = ["Reloaded"]

log = logging.getLogger(__name__)

T = TypeVar("T")

Stamp = tuple[tuple[int, int, int] | None, ...]


class Reloaded(Generic[T]):
    """The parsed content of some files. Checking for changes takes microseconds; thread-safe."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Read the files.

        Args:
            paths: files to watch; a new time, size or inode means a change.
            read: reads and checks all of them; raises CredentialsError.
        Raises:
            CredentialsError: they cannot be used.
        """
        self._paths = paths
        self._read = read
        self._lock = Lock()
        self._stamp = self._look()
        self._value = read()

    def get(self) -> T:
        """The newest usable content; the same object while nothing changes."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._reload(stamp)
            return self._value

    def _reload(self, stamp: Stamp) -> None:
        names = ", ".join(map(str, self._paths))
        try:
            value = self._read()
        except CredentialsError as error:
            log.error("credentials not reloaded", extra={"files": names, "why": str(error)})
        else:
            if self._look() != stamp:  # changed while being read: may mix old and new
                return
            self._value = value
            log.info("credentials reloaded", extra={"files": names})
        self._stamp = stamp

    def _look(self) -> Stamp:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
