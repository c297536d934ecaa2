"""Times calls for a while."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["time_calls", "time_in_turns"]

_LEAST, _MOST = 3, 200


def time_calls(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds of about as many calls as fit, after one that is not counted."""
    (summary,) = time_in_turns([call], seconds)
    return summary


def time_in_turns(calls: Sequence[Callable[[], Any]], seconds: float) -> list[dict[str, float]]:
    """The same of several that take turns: what else the machine does meanwhile slows all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while len(samples[0]) < _LEAST or (time.perf_counter() < end and len(samples[0]) < _MOST):
        for call, milliseconds in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            milliseconds.append((time.perf_counter() - start) * 1e3)
    return [_summary(milliseconds) for milliseconds in samples]


def _summary(milliseconds: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return {"median": round(deciles[4], 4), "p10": round(deciles[0], 4), "p90": round(deciles[-1], 4)}
