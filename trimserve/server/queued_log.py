"""A log handler that never waits for who reads the log.

Lines go through a bounded queue; what does not fit is dropped and counted.
"""

import logging
import select
import threading
from collections.abc import Callable
from typing import TextIO

__all__ = ["QueuedHandler"]

MAX_CHARS = 4 * 2**20
"""Of lines that wait to be written."""


class QueuedHandler(logging.Handler):
    """Writes lines on a thread of its own."""

    def __init__(self, stream: TextIO, dropped: Callable[[int], None]) -> None:
        """Start the thread.

        Args:
            stream: standard error, or what stands for it.
            dropped: told of lines that were not written, on any thread.
        """
        super().__init__()
        self._write = _writer(stream)
        self._poll = _poll_of(stream)
        self._dropped = dropped
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._num_chars = 0
        """Of all lines that are not written yet, also of those that are being written."""
        threading.Thread(target=self._run, name="trimserve-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or drop it."""
        try:
            line = self.format(record) + "\n"
        except Exception:  # noqa: BLE001  # a mistake in a log call must not end what logs
            self._dropped(1)
            return
        with self._changed:
            has_room = self._num_chars + len(line) <= MAX_CHARS
            if has_room:
                self._lines.append(line)
                self._num_chars += len(line)
                self._changed.notify_all()
        if not has_room:
            self._dropped(1)

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until all lines are written.

        Args:
            timeout_seconds: for all of it.
        Returns:
            Whether they are, and standard error takes more: who writes to it directly does not wait for ever.
        """
        with self._changed:
            is_empty = self._changed.wait_for(lambda: not self._num_chars, timeout_seconds)
        return is_empty and (self._poll is None or bool(self._poll.poll(0)))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                lines, self._lines = self._lines, []
            for line in lines:
                try:
                    self._write(line)
                except (OSError, ValueError):  # a full disk, a terminal or a reader that is gone, a closed stream
                    self._dropped(1)
                with self._changed:
                    self._num_chars -= len(line)
                    self._changed.notify_all()


def _writer(stream: TextIO) -> Callable[[str], None]:
    """Writes a line past the stream's buffer, whose lock a write that waits would hold at the end of the process."""
    try:
        raw = open(stream.fileno(), "wb", buffering=0, closefd=False)  # noqa: SIM115  # open as long as the process
    except (OSError, ValueError):  # not a file

        def write(line: str) -> None:
            stream.write(line)
            stream.flush()

        return write

    def write_raw(line: str) -> None:
        rest = memoryview(line.encode(errors="backslashreplace"))
        while rest:
            rest = rest[raw.write(rest) or 0 :]

    return write_raw


def _poll_of(stream: TextIO) -> "select.poll | None":
    """Tells whether a stream that is a file takes more."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return poll
