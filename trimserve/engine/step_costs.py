"""What a decode step takes by its number of rows, learnt from the steps themselves.

It keeps the fastest that was seen, since whatever else the machine does makes steps slower only, and lets that grow a
little with every step, since longer texts do, too.
"""

from bisect import bisect_left
from typing import Final

__all__ = ["StepCosts"]

_GROWTH: Final = 1.02
"""Of what is remembered, with each step."""
_MEMORY: Final = 128
"""Steps after which a number of rows that none of them had is forgotten, and tried anew."""


class StepCosts:
    """Seconds by rows."""

    def __init__(self) -> None:
        """Know nothing: all steps cost the same."""
        self._num_steps = 0
        self._seconds: dict[int, float] = {}
        self._seen_at: dict[int, int] = {}
        self._known: list[int] = []
        """Numbers of rows, ascending."""

    def saw(self, num_rows: int, seconds: float) -> None:
        """Note a step.

        Args:
            num_rows: at least 1.
            seconds: that it took, above 0.
        """
        before = self._seconds.get(num_rows)
        self._seconds[num_rows] = seconds if before is None else min(seconds, before * _GROWTH)
        self._num_steps += 1
        self._seen_at[num_rows] = self._num_steps
        if before is None or self._num_steps % _MEMORY == 0:
            self._forget()

    def seconds(self, num_rows: int) -> float:
        """Expected of a step; between steps that were seen on a line, beyond them as the next one that was seen.

        So a step with more rows than any before counts as cheap, is tried, and is known then.
        """
        known = self._known
        if not known:
            return 1.0
        place = bisect_left(known, num_rows)
        above = known[min(place, len(known) - 1)]
        below = known[max(place - 1, 0)]
        if above == num_rows or above <= below:
            return self._seconds[above]
        share = (num_rows - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def _forget(self) -> None:
        for num_rows in [rows for rows, seen_at in self._seen_at.items() if seen_at <= self._num_steps - _MEMORY]:
            del self._seen_at[num_rows], self._seconds[num_rows]
        self._known = sorted(self._seconds)
