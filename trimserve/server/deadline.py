"""When one call's client stops waiting, and until when the engine works on its request."""

import time

from trimserve.config import ServerConfig

__all__ = ["Deadline"]

SLACK_SECONDS = 0.05
SLACK_RATIO = 0.01
"""gRPC rounds a timeout up by at most this share of it on its way to the server."""


class Deadline:
    """The deadline that came with a call."""

    def __init__(self, remaining_seconds: float | None) -> None:
        """Start the clock; to be made as soon as the call arrives.

        Args:
            remaining_seconds: until the client's deadline; None if it set none.
        """
        now = time.monotonic()
        self.at = None if remaining_seconds is None else now + remaining_seconds
        """`time.monotonic()` value; None if the client set none."""
        self._slack = 0.0 if remaining_seconds is None else SLACK_SECONDS + SLACK_RATIO * remaining_seconds

    def has_passed(self) -> bool:
        """Whether a cancellation that arrives now means that the deadline passed, not that the client gave up.

        The client counts from an earlier moment than the server and cancels on its own clock, some milliseconds before
        the server's deadline.
        """
        return self.at is not None and time.monotonic() >= self.at - self._slack

    def bounded(self, config: ServerConfig) -> float | None:
        """The deadline that the engine gets, as a `time.monotonic()` value; None for none.

        Args:
            config: the longest deadline, which calls without one get, too.
        """
        if config.max_deadline_seconds is None:
            return self.at
        limit = time.monotonic() + config.max_deadline_seconds
        return limit if self.at is None else min(self.at, limit)
