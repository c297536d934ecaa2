"""How fast this machine has been at best: enough to say that a deadline cannot be met.

Bounds from the fastest that was seen, never from averages: work is refused only if it would come too late even when
nothing else ran. A prefill is compared with smaller ones, not measured by the row: its first rows cost the most. It
knows no clock and no request.
"""

import math

__all__ = ["Pace"]


class Pace:
    """Remembers the fastest prefills and the fastest token of decode steps."""

    def __init__(self) -> None:
        """Know nothing yet: everything can be met."""
        self._prefills: dict[int, float] = {}
        """Seconds by rows, of those prefills than which none had at least as many rows in as little time."""
        self._token_seconds = math.inf

    def saw_prefill(self, num_rows: int, seconds: float) -> None:
        """Note a prefill.

        Args:
            num_rows: prompt tokens and visual features, at least 1.
            seconds: that it took, from images to logits.
        """
        others = self._prefills.items()
        if all(rows < num_rows or fastest > seconds for rows, fastest in others):
            kept = {rows: fastest for rows, fastest in others if rows > num_rows or fastest < seconds}
            self._prefills = {**kept, num_rows: seconds}

    def saw_token(self, seconds: float) -> None:
        """Note a decode step, as seconds for each token of the sequence that it gave most."""
        self._token_seconds = min(self._token_seconds, seconds)

    def least_seconds(self, num_rows: int, num_tokens: int) -> float:
        """Time that a request takes at least.

        Args:
            num_rows: prompt tokens and visual features that are yet to be read.
            num_tokens: that it generates at least; the first comes with the prefill.
        """
        prefill = max((seconds for rows, seconds in self._prefills.items() if rows <= num_rows), default=0.0)
        decode = 0.0 if math.isinf(self._token_seconds) else max(0, num_tokens - 1) * self._token_seconds
        return prefill + decode
