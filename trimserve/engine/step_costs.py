"""What a decode step takes by its number of rows, learnt from the steps themselves.

It keeps the fastest that was seen, since whatever else the machine does makes steps slower only, and lets that grow a
little with every step, since longer texts do, too.
"""

from bisect import bisect_left
from typing import Final

__all__ = ["StepCosts"]

_GROWTH: Final = 1.02
"""Of what is remembered, with each step."""


class StepCosts:
    """Seconds by rows."""

    def __init__(self) -> None:
        """Know nothing: all steps cost the same."""
        self._seconds: dict[int, float] = {}
        self._known: list[int] = []

    def saw(self, num_rows: int, seconds: float) -> None:
        """Note a step.

        Args:
            num_rows: at least 1.
            seconds: that it took, above 0.
        """
        before = self._seconds.get(num_rows)
        self._seconds[num_rows] = seconds if before is None else min(seconds, before * _GROWTH)
        if before is None:
            self._known = sorted(self._seconds)

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
        if num_rows < below:
            return self._seconds[below]
        share = (num_rows - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])
