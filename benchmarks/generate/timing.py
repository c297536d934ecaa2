"""Times calls for a while."""

import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["time_calls"]

_LEAST, _MOST = 3, 200


def time_calls(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds of about as many calls as fit, after one that is not counted."""
    call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < _LEAST or (time.perf_counter() < end and len(samples) < _MOST):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": round(deciles[4], 4), "p10": round(deciles[0], 4), "p90": round(deciles[-1], 4)}
