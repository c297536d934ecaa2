"""When the client of one call stops waiting."""

import time
from typing import Any

from grpc.aio import ServicerContext

__all__ = ["Deadline"]

SLACK_SECONDS = 0.05
SLACK_RATIO = 0.01
"""gRPC rounds a timeout up by at most this share of it on its way to the server."""


class Deadline:
    """The deadline that came with a call, seen at its arrival."""

    def __init__(self, context: ServicerContext[Any, Any]) -> None:
        """Read it; to be made first thing.

        Args:
            context: of the call.
        """
        remaining: float | None = context.time_remaining()
        self.at = None if remaining is None else time.monotonic() + remaining
        """`time.monotonic()` value; None when the client set none."""
        self._slack = 0.0 if remaining is None else SLACK_SECONDS + SLACK_RATIO * remaining

    def has_passed(self) -> bool:
        """Whether a cancellation that arrives now is the client's deadline rather than its wish.

        The client counts from an earlier moment than the server and cancels on its own clock, some
        milliseconds before the server's deadline.
        """
        return self.at is not None and time.monotonic() >= self.at - self._slack
