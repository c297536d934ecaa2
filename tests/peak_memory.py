"""Most memory that a call holds at once."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from torch import Tensor

from benchmarks.machine import memory_bytes

__all__ = ["assert_takes_at_most"]

_NOISE: Final = 12 * 2**20
"""Of resident memory, which moves in pages and by what the allocator holds back: 9 MiB were seen at the end of the
whole suite, whose allocations leave the heap in pieces."""


def assert_takes_at_most(call: Callable[[], Tensor], most_bytes: int) -> None:
    """Fail if a call on the CPU holds more beyond its result; skip where the system does not tell (not Linux)."""
    for _ in range(3):  # pages that a busy system took away may come back during a call, and are counted
        taken = _peak_extra_bytes(call)
        if taken <= most_bytes + _NOISE:
            return
    pytest.fail(f"{taken} bytes are taken, {most_bytes} may be")


def _peak_extra_bytes(call: Callable[[], Tensor]) -> int:
    pid, reset = os.getpid(), Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("this system does not tell peak memory")
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept for later would hide what is taken again
    reset.write_text("5")  # sets the peak to what is held now
    before = memory_bytes(pid, "VmRSS")
    num_bytes = call().nbytes
    return max(0, (memory_bytes(pid) or 0) - (before or 0) - num_bytes)
