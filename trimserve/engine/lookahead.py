"""How many requests may hold decoded images before the engine takes them: pixels are larger than the files they were.

It knows no thread pool and no request, only tickets.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Lookahead", "Ticket"]


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place: first waiting, then inside, until it leaves."""

    urgency: tuple[float, ...]
    """The smallest is next; its first number is the negated priority."""
    begin: Callable[[], None] = field(repr=False)
    """Called once, when the request may decode its images."""


class Lookahead:
    """Lets the most urgent in; a request of higher priority does not wait for those of lower ones. Thread-safe."""

    def __init__(self, size: int) -> None:
        """Start empty.

        Args:
            size: requests of the same or a higher priority that may be inside, at least 1.
        """
        self._size = size
        self._lock = threading.RLock()  # `begin` may come back
        self._waiting: list[Ticket] = []
        self._inside: list[Ticket] = []

    def enter(self, ticket: Ticket) -> None:
        """Queue up; `ticket.begin` is called now or when there is room."""
        with self._lock:
            self._waiting.append(ticket)
            self._let_in()

    def leave(self, ticket: Ticket) -> None:
        """Give the place up, inside or waiting; a second call does nothing."""
        with self._lock:
            for tickets in (self._waiting, self._inside):
                if ticket in tickets:
                    tickets.remove(ticket)
            self._let_in()

    def _let_in(self) -> None:
        for ticket in sorted(self._waiting, key=lambda waiting: waiting.urgency):
            rivals = sum(inside.urgency[0] <= ticket.urgency[0] for inside in self._inside)
            if rivals < self._size:
                self._waiting.remove(ticket)
                self._inside.append(ticket)
                ticket.begin()
