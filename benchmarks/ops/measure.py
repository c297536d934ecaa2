"""Time, bandwidth and peak memory of calls, on the device where new tensors are made. It knows no op."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["Floor", "bandwidth", "peak_extra_bytes", "time_milliseconds"]

Floor = Literal["read", "copy"]
"""A use of memory that bounds an op."""

_FLUSH_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # more than the caches hold
_STREAM_BYTES = 256 * 2**20


def time_milliseconds(call: Callable[[], Any], runs: int) -> dict[str, float]:
    """Median, 10th and 90th percentile of `runs` calls, at least 2, each after the caches were flushed."""
    call()
    samples = list((_gpu_milliseconds if _is_gpu() else _cpu_milliseconds)(call, runs))
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": round(deciles[4], 4), "p10": round(deciles[0], 4), "p90": round(deciles[-1], 4)}


def _is_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def _cpu_milliseconds(call: Callable[[], Any], runs: int) -> Iterator[float]:
    flush = torch.empty(_FLUSH_BYTES["cpu"] // 4)
    for _ in range(runs):
        flush.fill_(0)
        start = time.perf_counter()
        call()
        yield (time.perf_counter() - start) * 1e3


def _gpu_milliseconds(call: Callable[[], Any], runs: int) -> Iterator[float]:
    """Time of the GPU alone where the call does not wait for it: while it flushes, the host queues the call."""
    flush = torch.empty(_FLUSH_BYTES["cuda"] // 4)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(runs):
        flush.fill_(0)
        start.record()
        call()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end)


def bandwidth(floor: Floor, runs: int) -> float:
    """Bytes per second of summing a large tensor (`read`) or of copying it (`copy`, both directions counted)."""
    source = torch.ones(_STREAM_BYTES // 4)
    target = torch.empty_like(source)
    calls: dict[Floor, tuple[Callable[[], Any], int]] = {
        "read": (source.sum, _STREAM_BYTES),
        "copy": (lambda: target.copy_(source), 2 * _STREAM_BYTES),
    }
    call, num_bytes = calls[floor]
    return num_bytes / time_milliseconds(call, runs)["median"] * 1e3


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
