"""Times of calls that take turns, what is made of them, and bandwidth. It knows no op and no model.

Everything happens on the device where new tensors are made.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from trimserve.model import huge_pages

__all__ = [
    "Floor",
    "bandwidth",
    "seconds_of",
    "spread",
    "stream",
    "time_calls",
    "time_cold",
    "time_in_turns",
]

Call = Callable[[], Any]
Floor = Literal["read", "copy"]
"""A use of memory that bounds an op."""

_FLUSH_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # more than the caches hold
_STREAM_BYTES = 256 * 2**20
_SLOW_MILLISECONDS, _FEW_RUNS = 100, 5
_LEAST, _MOST = 3, 200


def seconds_of(call: Call) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(samples: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    found = np.percentile(samples, (50, 10, 90))
    return {name: round(float(value), digits) for name, value in zip(("median", "p10", "p90"), found, strict=True)}


def time_calls(call: Call, seconds: float) -> dict[str, float]:
    """Milliseconds, as `spread` tells them, of about as many calls as fit, after one that is not counted."""
    [summary] = time_in_turns([call], seconds)
    return summary


def time_in_turns(calls: Sequence[Call], seconds: float) -> list[dict[str, float]]:
    """The same of several that take turns: what else the machine does meanwhile slows all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    for num_turns in range(_MOST):
        if num_turns >= _LEAST and time.perf_counter() >= end:
            break
        for call, milliseconds in zip(calls, samples, strict=True):
            milliseconds.append(seconds_of(call) * 1e3)
    return [spread(milliseconds) for milliseconds in samples]


def time_cold(calls: Sequence[Call], runs: int) -> list[dict[str, float]]:
    """Milliseconds of `runs` calls of each in turns, each after the caches were flushed.

    Calls that take a tenth of a second are timed five times at most.
    """
    timer = _gpu_timer() if _is_gpu() else _cpu_timer()
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for turn in range(runs):
        for call, milliseconds in zip(calls, samples, strict=True):
            if turn < _FEW_RUNS or milliseconds[0] < _SLOW_MILLISECONDS:
                milliseconds.append(timer(call))
    return [spread(milliseconds) for milliseconds in samples]


def _is_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def _cpu_timer() -> Callable[[Call], float]:
    flush = torch.ones(_FLUSH_BYTES["cpu"] // 4)

    def time_call(call: Call) -> float:
        flush.sum()  # read, not written: what caches have to write back would take bandwidth from the call
        return seconds_of(call) * 1e3

    return time_call


def _gpu_timer() -> Callable[[Call], float]:
    """Time of the GPU alone where the call does not wait for it: while it flushes, the host queues the call."""
    flush = torch.empty(_FLUSH_BYTES["cuda"] // 4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_call(call: Call) -> float:
        flush.fill_(0)
        start.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds

    return time_call


def stream(floor: Floor) -> tuple[Call, int]:
    """A call that sums a large tensor (`read`) or copies it (`copy`), and the bytes that it moves, both directions.

    It lies on huge pages, as weights and KV do.
    """
    device = torch.get_default_device()
    source = huge_pages.empty((_STREAM_BYTES // 4,), torch.float32, device).fill_(1)
    if floor == "read":
        return source.sum, _STREAM_BYTES
    target = huge_pages.empty(source.shape, source.dtype, device)
    return lambda: target.copy_(source), 2 * _STREAM_BYTES


def bandwidth(floor: Floor, runs: int) -> float:
    """Bytes per second of `stream`, by the median of `runs` calls."""
    call, num_bytes = stream(floor)
    [milliseconds] = time_cold([call], runs)
    return num_bytes / milliseconds["median"] * 1e3
