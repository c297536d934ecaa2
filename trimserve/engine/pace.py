"""How fast this machine has been at best: enough to say that a deadline cannot be met.

Bounds from the fastest that was seen, never from averages: work is refused only if it would come too late even when
nothing else ran. It knows no clock and no request.
"""

import math

__all__ = ["Pace"]


class Pace:
    """Remembers the fastest prefill and the fastest decode step."""

    def __init__(self) -> None:
        """Know nothing yet: everything can be met."""
        self._row_seconds = math.inf
        self._step_seconds = math.inf

    def saw_prefill(self, num_rows: int, seconds: float) -> None:
        """Note a prefill.

        Args:
            num_rows: prompt tokens and visual features, at least 1.
            seconds: that it took, from images to logits.
        """
        self._row_seconds = min(self._row_seconds, seconds / num_rows)

    def saw_step(self, seconds: float) -> None:
        """Note a decode step."""
        self._step_seconds = min(self._step_seconds, seconds)

    def least_seconds(self, num_rows: int, num_tokens: int) -> float:
        """Time that a request takes at least.

        Args:
            num_rows: prompt tokens and visual features that are yet to be read.
            num_tokens: that it generates at least; the first comes with the prefill.
        """
        prefill = 0.0 if math.isinf(self._row_seconds) else num_rows * self._row_seconds
        decode = 0.0 if math.isinf(self._step_seconds) else max(0, num_tokens - 1) * self._step_seconds
        return prefill + decode
