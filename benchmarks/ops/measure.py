"""Time, bandwidth and peak memory of calls, on the device where new tensors are made. It knows no op."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from trimserve.model import huge_pages

__all__ = ["Floor", "bandwidth", "peak_extra_bytes", "stream", "time_milliseconds"]

Floor = Literal["read", "copy"]
"""A use of memory that bounds an op."""

_FLUSH_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # more than the caches hold
_STREAM_BYTES = 256 * 2**20
_SLOW_MILLISECONDS, _FEW_RUNS = 100, 5


def time_milliseconds(calls: Sequence[Callable[[], Any]], runs: int) -> list[dict[str, float]]:
    """Median, 10th and 90th percentile of `runs` calls of each, at least 2, each after the caches were flushed.

    The calls take turns: what else the machine does meanwhile slows all of them. Those that take a tenth of a second
    are timed five times at most.
    """
    time_call = _gpu_timer() if _is_gpu() else _cpu_timer()
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for run in range(runs):
        for call, milliseconds in zip(calls, samples, strict=True):
            if run < _FEW_RUNS or milliseconds[0] < _SLOW_MILLISECONDS:
                milliseconds.append(time_call(call))
    return [_summary(milliseconds) for milliseconds in samples]


def _summary(milliseconds: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return {"median": round(deciles[4], 4), "p10": round(deciles[0], 4), "p90": round(deciles[-1], 4)}


def _is_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def _cpu_timer() -> Callable[[Callable[[], Any]], float]:
    flush = torch.ones(_FLUSH_BYTES["cpu"] // 4)

    def time_call(call: Callable[[], Any]) -> float:
        flush.sum()  # read, not written: what caches have to write back would take bandwidth from the call
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return time_call


def _gpu_timer() -> Callable[[Callable[[], Any]], float]:
    """Time of the GPU alone where the call does not wait for it: while it flushes, the host queues the call."""
    flush = torch.empty(_FLUSH_BYTES["cuda"] // 4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_call(call: Callable[[], Any]) -> float:
        flush.fill_(0)
        start.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds

    return time_call


def stream(floor: Floor) -> tuple[Callable[[], Any], int]:
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
    (milliseconds,) = time_milliseconds([call], runs)
    return num_bytes / milliseconds["median"] * 1e3


def peak_extra_bytes(call: Callable[[], torch.Tensor]) -> int | None:
    """Most memory that a call held at once beyond its result; None where the system does not tell (not Linux)."""
    if _is_gpu():
        call()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        num_bytes = call().nbytes
        return torch.cuda.max_memory_allocated() - held - num_bytes
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept for later would hide what is taken again
    reset.write_text("5")  # sets the peak to what is held now
    before = _kilobytes(status, "VmRSS")
    result = call()
    return max(0, (_kilobytes(status, "VmHWM") - before) * 1024 - result.nbytes)


def _kilobytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])
