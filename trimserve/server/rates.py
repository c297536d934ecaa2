"""How fast a client may go: allowances that fill up by the minute and may be overdrawn once.

What a call will take is known only afterwards (tokens are drawn one by one, bytes are counted when the message is
there), so a call is let in while something of the allowance is left, and pays what it took: the next one waits until
the debt is paid.
"""

import time
from collections.abc import Callable

from trimserve.errors import TooFast
from trimserve.server.tokens import Caller

__all__ = ["Rates"]

_MINUTE = 60.0


class _Allowance:
    """Grows evenly up to what a minute brings."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._balance = float(per_minute)
        self._counted_at = now

    def missing_seconds(self, now: float) -> float:
        """Until there is something to spend; 0 if there is."""
        self._grow(now)
        return 0.0 if self._balance >= 1 else (1 - self._balance) * _MINUTE / self.per_minute

    def spend(self, amount: int, now: float) -> None:
        self._grow(now)
        self._balance -= amount

    def _grow(self, now: float) -> None:
        earned = (now - self._counted_at) * self.per_minute / _MINUTE
        self._balance, self._counted_at = min(self.per_minute, self._balance + earned), now


class Rates:
    """The allowances of all clients, by name, so that a file of clients that is read again forgives no debt."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Everybody starts with a full minute.

        Args:
            clock: seconds that never go back.
        """
        self._clock = clock
        self._allowances: dict[tuple[str, str], _Allowance] = {}

    def check(self, caller: Caller) -> None:
        """Check that a client has something left of each of its allowances.

        Raises:
            TooFast: it has not; says when it will.
        """
        for knob, per_minute in caller.rates.items():
            seconds = self._allowance(caller, knob, per_minute).missing_seconds(self._clock())
            if seconds:
                raise TooFast(caller.name, knob, per_minute, seconds)

    def spend(self, caller: Caller, knob: str, amount: int) -> None:
        """Count what a client took.

        Args:
            caller: who took it.
            knob: name of the allowance in the file of clients, such as `tokens_per_minute`.
            amount: at least 0.
        """
        per_minute = caller.rates.get(knob)
        if per_minute is not None:
            self._allowance(caller, knob, per_minute).spend(amount, self._clock())

    def _allowance(self, caller: Caller, knob: str, per_minute: int) -> _Allowance:
        known = self._allowances.get((caller.name, knob))
        if known is None or known.per_minute != per_minute:
            known = self._allowances[caller.name, knob] = _Allowance(per_minute, self._clock())
        return known
